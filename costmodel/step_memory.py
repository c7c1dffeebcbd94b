"""Memory of N layouts: states, activations in flight, logits and buffers put together per stage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import StageMemory, activation_bytes, stage_states
from shardplan.costmodel.model import Model
from shardplan.costmodel.pipeline import in_flight
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import BlockRows, StageParameters, StageRows
from shardplan.hw_profiles.machine import Gpu

FloatArray = NDArray[np.float64]


def stage_memory(
    model: Model,
    job: Job,
    gpu: Gpu,
    layouts: LayoutTable,
    runtime: Runtime,
    blocks: BlockRows,
    stages: StageRows,
    parameters: StageParameters,
    micro_batches: FloatArray,
) -> StageMemory:
    """Bytes by part, (N, S), at the peak of each stage: the backward of the oldest micro-batch in flight."""
    states = stage_states(
        runtime,
        job,
        layouts,
        accumulates=micro_batches > 1,
        stage_parameters=parameters.stage,
        layer_parameters=parameters.layer,
        root_parameters=parameters.root,
        offloaded=layouts.offload_optimizer > 0,
    )
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
    on_gpu = gpu.device == "cuda"  # NCCL channels and GPU workspaces; gloo keeps next to nothing
    buffers = np.where((layouts.gpus > 1) & on_gpu, runtime.working_set.buffer_bytes, 0.0)[:, None]
    return StageMemory(
        parameters=states["parameters"],
        gradients=states["gradients"],
        optimizer=states["optimizer"],
        activations=activations,
        buffers=np.broadcast_to(buffers, total.shape),
        host=states["host"],
    )
