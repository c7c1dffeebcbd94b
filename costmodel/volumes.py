"""Payload bytes that each rank of a pipeline stage puts into collectives in one step, by axis: what the seconds of `step_time` are for.

Made of the same operators, counts and sizes. The payload of a collective is the buffer that `collectives.py` takes: what is reduced,
what has been gathered, what a rank holds before an all-to-all, what it sends to a neighbour. Not counted, here and in the seconds:
norms of gradients and losses (a few numbers), the sum over tp of gradients of norms under sequence parallelism (a vector each, once
a step), what stages tell each other of shapes, checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shardplan.costmodel.block_table import block_ops
from shardplan.costmodel.context_parallel import exchanges
from shardplan.costmodel.data_parallel import Exchange, exchange_s
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import CP_KINDS, Layout, LayoutTable, layout_table
from shardplan.costmodel.memory import SELECTIVE, gradient_bytes, parameter_bytes, tied_table_bytes
from shardplan.costmodel.model import Model
from shardplan.costmodel.op import Op
from shardplan.costmodel.pace import boundary_bytes
from shardplan.costmodel.pipeline import first_layers, layers_of_chunks
from shardplan.costmodel.rank_groups import StateGroups, dense_groups, expert_groups
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import stage_parameters, stage_rows

Volumes = dict[tuple[str, str], float]
"""Bytes by axis (dp, tp, cp, ep, pp) and operation (all_reduce, all_gather, reduce_scatter, all_to_all, send)."""


def communication_volumes(
    model: Model, job: Job, layout: Layout, runtime: Runtime, *, smallest_bytes: float = 0.0
) -> list[Volumes]:
    """Payload bytes per step of a rank of each pipeline stage, tensor-parallel collectives below `smallest_bytes` left out.

    Tokens go to experts evenly: those of real ranks vary about these, with the same sum. Of `full:N` the first N layers of a rank run
    again, as in the executor and Megatron's `block`, also where seconds and memory take an even mix of the rank's kinds of layers.
    """
    table = layout_table([layout])
    micro_batches = job.global_batch / (layout.dp * layout.micro_batch)
    stages = stage_rows(model, table, runtime, every_stage=True)
    ops = block_ops(model, job, table, runtime)
    held = stage_parameters(model, job, table, runtime, stages)
    boundary = float(boundary_bytes(model, job, table, runtime)[0])
    split = layers_of_chunks(layout, model.layer_count, runtime.stages)
    found: list[Volumes] = []
    for stage in range(layout.pp):
        layers = stages.layers[0, stage]
        ends = float(stages.embedding[0, stage] + stages.head[0, stage])
        again = first_layers(model, split, stage, stages.recomputed[0, stage], table)
        spread = 0.0 if held.experts is None else float(held.experts[0, stage])
        dense = float(held.stage[0, stage]) - spread
        states = (job, runtime, micro_batches)
        total = _states(dense, float(held.root[0, stage]), dense_groups(table), table, *states)
        if spread:
            _add(total, _states(spread, 0.0, expert_groups(table), table, *states))
        for run, count in enumerate(layers):
            block = ops.spread.get(run, ops.layers[run])
            for depth, number in ((1.0, float(again[run])), (0.0, float(count - again[run]))):
                _add(total, _layer(block, table, runtime, depth, smallest_bytes), micro_batches * number)
        for count, block in ((stages.embedding, ops.embedding), (stages.head, ops.head)):
            _add(total, _collectives(block, smallest_bytes, backward=True), micro_batches * float(count[0, stage]))
        if layout.pp > 1:  # the first chunk sends nothing back, the last nothing on, the turn of a V stays on its rank
            turns = 2.0 if table.v_placed[0] and stage == layout.pp - 1 else 0.0
            _add(total, {("pp", "send"): boundary}, micro_batches * (2.0 * layout.virtual_stages - ends - turns))
            if model.tied_embeddings and not table.v_placed[0] and ends:
                name = "send" if runtime.communication.tied_after_reduction else "all_reduce"
                _add(total, {("pp", name): float(tied_table_bytes(model, job, table, runtime)[0])})
        found.append({key: size for key, size in total.items() if size > 0})
    return found


def _add(total: Volumes, more: Mapping[tuple[str, str], float], times: float = 1.0) -> None:
    for key, size in more.items():
        total[key] = total.get(key, 0.0) + times * size


def _states(
    parameters: float,
    root: float,
    groups: StateGroups,
    table: LayoutTable,
    job: Job,
    runtime: Runtime,
    micro_batches: float,
) -> Volumes:
    """Gathers and reductions among `groups` of the states of a rank that holds `parameters`, `root` of them outside its layers."""
    one = np.ones(1)
    counts = exchange_s(
        Exchange(reduce_s=one, gather_s=one, reduce_share=one, gather_share=one),
        table,
        runtime.communication,
        micro_batches=np.array([micro_batches]),
        kept_share=root / parameters if runtime.working_set.root_stays_gathered else 0.0,
    )
    reduced = parameters * gradient_bytes(runtime, job)
    shards, replicas = float(groups.shards.size[0]), float(groups.replicas.size[0])
    found: Volumes = {}
    if shards > 1:
        found["dp", "reduce_scatter"] = float(counts.reduce_s[0]) * reduced
        found["dp", "all_gather"] = float(counts.gather_s[0]) * parameters * parameter_bytes(runtime, job, sent=True)
    if replicas > 1:
        times = 1.0 if runtime.communication.replicas_reduce_once else float(counts.reduce_s[0])
        found["dp", "all_reduce"] = times * reduced / shards
    return found


def _layer(block: Sequence[Op], table: LayoutTable, runtime: Runtime, depth: float, smallest_bytes: float) -> Volumes:
    """One layer and micro-batch; `depth` is 1 under full recompute, else 0."""
    found = _collectives(block, smallest_bytes, backward=True)
    how = runtime.communication
    split = bool(table.sequence_parallel[0])
    dispatched = any(op.experts is not None for op in block)
    again = depth * how.full_repeats(split=split, dispatched=dispatched)
    selects = table.recompute[0] == SELECTIVE
    if selects:
        again = how.selective_repeats(split=split, dispatched=dispatched)
    context_again = depth + float(
        selects and (how.selective_repeats_context or "attention" in runtime.activations.selective)
    )
    _add(found, _collectives(block, smallest_bytes, backward=False), again)
    for op in block:
        if op.experts is not None:
            _add(found, {("ep", "all_to_all"): float(np.ravel(op.experts[0])[0])}, 2.0 + depth)
        if op.context is not None and table.cp[0] > 1:
            query, key_value = (np.asarray(size, dtype=np.float64) for size in op.context)
            both = exchanges(CP_KINDS[int(table.cp_kind[0])], table.cp.astype(np.float64), query, key_value)
            for phase, times in zip(both, (1.0 + context_again, 1.0), strict=True):
                for one in phase:
                    name = "send" if one.operation == "pass" else one.operation
                    size = float(np.ravel(one.size_bytes * one.times)[0])
                    _add(found, {("cp", name): size}, times)
    return found


def _collectives(block: Sequence[Op], smallest_bytes: float, *, backward: bool) -> Volumes:
    """Tensor-parallel collectives of one pass forward and, if asked for, one backward."""
    found: Volumes = {}
    for op in block:
        for name, buffer in (*op.forward, *(op.backward if backward else ())):
            size = float(np.ravel(buffer)[0])
            if size >= smallest_bytes:
                _add(found, {("tp", name): size})
    return found
