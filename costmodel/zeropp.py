"""ZeRO++ (arXiv 2306.10209): parameters gathered in 8 bits (qwZ), a second copy of them for the backward (hpZ), gradients in 4 bits (qgZ).

Per step between nodes, in bytes of 16-bit parameters M: ZeRO-3 gathers M twice and reduces M; qwZ halves what the forward gathers, hpZ
takes the gathers of the backward from `hpz` neighbours, qgZ sends a quarter of the gradients in two all-to-alls, first inside the
node, then, of what is summed there, between nodes: 3 M becomes 0.75 M (section 3). Quantising reads and writes each element once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import collective_s, members_per_node
from shardplan.costmodel.kernels_time import memory_bound_s
from shardplan.costmodel.layout import LayoutTable
from shardplan.hw_profiles.machine import Gpu
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]

WEIGHT_BYTES, GRADIENT_BYTES = 1.0, 0.5
"""Of a quantised element on the wire; scales of blocks of 2,048 and more are left out."""
ELEMENT_BYTES = 2.0
"""Of a 16-bit element before and after."""


def uses_zeropp(layouts: LayoutTable) -> bool:
    """Whether some row has one of the three."""
    return bool((layouts.hpz > 1).any() or layouts.qwz.any() or layouts.qgz.any())


def secondary_bytes(layouts: LayoutTable, parameters: FloatArray, element_bytes: float) -> FloatArray:
    """Bytes of the second copy of a rank's (N, S) `parameters` under hpZ, shared by `hpz` ranks."""
    share = np.where(layouts.hpz > 1, element_bytes / layouts.hpz, 0.0)
    return parameters * share[:, None]


def gather_s(
    tiers: TierTable,
    gpu: Gpu,
    layouts: LayoutTable,
    *,
    parameters: FloatArray,
    messages: FloatArray,
    element_bytes: float,
    plain_s: FloatArray,
) -> FloatArray:
    """Seconds of one gather of all parameters of a rank, the mean of forward and backward, (N,); `plain_s` without ZeRO++."""
    step, shards = layouts.tp.astype(np.float64), layouts.zero_ranks.astype(np.float64)
    quantised = layouts.qwz > 0
    sent = np.where(quantised, WEIGHT_BYTES, element_bytes)

    def over(ranks: FloatArray) -> FloatArray:
        wire = messages * collective_s(tiers, "all_gather", parameters * sent / messages, ranks, step)
        traffic = (ELEMENT_BYTES + WEIGHT_BYTES) * (parameters / ranks + parameters)
        return wire + np.where(quantised, memory_bound_s(gpu, traffic), 0.0)

    forward = np.where(quantised, over(shards), plain_s)
    near = np.maximum(layouts.hpz, 1).astype(np.float64)
    return np.where(layouts.hpz > 1, 0.5 * (forward + over(near)), forward)


def reduce_s(
    tiers: TierTable,
    gpu: Gpu,
    layouts: LayoutTable,
    *,
    parameters: FloatArray,
    messages: FloatArray,
    plain_s: FloatArray,
) -> FloatArray:
    """Seconds of one reduction of all gradients of a rank, (N,); `plain_s` where they are not quantised."""
    step, shards = layouts.tp.astype(np.float64), layouts.zero_ranks.astype(np.float64)
    inside = members_per_node(tiers, shards, step)
    message = GRADIENT_BYTES * parameters / messages
    near = collective_s(tiers, "all_to_all", message, inside, step)
    far = collective_s(tiers, "all_to_all", message / inside, shards / inside, step * inside)
    # quantise; dequantise, sum and quantise again what arrived inside the node; dequantise and sum what arrived from others
    once = ELEMENT_BYTES + GRADIENT_BYTES
    traffic = parameters * (once + GRADIENT_BYTES + 2.0 * GRADIENT_BYTES / inside + ELEMENT_BYTES / shards)
    return np.where(layouts.qgz > 0, messages * (near + far) + memory_bound_s(gpu, traffic), plain_s)
