"""As few layers under full recompute as make a layout fit: `full:N` found by bisection instead of being enumerated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.placement import least_step_s
from shardplan.planner.space import Wishes, asked

NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")


def partly_recomputed(
    setting: Setting, estimates: Estimates, wishes: Wishes, headroom: float, *, best_s: float = np.inf
) -> tuple[LayoutTable | None, int]:
    """(layouts that fit once some layers of each stage are recomputed, with the least number that does; layouts estimated for it).

    Taken are the layouts without recompute that do not fit and could be faster than everything that fits: recompute only adds time, so
    no other can become the fastest, in whatever order of axes. None where the runtime recomputes all layers or none, or the user asked
    otherwise.
    """
    if asked(wishes, "recompute", "full") or not setting.runtime.abilities.partial_recompute:
        return None, 0
    fits = estimates.fits(headroom)
    fastest = min(best_s, float(np.min(estimates.step_s, where=fits, initial=np.inf)))
    layouts = estimates.layouts
    hopeful = ~fits & (layouts.recompute == NONE) & (least_step_s(setting, estimates, wishes) < fastest)
    hopeful &= layouts.pp * 2 <= setting.model.layer_count
    rows = layouts.take(np.flatnonzero(hopeful))
    looked_at = 0

    def fitting(table: LayoutTable, layers: NDArray[np.int64]) -> NDArray[np.bool_]:
        nonlocal looked_at
        looked_at += len(table)
        return estimated(setting, _recomputing(table, layers)).fits(headroom)

    if not len(rows):
        return None, 0
    most = setting.model.layer_count // rows.pp
    at_all = fitting(rows, most)
    rows, most = rows.take(at_all), most[at_all]
    if not len(rows):
        return None, looked_at
    too_few = np.zeros_like(most)
    while (most - too_few > 1).any():
        middle = (most + too_few + 1) // 2
        enough = fitting(rows, middle)
        most, too_few = np.where(enough, middle, most), np.where(enough, too_few, np.minimum(middle, most - 1))
    chosen = _recomputing(rows, most)
    return chosen.take(unbroken(setting, chosen)), looked_at


def _recomputing(table: LayoutTable, layers: NDArray[np.int64]) -> LayoutTable:
    """The rows with `layers` layers of each stage under full recompute."""
    return replace(table, recompute=np.full(len(table), FULL), recompute_layers=layers)
