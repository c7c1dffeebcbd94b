"""From the table to integers: the most promising pipelines get their stages cut exactly, best first, until no bound is left below the best.

`estimate.lower_bounds` says what no cut of the layers can beat. A layout that does not fit with equal stages, or without recompute, is
as hopeful as its bound. Once the least bound left passes the best plan found, that plan is the fastest of the space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import estimate, lower_bounds
from shardplan.costmodel.estimates import MEMORY_BAND, Estimates
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layout import SCHEDULES, Layout, LayoutTable, layout_table
from shardplan.costmodel.recompute import RECOMPUTE, RECOMPUTE_COLUMNS
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.stage_trials import StageTrials
from shardplan.planner.space import Wishes
from shardplan.planner.stage_options import Part, Wanted
from shardplan.planner.stages import can_cut, cut_stages

NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")
FIRST_CUT, AT_ONCE = 32, 2048
"""Layouts cut before bounds are looked at again: first, and four times as many each time up to."""
MOST_CUT = 8192
"""Layouts cut in one search; where it is reached the search says so."""
STRUCTURE = ("pp", "schedule", "virtual_stages")
"""Columns that layouts whose stages are cut together agree in, beside those of recompute."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Layouts whose stages were cut, those that fit."""

    found: Estimates | None
    looked_at: int
    """Layouts with cut stages that were estimated."""
    proved: bool
    """No layout left could have been faster than the fastest."""


def refined(setting: Setting, estimates: Estimates, wishes: Wishes, headroom: float) -> Refined:
    """Cut the stages of every layout whose bound is below the fastest plan that is known; `estimates` are of equal stages."""
    nothing = Refined(found=None, looked_at=0, proved=True)
    asked = {"stage_layers"} & (wishes.fixed_words | {word for word, _ in wishes.forbidden})
    if asked or not setting.runtime.abilities.uneven_stages:
        return nothing
    wanted = wanted_of(setting, wishes, headroom)
    fits = estimates.fits(headroom)
    fastest = float(estimates.step_s[fits].min()) if fits.any() else np.inf
    rows, bounds = _hopeful(setting, estimates.layouts, wishes, wanted, fastest)
    kept, looked_at, at, size = list[Layout](), 0, 0, FIRST_CUT
    while at < len(rows) and bounds[at] < fastest and at < MOST_CUT:
        some = slice(at, at + size)
        hope = bounds[some] < fastest
        chosen, slack_s = rows[some][hope], fastest - bounds[some][hope]
        at, size = at + size, min(4 * size, AT_ONCE)
        table = _cut(setting, estimates.layouts.take(chosen), slack_s, wanted)
        if table is None:
            continue
        its = estimate(
            model=setting.model, job=setting.job, cluster=setting.cluster, layouts=table, runtime=setting.runtime
        )
        looked_at, fit = looked_at + len(table), its.fits(headroom)
        kept += [table.row(int(row)) for row in np.flatnonzero(fit)]
        fastest = min(fastest, float(its.step_s[fit].min()) if fit.any() else np.inf)
    found = None
    if kept:
        table = layout_table(kept)
        found = estimate(
            model=setting.model, job=setting.job, cluster=setting.cluster, layouts=table, runtime=setting.runtime
        )
    proved = at >= len(rows) or bool(bounds[min(at, len(rows) - 1)] >= fastest)
    return Refined(found=found, looked_at=looked_at, proved=proved)


def wanted_of(setting: Setting, wishes: Wishes, headroom: float) -> Wanted:
    """What of stages the runtime can do and the user left open."""
    asked = "recompute" in wishes.fixed_words or any(word == "recompute" for word, _ in wishes.forbidden)
    abilities = setting.runtime.abilities
    return Wanted(
        headroom=headroom,
        partial_recompute=abilities.partial_recompute and not asked,
        by_stage=abilities.recompute_by_stage,
    )


def _hopeful(
    setting: Setting, layouts: LayoutTable, wishes: Wishes, wanted: Wanted, fastest: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(rows with a pipeline whose bounds leave hope, their bounds), most hopeful first."""
    plain = (layouts.pp > 1) & (layouts.split == 0)
    if wanted.partial_recompute:  # a layout without recompute stands for any number of recomputed layers
        plain &= layouts.recompute != FULL
    if "schedule" not in wishes.fixed_words and "1f1b" in setting.runtime.abilities.schedules:
        plain &= layouts.schedule != SCHEDULES.index("gpipe")  # as fast as 1f1b, with more in flight
    rows = np.flatnonzero(plain)
    if not len(rows):
        return rows, np.zeros(0)
    some = layouts.take(rows)
    bounds, _ = lower_bounds(
        model=setting.model, job=setting.job, cluster=setting.cluster, layouts=some, runtime=setting.runtime
    )
    near = np.flatnonzero(bounds < fastest)
    rows, bounds = rows[near], bounds[near]
    if len(rows):
        rows, bounds = _could_fit(setting, layouts, rows, bounds, wanted)
    order = np.argsort(bounds, kind="stable")
    return rows[order], bounds[order]


def _could_fit(
    setting: Setting,
    layouts: LayoutTable,
    rows: NDArray[np.intp],
    bounds: NDArray[np.float64],
    wanted: Wanted,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Those whose states and, recomputing every layer, activations fit if they were spread evenly."""
    table = layouts.take(rows)
    if wanted.partial_recompute:
        recompute = np.where(table.recompute == NONE, FULL, table.recompute)
        table = replace(table, recompute=recompute)
    _, needed = lower_bounds(
        model=setting.model, job=setting.job, cluster=setting.cluster, layouts=table, runtime=setting.runtime
    )
    usable = setting.cluster.gpu.memory_bytes * (1.0 - wanted.headroom)
    could = needed * (1.0 + MEMORY_BAND) <= usable
    return rows[could], bounds[could]


def _cut(setting: Setting, layouts: LayoutTable, slack_s: NDArray[np.float64], wanted: Wanted) -> LayoutTable | None:
    """The best cut of every layout that has one which no rule refuses; `slack_s` is how far its bound is below the fastest."""
    same = [getattr(layouts, name) for name in (*STRUCTURE, *RECOMPUTE_COLUMNS)]
    trials, found = StageTrials.of(setting, layouts), dict[int, list[Layout]]()
    first, group_of = unique_keys(*same)
    for group, row in enumerate(first.tolist()):
        if can_cut(setting.model, layouts.row(row)):
            at = np.flatnonzero(group_of == group)
            part = Part(setting=setting, trials=trials.take(at), stages=int(layouts.pp[row]))
            found |= dict(zip(at.tolist(), cut_stages([part], wanted, slack_s[at]), strict=True))
    cut = [one for row in sorted(found) for one in found[row]]
    if not cut:
        return None
    table = layout_table(cut)
    allowed = ~np.any([np.zeros(len(table), dtype=bool), *broken_rules(setting, table).values()], axis=0)
    return table.take(allowed) if allowed.any() else None
