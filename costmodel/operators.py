"""A layer kind as a tuple of operators: matrix shapes, FLOP, bytes moved, bytes kept for the backward pass, collectives.

All numbers are per rank and micro-batch, as arrays over the K unique shapes they depend on. `kept_bytes` of an
operator is what disappears when it is recomputed. Two entries only stand for kept tensors: "input", the layer's own,
always kept; and "attention_output", between attention core and projection, which some runtimes keep while they
recompute the core. For a GPT layer in 16 bit this sums to s b h (10 + 24/t + 5 a s / (h t)) under tensor parallelism
and s b h (34 + 5 a s / h) / t with sequence parallelism (Korthikanti et al., arXiv 2205.05198, equations 1-4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.attention_time import AttentionShape, flash_attention_flop
from shardplan.costmodel.collectives import Collective
from shardplan.costmodel.context_parallel import ULYSSES, kept_bytes
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.runtime import Runtime

FloatArray = NDArray[np.float64]
Amount = FloatArray | float


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The unique keys that operators depend on, each of shape (K,)."""

    micro_batch: FloatArray
    seq: FloatArray
    """Tokens of a sequence held by one rank (seq / cp)."""
    cp: Amount = 1.0
    cp_kind: NDArray[np.int64] | int = 0
    """Code of CP_KINDS."""
    tp: FloatArray
    sp: FloatArray
    """tp with sequence parallelism, else 1: divides what is split along the sequence."""
    flash: NDArray[np.bool_]
    """Fused attention instead of separate matrix products and softmax."""
    recompute_parts: NDArray[np.int64] | int = 0
    """Sum of `recompute.PART_BITS`; 0 = what the runtime selects."""
    element_bytes: int
    """Of activations."""

    @property
    def tokens(self) -> FloatArray:
        """Tokens of one micro-batch on one rank."""
        return self.micro_batch * self.seq


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """C[m, n] = A[m, k] B[k, n], `count` times."""

    m: FloatArray
    n: FloatArray
    k: FloatArray
    count: FloatArray

    @property
    def flop(self) -> FloatArray:
        """Forward FLOP of all of them."""
        return 2.0 * self.m * self.n * self.k * self.count


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator; left-out numbers are 0."""

    name: str
    gemms: tuple[Gemm, ...] = ()
    flash_flop: Amount = 0.0
    """Forward FLOP of fused causal attention."""
    attention: AttentionShape | None = None
    """Makes this the attention core: its time follows from this shape, `gemms` and `flash_flop` only count its FLOP."""
    traffic_bytes: Amount = 0.0
    """Element-wise bytes read and written, forward, fully fused."""
    kept_bytes: Amount = 0.0
    forward: tuple[tuple[Collective, FloatArray], ...] = ()
    """Tensor-parallel collectives of the forward pass: (kind, buffer bytes)."""
    backward: tuple[tuple[Collective, FloatArray], ...] = ()
    context: tuple[FloatArray, FloatArray] | None = None
    """Of attention: bytes of queries, and of keys and values, that context-parallel ranks exchange."""


EAGER_PASSES = {"rmsnorm": 9.0, "rotary": 5.0, "gated": 5.0 / 3.0}
"""Bytes that eager PyTorch moves relative to one fused kernel, by counting reads and writes: RMSNorm casts to fp32, squares, averages,
scales, casts back and weighs (18 against 2 of a 16-bit tensor); rotary embedding casts, multiplies and casts back (10 against 2);
silu and product are two kernels (5 against 3)."""


def _passes(what: str, runtime: Runtime) -> float:
    """Traffic of a layer's part relative to one fused kernel."""
    return 1.0 if runtime.execution.fused_layers else EAGER_PASSES.get(what, 1.0)


def layer_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """Operators of one decoder layer, in execution order."""
    return (*_attention_ops(kind, shapes, runtime), *_mlp_ops(kind, shapes, runtime))


