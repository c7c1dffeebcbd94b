"""What a benchmark found: ratios, targets met or not, the table for people, and long-format rows for files."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any

import torch

from shardplan.kernels.benchmark_case import LEVELS, OURS, Case, Target
from shardplan.kernels.benchmark_timing import Timing

SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9}
COLUMNS: tuple[str, ...] = ("kernel", "case", "provider", "metric", "unit", "p20", "p50", "p80")
COLUMNS += ("device", "torch", "triton", "driver", "date", "note")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case: a timing, or why there is none, for each provider; all reasons the same where it was left out."""

    case: Case
    found: Mapping[str, Timing | str]

    def rate(self, provider: str) -> float | None:
        """FLOP or bytes per second at the median; None where it was not timed."""
        timing = self.found.get(provider)
        return self.case.work_of(provider) / timing.p50_s if isinstance(timing, Timing) else None

    def ratio(self, baseline: str) -> float | None:
        """Rate of ours over the rate of that baseline."""
        ours, other = self.rate(OURS), self.rate(baseline)
        return ours / other if ours and other else None

    def targets(self) -> list[tuple[Target, float | None]]:
        """Each target and the ratio that was reached; None where either was not timed."""
        return [(target, self.ratio(target.baseline)) for target in self.case.targets]


def machine() -> dict[str, str]:
    """Device, versions and the time: what every row carries."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if cuda else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def long_rows(outcomes: Iterable[Outcome], about: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a provider and metric: time on the device, time of the host to queue it, rate, and the ratio of ours to it; or
    `not supported` with the reason as note."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        for provider, timing in outcome.found.items():
            start = {"kernel": outcome.case.kernel, "case": outcome.case.name, "provider": provider}
            rows += [
                dict.fromkeys(COLUMNS, "") | start | row | dict(about) for row in _metrics(outcome, provider, timing)
            ]
    return rows


def _metrics(outcome: Outcome, provider: str, timing: Timing | str) -> Iterable[dict[str, Any]]:
    if isinstance(timing, str):
        yield {"metric": "not supported", "note": timing}
        return
    times = (timing.p20_s, timing.p50_s, timing.p80_s)
    yield {"metric": "time", "unit": "us"} | _percentiles(1e6 * one for one in times)
    if timing.host_s is not None:
        yield {"metric": "host time", "unit": "us", "p50": f"{1e6 * timing.host_s:.4g}"}
    scale, work = SCALES[outcome.case.unit], outcome.case.work_of(provider)
    yield {"metric": "rate", "unit": outcome.case.unit} | _percentiles(work / one / scale for one in reversed(times))
    ratio = outcome.ratio(provider)
    if ratio is not None and provider != OURS:
        wanted = [(target, ratio) for target, _ in outcome.targets() if target.baseline == provider]
        yield {"metric": "ratio", "unit": "ours/provider", "p50": f"{ratio:.4g}", "note": _said(wanted)}


def _percentiles(values: Iterable[float]) -> dict[str, str]:
    return dict(zip(("p20", "p50", "p80"), (f"{value:.6g}" for value in values), strict=True))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(outcomes: Sequence[Outcome], about: Mapping[str, str], notes: Sequence[str]) -> dict[str, Any]:
    """Everything, nested by case."""
    return {
        "machine": dict(about),
        "notes": list(notes),
        "cases": [
            {
                "kernel": one.case.kernel,
                "case": one.case.name,
                "unit": one.case.unit,
                "providers": {name: _provider(one, name, timing) for name, timing in one.found.items()},
                "targets": [
                    asdict(target) | {"reached": ratio, "met": None if ratio is None else ratio >= target.ratio}
                    for target, ratio in one.targets()
                ],
            }
            for one in outcomes
        ],
        "summary": summary(outcomes),
    }


def _provider(outcome: Outcome, name: str, timing: Timing | str) -> dict[str, Any]:
    if isinstance(timing, str):
        return {"not_supported": timing}
    rate = outcome.rate(name) or 0.0
    return asdict(timing) | {"rate": rate / SCALES[outcome.case.unit], "ratio": outcome.ratio(name)}


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Level -> targets met, missed, and not comparable because something was not timed."""
    counts = {level: {"met": 0, "missed": 0, "not timed": 0} for level in LEVELS}
    for target, ratio in (pair for one in outcomes for pair in one.targets()):
        counts[target.level]["not timed" if ratio is None else "met" if ratio >= target.ratio else "missed"] += 1
    return counts


def table(outcomes: Sequence[Outcome]) -> str:
    """A block a case: a line a provider with its median, rate, and what its ratio was to reach."""
    lines: list[str] = []
    for one in outcomes:
        lines.append(f"{one.case.kernel}, {one.case.name}")
        reasons = {timing for timing in one.found.values() if isinstance(timing, str)}
        if len(reasons) == 1 and all(isinstance(timing, str) for timing in one.found.values()):
            lines.append(f"  not timed: {reasons.pop()}")
            continue
        lines += [f"  {name:<15}{_line(one, name, timing)}" for name, timing in one.found.items()]
    lines += [
        f"{level}: {', '.join(f'{count} {word}' for word, count in counts.items())}"
        for level, counts in summary(outcomes).items()
    ]
    return "\n".join(lines)


def _line(outcome: Outcome, name: str, timing: Timing | str) -> str:
    if isinstance(timing, str):
        return f"not supported: {timing}"
    rate = (outcome.rate(name) or 0.0) / SCALES[outcome.case.unit]
    text = f"{timing.p50_s * 1e6:>11,.1f} us  {rate:>9,.1f} {outcome.case.unit}"
    ratio = outcome.ratio(name)
    if name == OURS or ratio is None:
        return text
    wanted = [(target, reached) for target, reached in outcome.targets() if target.baseline == name]
    return f"{text}  ours {ratio:.2f}x  {_said(wanted)}".rstrip()


def _said(wanted: Iterable[tuple[Target, float | None]]) -> str:
    return ", ".join(
        f"{target.level} {target.ratio:.2f} {'met' if ratio is not None and ratio >= target.ratio else 'missed'}"
        for target, ratio in wanted
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""
