"""Pipeline schedules: which stage holds which layers, micro-batches in flight, bubble.

Closed forms: bubble / ideal = (p - 1) / (m v) (GPipe, arXiv 1811.06965; interleaved 1F1B, arXiv 2104.04473 section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.costmodel.layout import SCHEDULES
from shardplan.costmodel.model import Model
from shardplan.costmodel.runtime import StageRule

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

GPIPE, INTERLEAVED = SCHEDULES.index("gpipe"), SCHEDULES.index("interleaved")
WORST_STAGES = 4


def bubble_fraction(pp: ArrayLike, micro_batches: ArrayLike, virtual_stages: ArrayLike) -> FloatArray:
    """Idle time over ideal compute time of equal stages: (p - 1) / (m v)."""
    p, m, v = (np.asarray(x, dtype=np.float64) for x in (pp, micro_batches, virtual_stages))
    return (p - 1.0) / (m * v)


def in_flight(
    schedule: ArrayLike, pp: ArrayLike, stage: ArrayLike, micro_batches: ArrayLike, virtual_stages: ArrayLike
) -> FloatArray:
    """Micro-batches whose activations stage `stage` (0-based) holds at its peak, in units of the whole stage.

    GPipe m; 1F1B min(m, p - i); interleaved (2 (p - i - 1) + (v - 1) p + 1) / v chunks, which is 1F1B's p times
    1 + (p - 1)/(p v) on stage 0 (Megatron-LM theoretical_memory_usage).
    """
    code, p, i, m, v = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (schedule, pp, stage, micro_batches, virtual_stages))
    )
    one_f_one_b = np.minimum(m, p - i)
    interleaved = np.minimum(m, (2.0 * (p - i - 1.0) + (v - 1.0) * p + 1.0) / v)
    return np.where(code == GPIPE, m, np.where((code == INTERLEAVED) & (v > 1), interleaved, one_f_one_b))


def split_layers(layers: int, chunks: int, rule: StageRule) -> tuple[int, ...]:
    """Layers of each chunk in model order: as even as possible with embedding and head weighed as the runtime does.

    Every chunk gets at least one layer where layers >= chunks; the remainder goes to the earliest lightest chunks.
    """
    weights = np.zeros(chunks)
    even_with_ends = rule.weigh_ends_to_divide and layers % chunks != 0 and (layers + 2) % chunks == 0
    weights[0] += 1.0 if even_with_ends else rule.embedding_weight
    weights[-1] += 1.0 if even_with_ends else rule.head_weight
    counts = np.zeros(chunks, dtype=np.int64)
    base = max(int((layers + weights.sum()) // chunks - weights.max()), 1 if layers >= chunks else 0)
    counts[:] = base
    for _ in range(layers - base * chunks):
        counts[int(np.argmin(counts + weights))] += 1
    return tuple(int(c) for c in counts)


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """What S stages of each of U unique (pp, virtual stages, split) keys hold; absent stages repeat the last."""

    stage: IntArray
    """Stage index, (U, S)."""
    layers: IntArray
    """Layers by kind, (U, S, kinds)."""
    embedding: IntArray
    """1 where the stage holds the embedding, (U, S)."""
    head: IntArray
    """1 where the stage holds final norm, head and loss, (U, S)."""
    total_layers: IntArray
    """Layers of each stage of the whole pipeline, (U, longest pipeline), 0 beyond pp."""


def stage_table(
    model: Model,
    pp: Sequence[int],
    virtual_stages: Sequence[int],
    splits: Sequence[tuple[int, ...] | None],
    rule: StageRule,
    *,
    every_stage: bool,
) -> StageTable:
    """Contents of the stages that can be the worst (first, second, heaviest, last), or of `every_stage`."""
    kinds = np.repeat(np.arange(len(model.layers)), [count for _, count in model.layers])
    width = max(pp) if every_stage else WORST_STAGES
    keys = len(pp)
    stage = np.zeros((keys, width), dtype=np.int64)
    layers = np.zeros((keys, width, len(model.layers)), dtype=np.int64)
    total = np.zeros((keys, max(pp)), dtype=np.int64)
    for row, (p, v, split) in enumerate(zip(pp, virtual_stages, splits, strict=True)):
        chunk_layers = split or split_layers(model.layer_count, p * v, rule)
        content = _stage_content(kinds, chunk_layers, p, len(model.layers))
        total[row, :p] = content.sum(axis=1)
        worst = (0, min(1, p - 1), int(np.argmax(total[row, :p])), p - 1)
        stage[row] = [min(s, p - 1) for s in range(width)] if every_stage else worst
        layers[row] = content[stage[row]]
    last = np.asarray(pp, dtype=np.int64)[:, None] - 1
    return StageTable(
        stage=stage,
        layers=layers,
        embedding=(stage == 0).astype(np.int64),
        head=(stage == last).astype(np.int64),
        total_layers=total,
    )


def _stage_content(kinds: IntArray, chunk_layers: Sequence[int], pp: int, kind_count: int) -> IntArray:
    """Layers by kind of each stage; chunk c belongs to stage c % pp (looped placement)."""
    content = np.zeros((pp, kind_count), dtype=np.int64)
    start = 0
    for chunk, number in enumerate(chunk_layers):
        content[chunk % pp] += np.bincount(kinds[start : start + number], minlength=kind_count)
        start += number
    return content
