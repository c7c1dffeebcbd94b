"""What the rules leave of the space, and the account of what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.pipeline import GPIPE
from shardplan.costmodel.rule import Rule, Setting
from shardplan.costmodel.rules import RULES
from shardplan.costmodel.stage_trials import states_alone_bytes
from shardplan.planner.factors import COMPUTING, SPREADING, Factors
from shardplan.planner.space import Wishes, asked, join_tables, runtime_tiers, space_pieces
from shardplan.planner.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How many layouts one rule refused, with one example told in words and what to change in it."""

    rule: str
    count: int
    example: str
    remedy: str


@dataclass(kw_only=True)
class Sifted:
    """What was looked at so far."""

    looked_at: int = 0
    kept: list[LayoutTable] = field(default_factory=list[LayoutTable])
    """Rows that break no rule, by piece of the space."""
    waiting: list[Factors] = field(default_factory=list[Factors])
    """Layouts with context parallelism that no rule refuses for one factor alone; rules that need both were not asked yet."""
    later: list[Rule] = field(default_factory=list[Rule])
    """These rules."""
    too_large: list[Factors] = field(default_factory=list[Factors])
    """Layouts whose states alone no GPU holds; rules that need both factors were not asked either."""
    outdone: int = 0
    """Layouts that are `outdone` by another; rules that need both factors were not asked."""
    refused: dict[str, Refusal] = field(default_factory=dict[str, Refusal])

    def valid(self, wishes: Wishes) -> LayoutTable:
        """All rows that were kept."""
        return join_tables(self.kept, wishes)

    def account(self) -> tuple[Refusal, ...]:
        """Of the others, in order."""
        return largest_first(self.refused)


def sift_space(
    setting: Setting, wishes: Wishes, sifted: Sifted, watch: Watch, *, headroom: float | None = None
) -> None:
    """Sift the space into `sifted`, one piece at a time: what an interrupt leaves there stands. Layouts with cp > 1 are not written out
    yet (`context_search.py`); with a `headroom` nor are those that cannot fit by their states alone."""
    kinds, tiers = setting.runtime.abilities.context_parallel, runtime_tiers(setting.runtime)
    bare = setting.runtime.abilities.ends_without_layers
    space = space_pieces(
        setting.model,
        setting.job,
        setting.cluster.gpus,
        wishes,
        kinds,
        tiers,
        schedules=setting.runtime.abilities.schedules,
        bare_ends=bare,
    )
    for done, piece in space:
        if len(piece):
            left, later = _sift_factors(setting, piece, sifted.refused)
            sifted.looked_at += len(piece)
            sifted.outdone += len(left)
            left = left.with_rows(np.flatnonzero(~outdone(setting, left.computing, wishes)))
            sifted.outdone -= len(left)
            if headroom is not None and len(left):
                fits = _states_fit(setting, left.spreading, headroom)
                sifted.too_large += [left.of_spreading(~fits)] if not fits.all() else []
                left = left.of_spreading(fits)
            if len(left) and left.computing.cp[0] > 1:
                sifted.waiting.append(left)
                sifted.later = later
            elif len(left):
                sifted.kept.append(sift(setting, left.layouts(), sifted.refused, later))
        watch.phase("looking", 0.6 * done, sifted.looked_at)


def outdone(setting: Setting, table: LayoutTable, wishes: Wishes) -> NDArray[np.bool_]:
    """Rows under gpipe where 1f1b, which takes as long with less in flight however stages are cut, may be had instead."""
    known = setting.runtime.abilities.schedules
    open_to_both = "1f1b" in known and not asked(wishes, "schedule", "1f1b")
    return (table.schedule == GPIPE) & (table.pp > 1) & open_to_both


def _states_fit(setting: Setting, spreading: LayoutTable, headroom: float) -> NDArray[np.bool_]:
    """Ways to spread states, (S,), of which GPUs hold 1/pp of the states, with one micro-batch a step or several, in a model without
    experts: how those are spread depends on ep, which belongs to computing."""
    if any(kind.experts for kind in setting.kinds):
        return np.ones(len(spreading), dtype=bool)
    once = setting.job.global_batch // spreading.dp
    sizes = (spreading.micro_batch, once)
    least = np.min([states_alone_bytes(setting, replace(spreading, micro_batch=size)) for size in sizes], axis=0)
    return least * (1.0 + memory_band(setting.cluster)) <= setting.cluster.gpu.memory_bytes * (1.0 - headroom)


