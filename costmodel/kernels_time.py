"""Seconds of one kernel on one GPU: matrix product, memory-bound operator (attention: attention_time.py). All arguments broadcast."""

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
