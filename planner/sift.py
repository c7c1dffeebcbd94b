"""What the rules leave of the space, and the account of what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import RULES, broken_rules
from shardplan.planner.space import Wishes, join_tables, runtime_tiers, space_pieces
from shardplan.planner.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How many layouts one rule refused, with one example told in words."""

    rule: str
    count: int
    example: str


@dataclass(kw_only=True)
class Sifted:
    """What was looked at so far."""

    looked_at: int = 0
    kept: list[LayoutTable] = field(default_factory=list[LayoutTable])
    """Rows that break no rule, by piece of the space."""
    refused: dict[str, Refusal] = field(default_factory=dict[str, Refusal])

    def valid(self, wishes: Wishes) -> LayoutTable:
        """All rows that were kept."""
        return join_tables(self.kept, wishes)

    def account(self) -> tuple[Refusal, ...]:
        """Of the others, in order."""
        return largest_first(self.refused)


def sift_space(setting: Setting, wishes: Wishes, sifted: Sifted, watch: Watch) -> None:
    """Sift the space into `sifted`, one piece at a time: what an interrupt leaves there stands."""
    kinds, tiers = setting.runtime.abilities.context_parallel, runtime_tiers(setting.runtime)
    for done, piece in space_pieces(setting.model, setting.job, setting.cluster.gpus, wishes, kinds, tiers):
        if len(piece):
            left = sift(setting, piece, sifted.refused)
            sifted.looked_at += len(piece)
            sifted.kept.append(left)
        watch.phase("looking", 0.6 * done, sifted.looked_at)


def largest_first(refused: Mapping[str, Refusal]) -> tuple[Refusal, ...]:
    """The account of refusals in order."""
    return tuple(sorted(refused.values(), key=lambda r: (-r.count, r.rule)))


def sift(setting: Setting, space: LayoutTable, refused: dict[str, Refusal]) -> LayoutTable:
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
