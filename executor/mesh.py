"""The plan's rank map as a `DeviceMesh`.

In the default order rank = ((pp * dp + d) * cp + c) * tp + t, with d = replica * shard_ranks + shard; other orders of the plan place
the same mesh on other ranks. Ranks that share a sequence hold the same parameters: the mesh of states counts them as data-parallel
ones, inside dp_shard where ZeRO shards, else inside dp_replicate (torchtitan's `fsdp` axis, `LayoutTable.zero_ranks`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shardplan.costmodel.axis_order import DEFAULT_ORDER
from shardplan.costmodel.layout import Layout

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the outermost to the innermost of the default order, dp split in replicate x shard."""
STATE_AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Axes of the mesh that parameters are spread over: cp is part of dp_shard, or of dp_replicate with zero=0."""


def mesh_shape(layout: Layout) -> tuple[int, ...]:
    """Size of each of MESH_AXES. ZeRO-0 shards over groups of one, ZeRO-1 to 3 over `layout.shard_ranks`."""
    shard = layout.shard_ranks
    return (layout.pp, layout.dp // shard, shard, layout.cp, layout.tp)


def mesh_ranks(layout: Layout) -> Tensor:
    """The rank at every place of the mesh, of shape `mesh_shape`: ranks count along the axes of the layout's order, innermost first."""
    size: dict[str, int] = dict(zip(MESH_AXES, mesh_shape(layout), strict=True))
    outer_first = layout.order.replace("dp", "dp_shard-dp_replicate").split("-")[::-1]
    ranks = torch.arange(layout.gpus).view([size[axis] for axis in outer_first])
    return ranks.permute([outer_first.index(axis) for axis in MESH_AXES]).contiguous()


def build_mesh(layout: Layout, device: str) -> DeviceMesh:
    """STATE_AXES of all ranks on `device` ("cuda" or "cpu"); needs a process group of `layout.gpus` ranks."""
    ranks = state_ranks(layout)
    if layout.order == DEFAULT_ORDER:
        return init_device_mesh(device, tuple(ranks.shape), mesh_dim_names=STATE_AXES)
    return DeviceMesh(device, ranks, mesh_dim_names=STATE_AXES)


def state_ranks(layout: Layout) -> Tensor:
    """The rank at every place of the mesh of states. Ranks ascend along every axis, as members of a process group do."""
    pp, replicas, shards, cp, tp = mesh_shape(layout)
    if layout.zero:
        return mesh_ranks(layout).reshape(pp, replicas, shards * cp, tp).sort(dim=2).values
    return mesh_ranks(layout).reshape(pp, replicas * cp, shards, tp).sort(dim=1).values


def data_coordinate(layout: Layout, rank: int) -> int:
    """The coordinate d of `rank` on the data-parallel axis, 0 <= d < dp: ranks of one d train on the same sequences."""
    _, replica, shard, _, _ = (mesh_ranks(layout) == rank).nonzero()[0].tolist()
    return replica * layout.shard_ranks + shard


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's place among the dp * cp that hold the same parameters."""
    return mesh.get_local_rank("dp_replicate") * mesh["dp_shard"].size() + mesh.get_local_rank("dp_shard")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
