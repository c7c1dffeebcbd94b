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


def tile_slots(gpu: Gpu, m: ArrayLike, n: ArrayLike, count: ArrayLike = 1.0) -> FloatArray:
    """Outputs that the multiprocessors could compute in the time that `count` products of m x n outputs occupy them, with the best tile:
    at least count m n (tile and wave quantisation), and never fewer for a larger product."""
    m_, n_, products = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (m, n, count)))
    fewest = np.full(m_.shape, np.inf)
    for rows, columns, reached in TILES:
        tiles = np.ceil(m_ / rows) * np.ceil(n_ / columns) * products
        exact = tiles / gpu.multiprocessors
        waves = np.ceil(exact) - WAVE_SOFTNESS * np.where(exact > 1.0, np.ceil(exact) - exact, 0.0)
        fewest = np.minimum(fewest, waves * gpu.multiprocessors * rows * columns / reached)
    return fewest


GEMM_HALF_DEPTH = 200.0
"""Inner dimension at which a product reaches half its rate: filling and draining the pipeline of a tile. A guess:
fits of step times find 100 to 300."""
CUBES_AROUND = np.exp2(np.linspace(-0.5, 0.5, 17))
"""Sides, relative to that of a cube, over which what it occupies is averaged: curves of cubes are smooth, tiles are not."""

MEASURED_MULTIPLE = 128.0
"""Benchmarks multiply cubes whose sides fill tiles."""


def _occupied_flop(
    gpu: Gpu, m: FloatArray, n: FloatArray, k: FloatArray, count: FloatArray | float = 1.0
) -> FloatArray:
    """FLOP that the GPU could compute at the rate of its best tile in the time that `count` products occupy it."""
    return 2.0 * tile_slots(gpu, m, n, count) * (k + GEMM_HALF_DEPTH)


def _product_s(gpu: Gpu, precision: str, m: FloatArray, n: FloatArray, k: FloatArray, count: FloatArray) -> FloatArray:
    """Seconds of math alone: those of the cube (or of the products that were timed) on the measured curve that occupies the GPU as much,
    by tiles, waves and inner dimension, so that no larger product of equal alignment takes less. A CPU has no waves: it takes the
    curve at the same FLOP."""
    curve, peak = gpu.gemm_curve(precision), gpu.peak_flop_per_s[precision]
    flop: FloatArray = 2.0 * m * n * k * count
    if gpu.device == "cpu":
        return flop / (peak * curve.at(flop))
    sizes = np.asarray(curve.sizes)
    timed = np.asarray(curve.shapes).T if curve.shapes else np.tile(CUBES_AROUND, (3, 1))
    rows, depth, columns = np.cbrt(0.5 * sizes)[:, None] * timed[:, None]
    rows, columns = (
        np.maximum(np.round(side / MEASURED_MULTIPLE), 1.0) * MEASURED_MULTIPLE for side in (rows, columns)
    )
    cubes: FloatArray = np.exp(np.log(_occupied_flop(gpu, rows, columns, depth)).mean(axis=1))
    cube_s: FloatArray = np.maximum.accumulate(sizes / np.asarray(curve.fractions))
    occupied = _occupied_flop(gpu, m, n, k, count)
    log_rate: FloatArray = np.interp(np.log(np.maximum(occupied, 1.0)), np.log(cubes), np.log(cubes / cube_s))
    slower: FloatArray = np.where(count > 1.0, _slowdown(np.minimum(_aligned_to(n), _aligned_to(k))), 1.0)
    return np.maximum(occupied * np.exp(-log_rate) * slower, flop / (GEMM_CEILING * max(curve.fractions))) / peak


ALIGNMENT_SLOWDOWN = {8.0: 1.0, 4.0: 2.0, 2.0: 4.0, 1.0: 8.0}
"""How many times slower a batched 16-bit product runs when its inner or output width is only a multiple of 4, 2 or 1 elements:
loads shrink from 16 bytes to 8, 4 and 2
(3 to 8 times slower in the BLOOM sweep's runs with heads of 108 and 150, bigscience-workshop/bigscience@9e64edec). Single
products do not show it: libraries pick another layout."""


def _aligned_to(size: FloatArray) -> FloatArray:
    """Largest of 8, 4, 2, 1 that divides `size`."""
    whole = np.maximum(np.round(size), 1.0)
    return np.select([whole % 8 == 0, whole % 4 == 0, whole % 2 == 0], [8.0, 4.0, 2.0], 1.0)


def _slowdown(multiple: FloatArray) -> FloatArray:
    """How many times slower at an alignment of `multiple` elements."""
    return np.select([multiple == m for m in ALIGNMENT_SLOWDOWN], list(ALIGNMENT_SLOWDOWN.values()), 1.0)


GEMM_CEILING = 1.05
"""No shape is taken to beat the best measured cube by more: best shapes found by search pass 8192 cubed by about that
(A100 271 against 257 TFLOP/s, stas00/ml-engineering@744d01e and Azure/AI-benchmarking-guide@8fd0c6e)."""


def gemm_s(
    gpu: Gpu, precision: str, element_bytes: int, m: ArrayLike, n: ArrayLike, k: ArrayLike, batch: ArrayLike = 1.0
) -> FloatArray:
    """Seconds of `batch` products C[m, n] = A[m, k] B[k, n] in one kernel: math at the fraction of the dense peak that the shape
    reaches against memory traffic; 0 for an empty batch."""
    m_, n_, k_, count = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (m, n, k, batch)))
    math = np.where(m_ * n_ * k_ * count > 0.0, _product_s(gpu, precision, m_, n_, k_, count), 0.0)
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
