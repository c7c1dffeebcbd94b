"""Seconds of one kernel on one GPU: matrix product, memory-bound operator (attention: attention_time.py). All arguments broadcast."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.machine import Cluster, Gpu

FloatArray = NDArray[np.float64]

ROOFLINE_NORM = 4.0
"""Smooth maximum of math and memory time; 4 rounds the corner as measured GEMM sweeps do."""


def smooth_max(*seconds: FloatArray) -> FloatArray:
    """p-norm of the times, p = ROOFLINE_NORM: the larger one, rounded where they meet."""
    total = np.zeros_like(seconds[0])
    for one in seconds:
        total = total + one**ROOFLINE_NORM
    return total ** (1.0 / ROOFLINE_NORM)


TILES = (
    (256.0, 128.0, 1.0),
    (128.0, 256.0, 1.0),
    (128.0, 128.0, 0.95),
    (64.0, 128.0, 0.8),
    (128.0, 64.0, 0.8),
    (64.0, 64.0, 0.6),
)
"""Output tiles (rows, columns) of library kernels and what a full wave of them reaches relative to the largest: 128 x 256 class tiles
are what the best H100 shapes use (stas00/ml-engineering@744d01e); the shares of smaller ones are guesses, not fitted."""
WAVE_SOFTNESS = 0.5
"""Share of a partly filled last wave that is not lost: stream-K and persistent kernels split it over idle multiprocessors
(arXiv 2301.03598). A guess between none (plain tiles) and nearly all of it."""


def tile_utilisation(gpu: Gpu, m: ArrayLike, n: ArrayLike, count: ArrayLike = 1.0) -> FloatArray:
    """Share of the multiplier slots that `count` products of m x n outputs keep busy: tile and wave quantisation, best tile."""
    m_, n_, products = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (m, n, count)))
    best = np.full(m_.shape, 1e-6)
    for rows, columns, reached in TILES:
        tiles = np.ceil(m_ / rows) * np.ceil(n_ / columns) * np.maximum(products, 1.0)
        exact = tiles / gpu.multiprocessors
        waves = np.ceil(exact) - WAVE_SOFTNESS * np.where(exact > 1.0, np.ceil(exact) - exact, 0.0)
        useful = m_ * n_ * np.maximum(products, 1.0) / (waves * gpu.multiprocessors * rows * columns)
        best = np.maximum(best, reached * useful)
    return best


GEMM_HALF_DEPTH = 200.0
"""Inner dimension at which a product reaches half its rate: filling and draining the pipeline of a tile. A guess:
fits of step times find 100 to 300."""


def gemm_efficiency(
    gpu: Gpu, precision: str, m: FloatArray, n: FloatArray, k: FloatArray, count: FloatArray
) -> FloatArray:
    """Fraction of the dense peak: the measured curve of cubes at the same FLOP, times how much better or worse this shape fills
    tiles, waves and the inner dimension than that cube. A CPU has no waves: the curve alone."""
    flop = 2.0 * m * n * k * np.maximum(count, 1.0)
    curve = gpu.gemm_curve(precision)
    reached = curve.at(flop)
    if gpu.device == "cpu":
        return reached
    side = np.cbrt(0.5 * flop)
    reached = reached * np.where(count > 1.0, _alignment(np.minimum(_aligned_to(n), _aligned_to(k))), 1.0)
    shape = tile_utilisation(gpu, m, n, count) * k / (k + GEMM_HALF_DEPTH)
    cube = tile_utilisation(gpu, side, side) * side / (side + GEMM_HALF_DEPTH)
    return np.minimum(reached * shape / np.maximum(cube, 1e-6), GEMM_CEILING * max(curve.fractions))


ALIGNMENT_SLOWDOWN = {8.0: 1.0, 4.0: 2.0, 2.0: 4.0, 1.0: 8.0}
"""How many times slower a batched 16-bit product runs when its inner or output width is only a multiple of 4, 2 or 1 elements:
loads shrink from 16 bytes to 8, 4 and 2
(3 to 8 times slower in the BLOOM sweep's runs with heads of 108 and 150, bigscience-workshop/bigscience@9e64edec). Single
products do not show it: libraries pick another layout."""


def _aligned_to(size: FloatArray) -> FloatArray:
    """Largest of 8, 4, 2, 1 that divides `size`."""
    whole = np.maximum(np.round(size), 1.0)
    return np.select([whole % 8 == 0, whole % 4 == 0, whole % 2 == 0], [8.0, 4.0, 2.0], 1.0)


def _alignment(multiple: FloatArray) -> FloatArray:
    """Share of the rate left at an alignment of `multiple` elements."""
    return np.select([multiple == m for m in ALIGNMENT_SLOWDOWN], [1.0 / s for s in ALIGNMENT_SLOWDOWN.values()], 1.0)


GEMM_CEILING = 1.05
"""No shape is taken to beat the best measured cube by more: best shapes found by search pass 8192 cubed by about that
(A100 271 against 257 TFLOP/s, stas00/ml-engineering@744d01e and Azure/AI-benchmarking-guide@8fd0c6e)."""


PADDED_SIDES = (64.0, 128.0)
"""A thin product (an adapter's rank, a router) takes no longer than one padded to these sides: a tile computes them anyway, and the
measured curve of cubes says little of a product as thin as its launch. Batched ones keep the alignment that they have."""


def _math_s(gpu: Gpu, precision: str, m: FloatArray, n: FloatArray, k: FloatArray, count: FloatArray) -> FloatArray:
    """Seconds of math alone."""
    flop = 2.0 * m * n * k * count
    return flop / (gpu.peak_flop_per_s[precision] * gemm_efficiency(gpu, precision, m, n, k, count))


def gemm_s(
    gpu: Gpu, precision: str, element_bytes: int, m: ArrayLike, n: ArrayLike, k: ArrayLike, batch: ArrayLike = 1.0
) -> FloatArray:
    """Seconds of `batch` products C[m, n] = A[m, k] B[k, n] in one kernel: math at the fraction of the dense peak that the shape
    reaches against memory traffic; 0 for an empty batch."""
    m_, n_, k_, count = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (m, n, k, batch)))
    math: FloatArray = np.asarray(_math_s(gpu, precision, m_, n_, k_, count))
    least = np.minimum(np.minimum(m_, n_), k_)
    for side in () if gpu.device == "cpu" else PADDED_SIDES:
        thin = (count <= 1.0) & (least > 0.0) & (least < side)
        if thin.any():
            rows, columns, depth = (np.maximum(size[thin], side) for size in (m_, n_, k_))
            padded = _math_s(gpu, precision, rows, columns, depth, count[thin])
            math[thin] = np.minimum(math[thin], padded)
    traffic = element_bytes * count * (m_ * k_ + k_ * n_ + m_ * n_)
    return smooth_max(math, traffic / gpu.memory_bandwidth_bytes_per_s)


def memory_bound_s(gpu: Gpu, traffic_bytes: ArrayLike) -> FloatArray:
    """Seconds to move `traffic_bytes` (read + written) by one element-wise kernel."""
    traffic = np.asarray(traffic_bytes, dtype=np.float64)
    return traffic / (gpu.memory_bandwidth_bytes_per_s * gpu.memory_efficiency.at(traffic))


def state_pass_s(cluster: Cluster, traffic_bytes: FloatArray) -> FloatArray:
    """Seconds to read and write so much of parameters, gradients or states, (K,): a GPU does, or processes that share a host's memory."""
    if cluster.gpu.device != "cpu":
        return memory_bound_s(cluster.gpu, traffic_bytes)
    host = cluster.node.host
    sharing = max(cluster.node.gpus, host.cores)
    return traffic_bytes * sharing / (host.memory_bandwidth_bytes_per_s * host.memory_efficiency)
