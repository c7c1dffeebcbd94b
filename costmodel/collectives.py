"""Seconds of collectives on a rank group of the cluster: ring or tree inside the tiers the group spans.

A group is (ranks, stride): `ranks` members, `stride` apart in global rank order. Members in one node share the node's NICs with
the parallel groups of their neighbours, so a group with k members per node moves data between nodes at k NIC shares, never above
the link inside the node. Ranks of two axes with a third between them are such a group several times over, `set_stride` apart.

T = max(latency, S * f / bus(S)), f = 2(n-1)/n for all-reduce, (n-1)/n for all-gather and reduce-scatter
(NVIDIA/nccl-tests doc/PERFORMANCE.md); S is the reduced or gathered buffer.

Efficiency curves of the network were measured with all g GPUs of a node in one group, so that a buffer of S bytes passes S / g
through each NIC share. A group with k members per node passes S / k: its efficiency is that of a buffer of S g / k bytes.

They were measured on four nodes of eight GPUs. What a buffer takes beyond its bytes at the curve's highest rate is the time of the
ring's steps; on another group it grows with the steps, of an all-reduce with those of a double binary tree where there are fewer.
aliyun/SimAI@cef83f9 inputs/ratio has rates from 2 to 128 nodes: 64 MiB reach 0.53 of the peak on 4 nodes, 0.21 on 16, 0.05 on 64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.machine import EfficiencyCurve
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


def wire_factor(collective: Collective, ranks: ArrayLike) -> FloatArray:
    """Bytes per rank on the wire, relative to the buffer: of a ring, or of the shares an all-to-all sends; 0 for one rank."""
    n = np.asarray(ranks, dtype=np.float64)
    return (2.0 if collective == "all_reduce" else 1.0) * (n - 1.0) / n


def members_per_node(tiers: TierTable, ranks: ArrayLike, stride: ArrayLike) -> FloatArray:
    """Members of a group that sit in one node; of a group that straddles nodes unevenly, the fewest that share one."""
    return _members_among(float(tiers.gpus[0]), ranks, stride)


def _members_among(gpus: float, ranks: ArrayLike, stride: ArrayLike) -> FloatArray:
    """The same for any `gpus` that lie side by side."""
    whole = np.maximum(np.floor(gpus / np.asarray(stride, dtype=np.float64)), 1.0)
    n = np.asarray(ranks, dtype=np.float64)
    return np.gcd(whole.astype(np.int64), n.astype(np.int64)).astype(np.float64)


def _outer_tier(tiers: TierTable, span: FloatArray) -> NDArray[np.int64]:
    """Index of the smallest tier that holds all groups of `span` neighbouring ranks whole."""
    whole = np.remainder(tiers.gpus.reshape(-1, *[1] * span.ndim).astype(np.float64), span) == 0
    whole[-1] = True
    return whole.argmax(axis=0)


def _links_used(tiers: TierTable, members: FloatArray) -> FloatArray:
    """Share of a GPU's links in the node that lead to the `members` of its group: all of a switch, of a mesh those to each of them."""
    if tiers.is_switched[0]:
        return np.ones_like(members)
    return np.maximum(members - 1.0, 1.0) / max(float(tiers.gpus[0]) - 1.0, 1.0)


def _in_node(tiers: TierTable, size: FloatArray, curves: tuple[EfficiencyCurve, ...]) -> FloatArray:
    """Per-GPU bus bandwidth inside a node for a buffer of `size` bytes."""
    return tiers.bandwidth_bytes_per_s[0] * curves[0].at(size)


def _between_nodes(
    tiers: TierTable, tier: NDArray[np.int64], size: FloatArray, steps: FloatArray | float = 1.0
) -> FloatArray:
    """Per-GPU bus bandwidth of an outer `tier` for a buffer of `size` bytes in a group whose steps take `steps` times the measured
    ones; without meaning where the tier is the node."""
    outer = tiers.efficiency[1:] or tiers.efficiency
    curves = list({id(curve): curve for curve in outer}.values())
    if len(curves) == 1:  # as a rule: tiers of one network share their curve
        reached, highest = curves[0].at(size), max(curves[0].fractions)
    else:
        which = np.array([[one is curve for one in curves].index(True) for curve in outer])[np.maximum(tier - 1, 0)]
        reached = np.take_along_axis(np.stack([curve.at(size) for curve in curves]), which[None], axis=0)[0]
        highest = np.array([max(curve.fractions) for curve in curves])[which]
    return tiers.bandwidth_bytes_per_s[tier] / (1.0 / highest + (1.0 / reached - 1.0 / highest) * steps)


