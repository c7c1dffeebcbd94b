"""What the attention kernels share inside a tile: loading rows, which pairs are visible, scores, dropout.

Legend: a query row i of a sequence of S_q sees the key column j of a sequence of S_k where

    i + shift - left <= j <= i + shift + right,      shift = S_k - S_q (aligned at the bottom right) or 0 (top left);

a causal mask is right = 0. Scores live in units of log2, so that softmax takes exp2 (FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.interpreter import WIDEN, as_output

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    source,
    batch,
    head,
    first,
    start,
    limit,
    stride_b,
    stride_h,
    stride_s,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """(ROWS, BLOCK_D): rows [start, start + ROWS) of a sequence that begins at row `first` and has `limit` rows.

    `source` is a descriptor of the (B, H, S, D) view (TMA) or a pointer. What lies outside reads as zero by pointers; by
    descriptor only what lies outside the tensor does: the caller masks scores, so the rows of a neighbour never count.
    """
    if TMA:
        tile = source.load([batch, head, first + start, 0]).reshape(ROWS, BLOCK_D)
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_D)
        base = (
            source
            + batch.to(tl.int64) * stride_b
            + head.to(tl.int64) * stride_h
            + (first + start).to(tl.int64) * stride_s
        )
        inside = (start + rows < limit)[:, None]
        if BLOCK_D != D:
            inside = inside & (columns < D)[None, :]
        tile = tl.load(base + rows[:, None] * stride_s + columns[None, :], mask=inside, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(
    target,
    tile,
    batch,
    head,
    first,
    start,
    limit,
    stride_b,
    stride_h,
    stride_s,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write (ROWS, BLOCK_D) to rows [start, min(start + ROWS, limit)) of a sequence, cast to the target's dtype."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    base = (
        target + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + (first + start).to(tl.int64) * stride_s
    )
    inside = (start + rows < limit)[:, None]
    if BLOCK_D != D:
        inside = inside & (columns < D)[None, :]
    tl.store(base + rows[:, None] * stride_s + columns[None, :], as_output(tile, target), mask=inside)


@triton.jit
def sequence(cu_seqlens, index, length, VARLEN: tl.constexpr):
    """(first row, rows) of sequence `index`: from the cumulative lengths, or a dense batch's 0 and `length`."""
    if VARLEN:
        first = tl.load(cu_seqlens + index)
        return first, tl.load(cu_seqlens + index + 1) - first
    return index * 0, index * 0 + length


@triton.jit
def hide(tile, fill, rows, columns, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """`tile` with `fill` where a query row does not see a key column; `rows` and `columns` broadcast to the tile."""
    if HAS_RIGHT:
        tile = tl.where(columns <= rows + (shift + right), tile, fill)
    if HAS_LEFT:
        tile = tl.where(columns >= rows + (shift - left), tile, fill)
    return tile


@triton.jit
def tanh(x):
    """tanh to fp32 rounding: near 0, where 1 - 2 / (1 + exp 2|x|) cancels, its series up to x^9 (the next term is 4e-9 of it there)."""
    square = x * x
    near = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    far = 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def bent(product, rows, columns, shift, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores in log2 units of a tile of q·k: soft cap c·tanh(scale·q·k / c), then ALiBi's -slope·|i + shift - j|."""
    score = product * scale
    if SOFTCAP:
        score = softcap * tanh(score / softcap)
    if ALIBI:
        score -= slope * tl.abs(rows + shift - columns).to(tl.float32)
    return score * LOG2E


@triton.jit
def kept(seed, rows, columns, stream, probability):
    """Whether each pair survives dropout: Philox (Salmon et al. 2011) of (column, row, sequence·heads + head)."""
    zero = rows * 0 + columns * 0
    bits, _, _, _ = tl.philox(seed, columns + zero, rows + zero, stream + zero, zero)
    return tl.uint_to_uniform_float(bits) >= probability
