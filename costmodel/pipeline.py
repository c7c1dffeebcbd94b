"""Pipelines in closed form: which stage holds which layers, micro-batches in flight, bubble. `schedules.py` has the action lists.

Bubble of equal stages, in seconds of one chunk (forward F, gradients I of the input and W of the weights; x+ = max(x, 0)):

    gpipe, 1f1b          (p - 1) (F + I + W)                                          arXiv 1811.06965, 2104.04473
    interleaved, bfs     (p - 1 + (v - 1) (p - m)+) (F + I + W)                       arXiv 2104.04473, 2211.05953
    zero_bubble          (min(m, p) - 1) max(F, I, F + I - W) + (p - m)+ (F + I)      arXiv 2401.10241, section 2 (ZB-H1), appendix H
    zero_bubble_v        the longer of (p - 1) max(F, I, W, 2 F - I, 2 (I - W))
                         and 2 (p - 1) max(F, I) + 2 (p - m)+ F - 2 (m - p)+ W
    dualpipe_v           (p - 1) max(F, I, F + I - W, 2 I - W, 2 (F - W), 2 F - I - W)

The step ends for all ranks together: ZB-V's "zero bubble" counts each rank from its own first action to its last, which leaves
out the p - 1 forwards before the last rank starts. DeepSeek's table gives DualPipeV (p - 1) (F&B + B - 3 W), where the pair F&B
overlaps; without overlap and with F = I = W that is 2 F a hop, and the replay of the same lists takes F. The table is what the
replay takes: exactly in the first three rows (the second where m >= p); in the last two exactly with I = W = F (ZB-V with p < m <= 1.5 p:
to 2 % of the step), to 4 % of the step with F, I and W as transformers have them, to 5 % with any F, I, W within 1 to 6 and
m > 2 p (tests/test_schedules.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import SCHEDULES, SPLIT_BACKWARD, Layout, LayoutTable
from shardplan.costmodel.model import Model, attended_tokens, layer_order, matrix_parameters
from shardplan.costmodel.runtime_stages import StageRule

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

GPIPE, ONE_F_ONE_B, INTERLEAVED, LOOPED_BFS, ZERO_BUBBLE, ZERO_BUBBLE_V, DUALPIPE_V = (
    SCHEDULES.index(name)
    for name in ("gpipe", "1f1b", "interleaved", "looped_bfs", "zero_bubble", "zero_bubble_v", "dualpipe_v")
)
SPLITTING = tuple(SCHEDULES.index(name) for name in SPLIT_BACKWARD)
WORST_STAGES = 4
PIPELINES = 4096
"""Whose stages are remembered: a search asks for the same ones a hundred times."""


def splits_backward(layouts: LayoutTable) -> NDArray[np.bool_]:
    """Rows whose pipeline computes gradients of inputs and of weights apart, (N,)."""
    return np.asarray(layouts.pp > 1) & one_of(layouts.schedule, SPLITTING)


def _any_of(code: FloatArray, *schedules: int) -> bool:
    """Whether some row has one of the schedules: what none has is not computed."""
    return any(bool((code == one).any()) for one in schedules)


def bubble_share(
    schedule: ArrayLike,
    pp: ArrayLike,
    micro_batches: ArrayLike,
    virtual_stages: ArrayLike,
    passes: tuple[ArrayLike, ArrayLike, ArrayLike] = (1.0, 1.0, 1.0),
) -> FloatArray:
    """Bubble over F + I + W of one chunk (table above), shapes broadcast; `schedule` is the code, `passes` are F, I and W in any unit."""
    code, p, m, v = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (schedule, pp, micro_batches, virtual_stages))
    )
    hops = p - 1.0
    if not _any_of(code, INTERLEAVED, LOOPED_BFS, *SPLITTING):
        return hops
    missing = np.where(p > 1, np.maximum(p - m, 0.0), 0.0)
    found = np.where((code == INTERLEAVED) | (code == LOOPED_BFS), hops + (v - 1.0) * missing, hops)
    if not _any_of(code, *SPLITTING):
        return found
    f, i, w = (np.asarray(x, dtype=np.float64) for x in passes)
    whole = f + i + w
    longer = np.maximum(f, i)
    halved = np.maximum(longer, f + i - w)
    v_shaped = np.maximum(longer, np.maximum(np.maximum(w, 2.0 * f - i), 2.0 * (i - w)))
    paired = np.maximum(np.maximum(halved, 2.0 * i - w), 2.0 * f - w - np.minimum(i, w))
    surplus = np.where(p > 1, np.maximum(m - p, 0.0), 0.0)
    filling = 2.0 * (hops * longer + missing * f - surplus * w)
    seconds = np.where(code == ZERO_BUBBLE, (hops - missing) * halved + missing * (f + i), hops * paired)
    seconds = np.where(code == ZERO_BUBBLE_V, np.maximum(hops * v_shaped, filling), seconds)
    split = np.isin(code, SPLITTING)
    return np.where(
        split, np.divide(seconds, whole, out=np.zeros(np.broadcast(seconds, whole).shape), where=whole > 0), found
    )


def bubble_fraction(
    pp: ArrayLike, micro_batches: ArrayLike, virtual_stages: ArrayLike, schedule: ArrayLike = ONE_F_ONE_B
) -> FloatArray:
    """Idle time over ideal compute time of equal stages with I = W = F, shapes broadcast; `schedule` is the code.

    (p - 1) / (m v) for gpipe, 1f1b, and interleaved and looped_bfs with m >= p; a third of it for zero_bubble with m >= p,
    zero_bubble_v with 2 m >= 3 p - 1 and dualpipe_v.
    """
    m, v = (np.asarray(x, dtype=np.float64) for x in (micro_batches, virtual_stages))
    return bubble_share(schedule, pp, m, v) / (m * v)


def uneven_chunks_s(
    layouts: LayoutTable, micro_batches: FloatArray, chunks: FloatArray, mean_s: FloatArray, slowest_s: FloatArray
) -> FloatArray:
    """Seconds that a step of interleaved stages takes longer once it is full, (N,), where chunks of one number are longer than of
    another (`chunk_lengths`, (N, 2)): ranks that run the short ones wait for those at the long ones.

    In mean chunks per round of p micro-batches: (p - 1) (most - least) - most, less what all wait for the slowest stage anyway; from the
    third round on. Replays of 32 to 126 layers over 8 to 128 chunks, remainders on the earliest: 1.1 % off on average, 5 % at most; without
    it up to 20 % too short. Cuts as the planner makes them, remainders on some ranks: 3 to 7 % off on average, 20 % too long (one round) to
    18 % too short (sixteen) at most. Chunks in any other order are not what this is made for (tests/test_uneven_chunks.py).
    """
    p, (most, least) = layouts.pp.astype(np.float64), chunks.T
    lost = ((p - 1.0) * (most - least) - most) * mean_s / layouts.virtual_stages - p * (slowest_s - mean_s)
    rounds = np.maximum(micro_batches / p - 2.0, 0.0)
    return np.where(layouts.schedule == INTERLEAVED, rounds * np.maximum(lost, 0.0), 0.0)


def in_flight(
    schedule: ArrayLike, pp: ArrayLike, stage: ArrayLike, micro_batches: ArrayLike, virtual_stages: ArrayLike
) -> FloatArray:
    """Micro-batches whose activations rank `stage` (0-based) holds at its peak, in units of the whole stage.

    GPipe and breadth-first m; 1F1B min(m, p - i); interleaved (2 (p - i - 1) + (v - 1) p + 1) / v chunks, which is 1F1B's p
    times 1 + (p - 1)/(p v) on stage 0 (Megatron-LM theoretical_memory_usage), with the longest round in place of p where p
    does not divide m; ZB-H1 and ZB-V p on every rank (arXiv 2401.10241: the peak of 1F1B; ZB-V (m + i + 1) / 2 where that is
    less), DualPipeV p + 1/2 (deepseek-ai/DualPipe: PP + 1 chunks, PP = 2 p); none more than m. A chunk counts from its F to its
    B, or to its W where B is split.
    """
    code, p, i, m, v = (np.asarray(x, dtype=np.float64) for x in (schedule, pp, stage, micro_batches, virtual_stages))
    longest = np.ceil(m / np.maximum(np.floor(m / p), 1.0))
    chunked = (code == INTERLEAVED) & (v > 1)
    held = np.where(chunked, (2.0 * (p - i - 1.0) + (v - 1.0) * longest + 1.0) / v, p - i)
    if _any_of(code, *SPLITTING):
        held = np.where(code == ZERO_BUBBLE, p, held)
        held = np.where(code == ZERO_BUBBLE_V, np.minimum(p, (m + i + 1.0) / 2.0), held)
        held = np.where(code == DUALPIPE_V, p + 0.5, held)
    return np.where((code == GPIPE) | (code == LOOPED_BFS), m, np.minimum(m, held))


def split_layers(layers: int, chunks: int, rule: StageRule) -> tuple[int, ...]:
    """Layers of each chunk in model order: as even as possible with embedding and head weighed as the runtime does.

    Every chunk gets at least one layer where layers >= chunks; the remainder goes to the earliest lightest chunks. With fewer, the ends
    are counted as one each: up to two chunks more than layers, only the last and the first hold none.
    """
    even_with_ends = rule.weigh_ends_to_divide and layers % chunks != 0 and (layers + 2) % chunks == 0
    even_with_ends = even_with_ends or layers < chunks
    first, last = (1.0, 1.0) if even_with_ends else (rule.embedding_weight, rule.head_weight)
    if first == last == 0:
        each, more = divmod(layers, chunks)
        return (each + 1,) * more + (each,) * (chunks - more)
    weights = np.zeros(chunks)
    weights[0] += first
    weights[-1] += last
    base = max(int((layers + weights.sum()) // chunks - weights.max()), 1 if layers >= chunks else 0)
    counts = np.full(chunks, base, dtype=np.int64)
    for _ in range(layers - base * chunks):
        counts[int(np.argmin(counts + weights))] += 1
    return tuple(int(c) for c in counts)


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """What S stages (ranks) of each of U unique (pp, virtual stages, split, V-placed) keys hold; absent ones repeat the last."""

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
    chunks: FloatArray
    """See `chunk_lengths`, (U, 2)."""


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What the stages of one pipeline hold; see `StageTable`."""

    layers: IntArray
    """Layers by kind, (pp, kinds)."""
    total: IntArray
    """Layers, (pp,)."""
    worst: tuple[int, int, int, int]
    chunks: tuple[float, float]


