"""Times several ways to compute the same thing, in interleaved rounds, so that each meets the same clocks and heat.

What is timed is the device's work. Before each call the device is kept busy for longer than the host needs to queue it, so
that a call of a few short kernels is not timed at the pace of the Python that launches them; the host's own time is
measured beside it. That holds for any call, also for one that a CUDA graph cannot capture.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache holds: read before each call, so that a kernel reads device memory as it would in training."""
HEAD_START = 8
"""Flushes queued before a round, while the host gets ahead."""
LEAD, LEAD_S, LONGEST_LEAD_S = 1.5, 50e-6, 20e-3
"""The device waits so many times the host's time of a call, and so much more, before each; never longer than the last."""
CYCLES_PER_S = 2e9
"""No board runs faster, so waits are at least as long as asked for."""
WARM_UP_S = 0.025
FEWEST = 5
MOST = 200


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call on the device: percentiles of the round with the least median."""

    p20_s: float
    p50_s: float
    p80_s: float
    host_s: float | None = None
    """What the host needs to queue the call: an eager loop of such calls goes no faster. None where both are one."""


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


class Flush:
    """Empties the L2 cache of a GPU: by reading, since lines that were written have to leave it while the next kernel runs.

    That costs a kernel 1 to 7 us on an H200, a tenth of what a reduction of int4 codes takes (reports/measured/h200-2026-11-27/flush.csv).
    """

    def __init__(self, device: torch.device) -> None:
        numel = FLUSH_BYTES // 4 if device.type == "cuda" else 1
        self._read = torch.zeros(numel, device=device)
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        """Queue it."""
        torch.sum(self._read, dim=0, out=self._sum)


class Stopwatch:
    """CUDA events around each call on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flush = Flush(device)

    def interleaved(self, calls: Mapping[str, Call], plan: Plan) -> dict[str, Timing | str]:
        """Rounds of every provider in turn; what fails is reported as its error and left out of later rounds."""
        repeats: dict[str, int] = {}
        hosts: dict[str, float] = {}
        rounds: dict[str, list[list[float]]] = {name: [] for name in calls}
        failed: dict[str, str] = {}
        for name, call in calls.items():
            try:
                each_s, hosts[name] = self._warm_up(call, plan.warm_up_s)
                repeats[name] = max(plan.fewest, min(MOST, round(plan.round_s / each_s)))
            except Exception as error:  # a provider may fail in any way; it is a row of the table then
                failed[name] = first_line(error)
        for _ in range(plan.rounds):
            for name, count in repeats.items():
                if name not in failed:
                    try:
                        rounds[name].append(self._round(calls[name], count, hosts[name]))
                    except Exception as error:
                        failed[name] = first_line(error)
        return {
            name: failed[name] if name in failed else _best(rounds[name], hosts[name] if self.cuda else None)
            for name in calls
        }

    def _warm_up(self, call: Call, warm_up_s: float) -> tuple[float, float]:
        """Call once, for compilation, then until the time has passed; seconds of one call, and of the host to queue it."""
        call()
        self._wait()
        start_s, queued = time.perf_counter(), list[float]()
        while True:
            queued.append(_wall_s(call))
            self._wait()
            spent_s = time.perf_counter() - start_s
            if spent_s >= warm_up_s:
                return max(spent_s / len(queued), 1e-7), statistics.median(queued)

    def _round(self, call: Call, count: int, host_s: float) -> list[float]:
        if not self.cuda:
            return [_wall_s(call) for _ in range(count)]
        for _ in range(HEAD_START):
            self._flush()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        lead = round(min(LONGEST_LEAD_S, LEAD * host_s + LEAD_S) * CYCLES_PER_S)
        call()  # after another provider: its code and tables are cold
        for start, end in events:
            torch.cuda._sleep(lead)  # pyright: ignore[reportPrivateUsage]
            self._flush()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _wall_s(call: Call) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _best(rounds: list[list[float]], host_s: float | None) -> Timing:
    best = min(rounds, key=statistics.median)
    ordered = sorted(best)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(p20_s=low, p50_s=statistics.median(best), p80_s=high, host_s=host_s)


def first_line(error: BaseException) -> str:
    """What went wrong, in a few words."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:160] if text else type(error).__name__
