"""As few layers under full recompute as make a layout fit: `full:N` found between too few and enough instead of being enumerated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import memory_alone
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.planner.at_setting import unbroken
from shardplan.planner.space import Wishes, asked

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")


def partly_recomputed(
    setting: Setting, hopeful: Estimates, wishes: Wishes, headroom: float
) -> tuple[LayoutTable | None, int]:
    """(layouts that fit once some layers of each stage are recomputed, with the least number that does; layouts estimated for it).

    `hopeful` are layouts without recompute that do not fit. None where the runtime recomputes all layers or none, or the user asked
    otherwise.
    """
    if asked(wishes, "recompute", "full") or not setting.runtime.abilities.partial_recompute:
        return None, 0
    deep = np.flatnonzero(hopeful.layouts.pp * 2 <= setting.model.layer_count)
    rows = hopeful.layouts.take(deep)
    if not len(rows):
        return None, 0
    usable = hopeful.capacity_bytes * (1.0 - headroom) / (1.0 + hopeful.bands.memory)
    layers, looked_at = _fewest(setting, rows, hopeful.device_peak_bytes[deep], usable, headroom)
    rows, most = rows.take(np.flatnonzero(layers)), layers[layers > 0]
    if not len(rows):
        return None, looked_at
    chosen = _recomputing(rows, most)
    return chosen.take(unbroken(setting, chosen)), looked_at


def _fewest(
    setting: Setting, rows: LayoutTable, bytes_without: FloatArray, usable_bytes: float, headroom: float
) -> tuple[IntArray, int]:
    """(layers of each stage that have to be recomputed, (N,), 0 where all are too few; layouts estimated for it).

    Between a number that is too few and one that is enough, the peaks of both say where to look next: it falls by about as much with
    every layer. That number and the one below it are looked at together, which often settles it.
    """
    looked_at = 0

    def look(at: IntArray, layers: IntArray) -> tuple[NDArray[np.bool_], FloatArray]:
        nonlocal looked_at
        looked_at += len(at)
        found = memory_alone(setting, _recomputing(rows.take(at), layers))
        return found.fits(headroom), found.device_peak_bytes

    every = np.arange(len(rows))
    enough, too_few = setting.model.layer_count // rows.pp, np.zeros(len(rows), dtype=np.int64)
    fits, enough_bytes = look(every, enough)
    few_bytes = np.array(bytes_without)
    left = every[fits & (enough - too_few > 1)]
    while len(left):
        low, high = too_few[left], enough[left]
        slope = (few_bytes[left] - enough_bytes[left]) / (high - low)
        more = np.ceil((few_bytes[left] - usable_bytes) / np.where(slope > 0, slope, np.inf)).astype(np.int64)
        middle = np.clip(low + more, low + 1, high - 1)
        two = middle - 1 > low  # the number below it, where that is not known yet
        at, layers = np.concatenate([left, left[two]]), np.concatenate([middle, middle[two] - 1])
        good, peak_bytes = look(at, layers)
        for some in (slice(0, len(left)), slice(len(left), None)):
            here, count, fit, peak = at[some], layers[some], good[some], peak_bytes[some]
            lower, upper = fit & (count < enough[here]), ~fit & (count > too_few[here])
            enough[here[lower]], enough_bytes[here[lower]] = count[lower], peak[lower]
            too_few[here[upper]], few_bytes[here[upper]] = count[upper], peak[upper]
        left = left[enough[left] - too_few[left] > 1]
    return np.where(fits, enough, 0), looked_at


def _recomputing(table: LayoutTable, layers: IntArray) -> LayoutTable:
    """The rows with `layers` layers of each stage under full recompute."""
    return replace(table, recompute=np.full(len(table), FULL), recompute_layers=layers)
