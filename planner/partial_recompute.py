"""As few layers under full recompute as make a layout fit: `full:N` found between too few and enough instead of being enumerated.

A row that recomputes nothing stands for one with as few recomputed layers as make it fit. Where it must not stay as it is, because its
activations are off the GPU (inputs of recomputed layers) or the user forbids `recompute=none`, it only stands for others.
"""

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

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NONE, SELECTIVE, FULL = (RECOMPUTE.index(word) for word in ("none", "selective", "full"))


def recomputes_layers(setting: Setting, wishes: Wishes) -> bool:
    """Whether any number of layers may be recomputed: the runtime can, and the user has not said otherwise."""
    return setting.runtime.abilities.partial_recompute and not asked(wishes, "recompute", "full")


def only_stands_for_others(layouts: LayoutTable, wishes: Wishes) -> BoolArray:
    """Rows, (N,), that recompute nothing but have to."""
    forbidden = ("recompute", "none") in wishes.forbidden
    return (layouts.recompute == NONE) & ((layouts.offload_activations > 0) | forbidden)


def as_meant(layouts: LayoutTable, wishes: Wishes) -> LayoutTable:
    """The rows as rules are to be asked of them: those that `only_stands_for_others` under full recompute."""
    stand = only_stands_for_others(layouts, wishes)
    return replace(layouts, recompute=np.where(stand, FULL, layouts.recompute)) if stand.any() else layouts


def standing_for_others(layouts: LayoutTable, wishes: Wishes) -> LayoutTable:
    """Rows without recompute to start from where the user forbids them: one for each way to compute that is left; else no rows."""
    kinds = [kind for kind in (FULL, SELECTIVE) if (layouts.recompute == kind).any()]
    if ("recompute", "none") not in wishes.forbidden or not kinds or "recompute" in wishes.fixed_words:
        return layouts.slice(0, 0)
    some = layouts.take(np.flatnonzero(layouts.recompute == kinds[0]))
    return replace(some, recompute=np.full(len(some), NONE))


def with_all_recomputed(
    setting: Setting, layouts: LayoutTable, wishes: Wishes, headroom: float
) -> tuple[BoolArray, FloatArray]:
    """(layouts that GPUs hold, bytes on the device), each (N,), with as many layers recomputed as every stage has; none where not
    `recomputes_layers`."""
    held, peak_bytes = np.zeros(len(layouts), dtype=bool), np.full(len(layouts), np.inf)
    if not recomputes_layers(setting, wishes):
        return held, peak_bytes
    deep = np.flatnonzero(layouts.pp < setting.model.layer_count)
    if len(deep):
        rows = layouts.take(deep)
        found = memory_alone(setting, _recomputing(rows, setting.model.layer_count // rows.pp))
        held[deep], peak_bytes[deep] = found.fits_gpu(headroom), found.device_peak_bytes
    return held, peak_bytes


def partly_recomputed(
    setting: Setting, hopeful: Estimates, least_bytes: FloatArray, headroom: float
) -> tuple[LayoutTable | None, int]:
    """(the layouts with the least number of recomputed layers of each stage with which they fit, as far as no rule refuses it; layouts
    estimated for it).

    `hopeful` are layouts that do not fit without recompute, or must have some; GPUs hold them, with `least_bytes`,
    `with_all_recomputed`.
    """
    if not len(hopeful):
        return None, 0
    usable = hopeful.capacity_bytes * (1.0 - headroom) / (1.0 + hopeful.bands.memory)
    layers, looked_at = _fewest(setting, hopeful, least_bytes, usable, headroom)
    chosen = _recomputing(hopeful.layouts, layers)
    return chosen.take(unbroken(setting, chosen)), looked_at


def _fewest(
    setting: Setting, hopeful: Estimates, least_bytes: FloatArray, usable_bytes: float, headroom: float
) -> tuple[IntArray, int]:
    """(layers of each stage that have to be recomputed, (N,); layouts estimated for it).

    Between a number that is too few and one that is enough, the peaks of both say where to look next: it falls by about as much with
    every layer. That number and the one below it are looked at together, which often settles it.
    """
    looked_at, rows = 0, hopeful.layouts
    enough, too_few = setting.model.layer_count // rows.pp, np.zeros(len(rows), dtype=np.int64)
    enough_bytes, few_bytes = np.array(least_bytes), np.array(hopeful.device_peak_bytes)
    left = np.flatnonzero(enough - too_few > 1)
    while len(left):
        low, high = too_few[left], enough[left]
        slope = (few_bytes[left] - enough_bytes[left]) / (high - low)
        more = np.ceil((few_bytes[left] - usable_bytes) / np.where(slope > 0, slope, np.inf)).astype(np.int64)
        middle = np.clip(low + more, low + 1, high - 1)
        two = middle - 1 > low  # the number below it, where that is not known yet
        at, layers = np.concatenate([left, left[two]]), np.concatenate([middle, middle[two] - 1])
        found = memory_alone(setting, _recomputing(rows.take(at), layers))
        good, peak_bytes, looked_at = found.fits(headroom), found.device_peak_bytes, looked_at + len(at)
        for some in (slice(0, len(left)), slice(len(left), None)):
            here, count, fit, peak = at[some], layers[some], good[some], peak_bytes[some]
            lower, upper = fit & (count < enough[here]), ~fit & (count > too_few[here])
            enough[here[lower]], enough_bytes[here[lower]] = count[lower], peak[lower]
            too_few[here[upper]], few_bytes[here[upper]] = count[upper], peak[upper]
        left = left[enough[left] - too_few[left] > 1]
    return enough, looked_at


def _recomputing(table: LayoutTable, layers: IntArray) -> LayoutTable:
    """The rows with `layers` layers of each stage under full recompute."""
    return replace(table, recompute=np.full(len(table), FULL), recompute_layers=layers)
