"""Seconds and bytes of one layer, the embedding and the head for every unique shape: operators through kernel and collective times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.adapters import ADAPTER_OPS
from shardplan.costmodel.attention_time import (
    OWN_KERNEL,
    AttentionShape,
    fused_attention_s,
    takes_own_kernel,
    unfused_attention_s,
)
from shardplan.costmodel.collectives import Collective, collective_s
from shardplan.costmodel.context_parallel import RING, context_seconds, transient_bytes
from shardplan.costmodel.expert_parallel import exchange_s
from shardplan.costmodel.job import BYTES_OF, OUTSIDE_PRODUCTS
from shardplan.costmodel.kernels_time import gemm_s, memory_bound_s
from shardplan.costmodel.operators import Op, Shapes
from shardplan.costmodel.recompute import part_bits, parts_with
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Gpu
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

BACKWARD_TRAFFIC = 1.5
"""Backward over forward bytes of element-wise operators: two reads and a write against a read and a write."""
LAST_OPERATORS = ("down", "combine", "mlp_residual")
"""Of a layer: what follows the last tensor that its backward needs."""
TENSORS = ("input", "attention_output")
"""Entries that only stand for a kept tensor: nothing is launched for them."""
BACKWARD_LAUNCHES = 2.0
"""Backward over forward kernel launches."""


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Cost of one block (a layer, the embedding or the head) per rank and micro-batch; arrays of shape (K,)."""

    forward_s: FloatArray
    backward_s: FloatArray
    split_forward_s: FloatArray
    """`forward_s` with a third of the three products of each trained matrix in place of its own: their passes differ by how shapes fill
    the GPU, which is no reason for another schedule."""
    split_weight_s: FloatArray
    """That third: what a split backward puts off, the gradients of the weights."""
    selective_s: FloatArray
    """Forward seconds of the operators that `selective` recomputes."""
    full_s: FloatArray
    """Forward seconds that full recompute repeats."""
    tensor_forward_s: FloatArray
    """Tensor-parallel communication, before overlap."""
    tensor_backward_s: FloatArray
    tensor_selective_s: FloatArray
    """Part of `tensor_forward_s` that `selective` repeats."""
    tensor_full_s: FloatArray
    """Part of `tensor_forward_s` that full recompute repeats."""
    context_forward_exposed_s: FloatArray
    """Context-parallel communication that attention does not hide."""
    context_forward_hidden_s: FloatArray
    context_backward_exposed_s: FloatArray
    context_backward_hidden_s: FloatArray
    context_selective: FloatArray
    """1 where `selective` repeats the exchanges of attention."""
    context_transient_bytes: FloatArray
    """Of context parallelism while one attention runs backward."""
    expert_s: FloatArray
    """Exchanges of tokens with their experts in one pass, forward or backward, before overlap."""
    accumulate_s: FloatArray
    """Adding the gradients of one micro-batch, whole, to the accumulated ones."""
    host_forward_s: FloatArray
    """Host time to launch the forward; the backward takes BACKWARD_LAUNCHES times that."""
    reduce_host_s: FloatArray
    """Host time of one reduction of its gradients that goes with their size."""
    input_bytes: FloatArray
    """Kept even under full recompute."""
    kept_bytes: FloatArray
    """Kept with recompute none, the input included."""
    selective_bytes: FloatArray
    """Part of `kept_bytes` that `selective` drops."""
    selective_flop: FloatArray
    """Forward FLOP that `selective` repeats."""
    full_flop: FloatArray
    """Forward FLOP that full recompute repeats."""


def block_costs(
    blocks: Sequence[Sequence[Op]],
    shapes: Shapes,
    *,
    gpu: Gpu,
    precision: str,
    gradient_bytes: int,
    tiers: TierTable,
    runtime: Runtime,
) -> list[BlockCost]:
    """Cost of each block, given by its operators; `gradient_bytes` of one accumulated gradient element."""
    ops = [op for block in blocks for op in block]
    seconds = iter(_seconds_of_all(ops, shapes, gpu, precision, gradient_bytes, tiers, runtime))
    return [
        _block_cost([(op, next(seconds)) for op in block], shapes, gpu, precision, tiers, runtime) for block in blocks
    ]


