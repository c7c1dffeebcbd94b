"""Seconds of the attention core on one GPU: fused (one kernel) or unfused (products and softmax through memory).

Both return (forward, backward), arrays broadcast. The FLOP of the model are 4 S K D a head (half if causal), 2.5 times that
backward; what a kernel computes beyond them (tiles, padded head dims) costs time and is not counted as work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.costmodel.kernels_time import memory_bound_s
from shardplan.hw_profiles.machine import AttentionCurve, AttentionKernel, Gpu

FloatArray = NDArray[np.float64]

FLASH_BACKWARD_FLOP = 2.5
"""Backward over forward FLOP of flash attention: five matrix products against two (arXiv 2205.14135)."""
TILE_TOKENS = 128
"""Queries, and keys, of one tile: what a kernel computes is a whole number of them (FlashAttention-2 and -3: 64 to 128)."""
TILE_HEAD_DIMS = (32.0, 64.0, 96.0, 128.0, 160.0, 192.0, 256.0)
"""Head dims for which fused kernels exist; others run in the next one (Dao-AILab/flash-attention, csrc head-dim switch)."""
OWN_KERNEL: AttentionKernel = "shardplan"
"""This project's kernel (`kernels/attention.py`)."""
OWN_PRECISIONS = ("bf16", "fp16")
OWN_HEAD_DIM = 256
"""Widest head of it."""
NARROW_HEAD_DIM = 50.0
"""Head dim at which the products of unfused attention reach half the rate of a large product: D / (D + 50). Fitted to the
PyTorch attention of Dao-AILab/flash-attention@0251105 on A100 and H100, head dims 64 and 128."""
SOFTMAX_BACKWARD_TRAFFIC = 1.5
"""Backward over forward bytes between the products: two reads and a write against a read and a write."""
ALIGNED_BYTES = 16
"""Rows of an operand start at multiples of this only if head_dim * bytes is one: the width of one vector load."""
MISALIGNED_SLOWDOWN = {8: 9.0, 4: 14.0, 2: 16.0}
"""Math time of the products by the widest load that the head dim's bytes allow, relative to 16-byte loads: tensor-core kernels
give way to narrow-load ones, at worst to the vector units (16 = 312 / 19.5 TFLOP/s of an A100). 8 and 4 bytes are set by the steps
with head dims 108 and 150 beside those of 104 to 224 on 384 A100 (bigscience-workshop/bigscience@9e64edec,
train/tr11-176B-ml/chronicles-prequel.md): with them both groups are missed by as much as the aligned ones."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Attention of `pairs` = sequences x heads of one rank; arrays broadcast."""

    pairs: FloatArray
    seq: FloatArray
    """Queries of a sequence."""
    keys: FloatArray
    head_dim: float
    causal: bool = True

    @property
    def scores(self) -> FloatArray:
        """Elements of the score matrices."""
        return self.pairs * self.seq * self.keys


def takes_own_kernel(precision: str, head_dim: float) -> bool:
    """Attention of these numbers can run in this project's kernel on a GPU."""
    return precision in OWN_PRECISIONS and head_dim <= OWN_HEAD_DIM


def flash_attention_flop(seq: ArrayLike, keys: ArrayLike, heads: ArrayLike, head_dim: ArrayLike) -> FloatArray:
    """FLOP of causal attention forward for one sequence: 4 s k H D / 2 (FlashAttention convention)."""
    s, n, h, d = (np.asarray(x, dtype=np.float64) for x in (seq, keys, heads, head_dim))
    return 2.0 * s * n * h * d


def tiled_head_dim(head_dim: ArrayLike) -> FloatArray:
    """Head dim that a fused kernel computes: the next of TILE_HEAD_DIMS, beyond them the next multiple of 64."""
    wide = np.asarray(head_dim, dtype=np.float64)
    tiles = np.asarray(TILE_HEAD_DIMS)
    inside = tiles[np.minimum(np.searchsorted(tiles, wide), len(tiles) - 1)]
    return np.where(wide <= tiles[-1], inside, np.ceil(wide / 64.0) * 64.0)


def fused_attention_s(
    gpu: Gpu, precision: str, curve: AttentionCurve, shape: AttentionShape
) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds of one fused kernel; query heads that share keys cost as many FLOP as others.

    A CPU kernel computes the shape as it is, a GPU's whole tiles.
    """
    seq, keys, head_dim = shape.seq, shape.keys, np.asarray(shape.head_dim, dtype=np.float64)
    if gpu.device != "cpu":
        seq, keys = (np.ceil(tokens / TILE_TOKENS) * TILE_TOKENS for tokens in (seq, keys))
        head_dim = tiled_head_dim(head_dim)
    flop = (2.0 if shape.causal else 4.0) * shape.pairs * seq * keys * head_dim
    peak = gpu.peak_flop_per_s[precision]
    forward = flop / (peak * curve.at("forward", head_dim, keys, causal=shape.causal))
    backward = FLASH_BACKWARD_FLOP * flop / (peak * curve.at("backward", head_dim, keys, causal=shape.causal))
    return forward, backward


def unfused_attention_s(
    gpu: Gpu,
    precision: str,
    element_bytes: int,
    shape: AttentionShape,
    softmax_traffic_bytes: ArrayLike,
    softmax_passes: tuple[float, float] = (1.0, 1.0),
) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds of two batched products forward and four backward, and of what runs between them.

    `softmax_traffic_bytes` is read and written forward by scale, mask, softmax and dropout in one kernel, `softmax_passes` (forward,
    backward) is what a runtime moves relative to such. Every product reads or writes the whole score matrix (nothing is skipped for a
    causal mask), and does not hide that behind its math.
    """
    flop = 2.0 * shape.scores * shape.head_dim
    rate = gpu.peak_flop_per_s[precision] * gpu.gemm_curve(precision).at(flop)
    narrow = 1.0 + NARROW_HEAD_DIM / shape.head_dim
    slowest = gpu.peak_flop_per_s[precision] / gpu.vector_flop_per_s if gpu.device != "cpu" else 1.0
    slowdown = np.minimum(misaligned_slowdown(shape.head_dim, element_bytes), max(slowest, 1.0))
    operands = element_bytes * (shape.scores + shape.pairs * (shape.seq + shape.keys) * shape.head_dim)
    product = flop / rate * narrow * slowdown + memory_bound_s(gpu, operands)
    softmax, (ahead, back) = np.asarray(softmax_traffic_bytes, dtype=np.float64), softmax_passes
    forward = 2.0 * product + memory_bound_s(gpu, ahead * softmax)
    backward = 4.0 * product + memory_bound_s(gpu, back * SOFTMAX_BACKWARD_TRAFFIC * softmax)
    return forward, backward


def misaligned_slowdown(head_dim: ArrayLike, element_bytes: int) -> FloatArray:
    """Factor on the products' math: 1 where head_dim * element_bytes is a multiple of 16 bytes."""
    row_bytes = np.asarray(head_dim).astype(np.int64) * element_bytes
    width = np.gcd(row_bytes, ALIGNED_BYTES)
    known = list(MISALIGNED_SLOWDOWN)
    return np.select([width == w for w in known], [MISALIGNED_SLOWDOWN[w] for w in known], 1.0)
