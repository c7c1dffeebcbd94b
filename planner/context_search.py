"""The part of the space with context parallelism, the most hopeful first: there are many more ways to cut sequences than ever pay.

A way to compute (mesh, micro-batch, schedule, recompute, `cp_kind` ...) says how long a step takes at least, however its states are
spread and offloaded, its layers cut into stages, its axes ordered on the cluster and its knobs turned. Ways are written out with every way
to spread states in the order of that least time, until it passes NEAR_BEST times the quickest step that fits: what is left is slower than
the best. Where nothing fits yet, or the least memory is asked for, those that need least memory come first, and MOST_WRITTEN at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.axis_order import ORDERS
from shardplan.costmodel.estimate import memory_alone, times_alone
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import OFFLOAD, RATIO_STEPS, LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.planner.at_setting import estimated
from shardplan.planner.factors import Factors
from shardplan.planner.placement import as_innermost, movable, open_orders, with_bubble
from shardplan.planner.ranking import Objective
from shardplan.planner.sift import Sifted, sift
from shardplan.planner.space import Wishes

FloatArray = NDArray[np.float64]

NEAR_BEST = 1.02
"""Times the quickest step that fits: what may take less is looked at, so that the shortlist has it."""
SPREADING_PARTS = ("dp_exposed_s", "optimizer_s", "offload_exposed_s")
"""Time parts that depend on how states are spread."""
LAYOUTS_AT_ONCE = 1 << 16
"""Written out and estimated before the least time of the next ways is looked at again, about."""
MOST_WRITTEN = 1 << 20
"""Layouts written out that nothing says are slower than the best; where there are more, the search says so."""


@dataclass(kw_only=True)
class Written:
    """What was written out so far."""

    fastest: float
    """The quickest step that fits."""
    slower: int = 0
    """Layouts left: their least time says that they are not near the best, or there are too many (then not `complete`)."""
    complete: bool = True


def write_out(
    setting: Setting, wishes: Wishes, sifted: Sifted, written: Written, objective: Objective, headroom: float
) -> Iterator[tuple[float, Estimates]]:
    """(share of the ways behind it, layouts that no rule refuses) of what `sifted` left waiting, `written` kept up to date."""
    if not sifted.waiting:
        return
    ways = Factors.joined(sifted.waiting)
    partners = ways.partners()
    written.slower = int(partners.sum())
    by_time = objective != "memory"
    least_s = least_s_of(setting, ways.computing, wishes) if by_time else np.zeros(len(partners))
    quick = by_time and np.isfinite(written.fastest)
    order = np.argsort(least_s if quick else _lean_bytes(setting, ways.computing), kind="stable")
    piece_of = np.cumsum(partners[order]) // LAYOUTS_AT_ONCE
    out, done = 0, 0
    for piece in np.split(order, np.flatnonzero(np.diff(piece_of)) + 1):
        done += len(piece)
        chosen = np.sort(piece[least_s[piece] < NEAR_BEST * written.fastest])
        if not len(chosen):
            continue
        if out >= MOST_WRITTEN:
            written.complete = False
            return
        count = int(partners[chosen].sum())
        out, written.slower = out + count, written.slower - count
        layouts = sift(setting, ways.with_rows(chosen).layouts(), sifted.refused, sifted.later)
        if len(layouts):
            found = estimated(setting, layouts)
            fitting = found.fits(headroom)
            written.fastest = min(written.fastest, float(np.min(found.step_s, where=fitting, initial=np.inf)))
            yield done / len(order), found


def _lean_bytes(setting: Setting, computing: LayoutTable) -> FloatArray:
    """Bytes on the device about, (N,), with states spread over all ranks and every layer recomputed: what is likely to fit comes first."""
    lean = replace(
        _bare(computing), zero=np.full(len(computing), 3), recompute=np.full(len(computing), RECOMPUTE.index("full"))
    )
    return memory_alone(setting, lean, stages="mean").device_peak_bytes


def least_s_of(setting: Setting, computing: LayoutTable, wishes: Wishes) -> FloatArray:
    """Seconds that a step takes at least, (N,), whatever columns the layouts of `computing` get that say how states are spread, however
    their layers are cut into stages, in any open order of axes and with any knob turned.

    Where that is no bound (`as_innermost`), what axes exchange is left out.
    """
    bare, orders = _bare(computing), open_orders(setting, wishes)
    moved = movable(computing, orders)
    innermost, bounded = as_innermost(setting, bare)
    least_s = np.empty(len(bare))
    at = np.flatnonzero(moved & bounded)
    if len(at):
        least_s[at] = _without_spreading(times_alone(setting, innermost.take(at), stages="mean"))
    at = np.flatnonzero(~(moved & bounded))
    if len(at):
        usual = replace(bare.take(at), order=np.full(len(at), ORDERS.index(orders[0])))
        time = times_alone(setting, usual, stages="mean")
        alone = np.sum([time[part] for part in ("compute_s", "recompute_s", "host_s")], axis=0)
        elsewhere_s = np.where(moved[at], with_bubble(time, alone), np.inf)
        least_s[at] = np.minimum(_without_spreading(time), elsewhere_s)
    return least_s


def _without_spreading(time: Mapping[str, FloatArray]) -> FloatArray:
    """Seconds of a step without what depends on how states are spread."""
    return time["step_s"] - sum(time[part] for part in SPREADING_PARTS)


def _bare(computing: LayoutTable) -> LayoutTable:
    """The layouts with states on every rank and nothing offloaded."""
    rows = len(computing)
    return replace(
        computing,
        zero=np.zeros(rows, dtype=np.int64),
        dp_shard=computing.dp,
        offload_optimizer=np.full(rows, OFFLOAD.index("none")),
        offload_params=np.full(rows, OFFLOAD.index("none")),
        offload_ratio=np.full(rows, RATIO_STEPS),
        hpz=np.ones(rows, dtype=np.int64),
    )