@lru_cache(maxsize=PIPELINES)
def _stage_contents(
    model: Model, rule: StageRule, pp: int, virtual_stages: int, split: tuple[int, ...] | None, v_placed: bool
) -> _Contents:
    kinds, runs = np.asarray(layer_order(model), dtype=np.int64), len(model.runs)
    chunk_layers = split or split_layers(model.layer_count, pp * virtual_stages, rule)
    rank_of_layer = np.repeat(_chunk_ranks(pp, virtual_stages, v_placed=v_placed), chunk_layers)
    layers = np.bincount(rank_of_layer * runs + kinds, minlength=pp * runs).reshape(pp, runs)
    layers[0 if v_placed else pp - 1, len(model.layers) :] += model.mtp_modules
    total = layers.sum(axis=1)
    weight = total + layers @ _relative_work(model)
    heaviest = np.flatnonzero(weight == weight.max())
    for shared in (layers, total):
        shared.setflags(write=False)
    # ZB-V keeps more micro-batches in flight the later the rank, the others the earlier
    second = int(heaviest[-1]) if v_placed else min(1, pp - 1)
    return _Contents(
        layers=layers,
        total=total,
        worst=(0, second, int(heaviest[0]), pp - 1),
        chunks=chunk_lengths(chunk_layers, pp, virtual_stages) if virtual_stages > 1 else (1.0, 1.0),
    )