@dataclass(kw_only=True)
class _OpSeconds:
    """Seconds of one operator, (K,)."""

    forward: FloatArray
    backward: FloatArray
    product: FloatArray
    """Mean of the three products of its trained matrices."""
    product_forward: FloatArray
    """The first of them, part of `forward`."""
    accumulate: FloatArray
    """Adding its weight gradient of one micro-batch to the accumulated one."""
    tensor_forward: list[FloatArray]
    """Of each of its tensor-parallel collectives."""
    tensor_backward: list[FloatArray]


def _block_cost(
    ops: Sequence[tuple[Op, _OpSeconds]],
    shapes: Shapes,
    gpu: Gpu,
    precision: str,
    tiers: TierTable,
    runtime: Runtime,
) -> BlockCost:
    zero = np.zeros_like(shapes.tokens)
    total = {name: zero.copy() for name in BlockCost.__dataclass_fields__}
    launches = runtime.execution.launches_per_operator + np.where(
        shapes.tp > 1, runtime.execution.tensor_parallel_launches, 0.0
    )
    exchanging = bool(np.any(shapes.cp > 1))
    dispatched = any(op.experts is not None for op, _ in ops)
    has_experts, can = any(op.name == "router" for op, _ in ops), runtime.abilities
    elsewhere = part_bits(can.recompute_parts_of_dense_layers if has_experts else can.recompute_parts_of_expert_layers)
    full_repeats = _by_split(shapes, partial(runtime.communication.full_repeats, dispatched=dispatched))
    for op, seconds in ops:
        selected = _selected(op.name, shapes, runtime, elsewhere)
        apart = (shapes.tp > 1) | (shapes.cp > 1)
        for name, value in _op_totals(op, seconds, selected, precision, runtime, apart=apart).items():
            total[name] += value
        if op.context is not None and exchanging:
            total.update(_context_columns(op.context, shapes, seconds.forward, seconds.backward, tiers, runtime))
            total["context_selective"] = zero + ((selected > 0) | runtime.communication.selective_repeats_context)
        for one in seconds.tensor_forward:
            total["tensor_forward_s"] += one
            total["tensor_full_s"] += one * full_repeats
            total["tensor_selective_s"] += one * _repeated_tensor(selected, shapes, runtime, dispatched=dispatched)
        for one in seconds.tensor_backward:
            total["tensor_backward_s"] += one
        if op.name not in TENSORS:
            total["host_forward_s"] += gpu.launch_s * (launches + op.launches)
        total["reduce_host_s"] += gpu.launch_s * runtime.execution.reduce_launches * (_weights(op) + op.table)
    if any(op.experts is not None for op, _ in ops):
        total["expert_s"] = exchange_s(tiers, [op for op, _ in ops], shapes, runtime)
    return BlockCost(**total)


def _seconds_of_all(
    ops: Sequence[Op],
    shapes: Shapes,
    gpu: Gpu,
    precision: str,
    gradient_bytes: int,
    tiers: TierTable,
    runtime: Runtime,
) -> list[_OpSeconds]:
    """Seconds of every operator: what is alike is timed together, since many small calls take longer than one large one.

    To add a weight gradient the new one is read, the accumulated one read and written; fused into the product, which then does not
    write the new one, only the accumulated one counts.
    """
    element, zero = BYTES_OF[precision], np.zeros_like(shapes.tokens)
    added = 2 * gradient_bytes + (-element if runtime.execution.fused_accumulation else element)
    traffic = [zero + op.traffic_bytes * runtime.execution.elementwise_traffic for op in ops]
    copied = [op.copied_bytes for op in ops]
    both = [[scale * a + b for a, b in zip(traffic, copied, strict=True)] for scale in (1.0, BACKWARD_TRAFFIC)]
    moved = [*both[0], *both[1], *(zero + added * _weights(op) for op in ops)]
    forward, backward, accumulate = memory_bound_s(gpu, np.reshape(moved, (3, len(ops), len(zero))))
    found = [
        _OpSeconds(
            forward=f,
            backward=b,
            product=zero,
            product_forward=zero,
            accumulate=a,
            tensor_forward=[],
            tensor_backward=[],
        )
        for f, b, a in zip(forward, backward, accumulate, strict=True)
    ]
    _add_products(found, ops, gpu, precision, runtime)
    for op, seconds, moves in zip(ops, found, traffic, strict=True):
        if op.attention is not None:
            other = OUTSIDE_PRODUCTS.get(precision, precision)
            core = _attention_seconds(op.attention, moves, shapes, gpu, other, runtime)
            seconds.forward, seconds.backward = core
    _add_collectives(found, ops, shapes, tiers)
    return found


