"""dQ of attention (formulas: attention_backward): one program owns a tile of queries and sums over the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.attention_backward import probability_and_bend, row_values
from shardplan.kernels.attention_forward import key_range
from shardplan.kernels.attention_tile import hide, kept, load_rows, sequence, store_rows


@triton.jit
def _key_blocks(
    dq,
    q_MD,
    g_MD,
    row_lse2,
    row_delta,
    k,
    v,
    batch,
    kv_head,
    first_k,
    seq_k,
    rows,
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
    sk_b,
    sk_h,
    sk_s,
    sv_b,
    sv_h,
    sv_s,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Key blocks [begin, end) of one query tile."""
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k_ND = load_rows(k, batch, kv_head, first_k, start, seq_k, sk_b, sk_h, sk_s, BLOCK_N, D, BLOCK_D, TMA)
        v_ND = load_rows(v, batch, kv_head, first_k, start, seq_k, sv_b, sv_h, sv_s, BLOCK_N, D, BLOCK_D, TMA)
        product = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        dp = tl.dot(g_MD, v_ND.T, input_precision=PRECISION)
        weight, bend = probability_and_bend(
            product, row_lse2[:, None], rows[:, None], columns[None, :], shift, scale, softcap, slope,
            SOFTCAP, ALIBI,
        )  # fmt: skip
        if MASKED:
            weight = tl.where(columns[None, :] < seq_k, weight, 0.0)
            weight = hide(weight, 0.0, rows[:, None], columns[None, :], shift, left, right, HAS_LEFT, HAS_RIGHT)
        if DROPOUT:
            keep = kept(seed, rows[:, None], columns[None, :], stream, dropout)
            dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
        ds = (weight * (dp - row_delta[:, None]) * bend).to(k_ND.dtype)
        dq = tl.dot(ds, k_ND, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_query_gradient_kernel(
    q,
    k,
    v,
    grad,
    delta,
    lse2,
    dq,
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
    sdq_b,
    sdq_h,
    sdq_s,
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
    """One program: dQ of BLOCK_M query rows of one head; grid (tiles, heads, sequences)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    index = tl.program_id(2)
    first_q, seq_q = sequence(cu_q, index, length_q, VARLEN)
    first_k, seq_k = sequence(cu_k, index, length_k, VARLEN)
    start = tile * BLOCK_M
    if start >= seq_q:
        return
    batch = index if not VARLEN else index * 0
    kv_head = head // group
    shift = seq_k * 0 if TOP_LEFT else seq_k - seq_q
    rows = start + tl.arange(0, BLOCK_M)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + index * slope_b + head)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)
    stream = index * tl.num_programs(1) + head
    q_MD = load_rows(q, batch, head, first_q, start, seq_q, sq_b, sq_h, sq_s, BLOCK_M, D, BLOCK_D, TMA)
    g_MD = load_rows(grad, batch, head, first_q, start, seq_q, sg_b, sg_h, sg_s, BLOCK_M, D, BLOCK_D, TMA)
    place = batch.to(tl.int64) * sd_b + head.to(tl.int64) * sd_h + first_q
    row_lse2 = row_values(lse2 + place, start, seq_q, BLOCK_M, VARLEN, float("inf"))
    row_delta = row_values(delta + place, start, seq_q, BLOCK_M, VARLEN, 0.0)
    begin, whole_begin, whole_end, end = key_range(
        start, seq_k, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        dq_MD = _key_blocks(
            dq_MD, q_MD, g_MD, row_lse2, row_delta, k, v, batch, kv_head, first_k, seq_k, rows, begin,
            tl.minimum(whole_begin, end), shift, left, right, scale, softcap, slope, seed, stream, dropout,
            sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, D, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
            True, TMA, PRECISION,
        )  # fmt: skip
    dq_MD = _key_blocks(
        dq_MD, q_MD, g_MD, row_lse2, row_delta, k, v, batch, kv_head, first_k, seq_k, rows, whole_begin,
        whole_end, shift, left, right, scale, softcap, slope, seed, stream, dropout,
        sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, D, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
        False, TMA, PRECISION,
    )  # fmt: skip
    dq_MD = _key_blocks(
        dq_MD, q_MD, g_MD, row_lse2, row_delta, k, v, batch, kv_head, first_k, seq_k, rows, whole_end,
        end, shift, left, right, scale, softcap, slope, seed, stream, dropout,
        sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, D, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
        True, TMA, PRECISION,
    )  # fmt: skip
    store_rows(dq, dq_MD * scale, batch, head, first_q, start, seq_q, sdq_b, sdq_h, sdq_s, BLOCK_M, D, BLOCK_D)
