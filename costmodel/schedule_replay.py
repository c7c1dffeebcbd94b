"""Replay of a pipeline schedule: when every action starts and ends, what idles, what is in flight at the peak.

    F(s) waits for F(s-1) of its micro-batch; B(s) and I(s) for F(s) and for B(s+1) or I(s+1); W(s) for I(s).

A rank runs one action at a time in the order of its list. A result that another rank waits for arrives `transfer_s` after its
action ends, and sending it costs the sender no time. Adjacent F and B (DualPipe's overlapped pair) take the sum of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.schedules import Action, PipelineSchedule
from shardplan.hw_profiles.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NEVER = -1.0
"""End of an action that has not run."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a schedule takes. The step ends for all ranks together, when the last action does."""

    step_s: float
    busy_s: FloatArray
    """Seconds each rank computes, (pp,)."""
    bubble_s: FloatArray
    """Seconds each rank idles between 0 and step_s, (pp,)."""
    start_s: tuple[FloatArray, ...]
    """Start of each action by rank, in the order of the list."""
    end_s: tuple[FloatArray, ...]
    """End of each action by rank."""
    peak_in_flight: IntArray
    """Most chunk activations a rank holds at once, (pp,): one from the start of F to the end of B, or of W where B is split."""


def replay(
    schedule: PipelineSchedule,
    *,
    forward_s: Sequence[float] | FloatArray,
    input_grad_s: Sequence[float] | FloatArray,
    weight_grad_s: Sequence[float] | FloatArray,
    transfer_s: float = 0.0,
) -> Replay:
    """Run the lists of `schedule`: seconds of F, I and W by global stage, each of pp * virtual_stages; B takes I + W.

    InputError when the seconds are not one non-negative number a stage, or when the lists wait for each other for ever,
    naming the action that cannot start.
    """
    stages = schedule.pp * schedule.virtual_stages
    forward, inputs, weights = (
        _stage_seconds(name, values, stages)
        for name, values in (("forward_s", forward_s), ("input_grad_s", input_grad_s), ("weight_grad_s", weight_grad_s))
    )
    if not 0.0 <= transfer_s < np.inf:
        raise InputError(f"transfer_s={transfer_s} is not a time", place="replay", remedy="use seconds, 0 or more")
    seconds = {
        "F": forward,
        "B": [i + w for i, w in zip(inputs, weights, strict=True)],
        "I": inputs,
        "W": weights,
    }
    starts, ends = _run(schedule, seconds, transfer_s)
    busy = np.array([_busy(schedule, rank, seconds) for rank in range(schedule.pp)])
    step = max((end[-1] for end in ends if end), default=0.0)
    return Replay(
        step_s=step,
        busy_s=busy,
        bubble_s=step - busy,
        start_s=tuple(np.array(start) for start in starts),
        end_s=tuple(np.array(end) for end in ends),
        peak_in_flight=np.array([peak_in_flight(actions) for actions in schedule.ranks], dtype=np.int64),
    )


def peak_in_flight(actions: Sequence[Action]) -> int:
    """Most chunk activations held at once: +1 at the start of F, -1 after B or W (an I alone releases nothing)."""
    held = peak = 0
    for action in actions:
        if action.kind == "F":
            held += 1
            peak = max(peak, held)
        elif action.kind != "I":
            held -= 1
    return peak


def _stage_seconds(name: str, values: Sequence[float] | FloatArray, stages: int) -> list[float]:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (stages,) or not np.all((found >= 0) & (found < np.inf)):
        raise InputError(
            f"{name} has shape {found.shape}, or a value that is not a time",
            place="replay",
            remedy=f"give {stages} seconds",
        )
    return found.tolist()


def _busy(schedule: PipelineSchedule, rank: int, seconds: dict[str, list[float]]) -> float:
    stage = [schedule.stage(rank, chunk) for chunk in range(schedule.virtual_stages)]
    return float(sum(seconds[action.kind][stage[action.chunk]] for action in schedule.ranks[rank]))


def _run(
    schedule: PipelineSchedule, seconds: dict[str, list[float]], transfer_s: float
) -> tuple[list[list[float]], list[list[float]]]:
    """(starts, ends) of the actions by rank; a rank that has to wait is woken by the action it waits for."""
    done = _Done(schedule, transfer_s)
    starts: list[list[float]] = [[] for _ in schedule.ranks]
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    waiting: dict[int, int] = {}
    runnable = list(range(schedule.pp))
    while runnable:
        rank = runnable.pop()
        actions, start, end = schedule.ranks[rank], starts[rank], ends[rank]
        now = end[-1] if end else 0.0
        while len(end) < len(actions):
            action = actions[len(end)]
            stage = done.stages[rank][action.chunk]
            ready, missing = done.ready(action, stage)
            if missing >= 0:
                waiting[missing] = rank  # only its neighbour, or this rank itself, waits for an action
                break
            begin = max(now, ready)
            now = begin + seconds[action.kind][stage]
            start.append(begin)
            end.append(now)
            woken = waiting.pop(done.finish(action, stage, now), None)
            if woken is not None:
                runnable.append(woken)
    _check_complete(schedule, ends)
    return starts, ends


class _Done:
    """Ends of the actions so far: forwards, backwards (of the input) by stage * micro-batches + micro-batch."""

    def __init__(self, schedule: PipelineSchedule, transfer_s: float) -> None:
        self.micro_batches = schedule.micro_batches
        ranks = schedule.stage_ranks()
        self.size = len(ranks) * schedule.micro_batches
        self.ends = [NEVER] * (2 * self.size)
        """F of every stage, then B or I of every stage."""
        self.last = len(ranks) - 1
        self.hop_s = [0.0 if a == b else transfer_s for a, b in itertools.pairwise(ranks)]
        """Seconds from stage s to s + 1 or back."""
        self.stages = [
            [schedule.stage(rank, chunk) for chunk in range(schedule.virtual_stages)] for rank in range(schedule.pp)
        ]

    def ready(self, action: Action, stage: int) -> tuple[float, int]:
        """(when its inputs are there, -1), or (NEVER, the input that is still missing)."""
        at = stage * self.micro_batches + action.micro_batch
        if action.kind == "F":
            if stage == 0:
                return 0.0, -1
            before, hop = at - self.micro_batches, self.hop_s[stage - 1]
        elif action.kind == "W":
            before, hop = self.size + at, 0.0
        else:
            if self.ends[at] == NEVER:
                return NEVER, at
            if stage == self.last:
                return self.ends[at], -1
            before, hop = self.size + at + self.micro_batches, self.hop_s[stage]
        end = self.ends[before]
        return (NEVER, before) if end == NEVER else (end + hop, -1)

    def finish(self, action: Action, stage: int, end_s: float) -> int:
        """Note the end of an action; its number, -1 for W, which nothing waits for."""
        if action.kind == "W":
            return -1
        at = stage * self.micro_batches + action.micro_batch + (0 if action.kind == "F" else self.size)
        self.ends[at] = end_s
        return at


def _check_complete(schedule: PipelineSchedule, ends: Sequence[Sequence[float]]) -> None:
    """InputError naming the first action that could never start."""
    for rank, (actions, end) in enumerate(zip(schedule.ranks, ends, strict=True)):
        if len(end) < len(actions):
            action = actions[len(end)]
            raise InputError(
                f"{action.kind} of micro-batch {action.micro_batch} on stage {schedule.stage(rank, action.chunk)} "
                f"(rank {rank}, action {len(end)}) waits for ever",
                place=f"schedule {schedule.name}",
                remedy="put every action after the ones it needs",
            )