def _weights(op: Op) -> FloatArray | float:
    """Parameters of an operator's products, for which a gradient is accumulated; those of attention multiply activations."""
    return 0.0 if op.attention is not None or op.frozen else sum((g.k * g.n * g.count for g in op.gemms), 0.0)


def _add_products(found: Sequence[_OpSeconds], ops: Sequence[Op], gpu: Gpu, precision: str, runtime: Runtime) -> None:
    """Add the matrix products: backward is the input-gradient and, unless frozen, the weight-gradient product."""
    other = OUTSIDE_PRODUCTS.get(precision, precision)
    for product in dict.fromkeys((precision, other)):
        some = [
            (seconds, g, 0.0 if op.frozen else 1.0)
            for op, seconds in zip(ops, found, strict=True)
            if op.attention is None and product == (other if op.name in SIXTEEN_BIT else precision)
            for g in op.gemms
        ]
        if not some:
            continue
        m, n, k, count = (np.stack([getattr(g, size) for _, g, _ in some]) for size in ("m", "n", "k", "count"))
        alone = np.array([g.separate for _, g, _ in some])[:, None]
        together = np.where(alone, 1.0, count)
        ways = gemm_s(
            gpu, product, BYTES_OF[precision], np.stack([m, m, k]), np.stack([n, k, n]), np.stack([k, n, m]), together
        )
        if alone.any():
            ways = ways * np.where(alone, count, 1.0)
        if gpu.device != "cpu":
            ways = ways / np.array([g.rate for _, g, _ in some])[:, None]
        if product == "fp8":  # both operands are cast forward, the gradient of the output backward
            cast = np.stack([k * (m + n), m * n])
            ways[:2] += memory_bound_s(gpu, runtime.execution.cast_bytes * count * cast)
        for (seconds, _, trained), forward, input_grad, weight_grad in zip(some, *ways, strict=True):
            seconds.forward = seconds.forward + forward
            seconds.backward = seconds.backward + input_grad + trained * weight_grad
            seconds.product = seconds.product + trained * (forward + input_grad + weight_grad) / 3.0
            seconds.product_forward = seconds.product_forward + trained * forward


def _add_collectives(found: Sequence[_OpSeconds], ops: Sequence[Op], shapes: Shapes, tiers: TierTable) -> None:
    """Add the tensor-parallel collectives of each phase."""
    every: list[tuple[list[FloatArray], Collective, FloatArray]] = [
        (seconds, kind, size)
        for op, one in zip(ops, found, strict=True)
        for seconds, collectives in ((one.tensor_forward, op.forward), (one.tensor_backward, op.backward))
        for kind, size in collectives
    ]
    kinds: list[Collective] = [kind for _, kind, _ in every]
    for kind in dict.fromkeys(kinds):
        some = [(seconds, size) for seconds, same, size in every if same == kind]
        sizes = np.stack([size for _, size in some])
        together = np.where(sizes > 0, collective_s(tiers, kind, sizes, shapes.tp, shapes.tp_stride), 0.0)
        for (seconds, _), one in zip(some, together, strict=True):
            seconds.append(one)


def _selected(name: str, shapes: Shapes, runtime: Runtime, elsewhere: int) -> FloatArray:
    """Share of operator `name` that `selective` runs again, (K,): by the parts asked for but those `elsewhere`, else by the runtime."""
    parts = np.broadcast_to(np.asarray(shapes.recompute_parts), shapes.tokens.shape)
    stops = runtime.activations.full_stops_early and name in LAST_OPERATORS
    with_core = name == "attention_output" and runtime.activations.core_output_again
    asked = (parts & (0 if stops else parts_with("attention" if with_core else name)) & ~elsewhere) > 0
    return np.where(parts > 0, asked, runtime.activations.selective.get(name, 0.0))


def _repeated_tensor(selected: FloatArray, shapes: Shapes, runtime: Runtime, *, dispatched: bool) -> FloatArray:
    """Share of an operator's forward tensor-parallel communication that `selective` repeats, (K,); `selected`: where parts are named."""
    usual = _by_split(shapes, partial(runtime.communication.selective_repeats, dispatched=dispatched))
    return np.where(np.asarray(shapes.recompute_parts) > 0, selected, usual)


