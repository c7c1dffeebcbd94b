"""Layouts on the parts of a mixed cluster: estimated in the order of the parts, and their layers cut exactly (`stages.Cuttable`) where a
bound leaves hope, most hopeful first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from shardplan.planner.at_setting import unbroken
from shardplan.planner.cut_room import Room
from shardplan.planner.even_stages import mean_stage_seconds
from shardplan.planner.stage_options import Part, Wanted
from shardplan.planner.stage_search import STRUCTURE
from shardplan.planner.stages import Cuttable, can_cut

NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")
FIRST_LOOKED_AT, AT_ONCE = 64, 2048
"""Layouts whose stages are timed and weighed before bounds are looked at again: first, and four times as many each time up to."""
FIRST_CUT, MOST_CUT_AT_ONCE = 8, 256
"""Of them, cut before bounds are looked at again: first, and twice as many each time up to."""
MOST_CUT = 8192
"""Layouts cut in one order of the parts; where it is reached the search says so."""
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]


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
    return together(found)


def together(found: list[Estimates]) -> Estimates:
    """All of them as one."""
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


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Layouts whose stages may be cut, with what is the same in every order of the parts."""

    layouts: LayoutTable
    bounds: FloatArray
    """`_bounds` of their steps, (N,)."""
    least_s: FloatArray
    """The same once as many layers are recomputed as memory asks for, (N,)."""
    trials: Mapping[str, StageTrials]
    """By name of the part."""

    @staticmethod
    def of(setting: Setting, table: LayoutTable, wanted: Wanted) -> Candidates:
        """Those of the layouts that have whole stages on each part to cut, and room for them."""
        staged = table.take(_staged(setting, table))
        plain = staged.take(
            (staged.pp > 1) & (staged.split == 0) & ((staged.recompute != FULL) | (not wanted.partial_recompute))
        )
        plain = plain.take(_have_room(setting, plain, wanted)) if len(plain) else plain
        if not len(plain):
            return Candidates(layouts=plain, bounds=np.zeros(0), least_s=np.zeros(0), trials={})
        names = [part.name for part in setting.cluster.parts]
        trials = [StageTrials.of(part, plain) for part in part_settings(setting)]
        bounds, least_s = _bounds(setting, plain, wanted, trials)
        return Candidates(layouts=plain, bounds=bounds, least_s=least_s, trials=dict(zip(names, trials, strict=True)))

    def parts(self, setting: Setting, rows: IntArray) -> list[Part]:
        """The parts with the stages of the layouts at `rows`, of the same pp."""
        return _parts(
            setting, self.layouts, [self.trials[part.name].take(rows) for part in setting.cluster.parts], rows
        )


def cut_ones(setting: Setting, candidates: Candidates, wanted: Wanted, fastest: float) -> tuple[list[Estimates], bool]:
    """(estimates of the layouts with the best cuts, most hopeful first, until no bound is below the fastest; whether it came to that, with
    no bound below the fastest of what is not cut exactly)."""
    least_s = candidates.least_s
    order = np.argsort(least_s, kind="stable")
    cutting = _Cutting(setting=setting, candidates=candidates, wanted=wanted, fastest=fastest)
    at, size = 0, FIRST_LOOKED_AT
    while at < len(order) and least_s[order[at]] < cutting.fastest and cutting.count < MOST_CUT:
        some = order[at : at + size]
        at, size = at + size, min(4 * size, AT_ONCE)
        cutting.look_at(some[least_s[some] < cutting.fastest])
    return cutting.found, cutting.count < MOST_CUT and cutting.uncut_s >= cutting.fastest


@dataclass(kw_only=True)
class _Cutting:
    """What was found so far in one order of the parts."""

    setting: Setting
    candidates: Candidates
    wanted: Wanted
    fastest: float
    """The quickest step that fits."""
    found: list[Estimates] = field(default_factory=list[Estimates])
    count: int = 0
    """Layouts that were cut."""
    size: int = FIRST_CUT
    """Layouts to cut next before bounds are looked at again."""
    uncut_s: float = np.inf
    """The least bound of what is not cut exactly."""

    def look_at(self, looked: IntArray) -> None:
        """Cut candidates, least bound first, once what their stages can hold in whole layers says more than their bounds do."""
        layouts, bounds = self.candidates.layouts.take(looked), self.candidates.bounds[looked]
        ready: list[Cuttable] = []
        of, place = np.zeros(len(looked), dtype=np.int64), np.zeros(len(looked), dtype=np.int64)
        least_s = np.full(len(looked), np.inf)
        for rows in _alike(layouts, STRUCTURE):
            if not can_cut(self.setting.model, layouts.row(int(rows[0]))):
                self.uncut_s = min(self.uncut_s, float(bounds[rows].min()))
                continue
            parts = self.candidates.parts(self.setting, looked[rows])
            found = Cuttable.of(parts, self.wanted, self.fastest - bounds[rows])
            if found is not None:
                of[rows], place[rows] = len(ready), np.arange(len(rows))
                least_s[rows] = bounds[rows] + found.more_s
                ready.append(found)
        order = np.argsort(least_s, kind="stable")
        at = 0
        while at < len(order) and least_s[order[at]] < self.fastest and self.count < MOST_CUT:
            chosen = order[at : at + self.size]
            chosen = chosen[least_s[chosen] < self.fastest]
            at, self.size, self.count = at + self.size, min(2 * self.size, MOST_CUT_AT_ONCE), self.count + len(chosen)
            cut = [ready[of[row]].cuts(int(place[row]), self.fastest - float(bounds[row])) for row in chosen]
            unsure_s = bounds[chosen] + np.asarray([one.unsure_s(self.setting) for one in cut])
            self.uncut_s = min(self.uncut_s, float(unsure_s.min()))
            self._keep([one for each in cut for one in each.layouts])

    def _keep(self, cut: list[Layout]) -> None:
        """Estimate layouts with cut stages that no rule refuses."""
        table = _valid(self.setting, cut)
        if table is None:
            return
        for rows in _alike(table, ("pp",)):
            its = _on_parts(self.setting, table.take(rows))
            self.found.append(its)
            fit = its.fits(self.wanted.headroom)
            self.fastest = min(self.fastest, float(its.step_s[fit].min()) if fit.any() else np.inf)


