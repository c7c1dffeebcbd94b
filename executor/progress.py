"""What a person sees of a run: the live line, and the table of predicted and measured numbers at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

from shardplan.executor.measure import StepRecord
from shardplan.executor.metrics_files import utilisation

GIB = 2.0**30
PLAIN_LINES = 10
"""Steps told when the output is not a terminal (more when steps are slow)."""
QUIET_S = 30.0
"""Longest silence while steps go by."""


class ProgressLine:
    """Prints steps to `stream`: one line that rewrites itself on a terminal, else about PLAIN_LINES plain lines."""

    def __init__(self, stream: TextIO, *, steps: int, prediction: Mapping[str, Any]) -> None:
        self.stream, self.steps = stream, steps
        self.live = stream.isatty()
        self.every = max(1, steps // PLAIN_LINES)
        self.told_at = time.monotonic()
        self.unfinished = False
        self.predicted_s = (prediction.get("time") or {}).get("step_s")
        self.predicted_bytes = (prediction.get("memory") or {}).get("device_peak_bytes")
        self.prediction = prediction
        self.validation_loss: float | None = None

    def __call__(self, record: StepRecord) -> None:
        """Tell one step, or its validation loss where it comes again with one."""
        if record.validation_loss is not None:
            self.validation_loss = record.validation_loss
            self.tell(f"{self._number(record)}  validation {record.validation_loss:.3f}")
            return
        last = record.step == self.steps
        due = last or record.step % self.every == 1 % self.every
        if self.live:
            self.stream.write(f"\r\x1b[K{self.line(record)}" + ("\n" if last else ""))
            self.stream.flush()
            self.unfinished = not last
        elif due or time.monotonic() - self.told_at > QUIET_S:
            print(self.line(record), file=self.stream, flush=True)
            self.told_at = time.monotonic()

    def tell(self, line: str) -> None:
        """What happened besides steps, on a line of its own."""
        self.end()
        print(line, file=self.stream, flush=True)

    def end(self) -> None:
        """Leave the live line, also of a run that stopped early."""
        if self.unfinished:
            self.stream.write("\n")
            self.unfinished = False

    def line(self, record: StepRecord) -> str:
        """One step in words, predictions in brackets."""
        memory = next(
            (b for b in (record.rss_bytes, record.reserved_bytes, record.allocated_bytes) if b is not None), None
        )
        scaled = "" if record.loss_scale is None else f"scale {record.loss_scale:g} ({record.skipped_steps} skipped)  "
        held_out = "" if self.validation_loss is None else f"validation {self.validation_loss:.3f}  "
        return (
            f"{self._number(record)}  loss {record.loss:.3f}  {held_out}{scaled}"
            f"{seconds(record.step_s)} (predicted {seconds(self.predicted_s)})  {record.tokens_per_s:,.0f} tokens/s  "
            f"{self._utilisation(record)}memory {gibibytes(memory)} (predicted {gibibytes(self.predicted_bytes)})"
        )

    def _number(self, record: StepRecord) -> str:
        return f"step {record.step:>{len(str(self.steps))}}/{self.steps}"

    def _utilisation(self, record: StepRecord) -> str:
        mfu = utilisation(self.prediction, record.step_s)["mfu(%)"]
        if mfu is None:
            return ""
        return f"MFU {mfu:.1f} % (predicted {100 * self.prediction['throughput']['mfu']:.1f} %)  "


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def gibibytes(value: float | None) -> str:
    """Bytes for people."""
    return "-" if value is None else f"{value / GIB:.2f} GiB"


def summary(document: Mapping[str, Any]) -> str:
    """The end of a run: what was predicted, what was measured, their ratio; from the content of `run.json`."""
    found, expected, ratio = document["measured"], document["predicted"], document["ratio"]
    kind = {"rss": "resident set", "allocated": "allocated"}[found["memory_kind"]]
    rows = [
        ("step time", seconds(expected["step_s"]), seconds(found["step_s"]), ratio["step_s"]),
        ("tokens/s", _count(expected["tokens_per_s"]), _count(found["tokens_per_s"]), ratio["tokens_per_s"]),
        (
            "peak memory",
            gibibytes(expected["peak_memory_bytes"]),
            gibibytes(found["peak_memory_bytes"]),
            ratio["peak_memory_bytes"],
        ),
    ]
    lines = [f"{'':<12}{'predicted':>12}{'measured':>12}{'ratio':>8}"]
    lines += [f"{name:<12}{said:>12}{was:>12}{_ratio(part):>8}" for name, said, was, part in rows]
    timed = document.get("steps_timed", max(document["steps_done"] - document["warmup_steps"], 0))
    lines.append(f"median of {timed} steps after warm-up; memory: {kind} of the fullest rank")
    if found["first_loss"] is not None:
        lines.append(f"loss {found['first_loss']:.3f} -> {found['last_loss']:.3f} nats per token")
    if found.get("skipped_steps"):
        lines.append(f"steps skipped because a gradient overflowed: {found['skipped_steps']}")
    if found.get("validation_loss") is not None:
        lines.append(f"validation loss {found['validation_loss']:.3f} nats per token")
    return "\n".join(lines)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
