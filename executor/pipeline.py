"""Pipeline parallelism: which layers a chunk holds, and the schedule that runs the chunks of this rank.

Chunk c of pp * virtual_stages lives on pipeline rank c % pp (looped: rank r holds r, r + pp, ...), or, with two chunks a rank in V
placement, on the way up again: rank r holds r and 2 pp - 1 - r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    _Action,  # pyright: ignore[reportPrivateUsage]
    _PipelineScheduleRuntime,  # pyright: ignore[reportPrivateUsage]
)

from shardplan.costmodel.layout import V_PLACED, Layout
from shardplan.costmodel.pipeline import split_layers
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.schedules import stage_of
from shardplan.executor.loss import LossFunction
from shardplan.executor.transformer import Part

Schedule = PipelineScheduleSingle | PipelineScheduleMulti

OF_ONE_CHUNK: Mapping[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
OF_CHUNKS: Mapping[str, Callable[..., PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}
"""torch's class of each word of `schedule`."""
BACKWARD_ACTIONS = frozenset({"BACKWARD_INPUT", "BACKWARD_WEIGHT", "FULL_BACKWARD", "SEND_B", "RECV_B", "REDUCE_GRAD"})
"""torch's names of what only training does."""


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


def chunks_of_rank(layout: Layout, pp_rank: int) -> list[int]:
    """Chunk numbers that pipeline rank `pp_rank` holds, in model order."""
    v_placed = layout.schedule in V_PLACED
    return [stage_of(pp_rank, turn, pp=layout.pp, v_placed=v_placed) for turn in range(layout.virtual_stages)]


def layers_before(layout: Layout, split: Sequence[int], pp_rank: int) -> list[int]:
    """Layers that pipeline rank `pp_rank` holds in chunks before each of its chunks."""
    held = [split[number] for number in chunks_of_rank(layout, pp_rank)]
    return [sum(held[:turn]) for turn in range(len(held))]


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
    if layout.schedule in OF_ONE_CHUNK:
        return OF_ONE_CHUNK[layout.schedule](stages[0], micro_batches, loss_fn=loss)
    return OF_CHUNKS[layout.schedule](list(stages), micro_batches, loss_fn=loss)


@contextmanager
def forward_only(schedule: Schedule) -> Iterator[None]:
    """Within it `schedule.eval` runs what the forward passes need and nothing else.

    Left alone, schedules of several chunks walk through their backward passes too, and in V placement fail there
    (two chunks of one rank hand over gradients that were never computed).
    """
    if not isinstance(schedule, _PipelineScheduleRuntime):
        yield
        return
    whole = schedule.pipeline_order_with_comms
    schedule.pipeline_order_with_comms = {rank: _forwards(actions) for rank, actions in whole.items()}
    try:
        yield
    finally:
        schedule.pipeline_order_with_comms = whole


def _forwards(actions: Sequence[_Action]) -> list[_Action]:
    """The actions without backward passes, their messages and reductions; a pair of both leaves its forward."""
    single = [one for action in actions for one in (action.sub_actions or (action,))]
    return [action for action in single if action.computation_type.name not in BACKWARD_ACTIONS]
