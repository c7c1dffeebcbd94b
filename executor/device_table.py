"""Results of `validate_device` as a line for people and as rows of a CSV in long format."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from shardplan.executor.device_cases import Case
from shardplan.executor.device_facts import device_facts
from shardplan.executor.device_run import Measured
from shardplan.executor.measure import versions
from shardplan.hw_profiles.detect import cpu_facts

GIB = 2.0**30
LEAK_GIB = 0.2
"""Memory in use before a case, above which its line says so."""
COLUMNS = ("date", "device", "driver", "versions", "case", "source", "metric", "value", "unit")
"""`source` is measured, or predicted by one of the profiles."""
HEADER = (
    f"{'case':<42}{'step ms':>9}{'catalog':>9}{'err %':>7}{'calib.':>9}{'err %':>7}"
    f"{'alloc GiB':>10}{'pred.':>7}{'reserved':>9}{'pred.':>7}{'MFU %':>7}"
)
_UNITS = {"sm_clock_mhz": "MHz", "power_w": "W", "temperature_c": "degC", "timed_steps": "1"}
Row = tuple[str, str, float | str, str]
"""Source, metric, value, unit."""


def table_line(case: Case, predicted: Mapping[str, Mapping[str, Any]], measured: Measured | None, error: str) -> str:
    """One case; the errors are predicted over measured, less one."""
    first = predicted.get("catalog", {})
    said = {label: answer["time"]["step_s"] for label, answer in predicted.items()}
    memory = first.get("memory") or {}
    told = [memory[key] / GIB if memory else None for key in ("allocated_peak_bytes", "reserved_peak_bytes")]
    if measured is None:
        here = f"{case.name:<42}{'-':>9}" + "".join(
            f"{_cell(_ms(said.get(label)), 9)}{'-':>7}" for label in ("catalog", "calibrated")
        )
        return f"{here}{'-':>10}{_cell(told[0], 7)}{'-':>9}{_cell(told[1], 7)}{'-':>7}  {error}"
    line = f"{case.name:<42}{_cell(_ms(measured.step_s), 9)}"
    for label in ("catalog", "calibrated"):
        seconds = said.get(label)
        off = None if seconds is None else (seconds / measured.step_s - 1.0) * 100.0
        line += f"{_cell(_ms(seconds), 9)}{_cell(off, 7, sign=True)}"
    peaks = [measured.metrics.get(name) for name in ("allocated_bytes", "reserved_bytes")]
    found = [None if peak is None else peak / GIB for peak in peaks]
    left = measured.metrics.get("allocated_at_start_bytes", 0.0) / GIB
    note = f"  {left:.1f} GiB of the case before were not free" if left > LEAK_GIB else ""
    return (
        f"{line}{_cell(found[0], 10)}{_cell(told[0], 7)}{_cell(found[1], 9)}{_cell(told[1], 7)}"
        f"{_cell(measured_mfu(first, measured.step_s), 7)}{note}"
    )


def measured_mfu(answer: Mapping[str, Any], step_s: float) -> float | None:
    """Percent of the dense peak that the model's FLOP reached."""
    if not answer:
        return None
    return 100.0 * answer["throughput"]["mfu"] * answer["time"]["step_s"] / step_s


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _cell(value: float | None, width: int, *, sign: bool = False) -> str:
    return f"{'-' if value is None else format(value, '+.1f' if sign else '.1f'):>{width}}"


def case_rows(
    case: Case, predicted: Mapping[str, Mapping[str, Any]], measured: Measured | None, error: str
) -> list[tuple[str, Row]]:
    """(case, row) of everything known of one case."""
    rows: list[Row] = []
    for label, answer in predicted.items():
        rows += _predicted_rows(f"predicted:{label}", answer)
    if error:
        rows.append(("measured", "error", error, ""))
    if measured is not None:
        rows += [("measured", metric, value, unit_of(metric)) for metric, value in measured.metrics.items()]
        mfu = measured_mfu(predicted.get("catalog", {}), measured.step_s)
        rows += [] if mfu is None else [("measured", "mfu", mfu / 100.0, "1")]
        rows += [("profile", name, value, "1" if name == "count" else "s") for name, value in measured.kernels.items()]
    return [(case.name, row) for row in rows]


def _predicted_rows(source: str, answer: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = [
        (source, name, value, unit_of(name)) for name, value in answer["time"].items() if isinstance(value, float)
    ]
    rows += [
        (source, name, answer["memory"][name], "B")
        for name in ("allocated_peak_bytes", "reserved_peak_bytes", "device_peak_bytes")
    ]
    stage = answer["memory"]["stages"][0]
    rows += [(source, name, value, "B") for name, value in stage.items() if name.endswith("_bytes")]
    rows.append((source, "mfu", answer["throughput"]["mfu"], "1"))
    return [*rows, (source, "fits", "true" if answer["fits"] else "false", "")]


def unit_of(metric: str) -> str:
    """By our names: they end in their unit."""
    if metric.endswith("tokens_per_s"):
        return "tokens/s"
    if metric.endswith("_bytes"):
        return "B"
    if "loss" in metric:
        return "nats"
    if metric in _UNITS:
        return _UNITS[metric]
    return "s" if metric.endswith(("_s", "_s_least", "_s_most")) else "1"


def start_file(path: Path, device: torch.device, *, date: str) -> tuple[str, ...]:
    """Write the header; returns the first columns of every row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(COLUMNS)
    facts = device_facts() if device.type == "cuda" else {}
    cpu = cpu_facts()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu.model}, {cpu.cores:g} cores"
    told = " ".join(f"{package} {version}" for package, version in versions().items() if package != "platform")
    origin = (date, name, facts.get("driver", ""), f"{told} cuda {torch.version.cuda}")
    print(", ".join([*origin, *(f"{key} {value}" for key, value in facts.items())]), file=sys.stdout, flush=True)
    return origin


def append_rows(path: Path, origin: tuple[str, ...], rows: Iterable[tuple[str, Row]]) -> None:
    """Add rows; on disk when this returns."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for case, (source, metric, value, unit) in rows:
            writer.writerow(
                (*origin, case, source, metric, f"{value:.7g}" if isinstance(value, float) else value, unit)
            )