def _attention_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    e, tokens, tp, sp = shapes.element_bytes, shapes.tokens, shapes.tp, shapes.sp
    stream = e * tokens * kind.hidden
    heads, kv_heads = kind.heads / tp, kind.kv_heads / tp
    one = np.ones_like(tokens)
    qkv = (heads + 2 * kv_heads) * kind.head_dim
    entering, leaving = _tensor_parallel_collectives(shapes, stream)
    return (
        Op(name="input", kept_bytes=stream / sp),
        _norm("attention_norm", kind.norm, stream / sp, runtime, e),
        Op(
            name="qkv",
            gemms=(Gemm(m=tokens, n=qkv, k=kind.hidden * one, count=one),),
            kept_bytes=e * tokens * qkv,
            forward=entering[0],
            backward=entering[1],
        ),
        Op(
            name="rotary",
            traffic_bytes=2
            * e
            * tokens
            * (heads + kv_heads)
            * kind.head_dim
            * (_passes("rotary", runtime) if kind.rotary else 0),
        ),
        _attention_core(kind, shapes, heads, kv_heads),
        Op(name="attention_output", kept_bytes=e * tokens * heads * kind.head_dim),
        Op(
            name="projection",
            gemms=(Gemm(m=tokens, n=kind.hidden * one, k=heads * kind.head_dim, count=one),),
            forward=leaving[0],
            backward=leaving[1],
        ),
        _residual("attention_residual", kind, stream / sp, e, keeps_output=True),
    )


def _mlp_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    e, tokens, tp, sp = shapes.element_bytes, shapes.tokens, shapes.tp, shapes.sp
    stream = e * tokens * kind.hidden
    one = np.ones_like(tokens)
    experts = max(kind.experts, 1)
    copies = kind.experts_per_token if kind.experts else 1
    rows, ffn = tokens * copies / experts, kind.ffn / tp
    wide = e * tokens * copies * ffn
    entering, leaving = _tensor_parallel_collectives(shapes, stream)
    ops = [_norm("mlp_norm", kind.norm, stream / sp, runtime, e)]
    if kind.experts:
        ops.append(
            Op(
                name="router",
                gemms=(Gemm(m=tokens, n=experts * one, k=kind.hidden * one, count=one),),
                traffic_bytes=4 * copies * stream,
                kept_bytes=copies * stream + 4 * tokens * experts,
            )
        )
    up = 2 if kind.gated_mlp else 1
    ops += [
        Op(
            name="up",
            gemms=(Gemm(m=rows, n=up * ffn, k=kind.hidden * one, count=experts * one),),
            kept_bytes=up * wide,
            forward=entering[0],
            backward=entering[1],
        ),
        Op(
            name="activation",
            traffic_bytes=(up + 1) * wide * (_passes("gated", runtime) if kind.gated_mlp else 1),
            kept_bytes=wide * (runtime.activations.gated_mlp_copies - 2 if kind.gated_mlp else 1),
        ),
        Op(
            name="down",
            gemms=(Gemm(m=rows, n=kind.hidden * one, k=ffn, count=experts * one),),
            kept_bytes=copies * stream if kind.experts else 0.0,
            forward=leaving[0],
            backward=leaving[1],
        ),
        _residual("mlp_residual", kind, stream / sp, e, keeps_output=False),
    ]
    return tuple(ops)


def _attention_core(kind: LayerKind, shapes: Shapes, heads: FloatArray, kv_heads: FloatArray) -> Op:
    """Fused: keeps the log-sum-exp. Unfused: keeps softmax and its dropped-out copy, and the mask (5 a s^2 b bytes).

    A rank's share of the work is that of its seq tokens against all seq * cp keys, in every kind of context parallelism.
    """
    e, seq, tokens = shapes.element_bytes, shapes.seq, shapes.tokens
    keys = seq * shapes.cp
    scores = shapes.micro_batch * heads * seq * keys
    cp, cp_kind = np.broadcast_to(shapes.cp, seq.shape), np.broadcast_to(shapes.cp_kind, seq.shape)
    # ulysses gives each rank whole key-value heads; with fewer heads than ranks they are copied
    copied = np.where(cp_kind == ULYSSES, np.maximum(kv_heads, cp), kv_heads)
    queries, own, exchanged = (e * tokens * kind.head_dim * n for n in (heads, 2 * kv_heads, 2 * copied))
    extra = kept_bytes(cp_kind, cp, queries, own, exchanged)
    pairs = shapes.micro_batch * heads
    unfused = ~shapes.flash
    flop = shapes.micro_batch * flash_attention_flop(seq, keys, heads, kind.head_dim)
    products = tuple(
        Gemm(m=seq, n=n, k=k, count=np.where(unfused, pairs, 0.0))
        for n, k in ((keys, kind.head_dim * np.ones_like(seq)), (kind.head_dim * np.ones_like(seq), keys))
    )
    dropout = 1 if kind.dropout else 0
    return Op(
        name="attention",
        gemms=() if shapes.flash.all() else products,
        flash_flop=np.where(shapes.flash, flop, 0.0),
        attention=AttentionShape(pairs=pairs, seq=seq, keys=keys, head_dim=float(kind.head_dim)),
        traffic_bytes=np.where(unfused, scores * (2 * e + dropout * (2 * e + 1)), 0.0),
        kept_bytes=np.where(unfused, scores * (e + dropout * (e + 1)), 4 * tokens * heads + extra),
        context=(queries, exchanged),
    )


