"""What an operator is: matrix shapes, FLOP, bytes moved and kept, collectives, as arrays over the K unique shapes it depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.attention_time import AttentionShape
from shardplan.costmodel.collectives import Collective
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
    cp_stride: Amount = 1.0
    """Ranks between neighbours of a group (`axis_order.py`)."""
    tp: FloatArray
    tp_stride: Amount = 1.0
    sp: FloatArray
    """tp with sequence parallelism, else 1: divides what is split along the sequence."""
    flash: NDArray[np.bool_]
    """Fused attention instead of separate matrix products and softmax."""
    library: NDArray[np.bool_] | None = None
    """Where only kernels of libraries may run; None: nowhere."""
    ep: Amount = 1.0
    expert_tp: Amount = 1.0
    """Ranks each expert is cut over, where tokens are dispatched (`expert_parallel.py`)."""
    ep_stride: Amount = 1.0
    expert_tp_stride: Amount = 1.0
    expert_load: Amount = 1.0
    """Tokens that the experts of the busiest rank get, relative to an even share."""
    recompute_parts: NDArray[np.int64] | int = 0
    """Sum of `recompute.PART_BITS`; 0 = what the runtime selects."""
    element_bytes: int
    """Of activations."""
    document: float | None = None
    """Tokens that attend to each other where several documents are packed into a sequence."""
    casts: bool = False
    """Operands of products are cast to 8 bits."""

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
    separate: bool = False
    """Each in a kernel of its own, not all in one."""
    rate: float = 1.0
    """Of a GPU's kernel, relative to the library's for one dense product of the same shapes."""

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
    frozen: bool = False
    """No gradient of the weights of its products is taken."""
    traffic_bytes: Amount = 0.0
    """Element-wise bytes read and written, forward, fully fused."""
    copied_bytes: Amount = 0.0
    """Bytes read and written only to order rows, by one kernel, as many backward."""
    kept_bytes: Amount = 0.0
    forward: tuple[tuple[Collective, FloatArray], ...] = ()
    """Tensor-parallel collectives of the forward pass: (kind, buffer bytes)."""
    backward: tuple[tuple[Collective, FloatArray], ...] = ()
    experts: tuple[FloatArray, float] | None = None
    """Tokens exchanged with experts in each pass: bytes a rank sends, and copies of each token among them."""
    launches: Amount = 0.0
    """Kernels launched beyond those of any operator."""
    table: Amount = 0.0
    """Parameters of a table in which rows are looked up and that no product multiplies."""
    context: tuple[FloatArray, FloatArray] | None = None
    """Of attention: bytes of queries, and of keys and values, that context-parallel ranks exchange."""


EAGER_PASSES = {"rmsnorm": 9.0, "rotary": 5.0, "gated": 5.0 / 3.0}
"""Bytes that eager PyTorch moves relative to one fused kernel, by counting reads and writes: RMSNorm casts to fp32, squares, averages,
scales, casts back and weighs (18 against 2 of a 16-bit tensor); rotary embedding casts, multiplies and casts back (10 against 2);
silu and product are two kernels (5 against 3)."""


def passes(what: str, runtime: Runtime) -> float:
    """Traffic of a layer's part relative to one fused kernel."""
    return 1.0 if runtime.execution.fused_layers else EAGER_PASSES.get(what, 1.0)


def norm_op(name: str, norm: str, stream: FloatArray, runtime: Runtime, element_bytes: int) -> Op:
    """A norm of a tensor of `stream` bytes; one such tensor is kept: what comes out, or before a residual add what goes in."""
    return Op(
        name=name,
        traffic_bytes=2 * stream * (1.0 if runtime.execution.fused_norms else passes(norm, runtime)),
        kept_bytes=stream * (1 + runtime.activations.norm_bytes / element_bytes),
    )


CollectivePair = tuple[tuple[tuple[Collective, FloatArray], ...], tuple[tuple[Collective, FloatArray], ...]]


def tensor_parallel_collectives(shapes: Shapes, stream: FloatArray) -> tuple[CollectivePair, CollectivePair]:
    """((entering forward, backward), (leaving forward, backward)) of a block split over tp.

    Without sequence parallelism an all-reduce of the stream leaves each block forward and enters it backward; with it the same
    bytes go as all-gather in and reduce-scatter out, and the reverse backward (arXiv 2205.05198, section 4.2.2).
    """
    with_sp = np.where(shapes.sp > 1, stream, 0.0)
    without = np.where((shapes.sp <= 1) & (shapes.tp > 1), stream, 0.0)
    entering: CollectivePair = ((("all_gather", with_sp),), (("reduce_scatter", with_sp), ("all_reduce", without)))
    leaving: CollectivePair = ((("reduce_scatter", with_sp), ("all_reduce", without)), (("all_gather", with_sp),))
    return entering, leaving
