"""From unique keys to rows: block costs by shape, stage contents by split, parameters per stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.adapters import adapter_parameters
from shardplan.costmodel.block_table import block_table, group_strides, padded_vocab
from shardplan.costmodel.expert_parallel import expert_parameters
from shardplan.costmodel.job import Job
from shardplan.costmodel.keys import gathered, unique_keys
from shardplan.costmodel.layout import CP_KINDS, LayoutTable
from shardplan.costmodel.memory import FULL, SELECTIVE
from shardplan.costmodel.model import LayerKind, Model, split_parameters
from shardplan.costmodel.pipeline import stage_table
from shardplan.costmodel.recompute import ALL_LAYERS, BY_STAGE
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Cluster

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class BlockColumns(Mapping[str, FloatArray]):
    """Columns of `layer_cost.BlockCost` over its shapes, each gathered for N layouts whenever it is read."""

    def __init__(self, columns: Mapping[str, FloatArray], shape_of: IntArray) -> None:
        self._columns, self._shape_of = columns, shape_of

    def __getitem__(self, name: str) -> FloatArray:
        return self._columns[name].take(self._shape_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def take(self, rows: IntArray) -> BlockColumns:
        """The rows at `rows`."""
        return BlockColumns(self._columns, self._shape_of.take(rows))


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """Costs of the blocks of N layouts; columns of context and expert parallelism only where some layout has it."""

    layers: tuple[BlockColumns, ...]
    """One per run of layer kinds."""
    embedding: BlockColumns
    head: BlockColumns
    logits_bytes: FloatArray
    selects: FloatArray
    """1 where recompute is selective."""

    def take(self, rows: IntArray) -> BlockRows:
        """The rows at `rows`."""
        return BlockRows(
            layers=tuple(block.take(rows) for block in self.layers),
            embedding=self.embedding.take(rows),
            head=self.head.take(rows),
            logits_bytes=self.logits_bytes.take(rows),
            selects=self.selects.take(rows),
        )


def block_rows(model: Model, job: Job, cluster: Cluster, layouts: LayoutTable, runtime: Runtime) -> BlockRows:
    """Costs of layers, embedding and head: once per unique (tp, sp, cp and its kind, ep, etp, their strides, micro-batch, attention,
    recomputed parts), then gathered."""
    context = layouts.cp * len(CP_KINDS) + layouts.cp_kind
    work = (layouts.tp, layouts.sequence_parallel, context, layouts.ep, layouts.etp, layouts.micro_batch)
    apart = group_strides(layouts) if layouts.order.any() else ()  # in the default order tp and etp say them
    first, inverse = unique_keys(*work, layouts.attention, layouts.recompute_parts, *apart)
    at = layouts.take(first)
    costs = block_table(model, job, cluster, runtime).of(at)
    place = costs.place.take(inverse)
    absent = ("context_",) * bool((layouts.cp == 1).all()) + ("expert_",) * (not at.dispatches.any())

    def columns(block: Mapping[str, FloatArray]) -> BlockColumns:
        return BlockColumns({name: column for name, column in block.items() if not name.startswith(absent)}, place)

    *layers, embedding, head = costs.blocks
    return BlockRows(
        layers=tuple(map(columns, layers)),
        embedding=columns(embedding),
        head=columns(head),
        logits_bytes=costs.logits_bytes.take(place),
        selects=(layouts.recompute == SELECTIVE).astype(np.float64),
    )


@dataclass(frozen=True, kw_only=True)
class StageRows:
    """What S stages of each of N layouts hold; arrays as `keys.gathered` stores them."""

    stage: IntArray
    """Stage index, (N, S)."""
    layers: FloatArray
    """Layers by kind, (N, S, kinds)."""
    recomputed: FloatArray
    """Layers under full recompute, (N, S)."""
    recomputed_total: FloatArray
    """Layers under full recompute in the whole pipeline, (N,)."""
    embedding: FloatArray
    head: FloatArray
    chunks: FloatArray | None = None
    """See `pipeline.StageTable`, (N, 2); None where all chunks of every layout are as long."""

    def take(self, rows: IntArray) -> StageRows:
        """The rows at `rows`."""
        return StageRows(
            stage=gathered(self.stage, rows),
            layers=gathered(self.layers, rows),
            recomputed=gathered(self.recomputed, rows),
            recomputed_total=self.recomputed_total.take(rows),
            embedding=gathered(self.embedding, rows),
            head=gathered(self.head, rows),
            chunks=None if self.chunks is None else self.chunks.take(rows, axis=0),
        )

    def some(self, which: slice) -> StageRows:
        """Those stages."""
        return StageRows(
            stage=self.stage[:, which],
            layers=self.layers[:, which],
            recomputed=self.recomputed[:, which],
            recomputed_total=self.recomputed_total,
            embedding=self.embedding[:, which],
            head=self.head[:, which],
            chunks=self.chunks,
        )


def stage_rows(model: Model, layouts: LayoutTable, runtime: Runtime, *, every_stage: bool) -> StageRows:
    """Stage contents: once per unique (pp, virtual stages, split, V-placed), then gathered; full recompute once per unique depth too."""
    v_placed = layouts.v_placed
    first, inverse = unique_keys(layouts.pp, layouts.virtual_stages, layouts.split, v_placed.astype(np.int64))
    table = stage_table(
        model,
        layouts.pp[first].tolist(),
        layouts.virtual_stages[first].tolist(),
        [layouts.splits[int(i)] for i in layouts.split[first].tolist()],
        runtime.stages,
        v_placed=v_placed[first].tolist(),
        every_stage=every_stage,
    )
    layers = gathered(table.layers.astype(np.float64), inverse)
    depth = np.where(layouts.recompute_layers == ALL_LAYERS, model.layer_count, layouts.recompute_layers)
    depth = np.where(layouts.recompute == FULL, depth, 0)
    at, back = unique_keys(inverse, depth)
    limits = _depth_of_stages(depth[at], layouts.depths, table.total_layers.shape[1])
    totals = np.minimum(table.total_layers[inverse[at]], limits).sum(axis=1).astype(np.float64)
    own = depth[:, None]
    if layouts.depths:
        own = np.take_along_axis(limits[back], table.stage[inverse], axis=1)
    return StageRows(
        stage=gathered(table.stage, inverse),
        layers=layers,
        recomputed=np.minimum(layers.sum(axis=2), own),
        recomputed_total=totals[back],
        embedding=gathered(table.embedding.astype(np.float64), inverse),
        head=gathered(table.head.astype(np.float64), inverse),
        chunks=table.chunks.take(inverse, axis=0) if (table.chunks != 1.0).any() else None,
    )


def _depth_of_stages(depth: IntArray, depths: Sequence[tuple[int, ...]], stages: int) -> IntArray:
    """Most layers under full recompute of each of `stages` stages, (K, stages)."""
    limits = np.repeat(depth[:, None], stages, axis=1)
    for row in np.flatnonzero(depth <= BY_STAGE):
        own = depths[BY_STAGE - int(depth[row])][:stages]
        limits[row] = [*own, *[0] * (stages - len(own))]
    return limits


def mean_stage_rows(model: Model, layouts: LayoutTable) -> StageRows:
    """One stage that holds 1/pp of everything, as the last stage of the pipeline: no cut of the layers leaves every stage with less
    work, or with fewer states."""
    share = 1.0 / layouts.pp
    counts = np.asarray([count for _, count in model.runs], dtype=np.float64)
    full = np.where(layouts.recompute == FULL, float(model.layer_count), 0.0)
    return StageRows(
        stage=(layouts.pp - 1)[:, None],
        layers=share[:, None, None] * counts,
        recomputed=(share * full)[:, None],
        recomputed_total=full,
        embedding=share[:, None],
        head=share[:, None],
    )


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Parameters held by a rank after the tensor-parallel split, (N, S)."""

    stage: FloatArray
    layer: FloatArray
    """Of the largest layer."""
    matrix: FloatArray
    """Of the largest matrix of a layer (the two input products of a gated MLP are one)."""
    root: FloatArray
    """Embedding, positions, final norm and head."""
    adapters: FloatArray | None = None
    """Trainable parameters where the others are frozen; None where every one is trained."""
    experts: FloatArray | None = None
    """Those of `stage` in experts that tokens are dispatched to: fewer ranks hold the same ones; None where there are none."""

    def take(self, rows: IntArray) -> StageParameters:
        """The rows at `rows`."""
        return StageParameters(
            stage=gathered(self.stage, rows),
            layer=gathered(self.layer, rows),
            matrix=gathered(self.matrix, rows),
            root=gathered(self.root, rows),
            adapters=None if self.adapters is None else gathered(self.adapters, rows),
            experts=None if self.experts is None else gathered(self.experts, rows),
        )


