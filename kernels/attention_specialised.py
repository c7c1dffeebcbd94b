"""Forward pass of attention with warp specialisation (Hopper): a warp that loads, warpgroups that compute.

The same recurrence as attention_forward on dense tensors with no mask but a diagonal. Triton splits the loop where its
range says `warp_specialize`, which it takes only with four warps, tiles loaded through descriptors made on the device,
and one loop: every block is masked. Source: FlashAttention-3 (arXiv 2407.08608), section 3.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.attention_tile import LN2, LOG2E, store_rows


@triton.jit
def attention_specialised_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    group,
    length_q,
    length_k,
    shift,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
    SPECIALISE: tl.constexpr,
):
    """One program: BLOCK_M query rows of one head; grid (tiles, heads, batch). RAGGED: the last key block is partial."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // group
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    q_base = q + batch.to(tl.int64) * sq_b + head.to(tl.int64) * sq_h
    k_base = k + batch.to(tl.int64) * sk_b + kv_head.to(tl.int64) * sk_h
    v_base = v + batch.to(tl.int64) * sv_b + kv_head.to(tl.int64) * sv_h
    q_tiles = tl.make_tensor_descriptor(q_base, [length_q, D], [sq_s, 1], [BLOCK_M, D])
    k_tiles = tl.make_tensor_descriptor(k_base, [length_k, D], [sk_s, 1], [BLOCK_N, D])
    v_tiles = tl.make_tensor_descriptor(v_base, [length_k, D], [sv_s, 1], [BLOCK_N, D])
    end = length_k
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(start + BLOCK_M + shift, 0))
    q_MD = q_tiles.load([start, 0])
    factor = scale * LOG2E
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for at in tl.range(0, end, BLOCK_N, warp_specialize=SPECIALISE):
        k_ND = k_tiles.load([at, 0])
        score = tl.dot(q_MD, k_ND.T)
        columns = at + tl.arange(0, BLOCK_N)
        if CAUSAL:
            score = tl.where(columns[None, :] <= rows[:, None] + shift, score, -1.0e30)
        if RAGGED:
            score = tl.where(columns[None, :] < length_k, score, -1.0e30)
        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        v_ND = v_tiles.load([at, 0])
        acc = tl.dot(weight.to(v_ND.dtype), v_ND, acc)
        top = new_top
    seen = (total != 0) & (rows + shift >= 0) if CAUSAL else total != 0
    acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    store_rows(out, acc, batch, head, start * 0, start, length_q, so_b, so_h, so_s, BLOCK_M, D, D)
    row_lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
    lse_rows = lse + batch.to(tl.int64) * sl_b + head.to(tl.int64) * sl_h + rows
    tl.store(lse_rows, row_lse, mask=rows < length_q)
