"""Where nothing fits: the layout that is nearest to fitting, with whatever knobs and cuts that takes, and how far off it is.

The search ranks what fits. So it is asked on machines with more of all memories, as much more as the nearest layout known needs, then
LEAST_STEP less than what was found needs, and so on until nothing is found: no layout needs LEAST_STEP less than the last one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.mixed import estimate_any
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.machine import Cluster, Node
from shardplan.planner.machines import with_nodes
from shardplan.planner.one_size import search_one_size
from shardplan.planner.space import Wishes
from shardplan.planner.watch import Watch

LEAST_STEP = 0.03
"""Of what the nearest layout known needs."""
FloatArray = NDArray[np.float64]


def needed_share(estimates: Estimates, headroom: float) -> FloatArray:
    """What each layout needs of the memory that is fullest, GPUs, hosts or flash, (N,): up to 1 fits."""
    room = 1.0 - headroom
    shares = [
        estimates.device_peak_bytes * (1.0 + estimates.bands.memory) / (estimates.capacities * room),
        _share(estimates.host_bytes, estimates.host_capacity_bytes * room),
        _share(estimates.nvme_bytes, estimates.nvme_capacity_bytes * room),
    ]
    return np.max(shares, axis=0)


def _share(needed_bytes: FloatArray, room_bytes: float) -> FloatArray:
    """Of no room at all nothing is needed, or infinitely much."""
    if room_bytes > 0.0:
        return needed_bytes / room_bytes
    return np.where(needed_bytes > 0.0, np.inf, 0.0)


def closest_layout(
    setting: Setting, wishes: Wishes, headroom: float, known: Estimates, watch: Watch | None = None
) -> Estimates:
    """The layout nearest to fitting, at least as near as the best of the `known`; on a mixed cluster that one."""
    watching = watch or Watch()
    every = needed_share(known, headroom)
    best, share = known.take(np.asarray([int(every.argmin())])), float(every.min())
    while not setting.cluster.parts and np.isfinite(share):
        more = replace(setting, cluster=with_more_memory(setting.cluster, share * (1.0 + 1e-9)))
        watching.phase("nearest", 1.0 - 1.0 / max(share, 1.0), 0)
        ranked = search_one_size(more, wishes, "memory", headroom, Watch()).ranked
        if ranked is None:
            break
        needed = needed_share(ranked, headroom) * share * (1.0 + 1e-9)
        if needed.min() <= float(every.min()):
            best, every = ranked.take(np.asarray([int(needed.argmin())])), needed
        share = (1.0 - LEAST_STEP) * float(needed.min())
    return estimate_any(setting, best.layouts.row(0))


def with_more_memory(cluster: Cluster, times: float) -> Cluster:
    """The cluster with so many times the memory of GPUs and hosts, and flash."""

    def change(node: Node) -> Node:
        return replace(
            node,
            gpu=replace(node.gpu, memory_bytes=times * node.gpu.memory_bytes),
            host=replace(node.host, ram_bytes=times * node.host.ram_bytes),
            nvme=node.nvme and replace(node.nvme, capacity_bytes=times * node.nvme.capacity_bytes),
        )

    return with_nodes(cluster, change)
