"""Memory of N layouts: states, activations in flight, logits and buffers put together per stage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import Job
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import StageMemory, activation_bytes, stage_states
from shardplan.costmodel.model import Model
from shardplan.costmodel.pipeline import in_flight
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import BlockRows, StageParameters, StageRows
from shardplan.hw_profiles.machine import Gpu

FloatArray = NDArray[np.float64]


def stage_activations(
    model: Model, layouts: LayoutTable, blocks: BlockRows, stages: StageRows, micro_batches: FloatArray
) -> FloatArray:
    """Bytes of activations, logits and loss, (N, S), at the peak of each stage: the backward of the oldest micro-batch in flight."""
    flying = in_flight(
        layouts.schedule[:, None],
        layouts.pp[:, None],
        stages.stage,
        micro_batches[:, None],
        layouts.virtual_stages[:, None],
    )
    flying = np.where(layouts.pp[:, None] > 1, flying, 1.0)
    total = stages.layers.sum(axis=2)
    activations = np.zeros_like(total)
    for index in range(len(model.layers)):
        block = blocks.layers[index]
        layers = stages.layers[:, :, index]
        share = np.divide(layers, total, out=np.zeros_like(layers), where=total > 0)
        activations += activation_bytes(
            recompute=layouts.recompute,
            full_layers=stages.recomputed * share,
            layers=layers,
            flying=flying,
            kept=block["kept_bytes"],
            selective=block["selective_bytes"],
            entering=block["input_bytes"],
        )
        if "context_transient_bytes" in block:
            activations += np.where(layers > 0, block["context_transient_bytes"][:, None], 0.0)
    activations += flying * stages.embedding * blocks.embedding["kept_bytes"][:, None]
    activations += stages.head * (flying * blocks.head["kept_bytes"][:, None] + blocks.logits_bytes[:, None])
    return activations


def stage_memory(
    job: Job,
    gpu: Gpu,
    layouts: LayoutTable,
    runtime: Runtime,
    parameters: StageParameters,
    activations: FloatArray,
    content_rows: NDArray[np.int64],
    micro_batches: FloatArray,
) -> StageMemory:
    """Bytes by part, (N, S). Row n has the `parameters` and `activations` (K, S) at `content_rows[n]`; states are computed once per
    unique key."""
    accumulates = micro_batches > 1
    content = (layouts.pp, layouts.virtual_stages, layouts.split, layouts.v_placed.astype(np.int64))
    sharing = (layouts.zero, layouts.zero_ranks, layouts.offload_optimizer, accumulates.astype(np.int64))
    first, inverse = unique_keys(layouts.tp, *content, *sharing)
    keys, held = layouts.take(first), parameters.take(content_rows[first])
    states = stage_states(
        runtime,
        job,
        keys,
        accumulates=accumulates[first],
        stage_parameters=held.stage,
        layer_parameters=held.layer,
        root_parameters=held.root,
        offloaded=keys.offload_optimizer > 0,
    )
    on_gpu = gpu.device == "cuda"  # NCCL channels and GPU workspaces; gloo keeps next to nothing
    buffers = np.where((layouts.gpus > 1) & on_gpu, runtime.working_set.buffer_bytes, 0.0)[:, None]
    added = (runtime.working_set.matrix_gradient_bytes * parameters.matrix)[content_rows]
    gradients, optimizer, kept = states["gradients"][inverse], states["optimizer"][inverse], activations[content_rows]
    late = None
    if runtime.working_set.gradients_freed:
        freed = ~accumulates & ((layouts.zero > 0) | (layouts.dp * layouts.cp == 1))
        late = np.where(freed[:, None], np.minimum(gradients, kept), 0.0)
        gradients = gradients - late
    if states["stepping"].any():
        optimizer = optimizer + np.maximum(states["stepping"][inverse] - kept, 0.0)
    return StageMemory(
        parameters=states["parameters"][inverse],
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        buffers=buffers + added,
        host=states["host"][inverse],
        late=late,
    )
