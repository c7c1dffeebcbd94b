"""Attention as operators: grouped-query attention, multi-head latent attention, windows, norms of queries and keys."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.attention_time import TILE_TOKENS, AttentionShape, flash_attention_flop
from shardplan.costmodel.context_parallel import ULYSSES, kept_bytes
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.op import (
    FloatArray,
    Gemm,
    Op,
    Shapes,
    norm_op,
    passes,
    tensor_parallel_collectives,
)
from shardplan.costmodel.runtime import Runtime


def attention_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """From the layer's input to the output of attention, before the residual add."""
    e, tokens, tp, sp = shapes.element_bytes, shapes.tokens, shapes.tp, shapes.sp
    stream = e * tokens * kind.hidden
    heads, kv_heads = kind.heads / tp, kind.kv_heads / tp
    one = np.ones_like(tokens)
    leaving = tensor_parallel_collectives(shapes, stream)[1]
    make_heads = _latent_ops if kind.kv_lora_rank else _query_key_value_ops
    ops = (
        Op(name="input", kept_bytes=stream / sp),
        norm_op("attention_norm", kind.norm, stream / sp, runtime, e),
        *make_heads(kind, shapes, runtime),
        _attention_core(kind, shapes, heads, kv_heads),
        Op(name="attention_output", kept_bytes=e * tokens * heads * kind.value_dim),
        Op(
            name="projection",
            gemms=(Gemm(m=tokens, n=kind.hidden * one, k=heads * kind.value_dim, count=one),),
            forward=leaving[0],
            backward=leaving[1],
        ),
    )
    return (*ops, norm_op("attention_post_norm", kind.norm, stream / sp, runtime, e)) if kind.norms == 4 else ops


def _query_key_value_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """Queries, keys and values from one product; norms of queries and keys keep what goes in, attention keeps what comes out."""
    e, tokens = shapes.element_bytes, shapes.tokens
    heads, kv_heads = kind.heads / shapes.tp, kind.kv_heads / shapes.tp
    one = np.ones_like(tokens)
    qkv = (heads + 2 * kv_heads) * kind.head_dim
    entering = tensor_parallel_collectives(shapes, e * tokens * kind.hidden)[0]
    product = Op(
        name="qkv",
        gemms=(Gemm(m=tokens, n=qkv, k=kind.hidden * one, count=one),),
        kept_bytes=e * tokens * qkv,
        forward=entering[0],
        backward=entering[1],
    )
    rotary = Op(
        name="rotary",
        traffic_bytes=2
        * e
        * tokens
        * (heads + kv_heads)
        * kind.head_dim
        * (passes("rotary", runtime) if kind.rotary else 0),
    )
    if not kind.qk_norm:
        return product, rotary
    width = e * tokens * (heads + kv_heads) * kind.head_dim
    return product, norm_op("qk_norm", kind.norm, width, runtime, e), rotary


def _latent_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """Queries, keys and values through latents (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C), keys and values whole.

    The products that make the latents and the shared key are whole on every tensor-parallel rank and run on its part of the
    sequence; latents, not the stream, are gathered for the products that make heads, which are split by heads (Megatron-Core's MLA).
    Kept are the latents before and after their norms, and queries, keys (with the shared part copied to every head) and values. The
    sum over tp of the weight gradients of the first products, once a step, is not counted.
    """
    e, tokens, sp = shapes.element_bytes, shapes.tokens, shapes.sp
    heads, one = kind.heads / shapes.tp, np.ones_like(tokens)
    normed, rope = kind.q_lora_rank + kind.kv_lora_rank, kind.qk_rope_head_dim
    source = kind.q_lora_rank or kind.hidden
    entering = tensor_parallel_collectives(shapes, e * tokens * (source + kind.kv_lora_rank + rope))[0]
    key_value = heads * (kind.qk_nope_head_dim + kind.value_dim)
    return (
        Op(
            name="latent",
            gemms=(Gemm(m=tokens / sp, n=(normed + rope) * one, k=kind.hidden * one, count=one),),
            kept_bytes=e * tokens / sp * (normed + rope),
        ),
        norm_op("latent_norm", kind.norm, e * tokens / sp * normed, runtime, e),
        Op(
            name="qkv",
            gemms=(
                Gemm(m=tokens, n=heads * kind.head_dim, k=source * one, count=one),
                Gemm(m=tokens, n=key_value, k=kind.kv_lora_rank * one, count=one),
            ),
            kept_bytes=e * tokens * heads * (2 * kind.head_dim + kind.value_dim),
            forward=entering[0],
            backward=entering[1],
        ),
        Op(
            name="rotary",
            traffic_bytes=2 * e * tokens * ((heads + 1) * rope * passes("rotary", runtime) + heads * kind.head_dim),
        ),
    )


