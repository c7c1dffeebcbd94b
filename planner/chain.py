"""The layer chain cut into stages by dynamic programming: exact, whatever a stage costs.

    minimise  peak_weight * max_k t_k + sum_weight * sum_k t_k,   t_k = seconds[k, i, j] of stage k with layers i to j - 1

With m micro-batches and a bubble of h seconds per second that one takes on the other stages, peak_weight = m - h and sum_weight = h are
what the pipeline takes in a step. First the least maximum over all cuts (states: stages so far, layers so far; as in PipeDream, arXiv
1806.03377, section 3.1), then the least sum below each cap from there up, until a higher cap cannot pay any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

EVENNESS = 1e-7
"""Of the sum: what breaks ties between cuts that take equally long, in favour of equal stages."""


def best_cut(seconds: FloatArray, *, peak_weight: float, sum_weight: float) -> tuple[int, ...] | None:
    """Layers of each stage, or None where no cut is possible; `seconds` of shape (stages, layers + 1, layers + 1), inf = impossible."""
    least_peak = _least(seconds, np.maximum)[0]
    if not np.isfinite(least_peak):
        return None
    least_sum = _least(seconds, np.add)[0]
    caps = np.unique(seconds[np.isfinite(seconds) & (seconds >= least_peak)])
    best, cut = np.inf, None
    for cap in caps:
        if peak_weight * cap + sum_weight * least_sum >= best:
            break
        below = np.where(seconds <= cap, seconds, np.inf)
        _, found = _least(below * (1.0 + EVENNESS * np.where(np.isfinite(below), below, 0.0) / cap), np.add)
        times = _times(seconds, found)
        worth = float(peak_weight * times.max() + sum_weight * times.sum())
        if worth < best * (1.0 - 1e-12):
            best, cut = worth, found
    return cut


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


def _times(seconds: FloatArray, counts: tuple[int, ...]) -> FloatArray:
    first, end = bounds_of(counts)
    return seconds[np.arange(len(counts)), first, end]