def _by_split(shapes: Shapes, share: Callable[..., float]) -> FloatArray:
    """`share(split=…)` with and without sequence parallelism, (K,)."""
    return np.where(shapes.sp > 1, share(split=True), share(split=False))


def _context_columns(
    exchanged: tuple[FloatArray, FloatArray],
    shapes: Shapes,
    forward: FloatArray,
    backward: FloatArray,
    tiers: TierTable,
    runtime: Runtime,
) -> dict[str, FloatArray]:
    """Columns of context parallelism of one attention, whose passes hide behind `forward` and `backward` seconds."""
    cp = np.broadcast_to(np.asarray(shapes.cp, dtype=np.float64), shapes.tokens.shape)
    kinds = np.broadcast_to(np.asarray(shapes.cp_kind), shapes.tokens.shape)
    seconds = context_seconds(
        tiers,
        kinds=kinds,
        cp=cp,
        stride=np.broadcast_to(np.asarray(shapes.cp_stride, dtype=np.float64), cp.shape),
        query_bytes=exchanged[0],
        key_value_bytes=exchanged[1],
        forward_s=forward,
        backward_s=backward,
        overlap=runtime.communication.context_overlap,
    )
    return {**seconds, "context_transient_bytes": transient_bytes(kinds, cp, exchanged[1])}


def _op_totals(
    op: Op, seconds: _OpSeconds, selected: FloatArray, precision: str, runtime: Runtime, *, apart: BoolArray
) -> dict[str, FloatArray | float]:
    kept = op.kept_bytes * (KEPT_IN_FP8.get(op.name, 1.0) if precision == "fp8" else 1.0)
    flop = sum((g.flop for g in op.gemms), 2.0 * op.flash_flop)
    how = runtime.activations
    stops = how.full_stops_early & (~np.asarray(apart) | how.full_stops_early_apart)
    repeated = np.where(stops & (op.name in LAST_OPERATORS), 0.0, 1.0)
    return {
        "forward_s": seconds.forward,
        "backward_s": seconds.backward,
        "split_forward_s": seconds.forward - seconds.product_forward + seconds.product,
        "split_weight_s": seconds.product,
        "selective_s": seconds.forward * selected,
        "full_s": seconds.forward * repeated,
        "accumulate_s": seconds.accumulate,
        "input_bytes": op.kept_bytes if op.name == "input" else 0.0,
        "kept_bytes": kept,
        "selective_bytes": kept * selected,
        "selective_flop": flop * selected,
        "full_flop": flop * repeated,
    }


SIXTEEN_BIT = ("head", "router", *ADAPTER_OPS)
"""Products that stay out of fp8 (Transformer Engine and torchao recipes; adapters are plain 16-bit layers)."""
KEPT_IN_FP8 = {"attention_norm": 0.75, "mlp_norm": 0.75, "dispatch": 0.5, "activation": 0.5}
"""What products read is kept in 8 bits: the output of a norm (its input stays in 16), of the activation, dispatched tokens."""


def _attention_seconds(
    shape: AttentionShape, softmax_traffic: FloatArray, shapes: Shapes, gpu: Gpu, precision: str, runtime: Runtime
) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds of the attention core, fused where `shapes.flash`."""
    kernels = runtime.execution.attention_kernels
    others = [kernel for kernel in kernels if kernel != OWN_KERNEL]
    owned = kernels if takes_own_kernel(precision, shape.head_dim) else others
    fused = fused_attention_s(gpu, precision, gpu.attention_curve(owned), shape)
    if shapes.library is not None and owned != others and shapes.library.any():
        held = fused_attention_s(gpu, precision, gpu.attention_curve(others), shape)
        fused = tuple(np.where(shapes.library, other, own) for own, other in zip(fused, held, strict=True))
    ring = (np.asarray(shapes.cp) > 1) & (np.asarray(shapes.cp_kind) == RING)
    rate = runtime.execution.attention_rate * np.where(ring, runtime.execution.ring_attention_rate, 1.0)
    if shapes.flash.all():
        return fused[0] / rate, fused[1] / rate
    passes = runtime.execution.softmax_passes
    unfused = unfused_attention_s(gpu, precision, shapes.element_bytes, shape, softmax_traffic, passes)
    return np.where(shapes.flash, fused[0], unfused[0]) / rate, np.where(shapes.flash, fused[1], unfused[1]) / rate