def stage_table(
    model: Model,
    pp: Sequence[int],
    virtual_stages: Sequence[int],
    splits: Sequence[tuple[int, ...] | None],
    rule: StageRule,
    *,
    v_placed: Sequence[bool],
    every_stage: bool,
) -> StageTable:
    """Contents of the stages that can be the worst (first, second or in a V last heaviest, heaviest, last), or of `every_stage`.

    `v_placed` keys hold chunks r and 2 pp - 1 - r, so that stage 0 has the head beside the embedding.
    """
    width = max(pp) if every_stage else WORST_STAGES
    keys = len(pp)
    stage = np.zeros((keys, width), dtype=np.int64)
    layers = np.zeros((keys, width, len(model.runs)), dtype=np.int64)
    total = np.zeros((keys, max(pp)), dtype=np.int64)
    chunks = np.ones((keys, 2))
    last = np.where(np.asarray(v_placed, dtype=np.bool_), 0, np.asarray(pp, dtype=np.int64) - 1)
    for row, (p, v, split) in enumerate(zip(pp, virtual_stages, splits, strict=True)):
        one = _stage_contents(model, rule, p, v, split, v_placed[row])
        total[row, :p], chunks[row] = one.total, one.chunks
        stage[row] = np.minimum(np.arange(width), p - 1) if every_stage else one.worst
        layers[row] = one.layers[stage[row]]
    return StageTable(
        stage=stage,
        layers=layers,
        embedding=(stage == 0).astype(np.int64),
        head=(stage == last[:, None]).astype(np.int64),
        total_layers=total,
        chunks=chunks,
    )