def _have_room(setting: Setting, table: LayoutTable, wanted: Wanted) -> NDArray[np.bool_]:
    """Rows whose states and, recomputing every layer, activations would fit if they were shared out by the memory of the GPUs."""
    least = [Room(setting=one, wanted=wanted).least_bytes(table) for one in part_settings(setting)]
    return np.min(least, axis=0) <= _usable_bytes(setting, wanted)


def _usable_bytes(setting: Setting, wanted: Wanted) -> float:
    """Bytes of memory that a stage may be predicted to need, on average of all GPUs."""
    total = sum(part.gpus * part.gpu.memory_bytes for part in setting.cluster.parts)
    return total / setting.cluster.gpus * (1.0 - wanted.headroom) / (1.0 + memory_band(setting.cluster))


def _parts(setting: Setting, layouts: LayoutTable, trials: Sequence[StageTrials], rows: IntArray) -> list[Part]:
    """The parts with the stages of the layouts at `rows`, of the same pp, of which the `trials` are."""
    stages = stages_on_parts(setting.cluster, layouts.row(int(rows[0])))
    assert stages is not None
    return [
        Part(setting=part, trials=tried, stages=count)
        for part, tried, count in zip(part_settings(setting), trials, stages, strict=True)
    ]


def _valid(setting: Setting, cut: list[Layout]) -> LayoutTable | None:
    """Those of the layouts that break no rule on any part; None where there are none."""
    if not cut:
        return None
    found = layout_table(cut)
    for part in part_settings(setting):
        found = found.take(unbroken(part, found))
    return found if len(found) else None


def _bounds(
    setting: Setting, table: LayoutTable, wanted: Wanted, trials: Sequence[StageTrials]
) -> tuple[FloatArray, FloatArray]:
    """(step seconds, (N,), that layers shared out by speed leave: every stage as long as any other, all exchanges hidden that can be,
    transfers between stages as on the kind of node where they take most, what else a step takes as on that where it takes least; the
    same with `_recomputing`)."""
    settings = part_settings(setting)
    peak, fill = pipeline_weights(settings[0], table)
    alone = [on_mean_stage(part, table, hides_all=True) for part in settings]
    transfers = [one.time["pp_exposed_s"] for one in alone]
    rest = [
        one.step_s - moved - (peak + fill * table.pp) * tried.mean_seconds()
        for one, moved, tried in zip(alone, transfers, trials, strict=True)
    ]
    bounds, mean_s = np.max(transfers, axis=0) + np.min(rest, axis=0), np.zeros(len(table))
    for rows in _alike(table, ("pp",)):
        parts = _parts(setting, table, [tried.take(rows) for tried in trials], rows)
        least_s, mean_s[rows] = mean_stage_seconds(parts)
        bounds[rows] += peak[rows] * mean_s[rows] + fill[rows] * table.pp[rows] * least_s
    needed = np.min([one.device_peak_bytes for one in alone], axis=0)
    return bounds, bounds + peak * mean_s * _recomputing(setting, table, wanted, needed, trials)


def _recomputing(
    setting: Setting, table: LayoutTable, wanted: Wanted, needed: FloatArray, trials: Sequence[StageTrials]
) -> FloatArray:
    """How many times as long as without recompute the slowest stage takes longer at least, (N,), once so many layers are recomputed that
    the GPUs together hold all; infinite where they never do. `needed` bytes a stage has on average.

    See `cut_bounds.recomputing_mean_s`; layers may be recomputed where that costs least, and held where memory is.
    """
    longer, usable = np.zeros(len(table)), _usable_bytes(setting, wanted)
    at = np.flatnonzero((needed > usable) & (table.recompute == NONE))
    if len(setting.model.runs) > 1 or not wanted.partial_recompute or not len(at):
        return longer
    some = [tried.take(at) for tried in trials]
    saved = np.max([tried.mean_saving_bytes() for tried in some], axis=0)
    share = (needed[at] - usable) / np.maximum(saved, 1.0)
    every = np.ones(len(at))
    cost = np.min([tried.mean_seconds(every) / tried.mean_seconds() - 1.0 for tried in some], axis=0)
    longer[at] = np.where(share > 1.0, np.inf, share * np.maximum(cost, 0.0))
    return longer
