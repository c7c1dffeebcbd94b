"""Seconds of collectives on a rank group of the cluster: ring or tree inside the tiers the group spans.

A group is (ranks, stride): `ranks` members, `stride` apart in global rank order. Members in one node share the node's NICs with
the parallel groups of their neighbours, so a group with k members per node moves data between nodes at k NIC shares, never above
the link inside the node.

T = max(latency, S * f / bus(S)), f = 2(n-1)/n for all-reduce, (n-1)/n for all-gather and reduce-scatter
(NVIDIA/nccl-tests doc/PERFORMANCE.md); S is the reduced or gathered buffer.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.machine import EfficiencyCurve
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]


def wire_factor(collective: Collective, ranks: ArrayLike) -> FloatArray:
    """Bytes per rank on the wire of a ring, relative to the buffer; 0 for one rank."""
    n = np.asarray(ranks, dtype=np.float64)
    return (2.0 if collective == "all_reduce" else 1.0) * (n - 1.0) / n


def members_per_node(tiers: TierTable, ranks: ArrayLike, stride: ArrayLike) -> FloatArray:
    """Members of a group that sit in one node; of a group that straddles nodes unevenly, the fewest that share one."""
    in_node = np.maximum(np.floor(float(tiers.gpus[0]) / np.asarray(stride, dtype=np.float64)), 1.0)
    n = np.asarray(ranks, dtype=np.float64)
    return np.gcd(in_node.astype(np.int64), n.astype(np.int64)).astype(np.float64)


def _outer_tier(tiers: TierTable, span: FloatArray) -> NDArray[np.int64]:
    """Index of the smallest tier that holds all groups of `span` neighbouring ranks whole."""
    whole = np.remainder(tiers.gpus.reshape(-1, *[1] * span.ndim).astype(np.float64), span) == 0
    whole[-1] = True
    return whole.argmax(axis=0)


def _at_tier(
    tiers: TierTable, tier: NDArray[np.int64], size: FloatArray, curves: tuple[EfficiencyCurve, ...]
) -> FloatArray:
    """Per-GPU bus bandwidth of `tier` for a buffer of `size` bytes."""
    efficiency = np.stack([curve.at(size) for curve in curves])
    reached = np.take_along_axis(efficiency, tier[None], axis=0)[0]
    return tiers.bandwidth_bytes_per_s[tier] * reached


def collective_s(
    tiers: TierTable, collective: Collective, size_bytes: ArrayLike, ranks: ArrayLike, stride: ArrayLike
) -> FloatArray:
    """Seconds of one collective over each group; 0 where it has one rank. All arguments broadcast."""
    size, n, step = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (size_bytes, ranks, stride)))
    inside = members_per_node(tiers, n, step)
    tier = _outer_tier(tiers, n * step)
    node = np.zeros_like(tier)
    bus = _at_tier(tiers, node, size, tiers.efficiency)
    if collective == "all_reduce":  # a reducing switch (NVLS) serves groups of the whole node
        bus = np.where(n == tiers.gpus[0], _at_tier(tiers, node, size, tiers.all_reduce_efficiency), bus)
    between = inside * _at_tier(tiers, tier, size, tiers.efficiency)
    bus = np.where(tier == 0, bus, np.minimum(bus, between))
    seconds = size * wire_factor(collective, n) / bus
    return np.where(n > 1, np.maximum(seconds, _latency_s(tiers, collective, n, inside, tier)), 0.0)


def _latency_s(
    tiers: TierTable, collective: Collective, ranks: FloatArray, inside: FloatArray, tier: NDArray[np.int64]
) -> FloatArray:
    """Ring steps of all-gather and reduce-scatter; for all-reduce the cheaper of ring and double binary tree."""
    latency = tiers.latency_s
    nodes = np.maximum(ranks / inside, 1.0)
    ring = (ranks - nodes) * latency[0] + np.where(nodes > 1, nodes, 0.0) * latency[tier]
    if collective != "all_reduce":
        return ring
    tree = (inside - 1.0) * latency[0] + np.log2(nodes) * latency[tier]
    return 2.0 * np.minimum(ring, tree)


def point_to_point_s(tiers: TierTable, size_bytes: ArrayLike, ranks: ArrayLike, stride: ArrayLike) -> FloatArray:
    """Seconds to send `size_bytes` to the next of `ranks` members, `stride` apart, over the slowest hop of the chain:
    latency once, then the rate of one large transfer."""
    size, n, step = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (size_bytes, ranks, stride)))
    tier = _outer_tier(tiers, n * step)
    bandwidth = tiers.bandwidth_bytes_per_s * tiers.point_to_point_fraction
    return tiers.latency_s[tier] + size / bandwidth[tier]
