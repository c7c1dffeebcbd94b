"""The plan's rank map as a `DeviceMesh`.

rank = ((pp * dp + d) * cp + c) * tp + t, with d = replica * shard_ranks + shard
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardplan.costmodel.layout import Layout

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the outermost to the innermost: the cost model's `AXIS_ORDER` reversed, with dp split in replicate x shard."""


def mesh_shape(layout: Layout) -> tuple[int, ...]:
    """Size of each of MESH_AXES. ZeRO-0 shards over groups of one, ZeRO-1 to 3 over `layout.shard_ranks`."""
    shard = layout.shard_ranks
    return (layout.pp, layout.dp // shard, shard, layout.cp, layout.tp)


def build_mesh(layout: Layout, device: str) -> DeviceMesh:
    """The mesh of all ranks on `device` ("cuda" or "cpu"); needs a process group of `layout.gpus` ranks."""
    return init_device_mesh(device, mesh_shape(layout), mesh_dim_names=MESH_AXES)


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's coordinate d on the data-parallel axis, 0 <= d < dp."""
    return mesh.get_local_rank("dp_replicate") * mesh["dp_shard"].size() + mesh.get_local_rank("dp_shard")
