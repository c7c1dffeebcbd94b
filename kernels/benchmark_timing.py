"""Times several ways to compute the same thing, in interleaved rounds, so that each meets the same clocks and heat."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache holds: written before each call, so that a kernel reads device memory as it would in training."""
HEAD_START = 8
"""Flushes queued before a round: the host gets ahead, and short kernels are timed without their launches."""
MOST_FLUSHES = 16
"""Before one call, to keep the host ahead where it takes longer to queue a call than the device to run it."""
HOST_MARGIN = 1.5
WARM_UP_S = 0.025
FEWEST = 5
MOST = 200


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: percentiles of the round with the least median."""

    p20_s: float
    p50_s: float
    p80_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure."""

    rounds: int = 3
    round_s: float = 0.05
    """Aim for one provider in one round, the flushes not counted."""
    warm_up_s: float = WARM_UP_S
    fewest: int = FEWEST


ONCE = Plan(rounds=1, round_s=0.0, warm_up_s=0.0, fewest=1)
"""For a dry run."""


class Stopwatch:
    """CUDA events around each call on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flushed = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)
        self._flush_s = self._time_flush() if self.cuda else 1.0

    def interleaved(self, calls: Mapping[str, Call], plan: Plan) -> dict[str, Timing | str]:
        """Rounds of every provider in turn; what fails is reported as its error and left out of later rounds."""
        repeats: dict[str, int] = {}
        flushes: dict[str, int] = {}
        rounds: dict[str, list[list[float]]] = {name: [] for name in calls}
        failed: dict[str, str] = {}
        for name, call in calls.items():
            try:
                each_s, queue_s = self._warm_up(call, plan.warm_up_s)
                flushes[name] = flushes_before(each_s, queue_s, self._flush_s)
                repeats[name] = max(plan.fewest, min(MOST, round(plan.round_s / each_s)))
            except Exception as error:  # a provider may fail in any way; it is a row of the table then
                failed[name] = first_line(error)
        for _ in range(plan.rounds):
            for name, count in repeats.items():
                if name not in failed:
                    try:
                        rounds[name].append(self._round(calls[name], count, flushes[name]))
                    except Exception as error:
                        failed[name] = first_line(error)
        return {name: failed[name] if name in failed else _best(rounds[name]) for name in calls}

    def _time_flush(self) -> float:
        """Seconds that a flush takes the device."""
        self._flushed.zero_()
        self._wait()
        start_s = time.perf_counter()
        for _ in range(HEAD_START):
            self._flushed.zero_()
        self._wait()
        return (time.perf_counter() - start_s) / HEAD_START

    def _warm_up(self, call: Call, warm_up_s: float) -> tuple[float, float]:
        """Call once, for compilation, then until the time has passed; seconds of one call, and of queueing it."""
        call()
        self._wait()
        start_s, count, queue_s = time.perf_counter(), 0, 0.0
        while True:
            before_s = time.perf_counter()
            call()
            queue_s += time.perf_counter() - before_s
            self._wait()
            count += 1
            spent_s = time.perf_counter() - start_s
            if spent_s >= warm_up_s:
                return max(spent_s / count, 1e-7), queue_s / count

    def _round(self, call: Call, count: int, flushes: int) -> list[float]:
        if not self.cuda:
            return [_wall_s(call) for _ in range(count)]
        for _ in range(HEAD_START):
            self._flushed.zero_()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        call()  # after another provider: its code and tables are cold
        for start, end in events:
            for _ in range(flushes):
                self._flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def flushes_before(each_s: float, queue_s: float, flush_s: float) -> int:
    """Flushes before each call, so that the device has not done with them when the host has queued the call.

    Otherwise the time between the two events would hold what the host takes: Python, dispatch, the launch.
    """
    ahead_s = HOST_MARGIN * queue_s - (each_s - queue_s)
    return min(MOST_FLUSHES, 1 + max(0, math.ceil(ahead_s / flush_s)))


def _wall_s(call: Call) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _best(rounds: list[list[float]]) -> Timing:
    best = min(rounds, key=statistics.median)
    ordered = sorted(best)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(p20_s=low, p50_s=statistics.median(best), p80_s=high)


def first_line(error: BaseException) -> str:
    """What went wrong, in a few words."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:160] if text else type(error).__name__
