"""From the table to integers: the most promising pipelines get their stages cut exactly, best first, until no bound is left below the best.

`estimate.lower_bounds` says what no cut of the layers can beat. A layout that does not fit with equal stages, or without recompute, is
as hopeful as its bound. Once the least bound left passes the best plan found, that plan is the fastest of the space.

Knobs (`knobs.py`) and orders of mesh axes (`placement.py`) are bounded in the same way. The layouts of the space are cut first, as they
are; then those that could still win with other words beside, whatever these do to time, get those words, and so bounds of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import on_mean_stage
from shardplan.costmodel.estimates import Estimates, joined
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.pipeline_weights import pipeline_weights
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.stage_trials import StageTrials
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.chunk_climb import climbed, nudged
from shardplan.planner.cut_bounds import over_mean_s, recomputing_mean_s, waiting
from shardplan.planner.cut_room import Room
from shardplan.planner.even_stages import Even
from shardplan.planner.knobs import Knob, knobs_of, least_s_with, named_recompute, variants_of
from shardplan.planner.named_recompute import with_needed_parts
from shardplan.planner.partial_recompute import only_stands_for_others, recomputes_layers, standing_for_others
from shardplan.planner.placement import as_innermost, in_other_orders, movable, only_outer, open_orders
from shardplan.planner.space import Wishes, allowed, asked
from shardplan.planner.stage_options import Part, Wanted
from shardplan.planner.stages import Cuttable, can_cut

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")
FIRST_LOOKED_AT, AT_ONCE = 512, 8192
"""Layouts whose stages are timed and weighed before bounds are looked at again: first, and each time after."""
FIRST_CUT, MOST_CUT_AT_ONCE = 4, 128
"""Of them, cut before bounds are looked at again: first, and twice as many each time up to."""
MOST_CUT = 2048
"""Layouts cut in one search; where it is reached the search says so."""
MOST_CLIMBED = 8
"""Layouts whose chunks are moved layer by layer."""
MOST_ROWS = 300_000
"""Variants by one knob, or in other orders, that get a bound; where there are more the search says so."""
STRUCTURE = ("pp", "schedule", "virtual_stages", "recompute", "recompute_layers")
"""Columns that layouts whose stages are cut together agree in."""


@dataclass(frozen=True, kw_only=True)
class CutStages:
    """Layouts whose stages were cut, those that fit."""

    found: Estimates | None
    looked_at: int
    """Layouts with cut stages that were estimated."""
    proved: bool
    """No layout left could have been faster than the fastest."""


@dataclass(kw_only=True)
class _State:
    """What is known so far."""

    setting: Setting
    wishes: Wishes
    wanted: Wanted
    fastest: float
    """The quickest step that fits."""
    told: Callable[[int], None]
    kept: list[Estimates] = field(default_factory=list[Estimates])
    looked_at: int = 0
    cut: int = 0
    proved: bool = True
    uncuttable: list[tuple[FloatArray, LayoutTable]] = field(default_factory=list[tuple[FloatArray, LayoutTable]])
    """(bounds, layouts) whose chunks are moved layer by layer instead (`chunk_climb`)."""
    uncut_s: float = np.inf
    """The least bound of what is not cut exactly: it keeps the runtime's rule (`stages.can_cut`), or has more cuts than are written out, or
    cuts that wait for longer chunks than they were chosen for (`cut.Cuts.unsure_s`)."""

    @property
    def room(self) -> Room:
        """What the GPUs have room for."""
        return Room(setting=self.setting, wanted=self.wanted)


def search_stages(
    setting: Setting,
    layouts: LayoutTable,
    wishes: Wishes,
    headroom: float,
    *,
    fastest: float,
    told: Callable[[int], None] = lambda looked_at: None,
) -> CutStages:
    """Cut the stages of every layout of the space whose bound is below `fastest`, the best step known (infinite: none fits).

    `layouts` have equal stages; `told` hears how many cuts were looked at.
    """
    if not leaves_stages_open(setting, wishes):
        return CutStages(found=None, looked_at=0, proved=True)
    state = _State(
        setting=setting, wishes=wishes, wanted=wanted_of(setting, wishes, headroom), fastest=fastest, told=told
    )
    turned = (*knobs_of(setting, wishes), *named_recompute(setting, wishes))
    piped = _pipelines(layouts, wishes)
    piped = piped.take(np.flatnonzero(state.room.may_hold(piped, turned)))
    if len(piped):
        bounds = on_mean_stage(setting, piped)
        _best_first(state, state.room.holding(bounds.take(np.flatnonzero(_plain(state, bounds)))))
        if not np.isfinite(state.fastest):  # other words than these need no less memory
            saving = [knob for knob in turned if knob.saves_memory]
            for some in _with_knobs(state, bounds, saving):
                _best_first(state, some)
        if np.isfinite(state.fastest):
            _best_first(state, *_with_other_words(state, bounds, turned))
    _climb(state)
    found = joined(state.kept, stacked([one.layouts for one in state.kept])) if state.kept else None
    proved = state.proved and state.uncut_s >= state.fastest
    return CutStages(found=found, looked_at=state.looked_at, proved=proved)


def least_cut_bytes(setting: Setting, layouts: LayoutTable, wishes: Wishes, headroom: float) -> float:
    """Bytes on the device below which no cut of a layout of the space gets, with whatever words beside; infinite where none is cut."""
    piped = _pipelines(layouts, wishes)
    if not len(piped) or not leaves_stages_open(setting, wishes):
        return np.inf
    state = _State(
        setting=setting,
        wishes=wishes,
        wanted=wanted_of(setting, wishes, headroom),
        fastest=np.inf,
        told=lambda looked_at: None,
    )
    saving = [knob for knob in (*knobs_of(setting, wishes), *named_recompute(setting, wishes)) if knob.saves_memory]
    bounds = on_mean_stage(setting, piped)
    every = [bounds, *_with_knobs(state, bounds, saving)]
    return min(float(state.room.least_bytes(one.layouts).min()) for one in every)


def leaves_stages_open(setting: Setting, wishes: Wishes) -> bool:
    """Whether the runtime runs uneven stages and the user said nothing of them."""
    return setting.runtime.abilities.uneven_stages and not asked(wishes, "stage_layers")


def wanted_of(setting: Setting, wishes: Wishes, headroom: float) -> Wanted:
    """What of stages the runtime can do and the user left open."""
    return Wanted(
        headroom=headroom,
        partial_recompute=recomputes_layers(setting, wishes),
        by_stage=setting.runtime.abilities.recompute_by_stage,
        some_recomputed=("recompute", "none") in wishes.forbidden,
    )


def _pipelines(layouts: LayoutTable, wishes: Wishes) -> LayoutTable:
    """Rows that have stages to cut."""
    piped = layouts.take(np.flatnonzero((layouts.pp > 1) & (layouts.split == 0)))
    standing = standing_for_others(piped, wishes)
    return stacked([piped, standing]) if len(standing) else piped


def _plain(state: _State, bounds: Estimates) -> BoolArray:
    """Rows that are cut as they are: a layout without recompute stands for any number of recomputed layers."""
    layouts = bounds.layouts
    rows = (
        layouts.recompute != FULL if state.wanted.partial_recompute else ~only_stands_for_others(layouts, state.wishes)
    )
    return _could_win(state, bounds, bounds.step_s, rows)


def _could_win(state: _State, bounds: Estimates, least_s: FloatArray, rows: BoolArray) -> BoolArray:
    """Of the `rows` those whose step, `least_s` with stages of equal fractions, may be the fastest with stages of whole layers."""
    found = rows & (least_s < state.fastest)
    at = np.flatnonzero(found)
    if len(at) and np.isfinite(state.fastest):
        some = bounds.layouts.take(at)
        found[at] = least_s[at] + _in_a_step(state, some, over_mean_s(state.setting, some)) < state.fastest
    return found


def _could_win_recomputing(state: _State, bounds: Estimates) -> BoolArray:
    """Rows whose step may be the fastest with as many layers recomputed as they need, all other words as they are."""
    found = bounds.step_s < state.fastest
    at = np.flatnonzero(found)
    if len(at) and np.isfinite(state.fastest) and state.wanted.partial_recompute:
        some = bounds.layouts.take(at)
        usable = bounds.capacity_bytes * (1.0 - state.wanted.headroom) / (1.0 + bounds.bands.memory)
        longer_s = recomputing_mean_s(state.setting, some, bounds.device_peak_bytes[at], usable)
        found[at] = bounds.step_s[at] + _in_a_step(state, some, longer_s) < state.fastest
    return found


def _in_a_step(state: _State, layouts: LayoutTable, longer_s: FloatArray) -> FloatArray:
    """Seconds that a step takes longer where a micro-batch takes `longer_s` longer on the slowest stage."""
    weight = pipeline_weights(state.setting, layouts)[0]
    return longer_s * weight / waiting(weight)


def _could_win_elsewhere(
    state: _State, bounds: Estimates, later: Sequence[Knob], rows: BoolArray, *, as_they_are: bool = False
) -> BoolArray:
    """The same in any open order of axes and whatever `later` knobs do: another order may speed up the blocks of a stage. Rows that no
    knob changes any more, `as_they_are`, recompute what they need to fit."""
    setting, wishes = state.setting, state.wishes
    least_s, orders = least_s_with(setting, bounds, wishes, later, even=True), open_orders(setting, wishes)
    if only_outer(orders):
        return _could_win(state, bounds, least_s, rows)
    moved = movable(bounds.layouts, orders)
    found = _could_win(state, bounds, least_s, rows & ~moved) | (rows & moved & (least_s < state.fastest))
    layouts, bounded = as_innermost(setting, bounds.layouts)
    at = np.flatnonzero(found & moved & bounded)
    if len(at):
        its = on_mean_stage(setting, layouts.take(at))
        found[at] = _could_win(state, its, least_s_with(setting, its, wishes, later), np.ones(len(at), dtype=bool))
        if as_they_are:
            found[at] &= _could_win_recomputing(state, its)
    return found


def _with_other_words(state: _State, bounds: Estimates, turned: Sequence[Knob]) -> list[Estimates]:
    """Bounds of what could be the fastest with knobs turned, in another order of axes, or both."""
    setting, wishes = state.setting, state.wishes
    made = _with_knobs(state, bounds, turned)
    if len(open_orders(setting, wishes)) < 2:
        return made
    found = list(made)
    for batch in (bounds, *made):
        rows = np.ones(len(batch), dtype=bool)
        if batch is bounds and state.wanted.partial_recompute:
            rows = batch.layouts.recompute != FULL
        good = _could_win_elsewhere(state, batch, (), rows, as_they_are=True)
        some = state.room.holding(batch.take(np.flatnonzero(good)))
        ordered = in_other_orders(setting, some.layouts, wishes) if len(some) else some.layouts
        if len(ordered) > MOST_ROWS:
            state.proved = False
            ordered = ordered.slice(0, MOST_ROWS)
        if len(some) and len(ordered):
            its = on_mean_stage(setting, ordered)
            found.append(its.take(np.flatnonzero(_could_win(state, its, its.step_s, np.ones(len(its), dtype=bool)))))
    return found


def _with_knobs(state: _State, bounds: Estimates, turned: Sequence[Knob]) -> list[Estimates]:
    """Bounds of the variants by any of the knobs together that could be the fastest, in their own order of axes or another."""
    setting, wishes, made = state.setting, state.wishes, list[Estimates]()
    for at, knob in enumerate(turned):
        for batch in (bounds, *made):
            useful = knob.rows(batch.layouts)
            if state.wanted.partial_recompute:  # see `_plain`
                useful = useful & (batch.layouts.recompute != FULL)
            useful = _could_win_elsewhere(state, batch, turned[at:], useful)
            rows = np.flatnonzero(useful)
            if len(rows) and not knob.saves_memory:
                rows = rows[state.room.holds(batch.layouts.take(rows))]
            if len(rows) and "recompute" in knob.words:
                rows = rows[_could_win_by_parts(state, batch.layouts.take(rows))]
            most = MOST_ROWS // len(knob.variants)
            if len(rows) > most:
                state.proved = False
                least_s = least_s_with(setting, batch, wishes, turned[at:], even=True)
                rows = rows[np.argsort(least_s[rows], kind="stable")][:most]
            table = variants_of(setting, batch.layouts.take(rows), knob.variants, wishes)
            if table is None:
                continue
            its = on_mean_stage(setting, table)
            every = np.ones(len(its), dtype=bool)
            its = its.take(np.flatnonzero(_could_win_elsewhere(state, its, turned[at + 1 :], every)))
            its = state.room.holding(its)
            if len(its):
                made.append(its)
    return made


def _could_win_by_parts(state: _State, layouts: LayoutTable) -> BoolArray:
    """Layouts that may be the fastest with the named parts recomputed that they need at least."""
    setting = state.setting
    its = on_mean_stage(setting, with_needed_parts(setting, layouts, state.wanted.headroom))
    return _could_win_elsewhere(state, its, (), np.ones(len(its), dtype=bool))


def _best_first(state: _State, *candidates: Estimates) -> None:
    """Cut the candidates, least bound first, until no bound is below the fastest."""
    roomy = [one.take(np.flatnonzero(state.room.holds_below(one))) for one in candidates]
    some = [one.take(np.flatnonzero(_could_win_recomputing(state, one))) for one in roomy if len(one)]
    if not any(map(len, some)):
        return
    layouts = stacked([one.layouts for one in some])
    bounds = np.concatenate([one.step_s for one in some])
    waits = np.concatenate([_waits(one) for one in some])
    rows = np.argsort(bounds, kind="stable")
    at, size = 0, FIRST_LOOKED_AT
    while at < len(rows) and bounds[rows[at]] < state.fastest and state.proved:
        chosen = rows[at : at + size]
        chosen = chosen[bounds[chosen] < state.fastest]
        at, size = at + size, AT_ONCE
        _cut_some(state, layouts.take(chosen), bounds[chosen], waits[chosen])


def _waits(bounds: Estimates) -> FloatArray:
    """`stages.Cuttable.waits_s` of layouts with these bounds, (N, 2)."""
    time = bounds.time
    return np.stack([time["dp_exposed_s"] + time["offload_exposed_s"], time["behind_host_s"]], axis=1)


def _cut_some(state: _State, layouts: LayoutTable, bounds: FloatArray, waits: FloatArray) -> None:
    """Cut layouts, least bound first, once what their stages can hold in whole layers says more than `bounds` do."""
    ready: list[Cuttable] = []
    of, place, least_s = np.zeros(len(layouts), dtype=np.int64), np.zeros(len(layouts), dtype=np.int64), bounds + np.inf
    trials = StageTrials.of(state.setting, layouts)
    even = Even.alone(state.setting, trials)
    longer = waiting(even.peak)
    for rows, part in _alike(state.setting, trials):
        if part is None:
            state.uncut_s = min(state.uncut_s, float(bounds[rows].min()))
            state.uncuttable.append((bounds[rows], layouts.take(rows)))
            continue
        slack_s = (state.fastest - bounds[rows]) * longer[rows]
        found = Cuttable.of([part], state.wanted, slack_s, waits[rows], even.take(rows))
        if found is not None:
            of[rows], place[rows] = len(ready), np.arange(len(rows))
            least_s[rows] = bounds[rows] + found.more_s / longer[rows]
            ready.append(found)
    order = np.argsort(least_s, kind="stable")
    at, size = 0, FIRST_CUT
    while at < len(order) and least_s[order[at]] < state.fastest:
        if state.cut >= MOST_CUT:
            state.proved = False
            return
        chosen = order[at : at + size]
        chosen = chosen[least_s[chosen] < state.fastest]
        at, size, state.cut = at + size, min(2 * size, MOST_CUT_AT_ONCE), state.cut + len(chosen)
        slack_s = (state.fastest - bounds[chosen]) * longer[chosen]
        cut = [ready[of[row]].cuts(int(place[row]), float(s)) for row, s in zip(chosen, slack_s, strict=True)]
        unsure_s = bounds[chosen] + np.asarray([its.unsure_s(state.setting) for its in cut]) / longer[chosen]
        state.uncut_s = min(state.uncut_s, float(unsure_s.min()))
        _keep(state, [one for each in cut for one in each.layouts])
        state.told(state.looked_at)


def _climb(state: _State) -> None:
    """Move chunks of the most hopeful pipelines that cannot be cut exactly, and of the fastest cut, layer by layer: what a stage exchanges
    may take less time with a layer more."""
    if state.kept:
        best = min(state.kept, key=lambda one: float(one.step_s.min()))
        found, looked_at = nudged(
            state.setting, best.layouts.row(int(best.step_s.argmin())), state.wishes, state.wanted
        )
        state.looked_at += looked_at
        _keep(state, found)
    if not state.uncuttable:
        return
    bounds = np.concatenate([bounds for bounds, _ in state.uncuttable])
    layouts = stacked([table for _, table in state.uncuttable])
    hopeful = np.argsort(bounds, kind="stable")[:MOST_CLIMBED]
    hopeful = hopeful[bounds[hopeful] < state.fastest]
    if len(hopeful):
        moved, looked_at = climbed(state.setting, layouts.take(hopeful), state.wishes, state.wanted, state.fastest)
        state.looked_at += looked_at
        _keep(state, moved)


def _alike(setting: Setting, trials: StageTrials) -> Iterator[tuple[NDArray[np.intp], Part | None]]:
    """Rows whose stages are cut together, group by group; without a part where they cannot be."""
    layouts = trials.layouts
    first, group_of = unique_keys(*(getattr(layouts, name) for name in STRUCTURE))
    for group, row in enumerate(first.tolist()):
        at = np.flatnonzero(group_of == group)
        cuttable = can_cut(setting.model, layouts.row(row))
        yield at, Part(setting=setting, trials=trials.take(at), stages=int(layouts.pp[row])) if cuttable else None


def _keep(state: _State, cut: Sequence[Layout]) -> None:
    """Estimate layouts with cut stages that no rule refuses, and keep those that fit."""
    if not cut:
        return
    its, table = state.setting, layout_table(cut)
    table = table.take(unbroken(its, table) & allowed(table, state.wishes.forbidden))
    state.looked_at += len(table)
    if not len(table):
        return
    found = estimated(its, table)
    fits = np.flatnonzero(found.fits(state.wanted.headroom))
    if len(fits):
        state.kept.append(found.take(fits))
        state.fastest = min(state.fastest, float(state.kept[-1].step_s.min()))
