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

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layout import COLUMNS, LayoutTable, layout_table
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.mixed import part_settings
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
    refused, space = sifted.refused, _Space(setting=setting, wishes=wishes, objective=objective, headroom=headroom)
    first = sifted.valid(wishes)
    for part in parts[1:]:
        first = sift(part, first, refused)
    space.add(space.with_knobs(first))
    watch.phase("looking", 0.4, sifted.looked_at)
    written, slower, all_written = _written_out(parts, wishes, sifted, space.below_s())
    slower += sifted.outdone
    for part in parts[1:]:
        written = sift(part, written, refused)
    seeds = _best_alone(parts, wishes, objective, headroom, space.below_s(), watch)
    space.add(stacked([space.with_knobs(written), seeds]))
    best, closest = space.best(), space.closest()
    cluster = best[0].cluster if best else setting.cluster
    ranked = best[1] if best else None
    bounded = (
        space.all_cut
        and all_written
        and len(open_orders(setting, wishes)) < 2
        and not any((*knobs_of(parts[0], wishes), *named_recompute(parts[0], wishes)))
    )
    return SearchResult(
        cluster=cluster,
        ranked=ranked,
        closest=None if ranked is not None else closest,
        looked_at=sum(one.count for one in refused.values()) + slower + space.compared,
        refused=largest_first(refused),
        slower=slower,
        does_not_fit=space.compared - (len(ranked) if ranked is not None else 0),
        refined=0,
        placement=None,
        proved=bounded,
        complete=bounded,
        seconds=time.perf_counter() - start,
    )


SEEDS = 64
"""Layouts of the ranking on each kind of node alone that are compared on the mixed cluster."""


def _best_alone(
    parts: Sequence[Setting], wishes: Wishes, objective: Objective, headroom: float, below_s: float, watch: Watch
) -> LayoutTable:
    """The best layouts on clusters of each kind of node alone that no rule refuses on any. What takes longer there than `below_s` does
    on the mixed cluster, too, and may be left out."""
    tables = [layout_table([wishes.fixed]).slice(0, 0)]
    for at, part in enumerate(parts, start=1):
        ranked = search_one_size(part, wishes, objective, headroom, Watch(), below_s=below_s).ranked
        watch.phase("looking", 0.4 + 0.5 * at / len(parts), 0)
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


@dataclass(kw_only=True)
class _Space:
    """What was looked at on the parts in every order."""

    setting: Setting
    wishes: Wishes
    objective: Objective
    headroom: float
    found: list[tuple[Setting, list[Estimates]]] = field(default_factory=list[tuple[Setting, list[Estimates]]])
    """By order, with the cluster in it."""
    compared: int = 0
    all_cut: bool = True
    fastest: float = np.inf
    """The quickest step that fits."""
    alone_s: list[float] = field(default_factory=list[float])
    """The quickest step that fits on nodes of each kind alone, of what had knobs turned."""

    def below_s(self) -> float:
        """Seconds that a step of interest stays below."""
        return np.inf if self.objective == "memory" else self.fastest

    def with_knobs(self, layouts: LayoutTable) -> LayoutTable:
        """The layouts, and what knobs make of them on nodes of each kind alone."""
        parts, tables = part_settings(self.setting), [layouts]
        self.alone_s = self.alone_s or [np.inf] * len(parts)
        for at, part in enumerate(parts) if len(layouts) else ():
            turned = turn_knobs(part, [estimated(part, layouts)], self.wishes, self.headroom, fastest=self.alone_s[at])
            self.alone_s[at] = turned.best_s
            tables += [one.layouts for one in turned.found]
        return stacked(tables)

    def add(self, table: LayoutTable) -> None:
        """Estimate layouts in every order of the parts, and cut the stages of those that could be the fastest."""
        if not len(table):
            return
        first, _ = unique_keys(*(getattr(table, name) for name in COLUMNS))
        table = table.take(np.sort(first))
        wanted = replace(wanted_of(self.setting, self.wishes, self.headroom), most_cuts=MOST_CUTS)
        to_cut = leaves_stages_open(self.setting, self.wishes)
        candidates = Candidates.of(self.setting, table, wanted) if to_cut else None
        cluster = self.setting.cluster
        for order in () if self.found else orders(cluster):
            self.found.append((replace(self.setting, cluster=in_order(cluster, order)), []))
        for ordered, estimates in self.found:
            known = [estimated_on_parts(ordered, table)]
            self._keep(known)
            if candidates is not None:
                cut, every = cut_ones(ordered, candidates, wanted, self.fastest)
                self.all_cut &= every
                self._keep(cut)
                known += cut
            estimates.extend(known)

    def _keep(self, found: Sequence[Estimates]) -> None:
        self.compared += sum(map(len, found))
        steps = (float(np.min(one.step_s, where=one.fits(self.headroom), initial=np.inf)) for one in found)
        self.fastest = min((self.fastest, *steps))

    def best(self) -> tuple[Setting, Estimates] | None:
        """The order whose best is best, and the ranking in it; None where nothing fits."""
        best: tuple[Setting, Estimates] | None = None
        for ordered, estimates in self.found:
            found = together(estimates)
            rows = order_of(found, np.flatnonzero(found.fits(self.headroom)), self.objective)
            if len(rows) and (best is None or _ahead(found, int(rows[0]), best[1], self.objective)):
                best = (ordered, found.take(rows))
        return best

    def closest(self) -> Estimates | None:
        """The layout that fills its memory least, in the first order; None where there is none."""
        if not self.found:
            return None
        found = together(self.found[0][1])
        full = found.device_peak_bytes / found.capacities
        return found.take(np.asarray([int(full.argmin())]))
