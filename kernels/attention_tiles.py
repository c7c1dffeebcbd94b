"""Tile sizes of the attention kernels, by compute capability, head dimension and element size.

Chosen so that nothing spills and shared memory suffices (checked by the static gate), then by time on the devices named
in reports/measured. There is no tuning at run time: the first call is as fast as the last, also while a graph is captured.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.kernels.interpreter import INTERPRETED


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One kernel's launch: rows of queries and of keys in a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


INTERPRETER_TILES = Tiles(queries=32, keys=32, warps=4, stages=1)
"""Small, so that short sequences still take several tiles."""

HOPPER_TMA: dict[tuple[str, int], Tiles] = {
    ("forward", 64): Tiles(queries=64, keys=128, warps=4, stages=2),
    ("forward", 128): Tiles(queries=64, keys=64, warps=4, stages=3),
    ("forward", 256): Tiles(queries=64, keys=64, warps=4, stages=3),
    ("specialised", 64): Tiles(queries=128, keys=128, warps=4, stages=2),
    ("specialised", 128): Tiles(queries=128, keys=128, warps=4, stages=2),
    ("key_gradient", 64): Tiles(queries=64, keys=64, warps=4, stages=3),
    ("key_gradient", 128): Tiles(queries=64, keys=64, warps=4, stages=2),
    ("key_gradient", 256): Tiles(queries=64, keys=64, warps=8, stages=2),
    ("query_gradient", 64): Tiles(queries=128, keys=64, warps=8, stages=3),
    ("query_gradient", 128): Tiles(queries=128, keys=64, warps=8, stages=3),
    ("query_gradient", 256): Tiles(queries=128, keys=32, warps=8, stages=3),
}
"""By (kernel, block of the head dimension), 2-byte elements loaded by descriptor; timed on an H200
(reports/measured/h200-2026-11-26/attention_tuning.csv): small tiles of four warps, several to a multiprocessor, win."""
BLACKWELL_TMA: dict[tuple[str, int], Tiles] = HOPPER_TMA | {
    ("key_gradient", 256): Tiles(queries=64, keys=64, warps=8, stages=1),
    ("query_gradient", 256): Tiles(queries=128, keys=32, warps=8, stages=2),
}
"""Products there keep operands in shared memory that Hopper holds in registers; compiled, not timed."""
POINTERS: dict[tuple[str, int], Tiles] = {
    ("forward", 64): Tiles(queries=128, keys=64, warps=4, stages=3),
    ("forward", 128): Tiles(queries=128, keys=32, warps=8, stages=3),
    ("forward", 256): Tiles(queries=64, keys=32, warps=8, stages=2),
    ("key_gradient", 64): Tiles(queries=32, keys=64, warps=4, stages=2),
    ("key_gradient", 128): Tiles(queries=32, keys=64, warps=8, stages=2),
    ("key_gradient", 256): Tiles(queries=16, keys=32, warps=8, stages=2),
    ("query_gradient", 64): Tiles(queries=64, keys=64, warps=8, stages=2),
    ("query_gradient", 128): Tiles(queries=64, keys=32, warps=8, stages=2),
    ("query_gradient", 256): Tiles(queries=32, keys=32, warps=8, stages=1),
}
"""The same, loaded by pointer: GPUs before Hopper, and tensors that a descriptor cannot describe; not timed."""
WIDE: dict[tuple[str, int], Tiles] = {
    (kernel, block): Tiles(queries=32, keys=32, warps=4 if block == 64 else 8, stages=1)
    for kernel in ("forward", "key_gradient", "query_gradient")
    for block in (64, 128, 256)
}
"""fp32: products run outside the tensor cores, registers decide."""


def tiles(kernel: str, *, block_d: int, tma: bool, element_bytes: int, capability: int) -> Tiles:
    """Tiles of `kernel` (forward, specialised, key_gradient, query_gradient) for a head dimension padded to `block_d`.

    `capability` is the GPU's, 90 for 9.0; `tma` whether tiles are loaded by descriptor.
    """
    if INTERPRETED:
        return INTERPRETER_TILES
    key = (kernel, max(block_d, 64))
    if element_bytes > 2:
        return WIDE[key]
    if not tma:
        return POINTERS[key]
    return (BLACKWELL_TMA if capability >= 100 else HOPPER_TMA)[key]
