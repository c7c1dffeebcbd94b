"""Costs of layers, embedding and head of every shape that was asked for: each is computed once for a model, job, machine and runtime.

A search asks for the same shapes in dozens of tables of layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.adapters import frozen_head_ops, with_adapters, with_head
from shardplan.costmodel.expert_parallel import expert_load, mixed, spread_layers
from shardplan.costmodel.job import BYTES_OF, Job
from shardplan.costmodel.keys import Same
from shardplan.costmodel.layer_cost import BlockCost, block_costs
from shardplan.costmodel.layout import ATTENTION, LayoutTable
from shardplan.costmodel.memory import gradient_bytes
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.op import Op
from shardplan.costmodel.operators import Shapes, embedding_ops, head_ops, layer_ops, logits_bytes
from shardplan.costmodel.rank_groups import stage_stride
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import tier_table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
COLUMNS = tuple(BlockCost.__dataclass_fields__)
TABLES = 8
"""Settings whose shapes are kept: a search has one, a sweep or an explanation a few in turn."""


@dataclass(frozen=True, kw_only=True)
class BlockOps:
    """The operators of every kind of block, over K layouts."""

    shapes: Shapes
    layers: tuple[tuple[Op, ...], ...]
    """One per run of layer kinds."""
    embedding: tuple[Op, ...]
    head: tuple[Op, ...]
    """Of every prediction."""
    spread: Mapping[int, tuple[Op, ...]]
    """Of runs of layers with experts, where tokens are dispatched to those."""


def block_ops(model: Model, job: Job, at: LayoutTable, runtime: Runtime) -> BlockOps:
    """The operators of layers, embedding and head for each layout of `at`."""
    default = ATTENTION.index(runtime.abilities.attention[0])
    attention = np.where(at.attention == 0, default, at.attention)
    shapes = _shapes(job, at, attention != ATTENTION.index("unfused"))
    vocab = padded_vocab(model, runtime, shapes.tp)
    table = 0.0 if model.tied_embeddings else vocab / shapes.tp * model.hidden
    layers = tuple(_layer(kind, shapes, job, runtime) for kind, _ in model.runs)
    head = head_ops(model.hidden, model.norm, vocab, shapes, runtime, softcap=model.logit_softcap)
    return BlockOps(
        shapes=shapes,
        layers=layers,
        embedding=embedding_ops(model.hidden, table, model.layers[0][0].dropout, shapes),
        head=_head(head, shapes, job, runtime) * (1 + model.mtp_modules),  # each has logits and a loss of its own
        spread=spread_layers(model, layers, shapes, runtime) if at.dispatches.any() else {},
    )


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """Costs of T shapes, and where among them those of N layouts are."""

    blocks: tuple[Mapping[str, FloatArray], ...]
    """Columns of `BlockCost`, (T,), of one layer of each run, of the embedding and of the head."""
    logits_bytes: FloatArray
    place: IntArray


class BlockTable:
    """The shapes of one setting that were asked for so far."""

    def __init__(self, model: Model, job: Job, cluster: Cluster, runtime: Runtime) -> None:
        self._model, self._job, self._cluster, self._runtime = model, job, cluster, runtime
        self._tiers = tier_table(cluster)
        self._place: dict[bytes, int] = {}
        self._blocks: list[dict[str, FloatArray]] = []
        self._logits_bytes = np.zeros(0)

    def of(self, layouts: LayoutTable) -> BlockCosts:
        """The costs of the layouts' blocks."""
        keys = np.stack(_key(layouts), axis=1)
        rows = [row.tobytes() for row in keys]
        new = {row: at for at, row in enumerate(rows) if row not in self._place}
        if new:
            self._add(layouts.take(np.fromiter(new.values(), dtype=np.int64)))
            self._place.update({row: len(self._place) + nth for nth, row in enumerate(new)})
        place = np.fromiter((self._place[row] for row in rows), dtype=np.int64, count=len(rows))
        return BlockCosts(blocks=tuple(self._blocks), logits_bytes=self._logits_bytes, place=place)

    def _add(self, at: LayoutTable) -> None:
        """Compute the shapes of layouts that are all new."""
        model, job, runtime = self._model, self._job, self._runtime
        ops = block_ops(model, job, at, runtime)
        shapes, spread = ops.shapes, ops.spread
        costs = block_costs(
            (*ops.layers, ops.embedding, ops.head, *spread.values()),
            shapes,
            gpu=self._cluster.gpu,
            precision=job.precision,
            gradient_bytes=gradient_bytes(runtime, job),
            tiers=self._tiers,
            runtime=runtime,
        )
        columns = [{name: getattr(cost, name) for name in COLUMNS} for cost in costs]
        blocks = columns[: len(ops.layers) + 2]
        for index, cost in zip(spread, columns[len(ops.layers) + 2 :], strict=True):
            blocks[index] = mixed(blocks[index], cost, at.dispatches)
        streams = np.where(shapes.recompute_parts == 0, runtime.activations.selective_streams, 0.0)
        for (kind, _), layer in zip(
            model.runs, blocks, strict=False
        ):  # what `selective` keeps in exchange is not dropped
            kept = streams * shapes.element_bytes * shapes.tokens * kind.hidden
            layer["selective_bytes"] = layer["selective_bytes"] - kept
        vocab, heads = padded_vocab(model, runtime, shapes.tp), 1 + model.mtp_modules
        logits = heads * logits_bytes(vocab, shapes, with_head(runtime, job), softcap=model.logit_softcap)
        before = self._blocks or [dict.fromkeys(COLUMNS, np.zeros(0)) for _ in blocks]
        self._blocks = [
            {name: np.concatenate([old[name], new[name]]) for name in COLUMNS}
            for old, new in zip(before, blocks, strict=True)
        ]
        self._logits_bytes = np.concatenate([self._logits_bytes, logits])


