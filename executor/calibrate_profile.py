"""Measurements to a cluster profile: what was measured replaces the base's number, everything else keeps its source."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from shardplan.executor.calibrate_measurements import RING_STEPS, CollectiveRates, Measurements, Rates, Timing
from shardplan.hw_profiles.document import merged_table
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.kernel_curves import KernelRates, attention_tables
from shardplan.hw_profiles.load import cluster_document
from shardplan.hw_profiles.machine import PLAIN_CAUSAL_RAMP_TOKENS, PLAIN_RAMP_TOKENS, Source

Document = dict[str, Any]
MIB, GIB = 2.0**20, 2.0**30
ADAM_BYTES = 28.0
"""Of one fp32 AdamW update: parameter, gradient and two moments read, parameter and moments written."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Makes the numbers and curves of a profile, with their source."""

    text: str

    def number(self, value: float, what: str, *, digits: int = 4) -> Document:
        """Four digits by default: nobody measures more."""
        return {"value": _short(value, digits), "source": f"{self.text}: {what}", "source_kind": "measured"}

    def whole(self, value: int, what: str) -> Document:
        return {"value": value, "source": f"{self.text}: {what}", "source_kind": "measured"}

    def curve(self, unit: str, sizes: Sequence[float], fractions: Sequence[float], what: str) -> Document:
        return {
            f"size_{unit}": [_short(size) for size in sizes],
            "fraction": [_short(min(1.1, max(1e-6, fraction))) for fraction in fractions],
            "source": f"{self.text}: {what}",
            "source_kind": "measured",
        }


def base_document(measurements: Measurements) -> Document:
    """What is known of this machine without measuring; a stand-in of guesses for a machine nobody knows."""
    device = measurements.rates.device
    try:
        found = cluster_document("localhost")
    except InputError:  # a GPU that the catalog does not know
        found = {}
    return found if found.get("gpu", {}).get("device") == device else stand_in(device)


def stand_in(device: str) -> Document:
    """A one-GPU machine of guesses, for what neither the catalog nor the system tells."""
    table: Document = {
        "nodes": 1,
        "gpu": {"base": "cpu", "device": device, **({"vendor": "unknown"} if device == "cuda" else {})},
        "node": {
            "name": "localhost",
            "gpus": 1,
            "intra": {
                "kind": "pcie" if device == "cuda" else "shared_memory",
                "bandwidth_gb_per_s": 16.0 if device == "cuda" else 1.5,
                "latency_us": 20.0 if device == "cuda" else 75.0,
                "point_to_point_fraction": 0.8,
                "efficiency": {"size_mib": [0.01, 1.0, 100.0], "fraction": [0.05, 0.4, 0.8]},
            },
            "host": {
                "cores": 1,
                "ram_gib": 16.0,
                "memory_bandwidth_gb_per_s": 20.0,
                "memory_efficiency": 0.8,
                "pcie_gb_per_s": 12.0,
                "adam_bytes_per_parameter": ADAM_BYTES,
            },
        },
        "network": {"base": "none"},
    }
    source = Source(kind="guess", text="no catalog part for this machine")
    return merged_table("clusters", table, name="localhost", place="localhost", default=source)


def profile_document(
    measurements: Measurements, base: Mapping[str, Any], kernels: KernelRates | None = None
) -> Document:
    """The profile: `base` (a merged cluster document) with every measured number in place. Changes no argument.

    A GPU of the catalog keeps its specified peak and bandwidth, and efficiency is the part of them that was reached; on
    a CPU the peak is the best rate that was measured. `kernels` gives every attention kernel a curve of its own, in place of the one
    point that is measured of whichever runs here; InputError where they are another device's.
    """
    rates = measurements.rates
    disturbed = f" ({measurements.disturbance})" if measurements.disturbance else ""
    driver = f", driver {rates.facts['driver']}" if "driver" in rates.facts else ""
    software = f"{rates.software}{driver}, {measurements.date}{disturbed}"
    origin = _Origin(text=f"shardplan calibrate, {rates.device_name}, {software}")
    document: Document = copy.deepcopy(dict(base))
    document["name"] = profile_name(measurements)
    document["nodes"] = origin.whole(1, "this machine")
    known = document["gpu"]["attention_efficiency"]
    document["gpu"] = _gpu(document["gpu"], rates, origin)
    if kernels:
        check_device(kernels, rates.device_name)
        put_kernels(document["gpu"], kernels, known)
    node = document["node"]
    node["name"] = document["name"]
    node["gpus"] = origin.whole(measurements.gpus, "GPUs, or processes of a CPU")
    node["host"] = _host(node["host"], rates, origin)
    if measurements.collectives and measurements.collectives.members > 1:
        node["intra"] = _intra(node["intra"], measurements.collectives, rates, origin)
    return document


