"""Backward pass of attention from O and LSE: probabilities are computed again, tile by tile (arXiv 2307.08691, algorithm 2).

With P = exp(S - LSE), the dropout mask Z (0 or 1/(1 - p)) and delta = rowsum(dO ∘ O) - dLSE:

    dV = (P ∘ Z)ᵀ·dO,   dS = P ∘ ((dO·Vᵀ) ∘ Z - delta) ∘ cap',   dQ = scale·dS·K,   dK = scale·dSᵀ·Q

where cap' = 1 - (s/c)² is the slope of a soft cap c at the capped score s. Subtracting dLSE makes the LSE an output that
can be differentiated, as merging partial results of a ring needs. Two kernels, each owning what it writes: sums run in
one order, so that the same inputs give the same bits. One kernel that added dQ with atomics was slower (reports/measured).
"""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.attention_tile import LOG2E, bent, load_rows


@triton.jit
def attention_delta_kernel(
    out,
    grad,
    lse,
    grad_lse,
    delta,
    lse2,
    so_b,
    so_h,
    so_s,
    sg_b,
    sg_h,
    sg_s,
    sl_b,
    sl_h,
    sd_b,
    sd_h,
    sm_b,
    sm_h,
    sm_s,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    """delta and LSE in log2 units; +inf where a row sees nothing and past the last row, so that probabilities are zero.

    Both are written to the end of their rows, which are padded to whole tiles: the loops that read them need no mask.
    """
    start = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    batch = tl.program_id(2)
    rows = start + tl.arange(0, BLOCK_M)
    o_MD = load_rows(out, batch, head, 0, start, length, so_b, so_h, so_s, BLOCK_M, D, BLOCK_D, False)
    g_MD = load_rows(grad, batch, head, 0, start, length, sg_b, sg_h, sg_s, BLOCK_M, D, BLOCK_D, False)
    total = tl.sum(o_MD.to(tl.float32) * g_MD.to(tl.float32), 1)
    inside = rows < length
    place = batch.to(tl.int64) * sl_b + head.to(tl.int64) * sl_h + rows
    row_lse = tl.load(lse + place, mask=inside, other=-float("inf"))
    empty = row_lse == -float("inf")
    if HAS_GRAD_LSE:
        theirs = batch.to(tl.int64) * sm_b + head.to(tl.int64) * sm_h + rows.to(tl.int64) * sm_s
        total -= tl.load(grad_lse + theirs, mask=inside, other=0.0).to(tl.float32)
    padded = batch.to(tl.int64) * sd_b + head.to(tl.int64) * sd_h + rows
    tl.store(delta + padded, tl.where(empty, 0.0, total))
    tl.store(lse2 + padded, tl.where(empty, float("inf"), row_lse * LOG2E))


@triton.jit
def probability_and_bend(
    product,
    row_lse2,
    rows,
    columns,
    shift,
    scale,
    softcap,
    slope,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """(P, cap') of a tile of q·k in either orientation, before any mask."""
    if not (SOFTCAP or ALIBI):
        return tl.exp2(product * (scale * LOG2E) - row_lse2), 1.0
    bend = 1.0
    score = bent(product, rows, columns, shift, scale, softcap, slope, SOFTCAP, ALIBI)
    if SOFTCAP:
        capped = bent(product, rows, columns, shift, scale, softcap, slope, SOFTCAP, False) / (LOG2E * softcap)
        bend = 1.0 - capped * capped
    return tl.exp2(score - row_lse2), bend


@triton.jit
def row_values(source, start, limit, ROWS: tl.constexpr, VARLEN: tl.constexpr, other):
    """(ROWS,) of delta or LSE from row `start`; rows past a packed sequence belong to its neighbour: `other`."""
    rows = start + tl.arange(0, ROWS)
    if VARLEN:
        return tl.load(source + rows, mask=rows < limit, other=other)
    return tl.load(source + rows)
