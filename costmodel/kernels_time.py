"""Seconds of one kernel on one GPU: matrix product, attention, memory-bound operator. All arguments broadcast."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.machine import Gpu

FloatArray = NDArray[np.float64]

ROOFLINE_NORM = 4.0
"""Smooth maximum of math and memory time; 4 rounds the corner as measured GEMM sweeps do."""


def smooth_max(*seconds: FloatArray) -> FloatArray:
    """p-norm of the times, p = ROOFLINE_NORM: the larger one, rounded where they meet."""
    total = np.zeros_like(seconds[0])
    for one in seconds:
        total = total + one**ROOFLINE_NORM
    return total ** (1.0 / ROOFLINE_NORM)


def gemm_s(
    gpu: Gpu, precision: str, element_bytes: int, m: ArrayLike, n: ArrayLike, k: ArrayLike, batch: ArrayLike = 1.0
) -> FloatArray:
    """Seconds of `batch` products C[m, n] = A[m, k] B[k, n] in one kernel: math at the measured fraction of the dense peak
    against memory traffic; 0 for an empty batch."""
    m_, n_, k_, count = (np.asarray(x, dtype=np.float64) for x in (m, n, k, batch))
    flop = 2.0 * m_ * n_ * k_ * count
    math = flop / (gpu.peak_flop_per_s[precision] * gpu.gemm_curve(precision).at(flop))
    traffic = element_bytes * count * (m_ * k_ + k_ * n_ + m_ * n_)
    return smooth_max(math, traffic / gpu.memory_bandwidth_bytes_per_s)


def memory_bound_s(gpu: Gpu, traffic_bytes: ArrayLike) -> FloatArray:
    """Seconds to move `traffic_bytes` (read + written) by one element-wise kernel."""
    traffic = np.asarray(traffic_bytes, dtype=np.float64)
    return traffic / (gpu.memory_bandwidth_bytes_per_s * gpu.memory_efficiency.at(traffic))


def flash_attention_flop(seq: ArrayLike, keys: ArrayLike, heads: ArrayLike, head_dim: ArrayLike) -> FloatArray:
    """FLOP of causal attention forward for one sequence: 4 s k H D / 2 (FlashAttention convention)."""
    s, n, h, d = (np.asarray(x, dtype=np.float64) for x in (seq, keys, heads, head_dim))
    return 2.0 * s * n * h * d


FLASH_BACKWARD_FLOP = 2.5
"""Backward over forward FLOP of flash attention: five matrix products against two (arXiv 2205.14135)."""
FLASH_RAMP_TOKENS = 350.0
"""Sequence length at which causal flash attention reaches half its plateau (published H100 curves: 350-500)."""


def flash_attention_s(
    gpu: Gpu, precision: str, flop_forward: FloatArray, seq: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds of fused causal attention with `flop_forward` FLOP on sequences of `seq` tokens."""
    ramp = np.asarray(seq, dtype=np.float64) / (np.asarray(seq, dtype=np.float64) + FLASH_RAMP_TOKENS)
    peak = gpu.peak_flop_per_s[precision]
    forward = flop_forward / (peak * gpu.attention_efficiency["forward"] * ramp)
    backward = FLASH_BACKWARD_FLOP * flop_forward / (peak * gpu.attention_efficiency["backward"] * ramp)
    return forward, backward