def profile_name(measurements: Measurements) -> str:
    """For instance amd-epyc-x2."""
    return f"{re.sub('[^a-z0-9]+', '-', measurements.rates.device_name.lower()).strip('-')}-x{measurements.gpus}"


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _kept(number: object, rates: Rates) -> bool:
    """Whether a GPU's number stays: it is known, and not a guess."""
    return rates.device == "cuda" and isinstance(number, Mapping) and number.get("source_kind") != "guess"


def _gpu(base: Document, rates: Rates, origin: _Origin) -> Document:
    gpu = {**base, "peak_tflops": dict(base["peak_tflops"]), "gemm_efficiency": dict(base["gemm_efficiency"])}
    unknown = rates.device == "cuda" and not _kept(base["peak_tflops"]["fp32"], rates)
    if rates.device == "cpu" or unknown:
        gpu["name"] = rates.device_name
    shared = f"with {rates.processes} processes at work" if rates.device == "cpu" else "best of all sizes"
    facts = {
        "memory_mib": (rates.memory_bytes / MIB, "memory, divided among the processes of a CPU"),
        "bandwidth_gb_per_s": (_best(rates.memory) / 1e9, f"y = b + a x in fp32, best size, {shared}"),
        "l2_mib": (rates.l2_bytes / MIB, "as torch reports"),
    }
    for key, (value, what) in facts.items():
        if value > 0 and not _kept(base[key], rates):
            gpu[key] = origin.number(value, what, digits=4 if key.startswith("bandwidth") else 8)
    if rates.multiprocessors and not _kept(base["multiprocessors"], rates):
        gpu["multiprocessors"] = origin.whole(rates.multiprocessors, "as torch reports")
    _put_products(gpu, rates, origin, shared=shared, unknown=unknown)
    _put_attention(gpu, rates, origin)
    if rates.memory:
        peak = gpu["bandwidth_gb_per_s"]["value"] * 1e9
        fractions = [min(1.0, timing.rate / peak) for timing in rates.memory]
        sizes = [timing.size / MIB for timing in rates.memory]
        gpu["memory_efficiency"] = origin.curve("mib", sizes, fractions, "y = b + a x in fp32, bytes read and written")
    if rates.dispatch_s:
        what = "chain of tiny products, forward and backward"
        gpu["launch_us"] = origin.number(rates.dispatch_s * 1e6, what)
    if rates.context_bytes is not None:
        what = "resident memory of a process before its first tensor"
        what = what if rates.device == "cpu" else "used memory less the allocator's"
        gpu["context_gib"] = origin.number(rates.context_bytes / GIB, what)
    return gpu


def _best(timings: Sequence[Timing]) -> float:
    return max((timing.rate for timing in timings), default=0.0)


def _put_products(gpu: Document, rates: Rates, origin: _Origin, *, shared: str, unknown: bool) -> None:
    """Peaks and curves of matrix products, in `gpu`."""
    peaks, curves = gpu["peak_tflops"], gpu["gemm_efficiency"]
    if unknown:
        peaks = gpu["peak_tflops"] = {
            word: peak for word, peak in peaks.items() if word == "fp32" or word in rates.gemm
        }
    for word, timings in rates.gemm.items():
        if not timings:
            continue
        if not _kept(peaks.get(word), rates):
            peaks[word] = origin.number(_best(timings) / 1e12, f"best {word} matrix product, {shared}")
        fractions = [min(1.0, timing.rate / (peaks[word]["value"] * 1e12)) for timing in timings]
        what = f"{word} matrix products of random normal data, mean of three shapes a size"
        curves[word] = origin.curve("gflop", [timing.size / 1e9 for timing in timings], fractions, what)
    first = ("bf16", "fp16", "fp32") if rates.device == "cuda" else ("fp32", "bf16")
    chosen = next((word for word in first if rates.gemm.get(word)), None)
    if chosen:
        curves["default"] = curves[chosen]
    if unknown and rates.gemm.get("fp32"):
        gpu["vector_tflops"] = origin.number(
            _best(rates.gemm["fp32"]) / 1e12, "best fp32 matrix product, as a stand-in"
        )


def _put_attention(gpu: Document, rates: Rates, origin: _Origin) -> None:
    """Fractions of the peak of the first precision measured; the others are named in the source.

    The plain plateaus take the place of the catalog's kernels: they are of whichever kernel runs here. The cost model reaches
    a plateau along S / (S + ramp); the plateau is such that it meets the measurement.
    """
    peaks = gpu["peak_tflops"]
    ramp = rates.attention_seq / (rates.attention_seq + PLAIN_RAMP_TOKENS + PLAIN_CAUSAL_RAMP_TOKENS)
    reached = {
        word: {way: min(1.0, timing.rate / ramp / (peaks[word]["value"] * 1e12)) for way, timing in ways.items()}
        for word, ways in rates.attention.items()
        if word in peaks
    }
    first = next(iter(reached), "")
    measured: Document = {}
    for way, fraction in reached.get(first, {}).items():
        others = "".join(f"; in {word} {ways[way]:.2g}" for word, ways in reached.items() if word != first)
        what = f"causal fused attention in {first}, {rates.attention_seq} tokens, scaled to long sequences{others}"
        measured[way] = origin.number(fraction, what)
    gpu["attention_efficiency"] = measured or gpu["attention_efficiency"]


