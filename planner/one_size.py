"""The search on one number of GPUs: the whole space sifted by the rules, estimated, refined by knobs, placed on the cluster, ranked."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import ROWS_AT_ONCE, estimate
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import COLUMNS, LayoutTable
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import RULES, broken_rules
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.placement import Placement, place
from shardplan.planner.refine import refine
from shardplan.planner.space import Wishes, join_tables, runtime_tiers, space_pieces
from shardplan.planner.watch import Watch

Objective = Literal["throughput", "cost", "gpus", "memory", "deadline"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "cost", "gpus", "memory", "deadline")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How many layouts one rule refused, with one example told in words."""

    rule: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Ranked layouts that fit, and the account of the others."""

    cluster: Cluster
    ranked: Estimates | None
    """Best first; None when nothing fits."""
    closest: Estimates | None
    """The valid layout that needs least device memory, when nothing fits."""
    looked_at: int
    refused: tuple[Refusal, ...]
    """Largest first; a layout that breaks several rules counts for the first in the list of rules."""
    does_not_fit: int
    refined: int
    """Variants looked at beyond the space: recompute of some layers or parts, shares of the optimizer, ZeRO++ (`refine.py`)."""
    placement: Placement | None
    """How the axes of the ranked layouts were laid on the cluster."""
    complete: bool
    """No layout of the space is better than the first: nothing that could be was left out to save time."""
    partial: bool = False
    """It was interrupted: the best of what was looked at by then."""
    seconds: float


@dataclass(kw_only=True)
class _State:
    """What is known so far."""

    looked_at: int = 0
    refused: dict[str, Refusal] = field(default_factory=dict[str, Refusal])
    tried: int = 0
    """By knobs, beyond the space."""
    valid: LayoutTable | None = None
    batches: list[Estimates] = field(default_factory=list[Estimates])
    """Of the space first, then of what refinement added."""
    space_batches: int = 0
    ranked: Estimates | None = None
    placement: Placement | None = None
    complete: bool = True
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
    setting: Setting, wishes: Wishes, objective: Objective, headroom: float, watch: Watch
) -> SearchResult:
    """Rank every layout on all GPUs of the setting's cluster."""
    start = time.perf_counter()
    state = _State()
    kept: list[LayoutTable] = []
    with state.phase(watch):
        _sift_space(setting, wishes, state, kept, watch)
    state.valid = join_tables(kept, wishes)
    with state.phase(watch):
        _estimate_space(setting, state, watch)
    if state.batches and not state.partial:
        with state.phase(watch):
            _refine(setting, wishes, objective, headroom, state, watch)
    closest = None
    if state.batches:
        with state.phase(watch):
            _rank(setting, wishes, objective, headroom, state, watch)
        if state.partial and state.ranked is None:  # stopped while it was placed: once more without
            _rank(setting, wishes, objective, headroom, state, watch)
        if state.ranked is None:
            leanest = min(state.batches, key=lambda one: float(one.device_peak_bytes.min()))
            closest = leanest.take(np.asarray([int(leanest.device_peak_bytes.argmin())]))
    fitting = sum(int(one.fits(headroom).sum()) for one in state.batches[: state.space_batches])
    refused = sum(one.count for one in state.refused.values())
    return SearchResult(
        cluster=setting.cluster,
        ranked=state.ranked,
        closest=closest,
        looked_at=state.looked_at,
        refined=state.tried,
        refused=tuple(sorted(state.refused.values(), key=lambda r: (-r.count, r.rule))),
        does_not_fit=state.looked_at - refused - fitting,
        placement=state.placement,
        complete=state.complete and not state.partial and (state.placement is None or state.placement.complete),
        partial=state.partial,
        seconds=time.perf_counter() - start,
    )


def _sift_space(setting: Setting, wishes: Wishes, state: _State, kept: list[LayoutTable], watch: Watch) -> None:
    """Add the rows of the space that break no rule to `kept`, one piece at a time."""
    kinds, tiers = setting.runtime.abilities.context_parallel, runtime_tiers(setting.runtime)
    for done, piece in space_pieces(setting.model, setting.job, setting.cluster.gpus, wishes, kinds, tiers):
        if len(piece):
            left = _sift(setting, piece, state.refused)
            state.looked_at += len(piece)
            kept.append(left)
        watch.phase("looking", 0.6 * done, state.looked_at)


def _sift(setting: Setting, space: LayoutTable, refused: dict[str, Refusal]) -> LayoutTable:
    """Rows that break no rule; the others are added to `refused` under the first rule they break."""
    broken = broken_rules(setting, space)
    open_rows = np.ones(len(space), dtype=bool)
    found: dict[str, Refusal] = {}
    for rule in RULES:
        if rule.id in broken:
            new = broken[rule.id] & open_rows
            open_rows &= ~new
            if new.any():
                before = refused.get(rule.id)
                example = before.example if before else rule.detail(setting, space.row(int(np.flatnonzero(new)[0])))
                count = int(new.sum()) + (before.count if before else 0)
                found[rule.id] = Refusal(rule=rule.id, count=count, example=example)
    refused.update(found)
    return space.take(open_rows)


def _estimated(setting: Setting, layouts: LayoutTable) -> Estimates:
    return estimate(
        model=setting.model, job=setting.job, cluster=setting.cluster, layouts=layouts, runtime=setting.runtime
    )


def _estimate_space(setting: Setting, state: _State, watch: Watch) -> None:
    """Estimate the valid layouts in batches."""
    assert state.valid is not None
    rows = len(state.valid)
    for start in range(0, rows, ROWS_AT_ONCE):
        piece = state.valid.slice(start, start + ROWS_AT_ONCE) if rows > ROWS_AT_ONCE else state.valid
        state.batches.append(_estimated(setting, piece))
        state.space_batches += 1
        watch.phase("estimating", 0.6 + 0.3 * min((start + ROWS_AT_ONCE) / rows, 1.0), state.looked_at)


def _refine(
    setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: _State, watch: Watch
) -> None:
    """Add what words find that are not multiplied into the space."""
    watch.phase("refining", 0.9, state.looked_at)
    found = refine(setting, state.batches, wishes, headroom, least_memory=objective == "memory")
    state.batches += found.found
    state.tried, state.complete = found.tried, found.complete


def _rank(setting: Setting, wishes: Wishes, objective: Objective, headroom: float, state: _State, watch: Watch) -> None:
    """Rank what fits of all batches, each layout in its best order of axes."""
    fitting = [batch.layouts.take(batch.fits(headroom)) for batch in state.batches]
    if not any(map(len, fitting)):
        return
    if len(state.batches) == 1:
        whole = state.batches[0]
        ranked = whole.take(_order(whole, np.flatnonzero(whole.fits(headroom)), objective))
    else:
        whole = _estimated(setting, join_tables(fitting, wishes))
        ranked = whole.take(_order(whole, np.arange(len(whole)), objective))
    if not state.partial:
        watch.phase("placing", 0.95, state.looked_at + state.tried)
        ranked, state.placement = place(setting, ranked, wishes)
        if state.placement.moved:
            ranked = ranked.take(_order(ranked, np.arange(len(ranked)), objective))
    state.ranked = ranked


def _order(estimates: Estimates, rows: NDArray[np.intp], objective: Objective) -> NDArray[np.intp]:
    """`rows` best first; ties break by the other figure, then by the layout's columns."""
    first, second = estimates.step_s[rows], estimates.device_peak_bytes[rows]
    if objective == "memory":
        first, second = second, first
    columns = [getattr(estimates.layouts, name)[rows] for name in reversed(COLUMNS)]
    return rows[np.lexsort((*columns, second, first))]
