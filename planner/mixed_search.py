"""Search on a mixed cluster: same tp, cp and dp on all stages, every stage on one kind of node, layers by what each kind can take.

Layouts of the usual space are ranked as they are: with whole stages on each part where the ranks of a stage divide it, else at the pace
of the slowest kind. Those with whole stages then get their layers cut exactly (`stages.Cuttable`), best bound first, with the parts in
every order. What treats all GPUs as the slowest is in the space, so that the best is never worse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import LayoutTable, layout_table
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.mixed import estimate_spread, part_settings
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.mixed import in_order
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.context_search import MOST_WRITTEN, least_s_of
from shardplan.planner.factors import Factors
from shardplan.planner.knobs import knobs_of, named_recompute, turn_knobs
from shardplan.planner.mixed_cuts import Candidates, cut_ones, estimated_on_parts, together
from shardplan.planner.one_size import search_one_size
from shardplan.planner.placement import open_orders
from shardplan.planner.ranking import Objective, SearchResult, order_of
from shardplan.planner.sift import Sifted, largest_first, sift, sift_space
from shardplan.planner.space import Wishes
from shardplan.planner.stage_options import Wanted
from shardplan.planner.stage_search import leaves_stages_open, wanted_of
from shardplan.planner.watch import Watch

MOST_CUTS = 4
"""Of one layout."""


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
    wanted = replace(wanted_of(setting, wishes, headroom), most_cuts=MOST_CUTS)
    to_cut = len(table) and leaves_stages_open(setting, wishes)
    candidates = Candidates.of(setting, table, wanted) if to_cut else None
    for order in orders(setting.cluster) if len(table) else ():
        ordered = replace(setting, cluster=in_order(setting.cluster, order))
        so_far = float(best[1].step_s.min()) if best else np.inf
        found, every = _on(ordered, table, candidates, wanted, so_far)
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


def _on(
    setting: Setting, table: LayoutTable, candidates: Candidates | None, wanted: Wanted, so_far: float
) -> tuple[Estimates, bool]:
    """(estimates of all layouts on the parts in their order, and of the candidates with cut stages that could be faster than `so_far`;
    whether none of these was left out)."""
    known = estimated_on_parts(setting, table)
    fits = known.fits(wanted.headroom)
    fastest = min(so_far, float(known.step_s[fits].min()) if fits.any() else np.inf)
    if candidates is None:
        return known, True
    cut, every = cut_ones(setting, candidates, wanted, fastest)
    return together([known, *cut]), every