def check_device(kernels: KernelRates, device_name: str) -> None:
    """InputError unless the kernels were timed on a device of this name."""
    if kernels.device != device_name:
        raise InputError(
            f"rates of kernels are of {kernels.device!r}, this machine has {device_name!r}",
            place="--kernels",
            remedy="run `shardplan bench kernels --only attention -o FILE` here",
        )


def put_kernels(gpu: Document, kernels: KernelRates, known: Mapping[str, Any]) -> None:
    """Curves of the attention kernels in `gpu`; those that were not timed stay as they are `known`."""
    before = {name: table for name, table in known.items() if name not in ("forward", "backward")}
    tables = attention_tables(kernels, gpu["peak_tflops"]["bf16"]["value"] * 1e12, before)
    if tables:
        gpu["attention_efficiency"] = {**before, **tables}


def _host(base: Document, rates: Rates, origin: _Origin) -> Document:
    host = {**base, "cores": origin.whole(rates.cores, "CPUs a process may use")}
    host["ram_gib"] = origin.number(rates.ram_bytes / GIB, "memory a process may use", digits=8)
    adam = rates.adam.rate * ADAM_BYTES if rates.adam else 0.0
    copied = rates.host_copy.rate if rates.host_copy else 0.0
    if copied or adam:
        what = f"copy, or AdamW at {ADAM_BYTES:g} bytes per parameter if faster"
        host["memory_bandwidth_gb_per_s"] = origin.number(max(copied, adam) / 1e9, what)
    if adam:
        what = "fused AdamW in fp32: bytes read and written by the update"
        host["adam_bytes_per_parameter"] = origin.number(ADAM_BYTES, what)
        host["memory_efficiency"] = origin.number(adam / max(copied, adam), "AdamW's part of that bandwidth")
    ways = [timing.rate for timing in (rates.host_to_device, rates.device_to_host) if timing]
    if ways:
        host["pcie_gb_per_s"] = origin.number(min(ways) / 1e9, "pinned copy, the slower direction")
    return host


def _intra(base: Document, collectives: CollectiveRates, rates: Rates, origin: _Origin) -> Document:
    """Latency, wire rate and efficiency from the bus bandwidth of the collectives among all members."""
    ring = {name: undisturbed(collectives.timings.get(name, ())) for name in RING_STEPS}
    ring = {name: timings for name, timings in ring.items() if timings}
    if not ring:
        return base
    steps = collectives.members - 1
    bus = {name: [bus_rate(name, timing, collectives.members) for timing in timings] for name, timings in ring.items()}
    sent = undisturbed(collectives.timings.get("send_receive", ()))
    link: Document = {key: value for key, value in base.items() if key != "all_reduce_efficiency"}
    among = f"{collectives.backend} among {collectives.members}"
    if not _kept(base["bandwidth_gb_per_s"], rates):
        best = max(_best(sent), *(max(one) for one in bus.values()))
        link["bandwidth_gb_per_s"] = origin.number(best / 1e9, f"{among}, best bus bandwidth")
    wire = link["bandwidth_gb_per_s"]["value"] * 1e9
    latency_s = min(timings[0].seconds / (RING_STEPS[name] * steps) for name, timings in ring.items())
    link["latency_us"] = origin.number(latency_s * 1e6, f"{among}, smallest collective, per step of a ring")
    halves = [name for name in ("all_gather", "reduce_scatter") if name in ring] or list(ring)
    sizes = [timing.size / MIB for timing in ring[halves[0]]]
    fractions = [geometric_mean(pair) / wire for pair in zip(*(bus[name] for name in halves), strict=True)]
    link["efficiency"] = origin.curve("mib", sizes, fractions, f"{among}, {' and '.join(halves)}")
    if "all_reduce" in ring:
        curve = [one / wire for one in bus["all_reduce"]]
        link["all_reduce_efficiency"] = origin.curve("mib", sizes, curve, f"{among}, all_reduce")
    if sent:
        what = f"{among}, every member sends to the next"
        link["point_to_point_fraction"] = origin.number(min(1.0, sent[-1].rate / wire), what)
    return link


def bus_rate(name: str, timing: Timing, members: int) -> float:
    """Bytes per second through each member's link: a ring pass carries (members - 1) / members of the tensor."""
    return timing.rate * RING_STEPS[name] * (members - 1) / members


def undisturbed(timings: Sequence[Timing]) -> tuple[Timing, ...]:
    """No collective takes longer than a larger one of its kind: where it did, another program was in its way."""
    return tuple(
        Timing(size=timing.size, seconds=min(later.seconds for later in timings[index:]))
        for index, timing in enumerate(timings)
    )
