"""LoRA and QLoRA: low-rank adapters beside frozen matrices, whose base may lie in 4 bits.

LoRA (arXiv 2106.09685): a frozen matrix of shape (in, out) gets r (in + out) trainable parameters; nothing else has gradients or
optimizer states. The backward takes the gradient of each product's input but not of its weight, which leaves 4 FLOP per frozen
parameter and token. QLoRA (arXiv 2305.14314): the matrices of layers lie in NF4, 4 bits and 0.127 of constants after double
quantisation, and are dequantised before each product; embedding, head and norms stay in 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import Adapters, Job
from shardplan.costmodel.memory import CODE_BYTES
from shardplan.costmodel.model import LayerKind, Model, matrix_parameters
from shardplan.costmodel.op import Gemm, Op, Shapes
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.runtime_tuning import Tuning

FloatArray = NDArray[np.float64]

ADDED_TRAFFIC = 3.0
"""Reads and writes of the output of an adapted product to add what its adapter makes (2 in, 1 out)."""


def matrices(kind: LayerKind) -> dict[str, tuple[tuple[int, int, bool], ...]]:
    """(in, out, split by columns) of the products of a dense layer by the operator they belong to."""
    query, key = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    up = 2 if kind.gated_mlp else 1
    return {
        "q": ((kind.hidden, query, True),),
        "k": ((kind.hidden, key, True),),
        "v": ((kind.hidden, key, True),),
        "o": ((query, kind.hidden, False),),
        "up": ((kind.hidden, kind.ffn, True),) * up,
        "down": ((kind.ffn, kind.hidden, False),),
    }


def adapted(kind: LayerKind, adapters: Adapters) -> list[tuple[int, int, bool]]:
    """The products that get an adapter."""
    of = matrices(kind)
    return [one for name in adapters.products for one in of[name]]


def adapter_parameters(kind: LayerKind, adapters: Adapters, tp: FloatArray) -> FloatArray:
    """Trainable parameters of one layer per tensor-parallel rank, shape of `tp`: the side of a product that is split over tp is split,
    the other whole."""
    total = np.zeros_like(tp)
    for inputs, outputs, by_columns in adapted(kind, adapters):
        whole, divided = (inputs, outputs) if by_columns else (outputs, inputs)
        total = total + adapters.rank * (whole + divided / tp)
    return total


def trainable_parameters(model: Model, job: Job) -> float:
    """Of the adapters of the whole model; 0 where it is trained itself."""
    if job.adapters is None:
        return 0.0
    one = np.ones(1)
    return float(sum(count * adapter_parameters(kind, job.adapters, one)[0] for kind, count in model.layers))


PRODUCTS = {"qkv": ("q", "k", "v"), "projection": ("o",), "up": ("up",), "down": ("down",), "mlp_output": ("down",)}
"""Operator -> products of `matrices` that it is made of."""
ADAPTER_OPS = tuple(f"{name}_adapters" for name in PRODUCTS)


def with_adapters(
    ops: tuple[Op, ...], kind: LayerKind, shapes: Shapes, adapters: Adapters, tuning: Tuning, norm_bytes: float
) -> tuple[Op, ...]:
    """The operators of a layer with its matrices frozen, an entry for the adapters of each, and one for dequantising a 4-bit base.

    What goes into a product is kept for its weight gradient; where it is frozen only its adapter needs that (or, with dropout, has a
    copy of its own), or a 4-bit product that keeps it all the same. Other tensors serve the gradients of the inputs and stay: the
    inputs of norms (in fp32 where the runtime keeps them so, `norm_bytes`), queries, keys and values, gate and up.
    """
    everything = adapters.quantised and tuning.keeps_inputs
    kept = tuple(matrices(kind)) if everything else () if tuning.dropout != "none" else adapters.products
    found: list[Op] = []
    if adapters.quantised:
        moved = matrix_parameters(kind) / shapes.tp * (CODE_BYTES + tuning.scale_bytes + shapes.element_bytes)
        found.append(Op(name="dequantise", traffic_bytes=moved))
    for op in ops:
        bare = _without_input(op, kept, kind, shapes, norm_bytes)
        found.append(replace(bare, frozen=op.attention is None and bool(op.gemms)))
        products = [(name, one) for name in PRODUCTS.get(op.name, ()) for one in matrices(kind)[name]]
        chosen = [one for name, one in products if name in adapters.products]
        if chosen:
            found.append(_adapter_op(op.name, chosen, shapes, adapters.rank, tuning.dropout))
    return tuple(found)


def _without_input(op: Op, kept: tuple[str, ...], kind: LayerKind, shapes: Shapes, norm_bytes: float) -> Op:
    """The operator without what it keeps only as the input of a product that is not among those that `kept` theirs."""
    feeds: dict[str, tuple[str, ...]] = {
        "attention_norm": ("q", "k", "v"),
        "attention_output": ("o",),
        "mlp_norm": ("up",),
        "activation": ("down",),
    }
    if kind.norms == 1:
        feeds["attention_norm"] = ("q", "k", "v", "up")
    if op.name not in feeds or any(name in kept for name in feeds[op.name]):
        return op
    if op.name == "attention_output":  # fused attention needs its own output
        return replace(op, kept_bytes=np.where(shapes.flash, op.kept_bytes, 0.0))
    if op.name == "activation":
        wide = shapes.element_bytes * shapes.tokens * kind.ffn / shapes.tp
        return replace(op, kept_bytes=op.kept_bytes - wide)
    copy = norm_bytes / shapes.element_bytes
    return replace(op, kept_bytes=op.kept_bytes * (copy / (1.0 + copy)))


def frozen_head_ops(ops: tuple[Op, ...], shapes: Shapes, norm_bytes: float) -> tuple[Op, ...]:
    """Final norm, head and loss without weight gradients: the head's input is not kept."""
    copy = norm_bytes / shapes.element_bytes
    return tuple(
        replace(op, frozen=True, kept_bytes=op.kept_bytes * (copy / (1.0 + copy) if op.name == "final_norm" else 1.0))
        for op in ops
    )


def with_head(runtime: Runtime, job: Job) -> Runtime:
    """The runtime with what logits take where the head is frozen."""
    if job.adapters is None or runtime.tuning.logit_bytes is None:
        return runtime
    return replace(runtime, activations=replace(runtime.activations, logit_bytes=runtime.tuning.logit_bytes))


def _adapter_op(name: str, products: list[tuple[int, int, bool]], shapes: Shapes, rank: int, dropout: str) -> Op:
    """Both products of the adapters beside operator `name`, which share their input; what is between them is kept, and with dropout
    the input they have left and its mask."""
    tokens, one = shapes.tokens, np.ones_like(shapes.tokens)
    inner = rank * one
    gemms: list[Gemm] = []
    moved = kept = np.zeros_like(tokens)
    entering = one
    for inputs, outputs, by_columns in products:
        entering = inputs / (one if by_columns else shapes.tp)
        leaving = outputs / (shapes.tp if by_columns else one)
        gemms += [Gemm(m=tokens, n=inner, k=entering, count=one), Gemm(m=tokens, n=leaving, k=inner, count=one)]
        moved = moved + ADDED_TRAFFIC * shapes.element_bytes * tokens * leaving
        kept = kept + shapes.element_bytes * tokens * inner
    copies = {"none": 0, "shared": 1, "each": len(products)}[dropout]
    moved = moved + copies * (2 * shapes.element_bytes + 1) * tokens * entering
    kept = kept + copies * (shapes.element_bytes + 1) * tokens * entering
    return Op(name=f"{name}_adapters", gemms=tuple(gemms), traffic_bytes=moved, kept_bytes=kept)
