"""Context parallelism: what the ranks that share one sequence exchange in each attention, and how much of it hides.

A rank holds s / cp tokens of every sequence and computes 1 / cp of the causal attention, whichever way (zig-zag or head-tail
split, or all tokens of heads / cp). Per layer and micro-batch, with q and kv the bytes of a rank's queries, and of its keys and
values together:

    ring         passes kv to the next rank cp - 1 times while it computes the block it has; backward kv and their gradients
                 (Ring Attention, arXiv 2310.01889, section 3; zig-zag blocks of equal causal work)
    ulysses      all-to-alls of q, k, v and the output, forward and backward (arXiv 2309.14509, section 3.2)
    all_gather   gathers kv, again in the backward, and reduce-scatters their gradients (Llama 3, arXiv 2407.21783, section 3.3.2)

Ring passes hide behind the attention of the block in hand, the rest is exposed. What merging partial outputs and smaller blocks cost
is a share of the attention's rate, the runtime's (`ring_attention_rate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import Collective, collective_s, point_to_point_s
from shardplan.costmodel.layout import CP_KINDS
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
RING, ULYSSES, ALL_GATHER = (CP_KINDS.index(word) for word in ("ring", "ulysses", "all_gather"))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """`times` equal operations among the cp ranks."""

    operation: Collective | Literal["pass"]
    """A collective, or "pass": send to the next rank while the block in hand is computed."""
    size_bytes: FloatArray
    """Gathered or reduced buffer, bytes one rank holds before an all-to-all, bytes of one pass; (K,)."""
    times: FloatArray | float = 1.0


def exchanges(
    kind: str, cp: FloatArray, query_bytes: FloatArray, key_value_bytes: FloatArray
) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """(forward, backward) exchanges of one attention of `kind` (a word of CP_KINDS) for K shapes."""
    if kind == "ring":
        return (
            (Exchange(operation="pass", size_bytes=key_value_bytes, times=cp - 1.0),),
            (Exchange(operation="pass", size_bytes=2.0 * key_value_bytes, times=cp - 1.0),),
        )
    if kind == "ulysses":
        both = (
            Exchange(operation="all_to_all", size_bytes=query_bytes, times=2.0),
            Exchange(operation="all_to_all", size_bytes=key_value_bytes / 2.0, times=2.0),
        )
        return both, both
    whole = Exchange(operation="all_gather", size_bytes=cp * key_value_bytes)
    return (whole,), (whole, Exchange(operation="reduce_scatter", size_bytes=cp * key_value_bytes))


def exchange_seconds(
    tiers: TierTable,
    exchange: Exchange,
    cp: FloatArray,
    stride: FloatArray,
    *,
    attention_s: FloatArray,
    overlap: float,
) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) seconds, (K,), of one exchange among cp ranks, `stride` apart; `attention_s` is the attention beside it.

    Of each pass up to the share `overlap` hides behind the attention of one of cp blocks.
    """
    if exchange.operation != "pass":
        seconds = exchange.times * collective_s(tiers, exchange.operation, exchange.size_bytes, cp, stride)
        return seconds, np.zeros_like(seconds)
    once = point_to_point_s(tiers, exchange.size_bytes, cp, stride)
    hidden = np.minimum(overlap * once, attention_s / cp)
    return exchange.times * (once - hidden), exchange.times * hidden


def context_seconds(
    tiers: TierTable,
    *,
    kinds: IntArray,
    cp: FloatArray,
    stride: FloatArray,
    query_bytes: FloatArray,
    key_value_bytes: FloatArray,
    forward_s: FloatArray,
    backward_s: FloatArray,
    overlap: float,
) -> dict[str, FloatArray]:
    """Seconds of all exchanges of one attention for K shapes, as columns of `layer_cost.BlockCost`; 0 where cp = 1.

    `kinds` are codes of CP_KINDS, `stride` the ranks between neighbours; `forward_s` and `backward_s` the attention of one
    micro-batch on a rank.
    """
    zero = np.zeros_like(cp)
    columns = {f"context_{phase}_{what}_s": zero.copy() for phase in PHASES for what in ("exposed", "hidden")}
    for code, word in enumerate(CP_KINDS):
        rows = (kinds == code) & (cp > 1)
        if not rows.any():
            continue
        both = exchanges(word, cp, query_bytes, key_value_bytes)
        for phase, attention, parts in zip(PHASES, (forward_s, backward_s), both, strict=True):
            for part in parts:
                seconds = exchange_seconds(tiers, part, cp, stride, attention_s=attention, overlap=overlap)
                for what, value in zip(("exposed", "hidden"), seconds, strict=True):
                    columns[f"context_{phase}_{what}_s"] += np.where(rows, value, 0.0)
    return columns


PHASES = ("forward", "backward")


def transient_bytes(kinds: IntArray, cp: FloatArray, key_value_bytes: FloatArray) -> FloatArray:
    """Bytes beside kept activations while one attention runs backward, (K,): gathered keys and values, and their gradients.

    Blocks of a ring and buffers of an all-to-all are as small as other passing tensors of a layer, which are not counted either.
    """
    return np.where((kinds == ALL_GATHER) & (cp > 1), 2.0 * cp * key_value_bytes, 0.0)


def kept_bytes(
    kinds: IntArray, cp: FloatArray, query_bytes: FloatArray, own_bytes: FloatArray, key_value_bytes: FloatArray
) -> FloatArray:
    """Bytes fused attention keeps more than without context parallelism, (K,).

    With ulysses its output, which is no longer the tensor the projection keeps, and copies of key-value heads:
    `key_value_bytes` with, `own_bytes` without them.
    """
    return np.where((kinds == ULYSSES) & (cp > 1), query_bytes + key_value_bytes - own_bytes, 0.0)
