"""Which rows of a table share what: the sets of keys that memory and time of N layouts are computed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.keys import Keys, keys_of, one_of
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.runtime import Communication

IntArray = NDArray[np.int64]

SHARING = ("zero", "dp_shard", "offload_optimizer", "offload_params", "offload_ratio", "hpz", "qwz", "qgz")
"""Columns that say how states are spread and kept; all others say what a micro-batch computes and keeps."""

FEW_ROWS = 256
"""Of a table: to look for what they share takes longer than to compute it again."""


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """Keys of N layouts, with a layout that has each. Every column of a table belongs to `work` or to `states`, those of the mesh and
    of the stages to both."""

    work: LayoutTable
    """What a micro-batch computes and keeps: all columns but SHARING, (W,)."""
    work_of: IntArray
    """Key of each row, (N,)."""
    contents: LayoutTable
    """What a stage holds: tp, ep, etp, pp, chunks and their placement, (C,)."""
    contents_of_work: IntArray
    work_of_contents: IntArray
    pace: LayoutTable
    """The work, and what ZeRO adds to every micro-batch, (P,)."""
    pace_of: IntArray
    work_of_pace: IntArray
    states: LayoutTable
    """What a rank holds and exchanges: tp, stage contents, data-parallel ranks, their order, one or more
    micro-batches, SHARING, (T,)."""
    states_of: IntArray
    work_of_states: IntArray


def row_keys(layouts: LayoutTable, communication: Communication, global_batch: int) -> RowKeys:
    """The keys of every row, whether it has a meaning or not; each row its own where they are few."""
    if len(layouts) <= FEW_ROWS:
        return _its_own(layouts.with_constants())
    columns = layouts.columns()
    by_work = keys_of(*(column for name, column in columns.items() if name not in SHARING))
    by_sharing = keys_of(*(columns[name] for name in SHARING))
    work = layouts.take(by_work.row).with_constants()
    placed = work.v_placed.astype(np.int64)
    contents = keys_of(work.tp, work.ep, work.etp, work.pp, work.virtual_stages, work.split, placed)
    accumulates = (global_batch > work.dp * work.micro_batch).astype(np.int64)
    ranks = keys_of(contents.of_row, work.dp, work.cp, accumulates, work.order)
    exchanging = _exchanging(work, columns, communication, by_work, by_sharing)
    by_pace = keys_of(by_work.of_row, exchanging, dense=True)
    by_states = keys_of(ranks.of_row.take(by_work.of_row), by_sharing.of_row, dense=True)
    work_of_pace, work_of_states = by_work.of_row.take(by_pace.row), by_work.of_row.take(by_states.row)

    def rows(of_work: IntArray, at: IntArray) -> LayoutTable:
        """Layouts at `at`: what they share with their key of the work is read from there, where it lies close together."""
        return replace(work.take(of_work), **{name: columns[name].take(at) for name in SHARING})

    return RowKeys(
        work=work,
        work_of=by_work.of_row,
        contents=work.take(contents.row),
        contents_of_work=contents.of_row,
        work_of_contents=contents.row,
        pace=rows(work_of_pace, by_pace.row),
        pace_of=by_pace.of_row,
        work_of_pace=work_of_pace,
        states=rows(work_of_states, by_states.row),
        states_of=by_states.of_row,
        work_of_states=work_of_states,
    )


def _its_own(layouts: LayoutTable) -> RowKeys:
    every = np.arange(len(layouts))
    return RowKeys(
        work=layouts,
        work_of=every,
        contents=layouts,
        contents_of_work=every,
        work_of_contents=every,
        pace=layouts,
        pace_of=every,
        work_of_pace=every,
        states=layouts,
        states_of=every,
        work_of_states=every,
    )


def _exchanging(
    work: LayoutTable, columns: Mapping[str, IntArray], communication: Communication, by_work: Keys, by_sharing: Keys
) -> IntArray:
    """Code of what ZeRO adds to every micro-batch, (N,): its stage, whether it shards, and where gradients are reduced after every
    micro-batch, over how many ranks."""
    zero, shards = (columns[name].take(by_sharing.row) for name in ("zero", "dp_shard"))
    often = one_of(zero, communication.reduce_every_micro_batch)
    few = np.where(zero > 0, np.minimum(shards, 2), 1)
    outside, inside = np.where((zero > 0) & often, shards, few), few
    codes = keys_of(np.tile(zero, 2), np.concatenate([outside, inside])).of_row
    if not communication.pipeline_reduces_once:
        return codes.take(by_sharing.of_row)
    pipeline = np.where(work.pp > 1, len(zero), 0)
    return codes.take(pipeline.take(by_work.of_row) + by_sharing.of_row)