def _attention_core(kind: LayerKind, shapes: Shapes, heads: FloatArray, kv_heads: FloatArray) -> Op:
    """Fused: keeps the log-sum-exp. Unfused: keeps softmax and its dropped-out copy, and the mask (5 a s^2 b bytes).

    A rank's share of the work is that of its seq tokens against all seq * cp keys, in every kind of context parallelism. Values
    narrower than keys count with the mean width of both. Of a window w a fused kernel computes w - w^2 / (2 s) keys a query and
    another tile, unfused attention all of them; FLOP count w keys, as s of a full layer. A sink costs nothing worth counting.
    """
    e, seq, tokens, width = shapes.element_bytes, shapes.seq, shapes.tokens, kind.attention_dim
    keys = seq * shapes.cp
    scores = shapes.micro_batch * heads * seq * keys
    cp, cp_kind = np.broadcast_to(shapes.cp, seq.shape), np.broadcast_to(shapes.cp_kind, seq.shape)
    # ulysses gives each rank whole key-value heads; with fewer heads than ranks they are copied
    copied = np.where(cp_kind == ULYSSES, np.maximum(kv_heads, cp), kv_heads)
    queries, own, exchanged = (e * tokens * width * n for n in (heads, 2 * kv_heads, 2 * copied))
    extra = kept_bytes(cp_kind, cp, e * tokens * kind.value_dim * heads, own, exchanged)
    sequences, unfused = shapes.micro_batch, ~shapes.flash
    if shapes.document is not None:  # as many more, shorter sequences
        sequences, scores = sequences * seq / shapes.document, scores * shapes.document / keys
        seq = keys = np.full_like(seq, shapes.document)
    pairs = sequences * heads
    counted = np.minimum(keys, kind.window) if kind.window else keys
    flop = sequences * flash_attention_flop(seq, counted, heads, width)
    products = tuple(
        Gemm(m=seq, n=n, k=k, count=np.where(unfused, pairs, 0.0))
        for n, k in ((keys, kind.head_dim * np.ones_like(seq)), (kind.value_dim * np.ones_like(seq), keys))
    )
    dropout = 1 if kind.dropout else 0
    return Op(
        name="attention",
        gemms=() if shapes.flash.all() else products,
        flash_flop=np.where(shapes.flash, flop, 0.0),
        attention=AttentionShape(
            pairs=pairs,
            seq=seq,
            keys=np.where(unfused, keys, window_keys(kind.window, keys)) if kind.window else keys,
            head_dim=width,
        ),
        traffic_bytes=np.where(unfused, scores * (2 * e + dropout * (2 * e + 1)), 0.0),
        kept_bytes=np.where(unfused, scores * (e + dropout * (e + 1)), 4 * tokens * heads + extra),
        context=(queries, exchanged),
    )


def window_keys(window: int, keys: FloatArray) -> FloatArray:
    """Length of a causal sequence that costs a fused kernel as much a query as `keys` tokens seen through a window.

    A query sees w - w^2 / (2 s) keys on average, of a causal sequence half its length. Tiles at both edges of the window are
    computed whole, where the diagonal alone cuts one: half a tile more a query.
    """
    seen = 2.0 * window - window**2 / keys
    return np.where(window < keys, np.minimum(seen + TILE_TOKENS, keys), keys)
