"""How the kernels of norms and rotary positions are launched: the constants, and the tiles they give for a width.

The constants are for bf16 rows of 4,096; `layer_tuning` times them beside their neighbours. Other widths keep the elements
of a program and of a thread where they can.
"""

from __future__ import annotations

from typing import NamedTuple

from shardplan.kernels.launch import next_power_of_two

WIDEST = 16_384
WIDEST_HELD = 8_192
"""Widest row whose backward keeps s and dy in registers across the reduction; wider ones are read again, from cache."""
MOST_WARPS = 32
MOST_FORWARD_WARPS = 16
SHARED_BYTES = 192 * 1024
"""Of shared memory that tiles on their way may fill; sm_90 has 227 KiB."""


class RowTiles(NamedTuple):
    """Programs over the rows of a norm."""

    elements: int
    """Of a program's tile where a row has fewer; then it holds several rows."""
    per_thread: int
    """Elements of a thread: 8 of bf16 are one load of 16 bytes."""
    stages: int
    """Tiles of a program under way at once; 1 does not pipeline."""
    per_multiprocessor: int
    """Programs of a multiprocessor that walk over the tiles; 0 for a program a tile."""


class SumTile(NamedTuple):
    """Programs that add up the parts of dw and db."""

    rows: int
    columns: int
    warps: int


class HeadTiles(NamedTuple):
    """Programs over the heads of a token."""

    elements: int
    """Of the heads one program turns, at most."""
    per_thread: int


FORWARD = RowTiles(4_096, 32, 1, 0)
BACKWARD = RowTiles(4_096, 16, 3, 2)
SUM = SumTile(256, 16, 8)
ROTARY = HeadTiles(1_024, 16)


class RowLaunch(NamedTuple):
    """What a norm's kernel is launched with."""

    rows: int
    block: int
    warps: int
    stages: int
    per_multiprocessor: int


def forward_launch(width: int, element_bytes: int, tiles: RowTiles = FORWARD) -> RowLaunch:
    """The tile of rows of `width`; the widest rows have more elements a thread."""
    return _launch(width, tiles, MOST_FORWARD_WARPS, 2 * element_bytes)


def backward_launch(width: int, element_bytes: int, centered: bool, tiles: RowTiles = BACKWARD) -> RowLaunch:
    """As forward; rows that are read twice take a multiprocessor each, LayerNorm holds more and so has less under way."""
    if centered:
        tiles = tiles._replace(per_thread=min(16, tiles.per_thread), stages=max(1, tiles.stages - 1))
    launch = _launch(width, tiles, MOST_WARPS, 3 * element_bytes)
    if width > WIDEST_HELD:
        return launch._replace(warps=MOST_WARPS, stages=1, per_multiprocessor=1)
    return launch


def _launch(width: int, tiles: RowTiles, most_warps: int, read_bytes: int) -> RowLaunch:
    """`read_bytes` of each element of a tile are kept in shared memory for every stage but one."""
    block = max(16, next_power_of_two(width))
    rows = max(1, tiles.elements // block)
    warps = max(1, min(most_warps, rows * block // (32 * tiles.per_thread)))
    stages = min(tiles.stages, 1 + SHARED_BYTES // (rows * block * read_bytes))
    held = max(1, rows * block // tiles.elements)
    per_multiprocessor = max(1, tiles.per_multiprocessor // held) if tiles.per_multiprocessor else 0
    return RowLaunch(rows, block, warps, stages, per_multiprocessor)


def head_launch(q_heads: int, k_heads: int, half: int, tiles: HeadTiles = ROTARY) -> tuple[int, int, int]:
    """(heads, pairs, warps) of a program, for heads of which the first 2 · half elements turn."""
    pairs = next_power_of_two(half)
    heads = min(next_power_of_two(max(q_heads, k_heads)), max(1, tiles.elements // (2 * pairs)))
    return heads, pairs, max(1, min(8, 2 * heads * pairs // (32 * tiles.per_thread)))
