"""Pipeline parallelism: which layers a chunk holds, and the schedule that runs the chunks of this rank.

Chunk c of pp * virtual_stages lives on pipeline rank c % pp (looped ownership: rank r holds r, r + pp, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from shardplan.costmodel.layout import Layout
from shardplan.costmodel.pipeline import split_layers
from shardplan.costmodel.runtime import load_runtime
from shardplan.executor.loss import LossFunction
from shardplan.executor.transformer import Part

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


def chunk_layers(layout: Layout, layer_count: int, prediction: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers of each chunk in model order: the layout's, else the predicted ones, else this runtime's default rule."""
    if layout.stage_layers is not None:
        return layout.stage_layers
    stages = (prediction.get("memory") or {}).get("stages", ())
    predicted = tuple(int(stage["layers"]) for stage in stages)
    if layout.virtual_stages == 1 and len(predicted) == layout.pp and sum(predicted) == layer_count:
        return predicted
    return split_layers(layer_count, layout.pp * layout.virtual_stages, load_runtime("shardplan").stages)


def parts(split: Sequence[int]) -> list[Part]:
    """The chunks of `split` as parts of the model."""
    found: list[Part] = []
    for chunk, layers in enumerate(split):
        first = found[-1].end if found else 0
        found.append(Part(first=first, end=first + layers, embedding=chunk == 0, head=chunk == len(split) - 1))
    return found


def chunks_of_rank(layout: Layout, pp_rank: int) -> range:
    """Chunk numbers that pipeline rank `pp_rank` holds."""
    return range(pp_rank, layout.pp * layout.virtual_stages, layout.pp)


def build_schedule(
    modules: Sequence[nn.Module],
    layout: Layout,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    micro_batches: int,
    loss: LossFunction,
) -> Schedule:
    """The schedule over this rank's `modules` (its chunks in order). `loss` is a mean, and so gradients are."""
    numbers = chunks_of_rank(layout, mesh.get_local_rank("pp"))
    total = layout.pp * layout.virtual_stages
    stages = [
        PipelineStage(module, number, total, device, group=mesh.get_group("pp"))
        for module, number in zip(modules, numbers, strict=True)
    ]
    if layout.schedule == "interleaved":
        return ScheduleInterleaved1F1B(list(stages), micro_batches, loss_fn=loss)
    single = ScheduleGPipe if layout.schedule == "gpipe" else Schedule1F1B
    return single(stages[0], micro_batches, loss_fn=loss)
