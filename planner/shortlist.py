"""From a ranking to a shortlist: the best layout of each idea, and what less memory costs in time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.recompute import ALL_LAYERS, RECOMPUTE
from shardplan.costmodel.remedies import LEAST_SAVING

IDEA_COLUMNS = ("dp", "tp", "pp", "cp", "ep", "zero", "offload_optimizer")
"""Two layouts that agree in these, and in whether they recompute every layer, are one idea; micro-batch, schedule, virtual stages,
sequence parallelism, hybrid sharding and recompute of some layers or operators are its variants."""
FULL = RECOMPUTE.index("full")
RUNNERS_UP = 3
"""Ideas beside the best that are refined for themselves and explained."""

IndexArray = NDArray[np.intp]


def distinct(layouts: LayoutTable) -> tuple[IndexArray, IndexArray]:
    """(row of the best variant, number of variants) of each idea in a ranking of N layouts, best first; both of shape (ideas,)."""
    code = np.zeros(len(layouts), dtype=np.int64)
    for column in (*(getattr(layouts, name) for name in IDEA_COLUMNS), _recomputes_all(layouts)):
        values, index = np.unique(column, return_inverse=True)
        code = code * len(values) + index
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    order = np.argsort(first)
    return first[order], counts[order]


def worth_telling(estimates: Estimates, ideas: IndexArray) -> NDArray[np.bool_]:
    """Which of the `ideas`, rows of a ranking in its order, say something new: another mesh than all before, or the same with LEAST_SAVING
    less device memory. Another ZeRO stage or a tenth of the optimizer off the GPU, slower and no smaller, is a copy; so is cp in place
    of dp, as with twice the sequences per micro-batch each of half the length."""
    some = estimates.layouts.take(ideas)
    meshes = np.stack([some.dp * some.cp, some.tp, some.pp, some.ep], axis=1)
    least: dict[bytes, float] = {}
    told = np.zeros(len(ideas), dtype=bool)
    for at, (mesh, row) in enumerate(zip(meshes, ideas, strict=True)):
        peak, before = float(estimates.device_peak_bytes[row]), least.get(mesh.tobytes(), np.inf)
        told[at] = peak <= (1.0 - LEAST_SAVING) * before
        least[mesh.tobytes()] = min(peak, before) if told[at] else before
    return told


def of_idea(layouts: LayoutTable, ideas: LayoutTable, at: int) -> IndexArray:
    """Rows of `layouts` that are variants of row `at` of `ideas`, with any recompute."""
    return np.flatnonzero(np.all([getattr(layouts, name) == getattr(ideas, name)[at] for name in IDEA_COLUMNS], axis=0))


def same_idea(one: Layout, other: Layout) -> bool:
    """Whether two layouts are variants of one idea."""
    first, _ = distinct(layout_table([one, other]))
    return len(first) == 1


def _recomputes_all(layouts: LayoutTable) -> NDArray[np.bool_]:
    return (layouts.recompute == FULL) & (layouts.recompute_layers == ALL_LAYERS)


def memory_front(estimates: Estimates) -> IndexArray:
    """Rows of a ranking by time, fastest first, each of which needs at least LEAST_SAVING less device memory than the one before:
    the Pareto front over time and memory without its small steps."""
    by_time = np.argsort(estimates.step_s, kind="stable")
    peak = estimates.device_peak_bytes[by_time]
    front, least = list[int](), np.inf
    for at in np.flatnonzero(peak <= np.minimum.accumulate(peak)):
        if peak[at] <= (1.0 - LEAST_SAVING) * least:
            front.append(int(by_time[at]))
            least = float(peak[at])
    return np.asarray(front, dtype=np.intp)
