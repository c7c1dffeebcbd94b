"""Where the time of a step goes: its phases, and inside them the time this rank is blocked by others.

On a CPU a span is between two readings of a clock, on a GPU between two events on the stream that computes: nothing is synchronised
inside a step. What a rank waits is no part of the phase it waits in: forward + backward + optimizer + waiting + data + rest = step.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch

PHASES: tuple[str, ...] = ("forward", "backward", "optimizer")
Mark = Any
"""Seconds of a clock, or a recorded torch.cuda.Event."""


class StepClock:
    """Times the spans of one step of one rank while `on`; costs nothing otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on = device, False
        self.phase = ""
        self.waits_now = False
        self.spans: list[tuple[str, Mark, Mark]] = []
        self.waits: list[tuple[str, str, Mark, Mark]] = []
        """(phase, axis, begin, end)"""

    def __call__(self, phase: str) -> AbstractContextManager[object]:
        """Must surround what belongs to `phase`."""
        return _Span(self, phase) if self.on else nullcontext()

    def waiting(self, axis: str) -> AbstractContextManager[object]:
        """Must surround a wait for other ranks along `axis`; waits inside a wait are part of it."""
        return _Wait(self, axis) if self.on and not self.waits_now else nullcontext()

    def mark(self) -> Mark:
        """This moment, in the order of what computes."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by phase, without the waits in it, and by axis of waits; forgets them. The device must have done everything."""
        found = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self.spans:
            found[phase] += _seconds(begin, end)
        for phase, axis, begin, end in self.waits:
            waited = _seconds(begin, end)
            found[axis] = found.get(axis, 0.0) + waited
            if phase:
                found[phase] -= waited
        self.spans, self.waits = [], []
        return found


def _seconds(begin: Mark, end: Mark) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) * 1e-3


class _Span:
    def __init__(self, clock: StepClock, phase: str) -> None:
        self.clock, self.phase = clock, phase

    def __enter__(self) -> None:
        self.clock.phase, self.begin = self.phase, self.clock.mark()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.clock.spans.append((self.phase, self.begin, self.clock.mark()))
        self.clock.phase = ""


class _Wait:
    def __init__(self, clock: StepClock, axis: str) -> None:
        self.clock, self.axis = clock, axis

    def __enter__(self) -> None:
        self.clock.waits_now, self.begin = True, self.clock.mark()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        clock = self.clock
        clock.waits.append((clock.phase, self.axis, self.begin, clock.mark()))
        clock.waits_now = False


STAGE_WORK = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "backward",
    "backward_weight_one_chunk": "backward",
    "perform_reduce_grad": "backward",
}
"""Methods of torch.distributed.pipelining.PipelineStage -> phase; those that the installed version has."""


def watch_stages(schedule: Any, clock: StepClock) -> None:
    """Let the stages of a pipeline schedule tell `clock` what they run."""
    single = getattr(schedule, "_stage", None)
    for stage in [single] if single is not None else schedule._stages:
        for method, phase in STAGE_WORK.items():
            if hasattr(stage, method):
                setattr(stage, method, in_phase(getattr(stage, method), clock, phase))


def in_phase(method: Any, clock: StepClock, phase: str) -> Any:
    """`method` as a part of `phase`."""

    def timed(*arguments: Any, **words: Any) -> Any:
        with clock(phase):
            return method(*arguments, **words)

    return timed
