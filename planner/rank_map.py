"""The plan's rank map: every axis of the mesh from the innermost to the outermost, with its size and its stride in ranks.

    coordinate of a rank on an axis = rank // stride % size          rank = sum of coordinate * stride over all axes

Experts have axes of their own, over the ranks of a stage counted upwards from 0 (`place` below), whichever order the mesh has:

    place = rank // (s * pp) * s + rank % s, with s the stride of pp          coordinate = place // stride % size

So a few numbers tell where each of any number of GPUs is; `executor/mesh.py` and `executor/expert_parallel.py` build the same meshes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import Layout, layout_table
from shardplan.hw_profiles.machine import Cluster

IntArray = NDArray[np.int64]


def rank_map(layout: Layout, cluster: Cluster) -> dict[str, Any]:
    """Plain values: `ranks`; `axes` (tp, cp, dp_shard, dp_replicate and pp in the layout's order); `expert_axes` (expert_tp, ep,
    expert_shard, expert_replicate), null where experts are not spread apart from dense products.

    An axis is {axis, size, stride, nodes}: `nodes` is the most nodes that one of its groups of ranks lies in, 1 inside a node.
    """
    ranks: IntArray = np.arange(layout.gpus, dtype=np.int64)
    node_of = _nodes(cluster)
    table = layout_table([layout])
    sizes = _dense_sizes(layout)
    dense = _strides([(axis, sizes[axis]) for axis in layout.order.replace("dp", "dp_shard-dp_replicate").split("-")])
    experts: list[dict[str, Any]] | None = None
    if table.dispatches[0]:
        shards, replicas = int(table.expert_zero_ranks[0]), int(table.expert_replicas[0])
        expert_tp = int(table.expert_tp[0])
        spread = [("expert_tp", expert_tp), ("ep", layout.ep), ("expert_shard", shards)]
        experts = _strides([*spread, ("expert_replicate", replicas // shards)])
        stage, place = _stage_places(layout, ranks)
        by_place: IntArray = np.lexsort((place, stage)).astype(np.int64)
        for axis in experts:
            axis["nodes"] = _most_nodes(axis, by_place, node_of)
    for axis in dense:
        axis["nodes"] = _most_nodes(axis, ranks, node_of)
    return {"ranks": layout.gpus, "axes": dense, "expert_axes": experts}


def _dense_sizes(layout: Layout) -> dict[str, int]:
    """Size of every axis; dp is dp_replicate groups of dp_shard neighbours over which, times cp, ZeRO shards (1 with zero=0)."""
    shard = layout.shard_ranks
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "dp_shard": shard,
        "dp_replicate": layout.dp // shard,
        "pp": layout.pp,
    }


def _stage_places(layout: Layout, ranks: IntArray) -> tuple[IntArray, IntArray]:
    """(pipeline rank, place among the ranks of that stage counted upwards) of each of `ranks`, (N,)."""
    step = int(layout_table([layout]).stride("pp")[0])
    return ranks // step % layout.pp, ranks // (step * layout.pp) * step + ranks % step


def _strides(axes: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Axes with (name, size) from the innermost, each with the product of the sizes before it."""
    found: list[dict[str, Any]] = []
    stride = 1
    for axis, size in axes:
        found.append({"axis": axis, "size": size, "stride": stride})
        stride *= size
    return found


def _nodes(cluster: Cluster) -> IntArray:
    """Node of every rank, (gpus,): ranks fill one node after the other."""
    sizes = [node.gpus for node, count in cluster.node_runs for _ in range(count)]
    return np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)


def _most_nodes(axis: dict[str, Any], ranks: IntArray, node_of: IntArray) -> int:
    """Nodes of the group of this axis that lies in most; `ranks` are all in the order that the axis' stride counts in."""
    groups = node_of[ranks].reshape(-1, axis["size"], axis["stride"])
    ordered = np.sort(groups, axis=1)
    return int((np.diff(ordered, axis=1) != 0).sum(axis=1).max(initial=0)) + 1