def stage_parameters(
    model: Model, job: Job, layouts: LayoutTable, runtime: Runtime, stages: StageRows, *, of_one_kind: bool = False
) -> StageParameters:
    """Divided by tp but for what `split_parameters` keeps whole. An embedding that the last stage needs too, as the head or for
    prediction modules, is held twice where it is another stage than the first. `of_one_kind`, the largest layer is of the smallest kind.
    """
    tp = layouts.tp.astype(np.float64)
    split = [split_parameters(kind) for kind, _ in model.runs]
    by_kind = np.stack([divided / tp + whole for divided, whole in split], axis=-1)
    experts = None
    if layouts.dispatches.any():
        held, instead = expert_parameters(model, layouts)
        by_kind = by_kind + held - instead
        experts = (stages.layers * held[:, None, :]).sum(axis=2)
    table = padded_vocab(model, runtime, tp) * model.hidden / tp
    norm = model.hidden * (2 if model.norm == "layernorm" else 1) + (model.vocab if model.head_bias else 0)
    root = stages.embedding * (table + model.learned_positions * model.hidden)[:, None]
    apart = (layouts.pp > 1) & ~layouts.v_placed
    copied = (layouts.pp > 1) if runtime.working_set.tied_twice_in_v else apart
    tables = (copied | (not model.tied_embeddings)) + 1.0 * (
        apart & (model.mtp_modules > 0 and not model.tied_embeddings)
    )
    root = root + stages.head * (tables * table + norm)[:, None]
    body = (stages.layers * by_kind[:, None, :]).sum(axis=2)
    largest = np.where(stages.layers > 0, by_kind[:, None, :], 0.0).max(axis=2)
    matrices = np.array([largest_matrix(kind) for kind, _ in model.runs], dtype=np.float64)
    matrix = np.where(stages.layers > 0, matrices, 0.0).max(axis=2) / tp[:, None]
    if of_one_kind:
        largest, matrix = by_kind.min(axis=1)[:, None], matrices.min() / tp[:, None]
    trained = None
    if job.adapters is not None:
        each = np.stack([adapter_parameters(kind, job.adapters, tp) for kind, _ in model.runs], axis=-1)
        trained = (stages.layers * each[:, None, :]).sum(axis=2)
    return StageParameters(
        stage=body + root, layer=largest, matrix=matrix, root=root, adapters=trained, experts=experts
    )


def largest_matrix(kind: LayerKind) -> int:
    """Parameters of the widest product of a layer: queries, keys and values, or the input of the MLP with its gate."""
    mlp = kind.hidden * max(kind.ffn, kind.shared_ffn) * (2 if kind.gated_mlp else 1)
    if kind.kv_lora_rank:
        return max((kind.q_lora_rank or kind.hidden) * kind.heads * kind.head_dim, mlp)
    return max(kind.hidden * (kind.heads + 2 * kind.kv_heads) * kind.head_dim, mlp)
