"""A layer kind as a tuple of operators: matrix shapes, FLOP, bytes moved, bytes kept for the backward pass, collectives.

All numbers are per rank and micro-batch, as arrays over the K unique shapes they depend on. `kept_bytes` of an
operator is what disappears when it is recomputed. Two entries only stand for kept tensors: "input", the layer's own,
always kept; and "attention_output", between attention core and projection, which some runtimes keep while they
recompute the core. For a GPT layer in 16 bit this sums to s b h (10 + 24/t + 5 a s / (h t)) under tensor parallelism
and s b h (34 + 5 a s / h) / t with sequence parallelism (Korthikanti et al., arXiv 2205.05198, equations 1-4).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardplan.costmodel.attention_ops import attention_ops
from shardplan.costmodel.collectives import Collective
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.op import (
    Amount,
    FloatArray,
    Gemm,
    Op,
    Shapes,
    norm_op,
    passes,
    tensor_parallel_collectives,
)
from shardplan.costmodel.runtime import Runtime

__all__ = ["Gemm", "Op", "Shapes", "embedding_ops", "head_ops", "layer_ops", "logits_bytes"]


LOSS_REDUCTIONS = 3
"""Of a number per token in fp32, where logits are split over tp: largest logit, sum of exponentials, logit of the target (Megatron-LM
core/tensor_parallel/cross_entropy.py, PyTorch's loss_parallel)."""


def layer_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """Operators of one decoder layer, in execution order.

    Where attention and MLP stand side by side (GPT-NeoX, Phi) the stream between them is not kept; each still exchanges its own
    tensor-parallel buffers.
    """
    stream = shapes.element_bytes * shapes.tokens * kind.hidden / shapes.sp
    return (
        *(_prediction_ops(kind, shapes, runtime) if kind.mtp else ()),
        *attention_ops(kind, shapes, runtime),
        _residual("attention_residual", kind, stream, shapes.element_bytes, keeps_output=not kind.parallel),
        *_mlp_ops(kind, shapes, runtime),
    )


def _mlp_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """The MLP, or router and experts with the shared ones beside them, and the residual add.

    `down` is the last operator whose output no backward needs; where a norm follows, which keeps its input, it is `mlp_output`.
    """
    e, tokens, sp = shapes.element_bytes, shapes.tokens, shapes.sp
    stream = e * tokens * kind.hidden
    one = np.ones_like(tokens)
    entering, leaving = tensor_parallel_collectives(shapes, stream)
    ops = [norm_op("mlp_norm", kind.norm, stream / sp, runtime, e)] if kind.norms > 1 else []
    last: tuple[Op, ...] = ()
    if kind.experts:
        rows = kind.experts_per_token * tokens * shapes.expert_load
        copies = e * rows * kind.hidden
        ordered = runtime.expert_parallel.ordering_passes * copies * (1.0 + 1.0 / kind.experts_per_token)
        router, dispatch, combine = routing_ops(kind, runtime, tokens, ordered, copies)
        ops += [router, dispatch, *_shared_expert_ops(kind, shapes, runtime)]
        last = (combine,)
        up, activation, down = expert_ops(kind, shapes, runtime, rows, kind.ffn / shapes.tp, kind.experts * one)
    else:
        up, activation, down = feed_forward(kind, shapes, runtime, tokens, kind.ffn / shapes.tp)
    ops += [
        replace(up, forward=entering[0], backward=entering[1]),
        activation,
        replace(down, name="mlp_output" if kind.norms == 4 else "down", forward=leaving[0], backward=leaving[1]),
        *last,
    ]
    if kind.norms == 4:
        ops.append(norm_op("mlp_post_norm", kind.norm, stream / sp, runtime, e))
    ops.append(_residual("mlp_residual", kind, stream / sp, e, keeps_output=False))
    return tuple(ops)


def feed_forward(
    kind: LayerKind,
    shapes: Shapes,
    runtime: Runtime,
    rows: FloatArray,
    width: Amount,
    mlps: FloatArray | None = None,
) -> tuple[Op, Op, Op]:
    """The products and the activation between them of `mlps` MLPs of this width, one if None, on `rows` tokens together."""
    one = np.ones_like(rows)
    count = one if mlps is None else mlps
    wide = shapes.element_bytes * rows * width
    up = 2 if kind.gated_mlp else 1
    return (
        Op(
            name="up",
            gemms=(Gemm(m=rows / count, n=up * width * one, k=kind.hidden * one, count=count),),
            kept_bytes=up * wide,
        ),
        Op(
            name="activation",
            traffic_bytes=(up + 1) * wide * (passes("gated", runtime) if kind.gated_mlp else 1),
            kept_bytes=wide * (runtime.activations.gated_mlp_copies - 2 if kind.gated_mlp else 1),
        ),
        Op(name="down", gemms=(Gemm(m=rows / count, n=kind.hidden * one, k=width * one, count=count),)),
    )


def routing_ops(
    kind: LayerKind, runtime: Runtime, tokens: FloatArray, ordered_bytes: FloatArray, copies_bytes: FloatArray
) -> tuple[Op, Op, Op]:
    """(router of so many tokens, what makes and orders their copies for the experts, what joins those again): traffic of each of the
    last two, and the copies that are kept, in bytes."""
    one = np.ones_like(tokens)
    return (
        Op(
            name="router",
            gemms=(Gemm(m=tokens, n=kind.experts * one, k=kind.hidden * one, count=one),),
            kept_bytes=4 * tokens * kind.experts,
        ),
        Op(
            name="dispatch",
            copied_bytes=ordered_bytes,
            kept_bytes=copies_bytes,
            launches=runtime.expert_parallel.layer_launches,
        ),
        Op(name="combine", copied_bytes=ordered_bytes),
    )


def expert_ops(
    kind: LayerKind, shapes: Shapes, runtime: Runtime, rows: FloatArray, width: Amount, experts: FloatArray
) -> tuple[Op, Op, Op]:
    """The MLPs of a rank's own experts, of this width, on the `rows` copies of tokens that reach them (`[expert_parallel]`)."""
    how, copies = runtime.expert_parallel, shapes.element_bytes * rows * kind.hidden
    launches = (how.product_launches + (how.cast_launches if shapes.casts else 0.0)) * experts
    up, activation, down = feed_forward(kind, shapes, runtime, rows, width, experts)
    grouped = {"separate": how.separate_products, "rate": how.product_rate}
    products = [tuple(replace(gemm, **grouped) for gemm in op.gemms) for op in (up, down)]
    return (
        replace(up, gemms=products[0], launches=launches),
        replace(activation, traffic_bytes=activation.traffic_bytes * how.activation_traffic),
        replace(
            down,
            gemms=products[1],
            copied_bytes=how.bias_passes * copies if kind.mlp_bias else 0.0,
            kept_bytes=how.kept_outputs * copies,
            launches=launches,
        ),
    )


def _shared_expert_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> list[Op]:
    """The MLP that every token takes beside the routed ones (arXiv 2401.06066, section 3.2), on what the router already has.

    A gate (Qwen2-MoE) multiplies its output, which is then kept.
    """
    if not kind.shared_ffn:
        return []
    stream, one = shapes.element_bytes * shapes.tokens * kind.hidden, np.ones_like(shapes.tokens)
    ops = list(feed_forward(kind, shapes, runtime, shapes.tokens, kind.shared_ffn / shapes.tp))
    if kind.shared_gate:
        gate = Gemm(m=shapes.tokens, n=one, k=kind.hidden * one, count=one)
        ops.append(Op(name="shared_gate", gemms=(gate,), traffic_bytes=2 * stream, kept_bytes=stream))
    return ops


def _prediction_ops(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """What feeds a multi-token prediction module (arXiv 2412.19437, equation 21): look-up of the next token, both norms and their
    product. As in Megatron-Core the product is split over tp by its columns, which are gathered after it."""
    e, tokens, one = shapes.element_bytes, shapes.tokens, np.ones_like(shapes.tokens)
    stream = e * tokens * kind.hidden
    entering = tensor_parallel_collectives(shapes, 2 * stream)[0]
    gathered = np.where(shapes.tp > 1, stream, 0.0)
    return (
        Op(name="mtp_embedding", traffic_bytes=2 * stream),
        norm_op("mtp_norms", kind.norm, 2 * stream / shapes.sp, runtime, e),
        Op(
            name="mtp_projection",
            gemms=(Gemm(m=tokens, n=kind.hidden / shapes.tp, k=2 * kind.hidden * one, count=one),),
            traffic_bytes=4 * stream / shapes.sp,
            kept_bytes=2 * stream / shapes.sp,
            forward=(*entering[0], ("all_gather", gathered)),
            backward=entering[1],
        ),
    )


def _residual(name: str, kind: LayerKind, stream: FloatArray, element_bytes: int, *, keeps_output: bool) -> Op:
    """Residual add, with the dropout mask (1 byte per element) where the era used it."""
    mask = stream / element_bytes if kind.dropout else np.zeros_like(stream)
    return Op(name=name, traffic_bytes=3 * stream + mask, kept_bytes=mask + (stream if keeps_output else 0.0))


def embedding_ops(hidden: int, table: FloatArray | float, dropout: bool, shapes: Shapes) -> tuple[Op, ...]:
    """Look-up (an all-reduce joins the vocabulary parts) and embedding dropout; `table` is as in `Op`."""
    stream = shapes.element_bytes * shapes.tokens * hidden
    leaving = tensor_parallel_collectives(shapes, stream)[1]
    mask = stream / shapes.element_bytes / shapes.sp if dropout else np.zeros_like(stream)
    return (
        Op(
            name="embedding",
            table=table,
            traffic_bytes=2 * stream + mask,
            kept_bytes=mask + 8 * shapes.tokens,
            forward=leaving[0],
            backward=leaving[1],
        ),
    )


def head_ops(
    hidden: int, norm: str, padded_vocab: FloatArray, shapes: Shapes, runtime: Runtime, *, softcap: bool = False
) -> tuple[Op, ...]:
    """Final norm, language-model head and loss on a vocabulary split over tp. Logits are transient: see `logits_bytes`.

    `softcap` puts a scaled tanh between head and loss: three element-wise kernels, one where layers are fused.
    """
    tokens = shapes.tokens
    stream = shapes.element_bytes * tokens * hidden
    columns = padded_vocab / shapes.tp
    entering = tensor_parallel_collectives(shapes, stream)[0]
    reduction: tuple[Collective, FloatArray] = ("all_reduce", np.where(shapes.tp > 1, 4.0 * tokens, 0.0))
    capped = 2 * shapes.element_bytes * (1 if runtime.execution.fused_layers else 3) if softcap else 0
    return (
        Op(name="input", kept_bytes=stream / shapes.sp),
        norm_op("final_norm", norm, stream / shapes.sp, runtime, shapes.element_bytes),
        Op(
            name="head",
            gemms=(Gemm(m=tokens, n=columns, k=hidden * np.ones_like(tokens), count=np.ones_like(tokens)),),
            forward=entering[0],
            backward=entering[1],
        ),
        Op(
            name="loss",
            traffic_bytes=(runtime.activations.logit_bytes + capped) * tokens * columns,
            forward=(reduction,) * LOSS_REDUCTIONS,
        ),
    )


def logits_bytes(padded_vocab: FloatArray, shapes: Shapes, runtime: Runtime, *, softcap: bool = False) -> FloatArray:
    """Bytes of logits, softmax and their gradient alive at the peak of the loss, and of the tanh of `softcap`, shape (K,)."""
    per_logit = runtime.activations.logit_bytes + (shapes.element_bytes if softcap else 0)
    return per_logit * shapes.tokens * padded_vocab / shapes.tp
