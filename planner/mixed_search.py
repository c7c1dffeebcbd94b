"""Search on a mixed cluster: same tp, cp and dp on all stages, every stage on one kind of node, layers by what each kind can take.

Layouts of the usual space are ranked as they are: with whole stages on each part where the ranks of a stage divide it, else at the pace
of the slowest kind. Those with whole stages then get their layers cut exactly (`stages.Cuttable`), best bound first, with the parts in
every order. What treats all GPUs as the slowest is in the space, so that the best is never worse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.estimate import on_mean_stage
from shardplan.costmodel.estimates import Estimates, joined
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.mixed import estimate_spread, estimate_staged, part_settings, stages_on_parts
from shardplan.costmodel.pipeline_weights import pipeline_weights
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.stage_trials import StageTrials
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.mixed import in_order
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.context_search import MOST_WRITTEN, least_s_of
from shardplan.planner.cut_room import Room
from shardplan.planner.factors import Factors
from shardplan.planner.knobs import knobs_of, named_recompute, turn_knobs
from shardplan.planner.one_size import search_one_size
from shardplan.planner.placement import open_orders
from shardplan.planner.ranking import Objective, SearchResult, order_of
from shardplan.planner.sift import Sifted, largest_first, sift, sift_space
from shardplan.planner.space import Wishes
from shardplan.planner.stage_options import Part, Wanted
from shardplan.planner.stage_search import STRUCTURE, leaves_stages_open, wanted_of
from shardplan.planner.stages import Cuttable, can_cut, mean_stage_seconds
from shardplan.planner.watch import Watch

FULL = RECOMPUTE.index("full")
FIRST_LOOKED_AT, AT_ONCE = 512, 2048
"""Layouts whose stages are timed and weighed before bounds are looked at again: first, and each time after."""
FIRST_CUT, MOST_CUT_AT_ONCE = 8, 128
"""Of them, cut before bounds are looked at again: first, and twice as many each time up to."""
MOST_CUT = 8192
"""Layouts cut in one order of the parts; where it is reached the search says so."""
MOST_CUTS = 4
"""Of one layout."""
FloatArray = NDArray[np.float64]


def search_mixed(setting: Setting, wishes: Wishes, objective: Objective, headroom: float, watch: Watch) -> SearchResult:
    """The ranking in the order of parts whose best is best; `cluster` of the result has its parts in that order.

    Axes lie in the order that is fixed, else the default one; knobs (`knobs.py`) are turned where they would help on a part alone.
    The best layouts of a search on each kind of node alone, in whatever order and cut, are among those compared, so that treating all GPUs
    as the slowest is never better. `proved` and `complete` are only said where the runtime has no other orders and no knobs. An
    interrupt ends it.
    """
    if objective not in ("throughput", "memory"):
        raise InputError(
            f"objective={objective!r} takes parts of a cluster, and the mixed {setting.cluster.name!r} is used whole",
            place="--objective",
            remedy="use throughput or memory",
        )
    start = time.perf_counter()
    parts = part_settings(setting)
    sifted = Sifted()
    sift_space(parts[0], wishes, sifted, watch)
    refused, seeds = sifted.refused, _best_alone(parts, wishes, objective, headroom, watch)
    known = estimate_spread(setting, seeds) if len(seeds) else None
    fits = known is not None and known.fits(headroom).any()
    fastest = float(known.step_s[known.fits(headroom)].min()) if known is not None and fits else np.inf
    written, slower, all_written = _written_out(parts, wishes, sifted, np.inf if objective == "memory" else fastest)
    slower += sifted.outdone
    valid = stacked([sifted.valid(wishes), written])
    for part in parts[1:]:
        valid = sift(part, valid, refused)
    tables = [valid, seeds]
    for part in parts if len(valid) else ():
        alone = estimated(part, valid)
        tables += [one.layouts for one in turn_knobs(part, [alone], wishes, headroom).found]
    table = stacked(tables)
    best: tuple[Setting, Estimates] | None = None
    closest: Estimates | None = None
    cluster, compared, all_cut = setting.cluster, 0, True
    for order in orders(setting.cluster) if len(table) else ():
        ordered = replace(setting, cluster=in_order(setting.cluster, order))
        so_far = float(best[1].step_s.min()) if best else np.inf
        found, every = _on(ordered, table, wishes, headroom, so_far)
        all_cut &= every
        compared += len(found)
        rows = order_of(found, np.flatnonzero(found.fits(headroom)), objective)
        if len(rows) and (best is None or _ahead(found, int(rows[0]), best[1], objective)):
            best, cluster = (ordered, found.take(rows)), ordered.cluster
        if closest is None:
            full = found.device_peak_bytes / found.capacities
            closest = found.take(np.asarray([int(full.argmin())]))
    ranked = best[1] if best else None
    bounded = (
        all_cut
        and all_written
        and len(open_orders(setting, wishes)) < 2
        and not any((*knobs_of(parts[0], wishes), *named_recompute(parts[0], wishes)))
    )
    return SearchResult(
        cluster=cluster,
        ranked=ranked,
        closest=None if ranked is not None else closest,
        looked_at=sum(one.count for one in refused.values()) + slower + compared,
        refused=largest_first(refused),
        slower=slower,
        does_not_fit=compared - (len(ranked) if ranked is not None else 0),
        refined=0,
        placement=None,
        proved=bounded,
        complete=bounded,
        seconds=time.perf_counter() - start,
    )


SEEDS = 64
"""Layouts of the ranking on each kind of node alone that are compared on the mixed cluster."""


def _best_alone(
    parts: Sequence[Setting], wishes: Wishes, objective: Objective, headroom: float, watch: Watch
) -> LayoutTable:
    """The best layouts on clusters of each kind of node alone that no rule refuses on any."""
    tables = [layout_table([wishes.fixed]).slice(0, 0)]
    for part in parts:
        ranked = search_one_size(part, wishes, objective, headroom, Watch()).ranked
        watch.phase("looking", 0.1, 0)
        if ranked is not None:
            tables.append(ranked.layouts.slice(0, SEEDS))
    found = stacked(tables)
    for part in parts:
        found = found.take(unbroken(part, found))
    return found


def _written_out(
    parts: Sequence[Setting], wishes: Wishes, sifted: Sifted, fastest: float
) -> tuple[LayoutTable, int, bool]:
    """(layouts with context parallelism that may be quicker than `fastest`, MOST_WRITTEN at most; the number of the others; whether
    none that may be is among them)."""
    empty = layout_table([wishes.fixed]).slice(0, 0)
    if not sifted.waiting:
        return empty, 0, True
    ways = Factors.joined(sifted.waiting)
    least_s = np.min([least_s_of(part, ways.computing, wishes) for part in parts], axis=0)
    order = np.argsort(least_s, kind="stable")
    hopeful = order[least_s[order] < fastest]
    chosen = np.sort(hopeful[np.cumsum(ways.partners()[hopeful]) <= MOST_WRITTEN])
    left = len(ways) - int(ways.partners()[chosen].sum())
    if not len(chosen):
        return empty, left, not len(hopeful)
    layouts = sift(parts[0], ways.with_rows(chosen).layouts(), sifted.refused, sifted.later)
    return layouts, left, len(chosen) == len(hopeful)


MOST_ORDERED = 3
"""Parts that are tried in every order; more are tried as listed and the other way round."""


def orders(cluster: Cluster) -> list[tuple[int, ...]]:
    """Orders of the parts to try, those that only swap equal parts once."""
    count = len(cluster.parts)
    every = (
        list(permutations(range(count))) if count <= MOST_ORDERED else [tuple(range(count)), tuple(range(count))[::-1]]
    )
    found: list[tuple[int, ...]] = []
    kinds: list[list[tuple[object, ...]]] = []
    for order in every:
        kind: list[tuple[object, ...]] = [
            (part.node, part.nodes, part.network) for part in (cluster.parts[index] for index in order)
        ]
        if kind not in kinds:
            kinds.append(kind)
            found.append(order)
    return found


def _ahead(found: Estimates, row: int, best: Estimates, objective: Objective) -> bool:
    if objective == "memory":
        return float(found.device_peak_bytes[row]) < float(best.device_peak_bytes[0])
    return float(found.step_s[row]) < float(best.step_s[0]) * (1.0 - 1e-9)


def _staged(setting: Setting, table: LayoutTable) -> NDArray[np.bool_]:
    """Rows whose stages each lie on one part."""
    ranks = table.dp * table.tp * table.cp
    behind = (table.pp == 1) | (table.stride("pp") == ranks)
    return behind & np.all([part.gpus % ranks == 0 for part in setting.cluster.parts], axis=0)


def estimated_on_parts(setting: Setting, table: LayoutTable) -> Estimates:
    """Estimates of all layouts on the parts in their order, those with stages on several parts first, then by pp."""
    staged = _staged(setting, table)
    found: list[Estimates] = []
    if not staged.all():
        found.append(estimate_spread(setting, table.take(~staged)))
    plain = table.take(staged)
    for rows in _alike(plain, ("pp",)):
        found.append(_on_parts(setting, plain.take(rows)))
    return _together(found)


def _on(setting: Setting, table: LayoutTable, wishes: Wishes, headroom: float, so_far: float) -> tuple[Estimates, bool]:
    """(estimates of all layouts on the parts in their order, and of those with cut stages that could be faster than `so_far`; whether none
    of these was left out)."""
    known = estimated_on_parts(setting, table)
    fits = known.fits(headroom)
    fastest = min(so_far, float(known.step_s[fits].min()) if fits.any() else np.inf)
    if not leaves_stages_open(setting, wishes):
        return known, True
    wanted = replace(wanted_of(setting, wishes, headroom), most_cuts=MOST_CUTS)
    cut, every = _cut_ones(setting, table.take(_staged(setting, table)), wanted, fastest)
    return _together([known, *cut]), every


def _together(found: list[Estimates]) -> Estimates:
    return joined(found, stacked([one.layouts for one in found])) if len(found) > 1 else found[0]


def _alike(table: LayoutTable, columns: tuple[str, ...]) -> list[NDArray[np.intp]]:
    """Rows that agree in `columns`, group by group."""
    if not len(table):
        return []
    first, group_of = unique_keys(*(getattr(table, name) for name in columns))
    return [np.flatnonzero(group_of == group) for group in range(len(first))]


def _on_parts(setting: Setting, table: LayoutTable) -> Estimates:
    """Estimates of staged layouts of the same pp."""
    stages = stages_on_parts(setting.cluster, table.row(0))
    assert stages is not None
    return estimate_staged(setting, table, stages)


def _cut_ones(setting: Setting, staged: LayoutTable, wanted: Wanted, fastest: float) -> tuple[list[Estimates], bool]:
    """(estimates of the layouts with the best cuts, most hopeful first, until no bound is below the fastest; whether it came to that, with
    no bound below the fastest of what is not cut exactly)."""
    plain = staged.take(
        (staged.pp > 1) & (staged.split == 0) & ((staged.recompute != FULL) | (not wanted.partial_recompute))
    )
    plain = plain.take(_have_room(setting, plain, wanted)) if len(plain) else plain
    bounds = _bounds(setting, plain)
    order = np.argsort(bounds, kind="stable")
    cutting = _Cutting(setting=setting, wanted=wanted, fastest=fastest)
    at, size = 0, FIRST_LOOKED_AT
    while at < len(order) and bounds[order[at]] < cutting.fastest and cutting.count < MOST_CUT:
        some = order[at : at + size]
        some = some[bounds[some] < cutting.fastest]
        at, size = at + size, AT_ONCE
        cutting.look_at(plain.take(some), bounds[some])
    return cutting.found, cutting.count < MOST_CUT and cutting.uncut_s >= cutting.fastest


@dataclass(kw_only=True)
class _Cutting:
    """What was found so far in one order of the parts."""

    setting: Setting
    wanted: Wanted
    fastest: float
    """The quickest step that fits."""
    found: list[Estimates] = field(default_factory=list[Estimates])
    count: int = 0
    """Layouts that were cut."""
    uncut_s: float = np.inf
    """The least bound of what is not cut exactly."""

    def look_at(self, layouts: LayoutTable, bounds: FloatArray) -> None:
        """Cut layouts, least bound first, once what their stages can hold in whole layers says more than `bounds` do."""
        ready: list[Cuttable] = []
        of, place = np.zeros(len(layouts), dtype=np.int64), np.zeros(len(layouts), dtype=np.int64)
        least_s = np.full(len(layouts), np.inf)
        for rows in _alike(layouts, STRUCTURE):
            some = layouts.take(rows)
            if not can_cut(self.setting.model, some.row(0)):
                self.uncut_s = min(self.uncut_s, float(bounds[rows].min()))
                continue
            found = Cuttable.of(_parts(self.setting, some), self.wanted, self.fastest - bounds[rows])
            if found is not None:
                of[rows], place[rows] = len(ready), np.arange(len(rows))
                least_s[rows] = bounds[rows] + found.more_s
                ready.append(found)
        order = np.argsort(least_s, kind="stable")
        at, size = 0, FIRST_CUT
        while at < len(order) and least_s[order[at]] < self.fastest and self.count < MOST_CUT:
            chosen = order[at : at + size]
            chosen = chosen[least_s[chosen] < self.fastest]
            at, size, self.count = at + size, min(2 * size, MOST_CUT_AT_ONCE), self.count + len(chosen)
            cut = [ready[of[row]].cuts(int(place[row]), self.fastest - float(bounds[row])) for row in chosen]
            unsure_s = bounds[chosen] + np.asarray([one.unsure_s(self.setting) for one in cut])
            self.uncut_s = min(self.uncut_s, float(unsure_s.min()))
            self._keep([one for each in cut for one in each.layouts])

    def _keep(self, cut: list[Layout]) -> None:
        """Estimate layouts with cut stages that no rule refuses."""
        table = _valid(self.setting, cut)
        for rows in _alike(table, ("pp",)) if table is not None else ():
            its = _on_parts(self.setting, table.take(rows))
            self.found.append(its)
            fit = its.fits(self.wanted.headroom)
            self.fastest = min(self.fastest, float(its.step_s[fit].min()) if fit.any() else np.inf)


def _have_room(setting: Setting, table: LayoutTable, wanted: Wanted) -> NDArray[np.bool_]:
    """Rows whose states and, recomputing every layer, activations would fit if they were spread evenly over GPUs of the largest kind."""
    parts = part_settings(setting)
    least = [Room(setting=one, wanted=wanted).least_bytes(table) for one in parts]
    usable = max(one.cluster.gpu.memory_bytes for one in parts) * (1.0 - wanted.headroom)
    return np.min(least, axis=0) * (1.0 + memory_band(setting.cluster)) <= usable


def _parts(setting: Setting, table: LayoutTable) -> list[Part]:
    """The parts with the stages of layouts of the same pp."""
    stages = stages_on_parts(setting.cluster, table.row(0))
    assert stages is not None
    return [
        Part(setting=part, trials=StageTrials.of(part, table), stages=count)
        for part, count in zip(part_settings(setting), stages, strict=True)
    ]


def _valid(setting: Setting, cut: list[Layout]) -> LayoutTable | None:
    """Those of the layouts that break no rule on any part; None where there are none."""
    if not cut:
        return None
    found = layout_table(cut)
    for part in part_settings(setting):
        found = found.take(unbroken(part, found))
    return found if len(found) else None


def _bounds(setting: Setting, table: LayoutTable) -> FloatArray:
    """Step seconds, (N,), that layers shared out by speed leave: every stage as long as any other, all exchanges hidden that can be,
    transfers between stages as on the kind of node where they take most, what else a step takes as on that where it takes least."""
    bounds = np.full(len(table), np.inf)
    for rows in _alike(table, ("pp",)):
        some = table.take(rows)
        parts = _parts(setting, some)
        peak, fill = pipeline_weights(parts[0].setting, some)
        rest, transfers = list[FloatArray](), list[FloatArray]()
        for part in parts:
            alone = on_mean_stage(part.setting, some, hides_all=True)
            transfers.append(alone.time["pp_exposed_s"])
            rest.append(alone.step_s - transfers[-1] - (peak + fill * some.pp) * part.trials.mean_seconds())
        least_s, mean_s = mean_stage_seconds(parts)
        bounds[rows] = peak * mean_s + fill * some.pp * least_s + np.max(transfers, axis=0) + np.min(rest, axis=0)
    return bounds
