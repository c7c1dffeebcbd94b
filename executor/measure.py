"""What a run leaves behind: one JSON line per step and rank while it runs, then `measurements.csv`, `run.json`.

A rank appends to its own file, so whatever was measured before a failure is kept; the launcher merges the files.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANKS_FOLDER = "ranks"
EVENTS_FILE = "events.jsonl"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of one rank. Memory is the peak: of the step on CUDA, of the process so far on a CPU."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over the global batch, nats per token; the same on every rank."""
    grad_norm: float | None
    """Before clipping, over all ranks; None of a skipped step, where it is Inf or NaN."""
    step_s: float
    """From the batch to the end of the optimizer step, as this rank saw it."""
    tokens_per_s: float
    """Of all ranks together."""
    max_loss: float | None = None
    """Largest mean over what one rank along dp and cp has of the global batch, nats per token; the same on every rank."""
    allocated_bytes: int | None = None
    active_bytes: int | None = None
    reserved_bytes: int | None = None
    rss_bytes: int | None = None
    """Resident set of the rank's process (CPU runs)."""
    learning_rate: float | None = None
    data_s: float | None = None
    """Waiting for the batch, part of `step_s`."""
    validation_loss: float | None = None
    """After the step, where one was due; nats per token, the same on every rank. The step is written without it before."""
    loss_scale: float | None = None
    """Of the step, under fp16."""
    skipped_steps: int | None = None
    """Since the training began, under fp16: those whose gradients overflowed."""
    cpu_s: float | None = None
    """CPU time of the process in the step, all its threads: on a shared machine steadier than `step_s`, without any waiting."""
    forward_s: float | None = None
    """Phases and waits are those of a step that was looked into (`phases.py`); a phase is without the waits in it."""
    backward_s: float | None = None
    """Recomputation included."""
    optimizer_s: float | None = None
    """Clipping included."""
    dp_exposed_s: float | None = None
    """Blocked by other ranks along an axis; None where the layout has one rank there."""
    tp_exposed_s: float | None = None
    cp_exposed_s: float | None = None
    ep_exposed_s: float | None = None
    pp_exposed_s: float | None = None
    """Transfers and, with them, the bubble."""


PHASE_NAMES = {
    **{f"{phase}_s": (f"time_metrics/{phase}(s)", "s", 1) for phase in ("forward", "backward", "optimizer")},
    **{f"{axis}_exposed_s": (f"time_metrics/exposed_{axis}(s)", "s", 1) for axis in ("dp", "tp", "cp", "ep", "pp")},
}
_TORCHTITAN_NAMES = {
    "loss": ("loss_metrics/global_avg_loss", "nats", 1),
    "max_loss": ("loss_metrics/global_max_loss", "nats", 1),
    "grad_norm": ("grad_norm", "1", 1),
    "step_s": ("time_metrics/end_to_end(s)", "s", 1),
    "tokens_per_s": ("throughput(tps)", "tokens/s/rank", 1),
    "allocated_bytes": ("memory/max_allocated(GiB)", "GiB", GIB),
    "active_bytes": ("memory/max_active(GiB)", "GiB", GIB),
    "reserved_bytes": ("memory/max_reserved(GiB)", "GiB", GIB),
    "rss_bytes": ("memory/max_rss(GiB)", "GiB", GIB),
    "learning_rate": ("lr", "1", 1),
    "data_s": ("time_metrics/data_loading(s)", "s", 1),
    "validation_loss": ("validation_metrics/loss", "nats", 1),
    "loss_scale": ("loss_scale", "1", 1),
    "skipped_steps": ("skipped_steps", "1", 1),
    "cpu_s": ("time_metrics/cpu(s)", "s", 1),
    **PHASE_NAMES,
}
"""Field -> (metric, unit, divisor). torchtitan's throughput is per device, so that row is divided by the ranks too."""

CSV_COLUMNS = ("step", "rank", "metric", "value", "unit")


def host_peak_bytes() -> int:
    """Peak resident set of this process; the kernel counts in KiB on Linux, in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def rank_file(folder: Path, rank: int) -> Path:
    """Where `rank` appends its steps."""
    return folder / RANKS_FOLDER / f"rank-{rank:04d}.jsonl"


def append_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Add a line to `events.jsonl`: what happened besides steps (resuming, restarts, the wait for the last checkpoint)."""
    with (folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), **event}) + "\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of `events.jsonl`."""
    path = folder / EVENTS_FILE
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def last_records(records: Iterable[StepRecord]) -> list[StepRecord]:
    """One record a step, the last: steps after a checkpoint are trained again when the ranks are restarted."""
    return list({record.step: record for record in records}.values())


def read_records(folder: Path) -> dict[int, list[StepRecord]]:
    """Steps by rank, of a finished, failed or running run; a line that a kill cut short is left out."""
    found: dict[int, list[StepRecord]] = {}
    for path in sorted((folder / RANKS_FOLDER).glob("rank-*.jsonl")):
        found[int(path.stem.removeprefix("rank-"))] = last_records(parse_records(path.read_text(encoding="utf-8")))
    return found


