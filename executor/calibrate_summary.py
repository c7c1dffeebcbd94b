"""What a calibration found, as rows for people: measured beside what the catalog, or the system, said before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardplan.executor.calibrate_measurements import RING_STEPS, CollectiveRates, Measurements, Rates
from shardplan.executor.calibrate_profile import GIB, bus_rate, undisturbed


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One quantity in `unit`."""

    quantity: str
    measured: float
    unit: str
    known: float | None = None
    """What the base of the profile held; None = nothing comparable."""
    known_kind: str = ""
    """Its kind of source: spec, measured, published or guess."""


def summary_rows(measurements: Measurements, base: Mapping[str, Any]) -> tuple[SummaryRow, ...]:
    """The headline of each thing measured, against the merged cluster document it replaces."""
    rows = _product_rows(measurements.rates, base["gpu"]) + _gpu_rows(measurements.rates, base["gpu"])
    if measurements.collectives:
        rows += _collective_rows(measurements.collectives, base["node"]["intra"])
    return (*rows, *_host_rows(measurements.rates, base["node"]["host"]))


def _row(
    quantity: str, measured: float, unit: str, number: Mapping[str, Any] | None, *, times: float = 1.0
) -> SummaryRow:
    if number is None:
        return SummaryRow(quantity=quantity, measured=measured, unit=unit)
    known, kind = float(number["value"]) * times, str(number["source_kind"])
    return SummaryRow(quantity=quantity, measured=measured, unit=unit, known=known, known_kind=kind)


def _product_rows(rates: Rates, gpu: Mapping[str, Any]) -> list[SummaryRow]:
    rows: list[SummaryRow] = []
    for word, timings in rates.gemm.items():
        best = max((timing.rate for timing in timings), default=0.0) / 1e12
        peak = gpu["peak_tflops"].get(word)
        reached = max(gpu["gemm_efficiency"].get(word, gpu["gemm_efficiency"]["default"])["fraction"])
        rows.append(_row(f"matrix product {word}, best", best, "TFLOP/s", peak, times=reached))
    for word, ways in rates.attention.items():
        for way, timing in ways.items():
            peak, fraction = gpu["peak_tflops"].get(word), _known_plateau(gpu["attention_efficiency"], way)
            name = f"attention {way} {word}, {rates.attention_seq} tokens"
            rows.append(_row(name, timing.rate / 1e12, "TFLOP/s", peak, times=fraction))
    return rows


def _known_plateau(section: Mapping[str, Any], way: str) -> float:
    """The plain plateau, or the best one of the kernel that torch takes unasked (FlashAttention-2 where there is a choice)."""
    if way in section:
        return float(section[way]["value"])
    usual = next((name for name in ("shardplan", "flash2") if name in section), next(iter(section)))
    kernel = section[usual]
    return max(kernel[way])


def _gpu_rows(rates: Rates, gpu: Mapping[str, Any]) -> list[SummaryRow]:
    rows: list[SummaryRow] = []
    if rates.memory:
        reached = gpu["memory_efficiency"]["fraction"]
        best = max(timing.rate for timing in rates.memory)
        bandwidth = gpu["bandwidth_gb_per_s"]
        rows.append(_row("element-wise, best size", best / 1e9, "GB/s", bandwidth, times=max(reached)))
        largest = f"element-wise, {rates.memory[-1].size / 1e6:.0f} MB"
        rows.append(_row(largest, rates.memory[-1].rate / 1e9, "GB/s", bandwidth, times=reached[-1]))
    if rates.dispatch_s:
        rows.append(_row("dispatch of one operation", rates.dispatch_s * 1e6, "us", gpu["launch_us"]))
    rows.append(_row("memory per process", rates.memory_bytes / GIB, "GiB", gpu["memory_mib"], times=1 / 1024))
    if rates.context_bytes is not None:
        rows.append(_row("of it outside the allocator", rates.context_bytes / GIB, "GiB", gpu["context_gib"]))
    return rows


def _collective_rows(collectives: CollectiveRates, intra: Mapping[str, Any]) -> list[SummaryRow]:
    rows: list[SummaryRow] = []
    for name, raw in collectives.timings.items():
        timings = undisturbed(raw)
        if not timings:
            continue
        smallest = f"{name} among {collectives.members}, {timings[0].size / 1e3:.0f} kB"
        known = intra["latency_us"] if name in RING_STEPS else None
        steps = RING_STEPS.get(name, 1) * (collectives.members - 1)
        rows.append(_row(smallest, timings[0].seconds * 1e6, "us", known, times=steps))
        largest = f"{name} among {collectives.members}, {timings[-1].size / 1e6:.0f} MB"
        rate = bus_rate(name, timings[-1], collectives.members) if name in RING_STEPS else timings[-1].rate
        curve = intra.get("all_reduce_efficiency") if name == "all_reduce" else None
        reached = (curve or intra["efficiency"])["fraction"][-1]
        reached = reached if name in RING_STEPS else intra["point_to_point_fraction"]["value"]
        rows.append(_row(largest, rate / 1e9, "GB/s", intra["bandwidth_gb_per_s"], times=reached))
    return rows


def _host_rows(rates: Rates, host: Mapping[str, Any]) -> list[SummaryRow]:
    rows: list[SummaryRow] = []
    bandwidth, reached = host["memory_bandwidth_gb_per_s"], host["memory_efficiency"]["value"]
    if rates.host_copy:
        rows.append(
            _row("host memory copy, all processes", rates.host_copy.rate / 1e9, "GB/s", bandwidth, times=reached)
        )
    if rates.adam:
        each_bytes = host["adam_bytes_per_parameter"]["value"]
        name = "CPU AdamW, all processes"
        rows.append(_row(name, rates.adam.rate / 1e9, "Gparam/s", bandwidth, times=reached / each_bytes))
    for name, timing in (("host to GPU, pinned", rates.host_to_device), ("GPU to host, pinned", rates.device_to_host)):
        if timing:
            rows.append(_row(name, timing.rate / 1e9, "GB/s", host["pcie_gb_per_s"]))
    return rows
