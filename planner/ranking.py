"""What a search answers, and the order of its layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimates import Estimates
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.placement import Placement
from shardplan.planner.sift import Refusal

Objective = Literal["throughput", "cost", "gpus", "memory", "deadline"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "cost", "gpus", "memory", "deadline")


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Ranked layouts that fit, and the account of the others."""

    cluster: Cluster
    ranked: Estimates | None
    """Best first; None when nothing fits."""
    closest: Estimates | None
    """The layout of the space that needs least device memory, when nothing fits; `closest.py` looks for a nearer one."""
    looked_at: int
    refused: tuple[Refusal, ...]
    """Largest first; a layout that breaks several rules counts for the first in the list of rules."""
    slower: int
    """Left out because a step of theirs takes too long whatever is done (`context_search.py`), or because another schedule takes as long
    and holds less (`sift.py`), whether they fit or not."""
    does_not_fit: int
    refined: int
    """Variants looked at beyond the space: recompute of some layers or parts, shares of the optimizer, ZeRO++ (`knobs.py`), stages
    cut otherwise than evenly (`stage_search.py`)."""
    placement: Placement | None
    """How the axes of the ranked layouts were laid on the cluster."""
    proved: bool
    """No cut of the layers into stages that was left out could be better than the first."""
    complete: bool
    """No layout is better than the first: nothing that could be was left out to save time, cuts included."""
    partial: bool = False
    """It was interrupted: the best of what was looked at by then."""
    seconds: float


def nothing_yet(cluster: Cluster) -> SearchResult:
    """Of a search that was interrupted before it found anything."""
    return SearchResult(
        cluster=cluster,
        ranked=None,
        closest=None,
        looked_at=0,
        refused=(),
        slower=0,
        does_not_fit=0,
        refined=0,
        placement=None,
        proved=False,
        complete=False,
        partial=True,
        seconds=0.0,
    )


def order_of(estimates: Estimates, rows: NDArray[np.intp], objective: Objective) -> NDArray[np.intp]:
    """`rows` best first; ties break by the other figure, then by less context parallelism, then by the layout's columns."""
    first, second = estimates.step_s[rows], estimates.device_peak_bytes[rows]
    if objective == "memory":
        first, second = second, first
    layouts = estimates.layouts.with_constants()
    columns = [column[rows] for column in reversed(layouts.columns().values()) if column.strides != (0,)]
    return rows[np.lexsort((*columns, layouts.cp[rows], second, first))]