def collective_s(
    tiers: TierTable,
    collective: Collective,
    size_bytes: ArrayLike,
    ranks: ArrayLike,
    stride: ArrayLike,
    sets: ArrayLike | None = None,
    set_stride: ArrayLike = 1.0,
) -> FloatArray:
    """Seconds of one collective over each group; 0 where it has one rank. All arguments broadcast.

    `size_bytes` is the reduced or gathered buffer, for an all-to-all (of one set) what one rank holds. A group are `ranks` ranks
    `stride` apart, and that `sets` times, `set_stride` apart.
    """
    if collective == "all_to_all":
        return all_to_all_s(tiers, size_bytes, ranks, stride)
    size, n, step = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (size_bytes, ranks, stride)))
    inside, span = members_per_node(tiers, n, step), n * step
    if sets is not None:
        times, apart = np.asarray(sets, dtype=np.float64), np.asarray(set_stride, dtype=np.float64)
        inside = inside * np.where(times > 1, members_per_node(tiers, times, apart), 1.0)
        n, span = n * times, np.maximum(span, np.where(times > 1, times * apart, 0.0))
    tier = _outer_tier(tiers, span)
    bus = _in_node(tiers, size, tiers.efficiency)
    if collective == "all_reduce":  # a reducing switch (NVLS) serves groups of the whole node
        bus = np.where(n == tiers.gpus[0], _in_node(tiers, size, tiers.all_reduce_efficiency), bus)
    through_nics = size * float(tiers.gpus[0]) / inside
    between = inside * _between_nodes(tiers, tier, through_nics, _steps(tiers, collective, n, inside, tier))
    bus = bus * _links_used(tiers, np.where(tier == 0, n, inside))
    bus = np.where(tier == 0, bus, np.minimum(bus, between))
    seconds = size * wire_factor(collective, n) / bus
    return np.where(n > 1, np.maximum(seconds, _latency_s(tiers, collective, n, inside, tier)), 0.0)


def all_to_all_s(
    tiers: TierTable, size_bytes: ArrayLike, ranks: ArrayLike, stride: ArrayLike, copies: ArrayLike = 1.0
) -> FloatArray:
    """Seconds of an all-to-all of `size_bytes` a rank: every one of n ranks keeps 1/n, sends the shares of its node over the link
    inside, the (n - k)/n of others over its NIC share, both at once; all messages start together, so one latency. Of these, what leaves
    the leaf, to the (n - l)/n of ranks that are not below it, also passes the leaf's share of a thinner spine.

    Between many nodes the rate per rank approaches n/(n - k) of the NIC share (NVIDIA/nccl-tests, busbw of all-to-all).
    Where the buffer holds `copies` copies of each token for ranks drawn at random, and those for one rank, and over the network those
    for one node, are sent once (deepseek-ai/DeepEP), near and far bytes shrink as `sent_once` says.
    """
    size, n, step = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (size_bytes, ranks, stride)))
    k = members_per_node(tiers, n, step)
    tier = _outer_tier(tiers, n * step)
    k = np.where(tier == 0, n, k)
    near = size * (k - 1.0) / n * sent_once(n, copies)
    far = size * (n - k) / n * sent_once(n / k, copies)
    links = _in_node(tiers, size * k / n, tiers.efficiency) * _links_used(tiers, k)
    inside = near / links
    through_nics = far * float(tiers.gpus[0])
    outside = far / _between_nodes(tiers, np.minimum(tier, 1), through_nics)
    if len(tiers.gpus) > 2:  # bytes to other leaves: as many of the far ones as nodes of the group lie below those
        below = np.maximum(_members_among(float(tiers.gpus[1]), n, step), k)
        beyond = far * np.where(tier > 1, (n - below) / np.maximum(n - k, 1.0), 0.0)
        outside = np.maximum(outside, beyond / _between_nodes(tiers, tier, through_nics))
    return np.where(n > 1, np.maximum(inside, outside) + tiers.latency_s[tier], 0.0)


def sent_once(places: FloatArray, copies: ArrayLike) -> FloatArray:
    """Share of `copies` copies of a token, each for one of m `places` drawn at random, that is left when those for one place go as
    one: m (1 - (1 - 1/m)^copies) / copies."""
    number = np.asarray(copies, dtype=np.float64)
    return np.where(number > 1.0, places * (1.0 - (1.0 - 1.0 / places) ** number) / number, 1.0)


MEASURED_RANKS, MEASURED_NODES = 32.0, 4.0
"""Of the group on which network curves were measured (SimAI's tables; four p6-b200 nodes of stas00/ml-engineering)."""


def _steps(
    tiers: TierTable, collective: Collective, ranks: FloatArray, inside: FloatArray, tier: NDArray[np.int64]
) -> FloatArray:
    """Time of a group's ring steps, relative to those of the measured group."""
    near, far = tiers.latency_s[0], tiers.latency_s[tier]
    nodes = np.maximum(ranks / inside, 1.0)
    ring = (ranks - nodes) * near + nodes * far
    measured = (MEASURED_RANKS - MEASURED_NODES) * near + MEASURED_NODES * far
    ring = np.divide(ring, measured, out=np.ones_like(ring), where=measured > 0)
    if collective != "all_reduce":
        return ring
    return np.minimum(ring, np.maximum(np.log2(nodes) / np.log2(MEASURED_NODES), 1.0))


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
