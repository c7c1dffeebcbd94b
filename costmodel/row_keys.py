"""Which rows of a table share what: the sets of keys that memory and time of N layouts are computed on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.keys import Keys, keys_of
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.runtime import Communication

IntArray = NDArray[np.int64]

SHARING = ("zero", "dp_shard", "offload_optimizer", "ep")
"""Columns that say how states are spread and kept; all others say what a micro-batch computes and keeps."""

ROWS_IN_CACHE = 1 << 14
"""Rows that are gathered and added up together: their few columns stay in the cache of a core."""


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """Keys of N layouts. Every column of a table belongs to `work` or to `states`, those of the mesh and of the stages to both."""

    work: Keys
    """What a micro-batch computes and keeps: all columns but SHARING."""
    contents: Keys
    """What a stage holds: tp, pp, chunks and their placement; among the rows `work.first`."""
    pace: Keys
    """`work`, and what ZeRO adds to every micro-batch."""
    states: Keys
    """What a rank holds and exchanges: tp, stage contents, data-parallel ranks, one or more micro-batches, SHARING."""


def row_keys(layouts: LayoutTable, communication: Communication, global_batch: int) -> RowKeys:
    """The keys of every row; InputError never: meaningless rows have keys too."""
    columns = layouts.columns()
    work = keys_of(*(column for name, column in columns.items() if name not in SHARING))
    sharing = keys_of(*(columns[name] for name in SHARING))
    rows = layouts.take(work.first)
    contents = keys_of(rows.tp, rows.pp, rows.virtual_stages, rows.split, rows.v_placed.astype(np.int64))
    accumulates = (global_batch > rows.dp * rows.micro_batch).astype(np.int64)
    ranks = keys_of(contents.of_row, rows.dp, rows.cp, accumulates)
    return RowKeys(
        work=work,
        contents=contents,
        pace=keys_of(work.of_row, _exchanging(rows, layouts.take(sharing.first), communication, work, sharing)),
        states=keys_of(ranks.of_row.take(work.of_row), sharing.of_row),
    )


def _exchanging(
    work_rows: LayoutTable, sharing_rows: LayoutTable, communication: Communication, work: Keys, sharing: Keys
) -> IntArray:
    """Code of what ZeRO adds to every micro-batch, (N,): its stage, whether it shards, and where gradients are reduced after every
    micro-batch, over how many ranks."""
    zero, shards = sharing_rows.zero, sharing_rows.dp_shard
    often = np.isin(zero, communication.reduce_every_micro_batch)
    few = np.where(zero > 0, np.minimum(shards, 2), 1)
    outside, inside = np.where((zero > 0) & often, shards, few), few
    codes = keys_of(np.tile(zero, 2), np.concatenate([outside, inside])).of_row
    if not communication.pipeline_reduces_once:
        return codes.take(sharing.of_row)
    pipeline = np.where(work_rows.pp > 1, len(zero), 0)
    return codes.take(pipeline.take(work.of_row) + sharing.of_row)
