"""The layer chain cut into stages by dynamic programming: exact, whatever a stage costs.

    minimise  peak_weight * max_k t_k + sum_weight * sum_k t_k,   t_k = seconds[k, i, j] of stage k with layers i to j - 1

With m micro-batches and a bubble of h seconds per second that one takes on the other stages, peak_weight = m - h and sum_weight = h are
what the pipeline takes in a step. Where the slowest stage waits for launches, its exchanges hide behind them: a penalty says how much less
of them does than at best. First the least maximum over all cuts (states: stages so far, layers so far; as in PipeDream, arXiv
1806.03377, section 3.1), then the least sum below each cap from there up, until a higher cap cannot pay any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

AS_LONG = 1e-12
"""Of the longest time, by which two differ at most that are the same but for rounding."""
EVENNESS = 1e-7
"""Of the sum: what breaks ties between cuts that take equally long, in favour of equal stages."""


def best_cut(
    seconds: FloatArray, *, peak_weight: float, sum_weight: float, penalty_s: FloatArray | None = None
) -> tuple[int, ...] | None:
    """Layers of each stage, or None where no cut is possible; `seconds` of shape (stages, layers + 1, layers + 1), inf = impossible.
    `penalty_s`, 0 or more, inf = never, of the same shape, is added for the slowest stage."""
    least_peak = _least(seconds, np.maximum)[0]
    if not np.isfinite(least_peak):
        return None
    least_sum = _least(seconds, np.add)[0]
    caps = np.unique(seconds[np.isfinite(seconds) & (seconds >= least_peak)])
    best, cut = np.inf, None
    for cap in caps:
        if peak_weight * cap + sum_weight * least_sum >= best:
            break
        at_cap = seconds == cap
        if penalty_s is not None and not penalty_s[at_cap].min() < best - peak_weight * cap - sum_weight * least_sum:
            continue
        below = np.where(seconds <= cap, seconds, np.inf)
        even = below * (1.0 + EVENNESS * np.where(np.isfinite(below), below, 0.0) / cap)
        _, found = _least(even, np.add)
        worth = _worth_s(seconds, found, penalty_s, peak_weight=peak_weight, sum_weight=sum_weight)
        if worth < best * (1.0 - 1e-12):
            best, cut = worth, found
        if penalty_s is None:
            continue
        slower_s = peak_weight * cap + sum_weight * _at(seconds, found).sum()  # with any stage of these as the slowest
        for some in _slowest_in_turn(even, at_cap & (penalty_s < best * (1.0 - 1e-9) - slower_s), penalty_s):
            total, found = _least(some, np.add)
            if not np.isfinite(total):
                continue
            worth = _worth_s(seconds, found, penalty_s, peak_weight=peak_weight, sum_weight=sum_weight)
            if worth < best * (1.0 - 1e-12):
                best, cut = worth, found
    return cut


def _worth_s(
    seconds: FloatArray, counts: Sequence[int], penalty_s: FloatArray | None, *, peak_weight: float, sum_weight: float
) -> float:
    """Seconds of a step that the cut with these layers of each stage takes, the penalty of its slowest stage included."""
    times = _at(seconds, counts)
    worth = float(peak_weight * times.max() + sum_weight * times.sum())
    if penalty_s is None:
        return worth
    penalties = _at(penalty_s, counts)
    return worth + float(penalties[slowest(times, penalties)])


def slowest(times: FloatArray, penalties: FloatArray) -> IntArray:
    """The stage that takes longest of each cut, (C,), both (C, stages); of those that take as long but for rounding, that with the least
    penalty."""
    longest = times.max(axis=-1, keepdims=True) * (1.0 - AS_LONG)
    return np.where(times >= longest, penalties, np.inf).argmin(axis=-1)


def _slowest_in_turn(seconds: FloatArray, may_be: NDArray[np.bool_], penalty_s: FloatArray) -> Iterator[FloatArray]:
    """The seconds once for each stage that `may_be` the slowest, and each penalty it can have there, so that it is."""
    for stage in np.flatnonzero(may_be.any(axis=(1, 2))):
        for penalty in np.unique(penalty_s[stage][may_be[stage]]):
            some = seconds.copy()
            some[stage] = np.where(may_be[stage] & (penalty_s[stage] == penalty), some[stage], np.inf)
            yield some


def _least(seconds: FloatArray, combine: np.ufunc) -> tuple[float, tuple[int, ...]]:
    """(least combined seconds of all stages, layers of each stage that give it); inf where no cut is possible."""
    stages, ends = seconds.shape[:2]
    so_far = np.full(ends, np.inf)
    so_far[0] = 0.0
    start = np.zeros((stages, ends), dtype=np.int64)
    for stage in range(stages):
        with_it = combine(so_far[:, None], seconds[stage])
        start[stage] = with_it.argmin(axis=0)
        so_far = with_it[start[stage], np.arange(ends)]
    end, counts = ends - 1, list[int]()
    for stage in reversed(range(stages)):
        first = int(start[stage, end])
        counts.append(end - first)
        end = first
    return float(so_far[-1]), tuple(reversed(counts))


def bounds_of(counts: Sequence[int]) -> tuple[IntArray, IntArray]:
    """(first layer, layer behind the last) of each stage."""
    held = np.asarray(counts, dtype=np.int64)
    ends: IntArray = held.cumsum()
    return ends - held, ends


def _at(table: FloatArray, counts: Sequence[int]) -> FloatArray:
    first, end = bounds_of(counts)
    return table[np.arange(len(counts)), first, end]


def every_cut(possible: NDArray[np.bool_], most: int) -> list[tuple[int, ...]] | None:
    """Layers of each stage of all cuts that are possible, (stages, layers + 1, layers + 1); None where they are more than `most`."""
    stages, ends = possible.shape[:2]
    ways = np.zeros((stages + 1, ends))
    ways[stages, -1] = 1.0
    for stage in reversed(range(stages)):
        ways[stage] = possible[stage].astype(np.float64) @ ways[stage + 1]
    if ways[0, 0] > most:
        return None
    found: list[tuple[int, ...]] = [()]
    for stage in range(stages):
        found = [
            (*counts, int(end) - sum(counts))
            for counts in found
            for end in np.flatnonzero(possible[stage, sum(counts)] & (ways[stage + 1] > 0))
        ]
    return found
