"""What the rules leave of the space, and the account of what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import RULES, broken_rules
from shardplan.planner.space import Wishes, join_tables, runtime_tiers, space_pieces


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How many layouts one rule refused, with one example told in words."""

    rule: str
    count: int
    example: str


def sift_space(setting: Setting, wishes: Wishes) -> tuple[int, LayoutTable, tuple[Refusal, ...]]:
    """(layouts looked at, those that break no rule, the account of the others), one piece of the space at a time."""
    looked_at, kept = 0, list[LayoutTable]()
    refused: dict[str, Refusal] = {}
    kinds, tiers = setting.runtime.abilities.context_parallel, runtime_tiers(setting.runtime)
    for piece in space_pieces(setting.model, setting.job, setting.cluster.gpus, wishes, kinds, tiers):
        if len(piece):
            looked_at += len(piece)
            kept.append(sift(setting, piece, refused))
    return looked_at, join_tables(kept, wishes), largest_first(refused)


def largest_first(refused: Mapping[str, Refusal]) -> tuple[Refusal, ...]:
    """The account of refusals in order."""
    return tuple(sorted(refused.values(), key=lambda r: (-r.count, r.rule)))


def sift(setting: Setting, space: LayoutTable, refused: dict[str, Refusal]) -> LayoutTable:
    """Rows that break no rule; the others are added to `refused` under the first rule they break."""
    broken = broken_rules(setting, space)
    open_rows = np.ones(len(space), dtype=bool)
    for rule in RULES:
        if rule.id in broken:
            new = broken[rule.id] & open_rows
            open_rows &= ~new
            if new.any():
                before = refused.get(rule.id)
                example = before.example if before else rule.detail(setting, space.row(int(np.flatnonzero(new)[0])))
                count = int(new.sum()) + (before.count if before else 0)
                refused[rule.id] = Refusal(rule=rule.id, count=count, example=example)
    return space.take(open_rows)
