"""Forward pass of attention: O = softmax(scale·Q·Kᵀ + masks)·V tile by tile, scores never in memory.

Running maximum m, sum l and accumulator of each query row (FlashAttention, arXiv 2205.14135; -2, arXiv 2307.08691):

    m' = max(m, max_j s_j),   l' = l·2^(m - m') + Σ_j 2^(s_j - m'),   acc' = acc·2^(m - m') + Σ_j 2^(s_j - m')·v_j

and at the end O = acc / l, LSE = ln Σ_j exp(s_j) = (m + log2 l)·ln 2. A row that sees nothing gives O = 0, LSE = -inf.
Key blocks that every row of the tile sees whole are run without a mask; the others, at either end, with one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.attention_tile import LN2, LOG2E, bent, hide, kept, load_rows, sequence, store_rows


@triton.jit
def _blocks(
    acc,
    total,
    top,
    q,
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
        score = tl.dot(q, k_ND.T, input_precision=PRECISION)
        if SOFTCAP or ALIBI:
            score = bent(score, rows[:, None], columns[None, :], shift, scale, softcap, slope, SOFTCAP, ALIBI)
            factor = 1.0
        else:
            factor = scale * LOG2E
        if MASKED:
            score = tl.where(columns[None, :] < seq_k, score, -float("inf"))
            score = hide(score, -float("inf"), rows[:, None], columns[None, :], shift, left, right, HAS_LEFT, HAS_RIGHT)
        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        if MASKED:
            safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        else:
            safe = new_top
        weight = tl.exp2(score * factor - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        if DROPOUT:
            weight = tl.where(kept(seed, rows[:, None], columns[None, :], stream, dropout), weight, 0.0)
        acc = acc * fade[:, None]
        v_ND = load_rows(v, batch, kv_head, first_k, start, seq_k, sv_b, sv_h, sv_s, BLOCK_N, D, BLOCK_D, TMA)
        acc = tl.dot(weight.to(v_ND.dtype), v_ND, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def key_range(
    start,
    seq_k,
    shift,
    left,
    right,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """(begin, whole begin, whole end, end): key columns that rows [start, start + BLOCK_M) see; the middle unmasked."""
    begin = start * 0
    end = seq_k
    whole_begin = begin
    whole_end = (seq_k // BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        end = tl.minimum(end, tl.maximum(start + BLOCK_M + shift + right, 0))
        whole_end = tl.minimum(whole_end, tl.maximum(start + shift + right + 1, 0) // BLOCK_N * BLOCK_N)
    if HAS_LEFT:
        begin = tl.maximum(start + shift - left, 0) // BLOCK_N * BLOCK_N
        whole_begin = tl.maximum(start + BLOCK_M - 1 + shift - left, 0)
        whole_begin = (whole_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_begin = tl.minimum(whole_begin, tl.maximum((end + BLOCK_N - 1) // BLOCK_N * BLOCK_N, begin))
    whole_end = tl.maximum(whole_end, whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    so_b,
    so_h,
    so_s,
    sl_b,
    sl_h,
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
    """One program: BLOCK_M query rows of one head of one sequence; grid (tiles, heads, sequences)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a causal mask makes the last rows the longest: first
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
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    begin, whole_begin, whole_end, end = key_range(
        start, seq_k, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if HAS_LEFT:
        acc, total, top = _blocks(
            acc, total, top, q_MD, k, v, batch, kv_head, first_k, seq_k, rows, begin, tl.minimum(whole_begin, end), shift,
            left, right, scale, softcap, slope, seed, stream, dropout, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, D, BLOCK_D,
            BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT, True, TMA, PRECISION,
        )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, q_MD, k, v, batch, kv_head, first_k, seq_k, rows, whole_begin, whole_end, shift,
        left, right, scale, softcap, slope, seed, stream, dropout, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, D, BLOCK_D,
        BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT, False, TMA, PRECISION,
    )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, q_MD, k, v, batch, kv_head, first_k, seq_k, rows, whole_end, end, shift,
        left, right, scale, softcap, slope, seed, stream, dropout, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, D, BLOCK_D,
        BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT, True, TMA, PRECISION,
    )  # fmt: skip

    seen_any = total != 0
    divisor = tl.where(seen_any, total, 1.0)
    if DROPOUT:
        divisor = divisor * (1.0 - dropout)
    acc = acc / divisor[:, None]
    store_rows(out, acc, batch, head, first_q, start, seq_q, so_b, so_h, so_s, BLOCK_M, D, BLOCK_D)
    row_lse = tl.where(seen_any, (top + tl.log2(tl.where(seen_any, total, 1.0))) * LN2, -float("inf"))
    lse_rows = lse + batch.to(tl.int64) * sl_b + head.to(tl.int64) * sl_h + first_q + rows
    tl.store(lse_rows, row_lse, mask=rows < seq_q)
