"""Tables of layouts one below the other, with the explicit stages of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from shardplan.costmodel.columns import joined_column
from shardplan.costmodel.layout import COLUMNS, LayoutTable
from shardplan.costmodel.recompute import BY_STAGE


def stacked(tables: Sequence[LayoutTable]) -> LayoutTable:
    """All rows of `tables`, in order."""
    splits = list(dict.fromkeys((None, *(split for table in tables for split in table.splits))))
    depths = list(dict.fromkeys(depth for table in tables for depth in table.depths))
    same = [_renumbered(table, splits, depths) for table in tables]
    columns = {name: joined_column([getattr(table, name) for table in same]) for name in COLUMNS}
    return LayoutTable(**columns, splits=tuple(splits), depths=tuple(depths))


def _renumbered(
    table: LayoutTable, splits: Sequence[tuple[int, ...] | None], depths: Sequence[tuple[int, ...]]
) -> LayoutTable:
    code_of = {one: code for code, one in enumerate(splits)}
    codes = [code_of[one] for one in table.splits]
    split = table.split if codes == list(range(len(codes))) else np.asarray(codes, dtype=np.int64)[table.split]
    layers = table.recompute_layers
    if table.depths:
        code = np.asarray([BY_STAGE - depths.index(one) for one in table.depths], dtype=np.int64)
        own = layers <= BY_STAGE
        layers = np.where(own, code[np.where(own, BY_STAGE - layers, 0)], layers)
    return dataclasses.replace(table, split=split, recompute_layers=layers)