def _norm(name: str, norm: str, stream: FloatArray, runtime: Runtime, element_bytes: int) -> Op:
    return Op(
        name=name,
        traffic_bytes=2 * stream * _passes(norm, runtime),
        kept_bytes=stream * (1 + runtime.activations.norm_bytes / element_bytes),
    )


def _residual(name: str, kind: LayerKind, stream: FloatArray, element_bytes: int, *, keeps_output: bool) -> Op:
    """Residual add, with the dropout mask (1 byte per element) where the era used it."""
    mask = stream / element_bytes if kind.dropout else np.zeros_like(stream)
    return Op(name=name, traffic_bytes=3 * stream + mask, kept_bytes=mask + (stream if keeps_output else 0.0))


CollectivePair = tuple[tuple[tuple[Collective, FloatArray], ...], tuple[tuple[Collective, FloatArray], ...]]


def _tensor_parallel_collectives(shapes: Shapes, stream: FloatArray) -> tuple[CollectivePair, CollectivePair]:
    """((entering forward, backward), (leaving forward, backward)) of a block split over tp.

    Without sequence parallelism an all-reduce of the stream leaves each block forward and enters it backward; with it the same
    bytes go as all-gather in and reduce-scatter out, and the reverse backward (arXiv 2205.05198, section 4.2.2).
    """
    with_sp = np.where(shapes.sp > 1, stream, 0.0)
    without = np.where((shapes.sp <= 1) & (shapes.tp > 1), stream, 0.0)
    entering: CollectivePair = ((("all_gather", with_sp),), (("reduce_scatter", with_sp), ("all_reduce", without)))
    leaving: CollectivePair = ((("reduce_scatter", with_sp), ("all_reduce", without)), (("all_gather", with_sp),))
    return entering, leaving


def embedding_ops(hidden: int, dropout: bool, shapes: Shapes) -> tuple[Op, ...]:
    """Look-up (an all-reduce joins the vocabulary parts) and embedding dropout."""
    stream = shapes.element_bytes * shapes.tokens * hidden
    leaving = _tensor_parallel_collectives(shapes, stream)[1]
    mask = stream / shapes.element_bytes / shapes.sp if dropout else np.zeros_like(stream)
    return (
        Op(
            name="embedding",
            traffic_bytes=2 * stream + mask,
            kept_bytes=mask + 8 * shapes.tokens,
            forward=leaving[0],
            backward=leaving[1],
        ),
    )


def head_ops(hidden: int, norm: str, padded_vocab: FloatArray, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """Final norm, language-model head and loss on a vocabulary split over tp. Logits are transient: see `logits_bytes`."""
    tokens = shapes.tokens
    stream = shapes.element_bytes * tokens * hidden
    columns = padded_vocab / shapes.tp
    entering = _tensor_parallel_collectives(shapes, stream)[0]
    return (
        Op(name="input", kept_bytes=stream / shapes.sp),
        _norm("final_norm", norm, stream / shapes.sp, runtime, shapes.element_bytes),
        Op(
            name="head",
            gemms=(Gemm(m=tokens, n=columns, k=hidden * np.ones_like(tokens), count=np.ones_like(tokens)),),
            forward=entering[0],
            backward=entering[1],
        ),
        Op(name="loss", traffic_bytes=runtime.activations.logit_bytes * tokens * columns),
    )


def logits_bytes(padded_vocab: FloatArray, shapes: Shapes, runtime: Runtime) -> FloatArray:
    """Bytes of logits, softmax and their gradient alive at the peak of the loss, shape (K,)."""
    return runtime.activations.logit_bytes * shapes.tokens * padded_vocab / shapes.tp
