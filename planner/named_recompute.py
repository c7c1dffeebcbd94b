"""The quickest set of named parts to recompute (`recompute=selective:core_attn+mlp`) that makes a layout fit.

Recomputing one part more saves memory and costs time. So a part without which all the others do not fit is in every set that fits; these
parts together say how long a step takes at least, and where they fit no set is quicker. Else the sets that contain them are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.estimate import memory_alone
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.recompute import PART_BITS, RECOMPUTE
from shardplan.costmodel.recompute_rules import usable_parts
from shardplan.costmodel.rule import Setting
from shardplan.planner.at_setting import estimated, fitting, unbroken
from shardplan.planner.placement import least_step_s, may_take_less
from shardplan.planner.space import Wishes, asked

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
NONE, SELECTIVE = (RECOMPUTE.index(word) for word in ("none", "selective"))
LAYOUTS_AT_ONCE = 2048
MOST_ROWS = 300_000
"""Sets of parts that are compared at most, those of the most hopeful layouts first."""


def named_sets(setting: Setting) -> tuple[int, ...]:
    """Every set of parts, as the sum of its PART_BITS, that the runtime can run again and the model has; the smallest first."""
    bits = [PART_BITS[part] for part in usable_parts(setting)]
    sets = [sum(bit for n, bit in enumerate(bits) if some >> n & 1) for some in range(1, 1 << len(bits))]
    return tuple(sorted(sets, key=int.bit_count))


def with_all_parts(setting: Setting, layouts: LayoutTable, wishes: Wishes, headroom: float) -> BoolArray:
    """Layouts that GPUs hold with every part recomputed, (N,): they hold the others with no set; none where the user asked otherwise."""
    sets = _open_sets(setting, wishes)
    if not sets or not len(layouts):
        return np.zeros(len(layouts), dtype=bool)
    return memory_alone(setting, _with(layouts, np.full(len(layouts), sets[-1]))).fits_gpu(headroom)


def parts_recomputed(
    setting: Setting, hopeful: Estimates, wishes: Wishes, headroom: float, *, best_s: float
) -> tuple[LayoutTable | None, int, bool]:
    """(layouts that fit by named parts and may be the fastest, layouts estimated for it, whether all that may be were looked at).

    `hopeful` are layouts that do not fit without recompute; GPUs hold them `with_all_parts`.
    """
    sets, layouts = _open_sets(setting, wishes), hopeful.layouts
    if not sets or not len(layouts):
        return None, 0, True
    least_s = least_step_s(setting, hopeful, wishes)
    rows = np.flatnonzero(least_s < best_s)
    rows = rows[np.argsort(least_s[rows], kind="stable")]
    tried, compared, kept = 0, 0, list[LayoutTable]()
    for start in range(0, len(rows), LAYOUTS_AT_ONCE):
        some = rows[start : start + LAYOUTS_AT_ONCE]
        some = some[least_s[some] < best_s]
        if not len(some):
            break
        its = layouts.take(some)
        needed = _needed(setting, its, sets, headroom)
        some_part = (needed > 0) | (("recompute", "none") not in wishes.forbidden)
        with_needed = estimated(setting, _with(its, needed))
        quick = may_take_less(setting, with_needed, wishes, best_s)
        enough = some_part & with_needed.fits(headroom) & unbroken(setting, with_needed.layouts)
        tried += len(some) * (sets[-1].bit_count() + 1)
        candidates = [with_needed.take(np.flatnonzero(quick & enough))]
        at, which = np.nonzero((np.asarray(sets)[None, :] & needed[:, None]) == needed[:, None])
        open_rows = (quick & ~enough)[at]
        at, which = at[open_rows], which[open_rows]
        compared, tried = compared + len(at), tried + len(at)
        if compared > MOST_ROWS:
            return (stacked(kept) if kept else None), tried, False
        others = _with(its.take(at), np.asarray(sets)[which])
        others = others.take(unbroken(setting, others))
        if len(others):
            candidates.append(estimated(setting, others))
        for found in candidates:
            fits = found.fits(headroom)
            best_s = min(best_s, float(np.min(found.step_s, where=fits, initial=np.inf)))
            kept.append(found.layouts.take(np.flatnonzero(fits & (least_step_s(setting, found, wishes) <= best_s))))
    return (stacked(kept) if kept else None), tried, True


def _open_sets(setting: Setting, wishes: Wishes) -> tuple[int, ...]:
    return () if asked(wishes, "recompute", "selective") else named_sets(setting)


def _needed(setting: Setting, layouts: LayoutTable, sets: Sequence[int], headroom: float) -> IntArray:
    """Parts, as the sum of their PART_BITS, that every set which makes a layout fit contains, (N,)."""
    bits, without = _each_left_out(layouts, sets)
    return (bits[:, None] * ~fitting(setting, without, headroom).reshape(len(bits), -1)).sum(axis=0)


def _each_left_out(layouts: LayoutTable, sets: Sequence[int]) -> tuple[IntArray, LayoutTable]:
    """(bits of the parts, (P,); the layouts with all parts recomputed but the first, then but the second, and so on, P * N rows)."""
    bits = np.asarray(sets[: sets[-1].bit_count()])
    again = layouts.take(np.tile(np.arange(len(layouts)), len(bits)))
    return bits, _with(again, np.repeat(sets[-1] - bits, len(layouts)))


def with_needed_parts(setting: Setting, layouts: LayoutTable, headroom: float) -> LayoutTable:
    """The layouts with the parts recomputed that every set which makes them fit contains, however their layers are cut into stages."""
    sets = named_sets(setting)
    if not len(layouts) or not sets:
        return _with(layouts, np.zeros(len(layouts), dtype=np.int64))
    usable = setting.cluster.gpu.memory_bytes * (1.0 - headroom) / (1.0 + memory_band(setting.cluster))
    bits, without = _each_left_out(layouts, sets)
    peaks = memory_alone(setting, without, stages="mean").device_peak_bytes.reshape(len(bits), -1)
    return _with(layouts, (bits[:, None] * (peaks > usable)).sum(axis=0))


def _with(layouts: LayoutTable, parts: IntArray) -> LayoutTable:
    """The layouts with these parts recomputed, whether a rule refuses it or not."""
    return replace(layouts, recompute=np.where(parts > 0, SELECTIVE, NONE), recompute_parts=parts)
