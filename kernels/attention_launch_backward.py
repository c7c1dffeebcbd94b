"""Launches of the backward pass of attention. Shapes as in `attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from shardplan.kernels.attention_backward import attention_delta_kernel
from shardplan.kernels.attention_key_gradient import attention_key_gradient_kernel
from shardplan.kernels.attention_launch import (
    Sequences,
    constants,
    describable,
    flags,
    padded_dimension,
    pick,
    scalars,
    source,
    strides,
)
from shardplan.kernels.attention_query_gradient import attention_query_gradient_kernel
from shardplan.kernels.attention_reference import Shape
from shardplan.kernels.attention_tiles import Tiles

ROW_PADDING = 128
"""delta and LSE are padded to a multiple of this, the largest tile of queries."""
DELTA_ROWS = 64
"""Rows a program of the delta kernel."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What both gradient kernels read."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    delta: Tensor
    """(B, H, padded S_q) fp32: rowsum(dO ∘ O) - dLSE."""
    lse2: Tensor
    """(B, H, padded S_q) fp32: LSE in units of log2."""
    shape: Shape
    sequences: Sequences
    slopes: Tensor | None
    seed: Tensor | None
    tma: bool


def prepare(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
    sequences: Sequences,
    slopes: Tensor | None,
    seed: Tensor | None,
) -> Prepared:
    """delta and LSE in the units and padding of the gradient kernels; launches one kernel."""
    grad, out = (x if x.stride(3) == 1 else x.contiguous() for x in (grad, out))
    lse = lse if lse.stride(2) == 1 else lse.contiguous()
    rows = triton.cdiv(q.shape[1], ROW_PADDING) * ROW_PADDING
    if sequences.packed:
        rows += ROW_PADDING  # the last tile of the last sequence starts anywhere
    delta = torch.empty(q.shape[0], q.shape[2], rows, dtype=torch.float32, device=q.device)
    lse2 = torch.empty_like(delta)
    attention_delta_kernel[(rows // DELTA_ROWS, q.shape[2], q.shape[0])](
        out,
        grad,
        lse,
        grad_lse,
        delta,
        lse2,
        *strides(out),
        *strides(grad),
        lse.stride(0),
        lse.stride(1),
        delta.stride(0),
        delta.stride(1),
        *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
        q.shape[1],
        D=q.shape[3],
        BLOCK_D=padded_dimension(q.shape[3]),
        BLOCK_M=DELTA_ROWS,
        HAS_GRAD_LSE=grad_lse is not None,
    )
    return Prepared(
        q=q, k=k, v=v, grad=grad, delta=delta, lse2=lse2, shape=shape, sequences=sequences, slopes=slopes, seed=seed,
        tma=describable(q, k, v, grad),
    )  # fmt: skip


def key_gradient(given: Prepared, dk: Tensor, dv: Tensor, tile: Tiles | None = None) -> None:
    """Fill dK and dV."""
    q, k, tma = given.q, given.k, given.tma
    tile = tile or pick("key_gradient", q, tma)
    grid = (triton.cdiv(given.sequences.keys, tile.keys), k.shape[2], given.sequences.count)
    attention_key_gradient_kernel[grid](
        *_sources(given, tile),
        given.delta,
        given.lse2,
        dk,
        dv,
        given.sequences.cu_q,
        given.sequences.cu_k,
        given.slopes,
        given.seed,
        *_strides(given),
        *strides(dk),
        *strides(dv),
        *scalars(given.slopes, q, k, given.sequences, given.shape),
        **flags(given.shape, given.sequences, given.slopes),
        **constants(q, tile, tma=tma),
    )


def query_gradient(given: Prepared, dq: Tensor, tile: Tiles | None = None) -> None:
    """Fill dQ."""
    q, k, tma = given.q, given.k, given.tma
    tile = tile or pick("query_gradient", q, tma)
    grid = (triton.cdiv(given.sequences.queries, tile.queries), q.shape[2], given.sequences.count)
    attention_query_gradient_kernel[grid](
        *_sources(given, tile),
        given.delta,
        given.lse2,
        dq,
        given.sequences.cu_q,
        given.sequences.cu_k,
        given.slopes,
        given.seed,
        *_strides(given),
        *strides(dq),
        *scalars(given.slopes, q, k, given.sequences, given.shape),
        **flags(given.shape, given.sequences, given.slopes),
        **constants(q, tile, tma=tma),
    )


def _sources(given: Prepared, tile: Tiles) -> tuple[Any, ...]:
    block_d = padded_dimension(given.q.shape[3])
    return (
        source(given.q, tile.queries, block_d, given.tma),
        source(given.k, tile.keys, block_d, given.tma),
        source(given.v, tile.keys, block_d, given.tma),
        source(given.grad, tile.queries, block_d, given.tma),
    )


def _strides(given: Prepared) -> tuple[int, ...]:
    tensors = (given.q, given.k, given.v, given.grad)
    return (*(stride for x in tensors for stride in strides(x)), given.delta.stride(0), given.delta.stride(1))


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
    sequences: Sequences,
    slopes: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV), contiguous, in the dtypes of q, k and v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    nothing = q.numel() == 0 or k.numel() == 0 or sequences.count == 0
    if sequences.packed or nothing:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    if nothing:
        return dq, dk, dv
    given = prepare(grad, grad_lse, q, k, v, out, lse, shape, sequences, slopes, seed)
    key_gradient(given, dk, dv)
    query_gradient(given, dq)
    return dq, dk, dv
