"""dK and dV of attention (formulas: attention_backward): one program owns a tile of keys and sums over the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.attention_backward import probability_and_bend, row_values
from shardplan.kernels.attention_tile import hide, kept, load_rows, sequence, store_rows


@triton.jit
def _query_blocks(
    dk,
    dv,
    k_ND,
    v_ND,
    q,
    grad,
    delta,
    lse2,
    batch,
    head,
    first_q,
    seq_q,
    columns,
    begin,
    end,
    shift,
    left,
    right,
    scale,
    softcap,
    slope,
    seed,
    stream,
    dropout,
    sq_b,
    sq_h,
    sq_s,
    sg_b,
    sg_h,
    sg_s,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Query blocks [begin, end) of one key tile, transposed: scores are (BLOCK_N, BLOCK_M)."""
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q, batch, head, first_q, start, seq_q, sq_b, sq_h, sq_s, BLOCK_M, D, BLOCK_D, TMA)
        row_lse2 = row_values(lse2, start, seq_q, BLOCK_M, VARLEN, float("inf"))
        product = tl.dot(k_ND, q_MD.T, input_precision=PRECISION)
        weight, bend = probability_and_bend(
            product, row_lse2[None, :], rows[None, :], columns[:, None], shift, scale, softcap, slope,
            SOFTCAP, ALIBI,
        )  # fmt: skip
        weight = hide(weight, 0.0, rows[None, :], columns[:, None], shift, left, right, HAS_LEFT, HAS_RIGHT)
        g_MD = load_rows(grad, batch, head, first_q, start, seq_q, sg_b, sg_h, sg_s, BLOCK_M, D, BLOCK_D, TMA)
        row_delta = row_values(delta, start, seq_q, BLOCK_M, VARLEN, 0.0)
        kept_weight = weight
        dp = tl.dot(v_ND, g_MD.T, input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, rows[None, :], columns[:, None], stream, dropout)
            again = 1.0 / (1.0 - dropout)
            kept_weight = tl.where(keep, weight * again, 0.0)
            dp = tl.where(keep, dp * again, 0.0)
        dv = tl.dot(kept_weight.to(g_MD.dtype), g_MD, dv, input_precision=PRECISION)
        ds = (weight * (dp - row_delta[None, :]) * bend).to(q_MD.dtype)
        dk = tl.dot(ds, q_MD, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_key_gradient_kernel(
    q,
    k,
    v,
    grad,
    delta,
    lse2,
    dk,
    dv,
    cu_q,
    cu_k,
    slopes,
    seeds,
    sq_b,
    sq_h,
    sq_s,
    sk_b,
    sk_h,
    sk_s,
    sv_b,
    sv_h,
    sv_s,
    sg_b,
    sg_h,
    sg_s,
    sd_b,
    sd_h,
    sdk_b,
    sdk_h,
    sdk_s,
    sdv_b,
    sdv_h,
    sdv_s,
    slope_b,
    group,
    length_q,
    length_k,
    left,
    right,
    scale,
    softcap,
    dropout,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dK, dV of BLOCK_N keys of one key head, over its group of query heads; grid (tiles, kv heads, sequences)."""
    tile = tl.program_id(0)  # a causal mask makes the first keys the longest: first
    kv_head = tl.program_id(1)
    index = tl.program_id(2)
    first_q, seq_q = sequence(cu_q, index, length_q, VARLEN)
    first_k, seq_k = sequence(cu_k, index, length_k, VARLEN)
    start = tile * BLOCK_N
    if start >= seq_k:
        return
    batch = index if not VARLEN else index * 0
    shift = seq_k * 0 if TOP_LEFT else seq_k - seq_q
    columns = start + tl.arange(0, BLOCK_N)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)
    k_ND = load_rows(k, batch, kv_head, first_k, start, seq_k, sk_b, sk_h, sk_s, BLOCK_N, D, BLOCK_D, TMA)
    v_ND = load_rows(v, batch, kv_head, first_k, start, seq_k, sv_b, sv_h, sv_s, BLOCK_N, D, BLOCK_D, TMA)

    # rows that see these keys; one masked loop costs fewer registers than loops with and without a mask
    begin = start * 0
    end = seq_q
    if HAS_RIGHT:
        begin = tl.maximum(start - shift - right, 0) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(end, tl.maximum(start + BLOCK_N - shift + left, 0))
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + index * slope_b + head)
        stream = index * (tl.num_programs(1) * group) + head
        place = batch.to(tl.int64) * sd_b + head.to(tl.int64) * sd_h + first_q
        delta_row = delta + place
        lse2_row = lse2 + place
        dk_ND, dv_ND = _query_blocks(
            dk_ND, dv_ND, k_ND, v_ND, q, grad, delta_row, lse2_row, batch, head, first_q, seq_q, columns,
            begin, end, shift, left, right, scale, softcap, slope, seed, stream, dropout,
            sq_b, sq_h, sq_s, sg_b, sg_h, sg_s, D, BLOCK_D, BLOCK_M,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT, VARLEN, TMA, PRECISION,
        )  # fmt: skip
    store_rows(dk, dk_ND * scale, batch, kv_head, first_k, start, seq_k, sdk_b, sdk_h, sdk_s, BLOCK_N, D, BLOCK_D)
    store_rows(dv, dv_ND, batch, kv_head, first_k, start, seq_k, sdv_b, sdv_h, sdv_s, BLOCK_N, D, BLOCK_D)