def chunk_lengths(split: Sequence[int], pp: int, virtual_stages: int) -> tuple[float, float]:
    """(most, least) layers of a chunk number, mean over its ranks, relative to all chunks; ones where all are as long."""
    by_number = np.reshape(split, (virtual_stages, pp)).mean(axis=1)
    return float(by_number.max() / by_number.mean()), float(by_number.min() / by_number.mean())


def layers_of_ranks(split: Sequence[int], pp: int, virtual_stages: int, *, v_placed: bool) -> IntArray:
    """Layers of each rank, (pp,), of a pipeline whose chunks in model order hold `split`."""
    held = np.zeros(pp, dtype=np.int64)
    np.add.at(held, _chunk_ranks(pp, virtual_stages, v_placed=v_placed), split)
    return held


def layers_of_chunks(layout: Layout, layers: int, rule: StageRule) -> tuple[int, ...]:
    """Layers of each chunk in model order: those the layout says, else as the runtime splits `layers`."""
    return layout.stage_layers or split_layers(layers, layout.pp * layout.virtual_stages, rule)


def first_layers(model: Model, split: Sequence[int], rank: int, number: float, table: LayoutTable) -> IntArray:
    """Layers of each run among the first `number` that `rank` of the one pipeline of `table` holds, prediction modules last, (runs,)."""
    pp, v_placed = int(table.pp[0]), bool(table.v_placed[0])
    held_by = np.repeat(_chunk_ranks(pp, int(table.virtual_stages[0]), v_placed=v_placed), split)
    kinds = np.asarray(layer_order(model), dtype=np.int64)[held_by == rank]
    if rank == (0 if v_placed else pp - 1):
        kinds = np.concatenate([kinds, np.full(model.mtp_modules, len(model.layers))])
    return np.bincount(kinds[: int(number)], minlength=len(model.runs))


def _relative_work(model: Model) -> FloatArray:
    """Matrix products and attention of one layer of each run, all together a hundredth of a layer: ranks stages that have as many."""
    seq = model.max_positions or 0
    work = np.array(
        [
            matrix_parameters(kind) + 2 * attended_tokens(kind, seq) * kind.heads * kind.attention_dim
            for kind, _ in model.runs
        ]
    )
    return work / work.max() / (100.0 * sum(count for _, count in model.runs))


def _chunk_ranks(pp: int, virtual_stages: int, *, v_placed: bool) -> IntArray:
    """Rank of each chunk in model order: c % pp looped; down and up again in V placement."""
    turn, at = np.divmod(np.arange(pp * virtual_stages), pp)
    return np.where(turn % 2 == 1, pp - 1 - at, at) if v_placed else at
