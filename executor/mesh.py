"""The plan's rank map as a `DeviceMesh`.

In the default order rank = ((pp * dp + d) * cp + c) * tp + t, with d = replica * shard_ranks + shard; other orders of the plan place
the same mesh on other ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardplan.costmodel.axis_order import DEFAULT_ORDER
from shardplan.costmodel.layout import Layout

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the outermost to the innermost of the default order, dp split in replicate x shard."""


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
    """The mesh of all ranks on `device` ("cuda" or "cpu"); needs a process group of `layout.gpus` ranks."""
    if layout.order == DEFAULT_ORDER:
        return init_device_mesh(device, mesh_shape(layout), mesh_dim_names=MESH_AXES)
    return DeviceMesh(device, mesh_ranks(layout), mesh_dim_names=MESH_AXES)


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's coordinate d on the data-parallel axis, 0 <= d < dp."""
    return mesh.get_local_rank("dp_replicate") * mesh["dp_shard"].size() + mesh.get_local_rank("dp_shard")