def _sift_factors(setting: Setting, piece: Factors, refused: dict[str, Refusal]) -> tuple[Factors, list[Rule]]:
    """(factors that break no rule that looks at one of them, the other rules). A layout counts for the first rule that its factors break,
    else for the first of the others that it breaks itself."""
    of_computing, later = _first_broken(setting, piece.computing, SPREADING, range(len(RULES)))
    of_spreading, later = _first_broken(setting, piece.spreading, COMPUTING, later)
    for at, count in enumerate(_refused_pairs(piece, of_computing, of_spreading)):
        if count:
            first = (
                (of_computing == at, of_spreading >= at)
                if (of_computing == at).any()
                else (of_computing >= at, of_spreading == at)
            )
            _count(setting, RULES[at], int(count), piece.one(*first), refused)
    left = piece.take(of_computing == len(RULES), of_spreading == len(RULES))
    return left, [RULES[at] for at in later]


def _first_broken(
    setting: Setting, table: LayoutTable, hidden: Sequence[str], rules: Sequence[int]
) -> tuple[NDArray[np.int64], list[int]]:
    """(index in RULES of the first of the `rules`, given in order, that each row breaks, len(RULES) where none; those that read one of
    the `hidden` columns)."""
    first, later, half = np.full(len(table), len(RULES)), list[int](), without(table, hidden)
    for at in rules:
        try:
            broken = RULES[at].broken(setting, half)
        except HiddenError:
            later.append(at)
        else:
            if np.any(broken):
                first[broken & (first > at)] = at
    return first, later


class HiddenError(Exception):
    """A rule reads a column that is not there."""


def without(table: LayoutTable, hidden: Sequence[str]) -> LayoutTable:
    """The table; reading one of the columns `hidden` raises HiddenError."""

    class Half(LayoutTable):
        def __getattribute__(self, name: str) -> Any:
            if name in hidden:
                raise HiddenError(name)
            return super().__getattribute__(name)

    return Half(**table.columns(), splits=table.splits, depths=table.depths)


def _refused_pairs(
    piece: Factors, of_computing: NDArray[np.int64], of_spreading: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Layouts whose factors break each rule and none before it: of all that break none before it those that do not break it."""
    codes = len(RULES) + 1

    def at_least(first: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = np.bincount(block * codes + first, minlength=piece.blocks * codes).reshape(piece.blocks, codes)
        return counts[:, ::-1].cumsum(axis=1)[:, ::-1]

    left = at_least(of_computing, piece.computing_block) * at_least(of_spreading, piece.spreading_block)
    return -np.diff(left.sum(axis=0))


def _count(setting: Setting, rule: Rule, count: int, rows: LayoutTable, refused: dict[str, Refusal]) -> None:
    """Add layouts that break a rule to the account; the first of `rows` is the example of a rule that has none yet."""
    before = refused.get(rule.id)
    if before:
        refused[rule.id] = replace(before, count=count + before.count)
        return
    first = rows.row(0)
    refused[rule.id] = Refusal(
        rule=rule.id, count=count, example=rule.detail(setting, first), remedy=rule.remedy(setting, first)
    )


def largest_first(refused: Mapping[str, Refusal]) -> tuple[Refusal, ...]:
    """The account of refusals in order."""
    return tuple(sorted(refused.values(), key=lambda r: (-r.count, r.rule)))


def sift(
    setting: Setting, space: LayoutTable, refused: dict[str, Refusal], rules: Sequence[Rule] = RULES
) -> LayoutTable:
    """Rows that break none of the rules; the others are added to `refused` under the first rule they break."""
    if not len(space):
        return space
    open_rows = np.ones(len(space), dtype=bool)
    for rule in rules:
        new = np.broadcast_to(rule.broken(setting, space), len(space)) & open_rows
        if new.any():
            open_rows = open_rows & ~new
            example = space.slice(int(new.argmax()), int(new.argmax()) + 1)
            _count(setting, rule, int(new.sum()), example, refused)
    return space if open_rows.all() else space.take(open_rows)