def parse_records(text: str) -> list[StepRecord]:
    """The complete lines of a rank's file."""
    whole, _, _ = text.rpartition("\n")
    return [StepRecord(**json.loads(line)) for line in whole.splitlines()]


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, never half."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """`write_atomically` for JSON."""
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def write_measurements(folder: Path, records: Mapping[int, Sequence[StepRecord]], *, ranks: int) -> None:
    """`measurements.csv`, long format: step, rank, metric, value, unit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    by_step = sorted((record.step, rank, record) for rank, steps in records.items() for record in steps)
    for step, rank, record in by_step:
        for field, (metric, unit, divisor) in _TORCHTITAN_NAMES.items():
            value = getattr(record, field)
            if value is not None:
                per = divisor * (ranks if field == "tokens_per_s" else 1)
                writer.writerow((step, rank, metric, f"{value / per:.9g}", unit))
    write_atomically(folder / "measurements.csv", text.getvalue())


def measured(records: Mapping[int, Sequence[StepRecord]], *, tokens_per_step: int, warmup_steps: int) -> dict[str, Any]:
    """Medians after the warm-up (a step takes as long as its slowest rank) and the peak memory of the fullest rank."""
    slowest = step_seconds(records, warmup_steps=warmup_steps)
    looked_into = {record.step for record in _every(records) if record.forward_s is not None}
    untouched = [seconds for step, seconds in slowest.items() if step not in looked_into]
    timed = untouched if len(untouched) >= FEWEST_UNTOUCHED else list(slowest.values())
    low, median, high = np.percentile(timed, (20, 50, 80)).tolist() if timed else (None, None, None)
    kind = "rss" if any(record.rss_bytes is not None for record in _every(records)) else "allocated"
    peaks = [getattr(record, f"{kind}_bytes") for record in _every(records)]
    losses = {record.step: record.loss for record in _every(records)}
    return {
        "step_s": median,
        "step_s_p20": low,
        "step_s_p80": high,
        "tokens_per_s": tokens_per_step / median if median else None,
        "cpu_s": _busiest_cpu_s(records, timed=slowest),
        "peak_memory_bytes": max(peaks, default=None),
        "memory_kind": kind,
        "reserved_peak_bytes": max((r.reserved_bytes for r in _every(records) if r.reserved_bytes), default=None),
        "first_loss": losses[min(losses)] if losses else None,
        "last_loss": losses[max(losses)] if losses else None,
        "skipped_steps": next((r.skipped_steps for r in _latest_first(records) if r.skipped_steps is not None), None),
        "validation_loss": next(
            (r.validation_loss for r in _latest_first(records) if r.validation_loss is not None), None
        ),
    }


FEWEST_UNTOUCHED = 3
"""Steps that nothing looked into, from which on only they are timed (on a GPU events take their time)."""


def step_seconds(records: Mapping[int, Sequence[StepRecord]], *, warmup_steps: int) -> dict[int, float]:
    """Seconds of each step after the warm-up: those of its slowest rank."""
    slowest: dict[int, float] = {}
    for record in _every(records):
        slowest[record.step] = max(slowest.get(record.step, 0.0), record.step_s)
    return dict(sorted(slowest.items())[warmup_steps:])


def _busiest_cpu_s(records: Mapping[int, Sequence[StepRecord]], *, timed: Mapping[int, float]) -> float | None:
    """Median CPU time of a step of the rank where it is longest."""
    found = [[r.cpu_s for r in steps if r.step in timed and r.cpu_s is not None] for steps in records.values()]
    return max((float(np.median(values)) for values in found if values), default=None)


def _every(records: Mapping[int, Sequence[StepRecord]]) -> Iterable[StepRecord]:
    return (record for steps in records.values() for record in steps)


def _latest_first(records: Mapping[int, Sequence[StepRecord]]) -> list[StepRecord]:
    return sorted(_every(records), key=lambda record: -record.step)


def predicted(prediction: Mapping[str, Any], *, memory_kind: str) -> dict[str, Any]:
    """The plan's numbers to compare with; `peak_memory_bytes` is the one that means what was measured."""
    times, memory = prediction.get("time") or {}, prediction.get("memory") or {}
    alike = "device_peak_bytes" if memory_kind == "rss" else "allocated_peak_bytes"
    return {
        "step_s": times.get("step_s"),
        "tokens_per_s": (prediction.get("throughput") or {}).get("tokens_per_s"),
        "device_peak_bytes": memory.get("device_peak_bytes"),
        "peak_memory_bytes": memory.get(alike),
        "peak_memory_is": alike,
    }


def mfu(prediction: Mapping[str, Any], step_s: float | None) -> dict[str, Any]:
    """Model FLOP utilisation of a step of `step_s` as a fraction, and what it counts, in the words of the prediction."""
    said, times = prediction.get("throughput") or {}, prediction.get("time") or {}
    counts = next((line for line in prediction.get("assumptions", ()) if line.startswith("MFU counts")), None)
    known = step_s and said.get("mfu") and times.get("step_s")
    return {"mfu": said["mfu"] * times["step_s"] / step_s if known else None, "mfu_counts": counts}


def ratios(of: Mapping[str, Any], to: Mapping[str, Any]) -> dict[str, float | None]:
    """Measured over predicted; None where either is missing."""
    names = ("step_s", "tokens_per_s", "peak_memory_bytes")
    return {name: of[name] / to[name] if of[name] and to[name] else None for name in names}


def versions() -> dict[str, str]:
    """Versions of what ran, without importing it."""
    from importlib import metadata

    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in ("torch", "triton", "numpy", "shardplan"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
