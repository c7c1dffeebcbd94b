"""Timing: median of samples within a time budget, in step with the other processes, on a warm device.

All the processes take the same number of calls and samples, so that they load the machine together and so that
collectives can be timed by the same code. Samples are short, so that the median drops those another program disturbed.

What a CPU computes is timed by the CPU time of the process, times the processes that share a core: other programs then do not count.
Collectives are timed by the wall, those of CPU processes each behind a product, since back to back they take half as long as in a
training step or less; where there are more processes than cores, samples are long enough to hold several time slices.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

Call = Callable[[], object]

SAMPLE_S = 1e-3
CROWDED_SAMPLE_S = 20e-3
CUDA_SAMPLE_CALLS = 64
MOST_CALLS = 65536
MOST_SAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Measures seconds per call on one device; the answer is the mean over the processes of each one's median."""

    device: torch.device
    budget_s: float
    """Time to spend on one measurement, warm-up included, unless three calls take longer."""
    sample_s: float = SAMPLE_S
    """Length of one sample; 0 = every call is one, right for collectives, which wait for each other anyway."""
    per_core: float = 1.0
    """Of the processes that measure together, at least 1."""
    group: dist.ProcessGroup | None = None
    """CPU group of the processes that measure together; None = alone."""
    cover: Call | None = None
    """On a GPU: a few milliseconds of matrix products. Queued ahead of a sample, they let the host get ahead, so that
    short kernels are timed without their launches, and keep the clocks and temperature at their working level."""
    cover_s: float = 0.0
    """Seconds of the cover; they count towards the budget."""

    def agree(self, seconds: float) -> float:
        """Mean of `seconds` over the processes; also their meeting point."""
        if self.group is None:
            return seconds
        value = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(value, group=self.group)
        return float(value) / dist.get_world_size(self.group)

    def host_seconds(self, call: Call) -> float:
        """Seconds of one call on the wall, the device's work included."""
        return self._median(call, self._wall_sample, most_calls=MOST_CALLS, ahead_s=0.0)

    def seconds_behind(self, work: Call, call: Call) -> float:
        """Wall seconds of one call that comes behind `work`, which does not count: with the wake-up of threads and the wait for whichever
        process was later, as between the products of a training step."""
        work()
        work_s = self.agree(self._wall_sample(work, 3))

        def sample(one: Call, _calls: int) -> float:
            work()
            return self._wall_sample(one, 1)

        return self._median(call, sample, most_calls=1, ahead_s=work_s)

    def device_seconds(self, call: Call) -> float:
        """Seconds the device spends on one call; on a CPU those of the process."""
        if self.device.type == "cpu":
            return self.per_core * self._median(call, self._process_sample, most_calls=MOST_CALLS, ahead_s=0.0)
        return self._median(call, self._event_sample, most_calls=CUDA_SAMPLE_CALLS, ahead_s=self.cover_s)

    def _median(self, call: Call, sample: Callable[[Call, int], float], *, most_calls: int, ahead_s: float) -> float:
        call()  # allocations, library start-up, choice of algorithm
        each_s = self._warm_up(call)
        calls = max(1, min(most_calls, round(self.sample_s / each_s)))
        samples = max(3, min(MOST_SAMPLES, math.floor(0.8 * self.budget_s / (calls * each_s + ahead_s))))
        self.agree(0.0)
        return self.agree(statistics.median(sample(call, calls) for _ in range(samples)))

    def _warm_up(self, call: Call) -> float:
        """Call until a fifth of the budget has passed; seconds per call of the last round, the same on all processes."""
        calls, spent_s = 1, 0.0
        while True:
            each_s = max(self.agree(self._wall_sample(call, calls)), 1e-9)
            spent_s += each_s * calls
            if spent_s >= 0.2 * self.budget_s or calls >= MOST_CALLS:
                return each_s
            calls = min(calls * 4, max(1, math.ceil(0.1 * self.budget_s / each_s)), MOST_CALLS)

    def _wall_sample(self, call: Call, calls: int) -> float:
        self._synchronize()
        start_s = time.perf_counter()
        for _ in range(calls):
            call()
        self._synchronize()
        return (time.perf_counter() - start_s) / calls

    def _process_sample(self, call: Call, calls: int) -> float:
        start_s = time.process_time()
        for _ in range(calls):
            call()
        return (time.process_time() - start_s) / calls

    def _event_sample(self, call: Call, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.cover is not None:
            self.cover()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3 / calls

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def cuda_cover(device: torch.device) -> Call:
    """About 2 TFLOP of fp16 matrix products on random data: 3 ms of an H100, more of a slower GPU."""
    left, right = (torch.randn(4096, 4096, device=device, dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(left)

    def cover() -> None:
        for _ in range(16):
            torch.mm(left, right, out=out)

    return cover


def heat(cover: Call, seconds: float) -> float:
    """Run `cover` for `seconds`, so that clocks and temperature settle; returns the seconds of the last one."""
    deadline_s = time.perf_counter() + seconds
    while True:
        start_s = time.perf_counter()
        cover()
        torch.cuda.synchronize()
        if time.perf_counter() >= deadline_s:
            return time.perf_counter() - start_s