def block_table(model: Model, job: Job, cluster: Cluster, runtime: Runtime) -> BlockTable:
    """The table of a setting, as far as it was filled."""
    return _table(Same((model, job, cluster, runtime)))


@lru_cache(maxsize=TABLES)
def _table(same: Same) -> BlockTable:
    return BlockTable(*same.objects)


def _key(layouts: LayoutTable) -> list[IntArray]:
    """What the costs of blocks depend on, columns (N,)."""
    names = ("tp", "sequence_parallel", "cp", "cp_kind", "ep", "etp", "micro_batch", "attention", "recompute_parts")
    strides = group_strides(layouts)
    return [np.asarray(column, dtype=np.int64) for column in (*(getattr(layouts, name) for name in names), *strides)]


def padded_vocab(model: Model, runtime: Runtime, tp: FloatArray) -> FloatArray:
    """Vocabulary padded to a multiple of the runtime's block times tp."""
    multiple = runtime.vocabulary_multiple * tp
    return np.ceil(model.vocab / multiple) * multiple


def _shapes(job: Job, at: LayoutTable, flash: NDArray[np.bool_]) -> Shapes:
    """The keys of operators of each layout of `at`."""
    tp = at.tp.astype(np.float64)
    return Shapes(
        micro_batch=at.micro_batch.astype(np.float64),
        seq=job.seq / at.cp,
        cp=at.cp.astype(np.float64),
        cp_kind=at.cp_kind,
        cp_stride=at.stride("cp").astype(np.float64),
        tp=tp,
        tp_stride=at.stride("tp").astype(np.float64),
        sp=np.where(at.sequence_parallel == 1, tp, 1.0),
        flash=flash,
        library=at.attention == ATTENTION.index("flash"),
        ep=at.ep.astype(np.float64),
        expert_tp=at.expert_tp.astype(np.float64),
        ep_stride=stage_stride(at, at.expert_tp).astype(np.float64),
        expert_tp_stride=stage_stride(at, np.ones_like(at.tp)).astype(np.float64),
        expert_load=expert_load(job, at),
        recompute_parts=at.recompute_parts,
        element_bytes=BYTES_OF[job.precision],
        casts=job.precision == "fp8",
        document=job.document_tokens,
    )


def group_strides(layouts: LayoutTable) -> tuple[IntArray, ...]:
    """Of the groups that a layer exchanges in, each (N,)."""
    experts = (stage_stride(layouts, layouts.expert_tp), stage_stride(layouts, np.ones_like(layouts.tp)))
    return (layouts.stride("tp"), layouts.stride("cp"), *experts)


def _layer(kind: LayerKind, shapes: Shapes, job: Job, runtime: Runtime) -> tuple[Op, ...]:
    """The operators of a layer, with adapters where the job trains those."""
    ops = layer_ops(kind, shapes, runtime)
    if job.adapters is None:
        return ops
    return with_adapters(ops, kind, shapes, job.adapters, runtime.tuning, runtime.activations.norm_bytes)


def _head(ops: tuple[Op, ...], shapes: Shapes, job: Job, runtime: Runtime) -> tuple[Op, ...]:
    """The operators of the head as they are, or frozen."""
    return ops if job.adapters is None else frozen_head_ops(ops, shapes, runtime.activations.norm_bytes)
