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

from shardplan.costmodel.job import LORA_TARGETS, Adapters, Job
from shardplan.costmodel.memory import NF4_BYTES
from shardplan.costmodel.model import LayerKind, Model, matrix_parameters
from shardplan.costmodel.op import Gemm, Op, Shapes

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
    return [one for name in LORA_TARGETS[adapters.targets] for one in of[name]]


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


def with_adapters(ops: tuple[Op, ...], kind: LayerKind, shapes: Shapes, adapters: Adapters) -> tuple[Op, ...]:
    """The operators of a layer with its matrices frozen, an entry for all adapters, and one for dequantising a 4-bit base.

    An adapter needs the input of its product, which stays kept; that of a product without one is not kept where nothing else needs it.
    """
    frozen = [replace(op, frozen=op.attention is None and bool(op.gemms)) for op in ops]
    if "down" not in LORA_TARGETS[adapters.targets]:
        wide = shapes.element_bytes * shapes.tokens * kind.ffn / shapes.tp
        frozen = [replace(op, kept_bytes=op.kept_bytes - wide) if op.name == "activation" else op for op in frozen]
    extra = [_adapter_op(kind, shapes, adapters)]
    if adapters.quantised:
        moved = matrix_parameters(kind) / shapes.tp * (NF4_BYTES + shapes.element_bytes)
        extra.insert(0, Op(name="dequantise", traffic_bytes=moved))
    return (frozen[0], *extra, *frozen[1:])


def _adapter_op(kind: LayerKind, shapes: Shapes, adapters: Adapters) -> Op:
    """Both products of every adapter of a layer; what is between them is kept."""
    tokens, rank = shapes.tokens, adapters.rank * np.ones_like(shapes.tokens)
    gemms: list[Gemm] = []
    moved = kept = np.zeros_like(tokens)
    for inputs, outputs, by_columns in adapted(kind, adapters):
        entering = inputs / (1.0 if by_columns else shapes.tp) * np.ones_like(tokens)
        leaving = outputs / (shapes.tp if by_columns else 1.0) * np.ones_like(tokens)
        one = np.ones_like(tokens)
        gemms += [Gemm(m=tokens, n=rank, k=entering, count=one), Gemm(m=tokens, n=leaving, k=rank, count=one)]
        moved = moved + ADDED_TRAFFIC * shapes.element_bytes * tokens * leaving
        kept = kept + shapes.element_bytes * tokens * rank
    return Op(name="adapters", gemms=tuple(gemms), traffic_bytes=moved, kept_bytes=kept)
