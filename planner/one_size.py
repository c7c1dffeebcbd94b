"""The search on one number of GPUs: the whole space sifted by the rules, estimated, refined by knobs, placed on the cluster, ranked; then
stages cut, where a bound leaves hope that it pays, with whatever knobs and order of axes.

Stages come last: the best step of equal stages, knobs and orders included, is what their bounds are held against.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.estimate import ROWS_AT_ONCE, memory_alone
from shardplan.costmodel.estimates import Estimates, joined
from shardplan.costmodel.layout import COLUMNS, LayoutTable
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.rule import Setting
from shardplan.planner.at_setting import estimated
from shardplan.planner.context_search import Written, write_out
from shardplan.planner.knobs import turn_knobs
from shardplan.planner.machines import with_gpu_memory
from shardplan.planner.placement import Placement, place
from shardplan.planner.ranking import Objective, SearchResult, order_of
from shardplan.planner.shortlist import RUNNERS_UP, distinct, of_idea, worth_telling
from shardplan.planner.sift import Sifted, sift, sift_space
from shardplan.planner.space import Wishes
from shardplan.planner.stage_search import least_cut_bytes, leaves_stages_open, search_stages
from shardplan.planner.watch import Watch

CARRIED = 256
"""Layouts of a ranking that a search on less memory is held against."""
LEAN_STEP = 0.01
"""Of device memory: with the objective `memory`, no cut that needs so much less is left."""


@dataclass(kw_only=True)
class State:
    """What is known so far."""

    sifted: Sifted = field(default_factory=Sifted)
    tried: int = 0
    """By knobs and cuts, beyond the space."""
    space: list[Estimates] = field(default_factory=list[Estimates])
    """Layouts of the space that break no rule."""
    more: list[Estimates] = field(default_factory=list[Estimates])
    """What knobs added, all of it fits."""
    slower: int = 0
    """Layouts of the space that were not written out: their least time is too long, or another takes as long with less memory."""
    known: Estimates | None = None
    """Layouts from elsewhere that fit here too, ranked with the others."""
    below_s: float = np.inf
    """Seconds that a step of interest stays below: what takes longer may be left out."""
    ranked: Estimates | None = None
    placement: Placement | None = None
    proved: bool = True
    """Of stages."""
    complete: bool = True
    """Of knobs."""
    partial: bool = False

    @contextmanager
    def phase(self, watch: Watch) -> Generator[None]:
        """A phase whose interrupt leaves what came before, where the watch wants that."""
        try:
            yield
        except KeyboardInterrupt:
            if not watch.keeps_best or self.partial:
                raise
            self.partial = True


def search_one_size(
    setting: Setting,
    wishes: Wishes,
    objective: Objective,
    headroom: float,
    watch: Watch,
    *,
    below_s: float = np.inf,
) -> SearchResult:
    """Rank every layout on all GPUs of the setting's cluster. With `below_s`, what takes as long or longer may be left out, and runners-up
    are not refined."""
    start = time.perf_counter()
    state = State(below_s=below_s)
    look(setting, wishes, headroom, state, watch)
    settle(setting, wishes, objective, headroom, state, watch)
    if state.space and not state.partial and below_s == np.inf:
        with state.phase(watch):
            _refine_runners_up(setting, wishes, objective, headroom, state)
    if objective == "memory" and not state.partial:
        with state.phase(watch):
            _cut_leaner(setting, wishes, headroom, state)
    closest = _closest(setting, state) if state.ranked is None else None
    looked_at, refused = state.sifted.looked_at, state.sifted.account()
    fitting = sum(int(one.fits(headroom).sum()) for one in state.space)
    placed, proved = state.placement is None or state.placement.complete, state.proved and not state.partial
    return SearchResult(
        cluster=setting.cluster,
        ranked=state.ranked,
        closest=closest,
        looked_at=looked_at,
        refined=state.tried,
        refused=refused,
        slower=state.slower,
        does_not_fit=looked_at - sum(one.count for one in refused) - state.slower - fitting,
        placement=state.placement,
        proved=proved,
        complete=state.complete and proved and placed,
        partial=state.partial,
        seconds=time.perf_counter() - start,
    )


def quickest_s(setting: Setting, wishes: Wishes, headroom: float, below_s: float, watch: Watch) -> float:
    """Seconds of the shortest step of all layouts on all GPUs of the setting's cluster; infinite where none that fits is below
    `below_s`: what cannot be is left out, which makes it quick."""
    state = State(below_s=below_s)
    look(setting, wishes, headroom, state, watch)
    settle(setting, wishes, "throughput", headroom, state, watch)
    found = np.inf if state.ranked is None else float(state.ranked.step_s.min())
    return found if found < below_s else np.inf


def anything_fits(setting: Setting, wishes: Wishes, headroom: float, watch: Watch) -> bool:
    """Whether any layout does: what is estimated without knobs and cuts is asked first."""
    state = State()
    look(setting, wishes, headroom, state, watch)
    if not any(one.fits(headroom).any() for one in state.space):
        settle(setting, wishes, "throughput", headroom, state, watch)
    return state.ranked is not None or any(one.fits(headroom).any() for one in state.space)


def look(setting: Setting, wishes: Wishes, headroom: float, state: State, watch: Watch) -> None:
    """Estimate the layouts of the space that no rule refuses, but for those with context parallelism."""
    with state.phase(watch):
        sift_space(setting, wishes, state.sifted, watch, headroom=headroom)
    state.slower = state.sifted.outdone
    with state.phase(watch):
        _estimate_space(setting, wishes, state, watch)


def settle(setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: State, watch: Watch) -> None:
    """Find the best layout: knobs turned, what waits written out, axes placed, stages cut."""
    with state.phase(watch):
        _refine(setting, wishes, objective, headroom, state, state.space, watch, 0.8)
    with state.phase(watch):
        _write_out(setting, wishes, objective, headroom, state, watch)
    if state.space:
        with state.phase(watch):
            _rank(setting, wishes, objective, headroom, state, watch)
        if state.partial and state.ranked is None:  # stopped while it was placed: once more without
            _rank(setting, wishes, objective, headroom, state, watch)
    if state.known is not None:
        state.ranked = _merged(state.ranked, state.known, objective)
    if state.space and not state.partial:
        with state.phase(watch):
            _cut_stages(setting, wishes, objective, headroom, state, watch)


def _merged(ranked: Estimates | None, more: Estimates, objective: Objective) -> Estimates:
    """One ranking of both."""
    every = [more] if ranked is None else [ranked, more]
    whole = joined(every, stacked([one.layouts for one in every]))
    return whole.take(_once(whole.layouts, order_of(whole, np.arange(len(whole)), objective)))


def on_less_memory(
    setting: Setting, state: State, memory_bytes: float, headroom: float, known: Estimates | None
) -> tuple[Setting, State]:
    """(the setting with so much memory on every GPU, what is known there before it is settled: the space of `state`, and the best of the
    ranking `known` that fit)."""
    carried = None
    if known is not None:
        smaller = replace(known, capacity_bytes=memory_bytes)
        rows = np.flatnonzero(smaller.fits(headroom))[:CARRIED]
        carried = smaller.take(rows) if len(rows) else None
    return replace(setting, cluster=with_gpu_memory(setting.cluster, memory_bytes)), State(
        sifted=replace(state.sifted, refused=dict(state.sifted.refused)),
        space=[replace(one, capacity_bytes=memory_bytes) for one in state.space],
        known=carried,
    )


def memory_for(setting: Setting, peak_bytes: float, headroom: float) -> float:
    """Memory of the smallest GPU that holds layouts with this peak, and none with a higher one."""
    return peak_bytes * (1.0 + memory_band(setting.cluster)) / (1.0 - headroom)


def _cut_leaner(setting: Setting, wishes: Wishes, headroom: float, state: State) -> None:
    """Add layouts whose stages are cut so that they need less memory than the leanest, until none needs LEAN_STEP less: cuts are made for
    time, on GPUs with that much less memory."""
    while leaves_stages_open(setting, wishes) and state.ranked is not None:
        peak_bytes = (1.0 - LEAN_STEP) * float(state.ranked.device_peak_bytes[0])
        at, level = on_less_memory(setting, state, memory_for(setting, peak_bytes, headroom), headroom, None)
        level.sifted.waiting = []  # all of it was written out
        settle(at, wishes, "throughput", headroom, level, Watch())
        state.tried += level.tried
        if level.ranked is None:
            return
        found = replace(level.ranked, capacity_bytes=setting.cluster.gpu.memory_bytes)
        state.ranked = _merged(state.ranked, found, "memory")
        least_bytes = least_cut_bytes(setting, stacked([one.layouts for one in state.space]), wishes, headroom)
        state.proved = least_bytes >= float(state.ranked.device_peak_bytes[0])


def _closest(setting: Setting, state: State) -> Estimates | None:
    """The layout that needs least device memory; None where no rule leaves any. Stopped, of those looked at by then."""
    every = [one.take(_leanest(one)) for one in state.space]
    for factors in () if state.partial else state.sifted.too_large:
        layouts = sift(setting, factors.layouts(), {})
        if len(layouts):
            every.append(estimated(setting, layouts.take(_leanest(memory_alone(setting, layouts)))))
    return min(every, key=lambda one: float(one.device_peak_bytes[0]), default=None)


def _leanest(estimates: Estimates) -> NDArray[np.intp]:
    return np.asarray([int(estimates.device_peak_bytes.argmin())])


def _estimate_space(setting: Setting, wishes: Wishes, state: State, watch: Watch) -> None:
    """Estimate the layouts that the rules left, in batches."""
    valid = state.sifted.valid(wishes)
    rows = len(valid)
    for start in range(0, rows, ROWS_AT_ONCE):
        piece = valid.slice(start, start + ROWS_AT_ONCE) if rows > ROWS_AT_ONCE else valid
        state.space.append(estimated(setting, piece))
        watch.phase("estimating", 0.6 + 0.2 * min((start + ROWS_AT_ONCE) / rows, 1.0), state.sifted.looked_at)


def _refine(
    setting: Setting,
    wishes: Wishes,
    objective: Objective,
    headroom: float,
    state: State,
    batches: Sequence[Estimates],
    watch: Watch,
    done: float,
) -> None:
    """Add what words find that are not multiplied into the space, from some batches of it."""
    if not batches or state.partial:
        return
    watch.phase("refining", done, state.sifted.looked_at)
    memory = objective == "memory"
    if (
        sum(map(len, batches)) <= ROWS_AT_ONCE
    ):  # fewer tables, each of which takes some milliseconds however short it is
        batches = [joined(batches, stacked([one.layouts for one in batches]))]
    found = turn_knobs(setting, batches, wishes, headroom, fastest=_fastest_s(state, headroom), least_memory=memory)
    state.more += found.found
    state.tried += found.tried
    state.complete &= found.complete


def _write_out(
    setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: State, watch: Watch
) -> None:
    """Add layouts with context parallelism as far as they may be near the best, and what knobs make of them."""
    if state.partial:
        return
    written = Written(fastest=_fastest_s(state, headroom))
    before = len(state.space)
    try:
        for done, batch in write_out(setting, wishes, state.sifted, written, objective, headroom):
            state.space.append(batch)
            watch.phase("estimating", 0.8 + 0.1 * done, state.sifted.looked_at)
    finally:
        state.slower += written.slower
        state.complete &= written.complete
    _refine(setting, wishes, objective, headroom, state, state.space[before:], watch, 0.9)


def _fastest_s(state: State, headroom: float) -> float:
    """The quickest step known that fits, or the longest of interest."""
    batches = [*state.space, *state.more, *([] if state.known is None else [state.known])]
    every = (float(np.min(one.step_s, where=one.fits(headroom), initial=np.inf)) for one in batches)
    return min((state.below_s, *every))


def _rank(setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: State, watch: Watch) -> None:
    """Rank what fits of all batches, each layout in its best order of axes."""
    every = [batch.take(np.flatnonzero(batch.fits(headroom))) for batch in (*state.space, *state.more)]
    fitting = [batch for batch in every if len(batch)]
    if not fitting:
        return
    whole = joined(fitting, stacked([batch.layouts for batch in fitting]))
    ranked = whole.take(order_of(whole, np.arange(len(whole)), objective))
    if not state.partial:
        watch.phase("placing", 0.95, state.sifted.looked_at + state.tried)
        ranked, state.placement = place(setting, ranked, wishes)
        if state.placement.moved:
            ranked = ranked.take(order_of(ranked, np.arange(len(ranked)), objective))
    state.ranked = ranked


def _cut_stages(
    setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: State, watch: Watch
) -> None:
    """Add layouts whose stages are cut so that they could be the fastest, and rank them with the others."""
    valid = stacked([one.layouts for one in state.space])
    looked_at = state.sifted.looked_at + state.tried
    watch.phase("cutting", 0.97, looked_at)
    ranked = state.ranked
    found = search_stages(
        setting,
        valid,
        wishes,
        headroom,
        fastest=state.below_s if ranked is None else min(state.below_s, float(ranked.step_s.min())),
        told=lambda cut: watch.phase("cutting", 0.97, looked_at + cut),
    )
    if found.found is not None:
        ranked = _merged(ranked, found.found, objective)
    if objective == "memory" and ranked is not None:  # cuts are chosen for time
        least_bytes = least_cut_bytes(setting, valid, wishes, headroom)
        state.proved = least_bytes >= float(ranked.device_peak_bytes[0])
    else:
        state.proved = found.proved
    state.ranked, state.tried = ranked, state.tried + found.looked_at


def _refine_runners_up(setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: State) -> None:
    """Add what knobs make of the next best ideas, each for itself: what cannot be the best of all was left as it was."""
    ranked = state.ranked
    if ranked is None or objective == "memory":
        return
    first, _ = distinct(ranked.layouts)
    ideas = ranked.layouts.take(first[worth_telling(ranked, first)][1 : 1 + RUNNERS_UP])
    found: list[Estimates] = []
    for at in range(len(ideas)):
        same = [of_idea(batch.layouts, ideas, at) for batch in state.space]
        batches = [batch.take(rows) for batch, rows in zip(state.space, same, strict=True) if len(rows)]
        if batches:
            its = joined(batches, stacked([one.layouts for one in batches]))
            turned = turn_knobs(setting, [its], wishes, headroom)
            found += turned.found
            state.tried += turned.tried
    if found:
        placed, _ = place(setting, joined(found, stacked([one.layouts for one in found])), wishes)
        state.ranked = _merged(ranked, placed, objective)


def _once(layouts: LayoutTable, ordered: NDArray[np.intp]) -> NDArray[np.intp]:
    """`ordered` rows without those equal to the one before: the best cut may be the usual one, in the order it was placed in."""
    columns = [getattr(layouts, name)[ordered] for name in COLUMNS]
    same = np.all([column[1:] == column[:-1] for column in columns], axis=0)
    return ordered[np.concatenate([[True], ~same])]
