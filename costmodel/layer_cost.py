"""Seconds and bytes of one layer, the embedding and the head for every unique shape: operators through kernel and collective times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.attention_time import AttentionShape, fused_attention_s, unfused_attention_s
from shardplan.costmodel.collectives import collective_s
from shardplan.costmodel.context_parallel import RING, context_seconds, transient_bytes
from shardplan.costmodel.job import BYTES_OF, OUTSIDE_PRODUCTS
from shardplan.costmodel.kernels_time import gemm_s, memory_bound_s
from shardplan.costmodel.operators import Op, Shapes
from shardplan.costmodel.recompute import parts_with
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Gpu
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]

BACKWARD_TRAFFIC = 1.5
"""Backward over forward bytes of element-wise operators: two reads and a write against a read and a write."""
LAST_OPERATORS = ("down", "mlp_residual")
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
    selective_s: FloatArray
    """Forward seconds of the operators that `selective` recomputes."""
    full_s: FloatArray
    """Forward seconds that full recompute repeats."""
    tensor_forward_s: FloatArray
    """Tensor-parallel communication, before overlap."""
    tensor_backward_s: FloatArray
    tensor_selective_s: FloatArray
    """Part of `tensor_forward_s` that `selective` repeats."""
    context_forward_exposed_s: FloatArray
    """Context-parallel communication that attention does not hide."""
    context_forward_hidden_s: FloatArray
    context_backward_exposed_s: FloatArray
    context_backward_hidden_s: FloatArray
    context_selective: FloatArray
    """1 where `selective` repeats the exchanges of attention."""
    context_transient_bytes: FloatArray
    """Of context parallelism while one attention runs backward."""
    accumulate_s: FloatArray
    """Adding the gradients of one micro-batch, whole, to the accumulated ones."""
    host_forward_s: FloatArray
    """Host time to launch the forward; the backward takes BACKWARD_LAUNCHES times that."""
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


def block_cost(
    ops: Sequence[Op],
    shapes: Shapes,
    *,
    gpu: Gpu,
    precision: str,
    gradient_bytes: int,
    tiers: TierTable,
    runtime: Runtime,
) -> BlockCost:
    """Cost of the operators of one block; `gradient_bytes` of one accumulated gradient element."""
    zero = np.zeros_like(shapes.tokens)
    total = {name: zero.copy() for name in BlockCost.__dataclass_fields__}
    for op in ops:
        forward, backward = _op_seconds(op, shapes, gpu, precision, runtime)
        selected = _selected(op.name, shapes, runtime)
        for name, value in _op_totals(op, forward, backward, selected, zero, precision, runtime).items():
            total[name] = total[name] + value
        if op.context is not None and np.any(shapes.cp > 1):
            total.update(_context_columns(op.context, shapes, forward, backward, tiers, runtime))
            total["context_selective"] = zero + (selected > 0)
        for phase, collectives in (("tensor_forward_s", op.forward), ("tensor_backward_s", op.backward)):
            for kind, size in collectives:
                seconds = collective_s(tiers, kind, size, shapes.tp, 1.0)
                total[phase] = total[phase] + np.where(size > 0, seconds, 0.0)
                if phase == "tensor_forward_s":
                    again = _repeated_tensor(selected, shapes, runtime)
                    total["tensor_selective_s"] = total["tensor_selective_s"] + np.where(size > 0, seconds * again, 0.0)
        total["accumulate_s"] = total["accumulate_s"] + _accumulate_s(op, gpu, precision, gradient_bytes, runtime)
        launches = runtime.execution.launches_per_operator + np.where(
            shapes.tp > 1, runtime.execution.tensor_parallel_launches, 0.0
        )
        if op.name not in TENSORS:
            total["host_forward_s"] = total["host_forward_s"] + gpu.launch_s * launches
    return BlockCost(**total)


def _selected(name: str, shapes: Shapes, runtime: Runtime) -> FloatArray:
    """Share of operator `name` that `selective` runs again, (K,): by the parts asked for, else by the runtime."""
    parts = np.broadcast_to(np.asarray(shapes.recompute_parts), shapes.tokens.shape)
    stops = runtime.activations.full_stops_early and name in LAST_OPERATORS
    asked = (parts & (0 if stops else parts_with(name))) > 0
    return np.where(parts > 0, asked, runtime.activations.selective.get(name, 0.0))


def _repeated_tensor(selected: FloatArray, shapes: Shapes, runtime: Runtime) -> FloatArray:
    """Share of an operator's forward tensor-parallel communication that `selective` repeats, (K,)."""
    communication = runtime.communication
    usual = np.where(shapes.sp > 1, communication.selective_repeats_tensor_sp, communication.selective_repeats_tensor)
    return np.where(np.asarray(shapes.recompute_parts) > 0, selected, usual)


def _accumulate_s(op: Op, gpu: Gpu, precision: str, gradient_bytes: int, runtime: Runtime) -> FloatArray | float:
    """Seconds to add the weight gradient of one micro-batch: the new one read, the accumulated one read and written; fused into
    the product, which then does not write the new one, only the accumulated one counts."""
    if op.attention is not None or not op.gemms:
        return 0.0
    element = BYTES_OF[precision]
    traffic = 2 * gradient_bytes + (-element if runtime.execution.fused_accumulation else element)
    return memory_bound_s(gpu, traffic * sum(g.k * g.n * g.count for g in op.gemms))


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
        tp=shapes.tp,
        query_bytes=exchanged[0],
        key_value_bytes=exchanged[1],
        forward_s=forward,
        backward_s=backward,
        overlap=runtime.communication.context_overlap,
    )
    return {**seconds, "context_transient_bytes": transient_bytes(kinds, cp, exchanged[1])}


def _op_totals(
    op: Op,
    forward: FloatArray,
    backward: FloatArray,
    selected: FloatArray,
    zero: FloatArray,
    precision: str,
    runtime: Runtime,
) -> dict[str, FloatArray]:
    kept = KEPT_IN_FP8.get(op.name, 1.0) if precision == "fp8" else 1.0
    products = sum((g.flop for g in op.gemms), zero)
    flop = products + 2.0 * op.flash_flop
    repeated = 0.0 if runtime.activations.full_stops_early and op.name in LAST_OPERATORS else 1.0
    return {
        "forward_s": forward,
        "backward_s": backward,
        "selective_s": forward * selected,
        "full_s": forward * repeated,
        "input_bytes": zero + (op.kept_bytes if op.name == "input" else 0.0),
        "kept_bytes": zero + op.kept_bytes * kept,
        "selective_bytes": zero + op.kept_bytes * kept * selected,
        "selective_flop": flop * selected,
        "full_flop": flop * repeated,
    }


SIXTEEN_BIT = ("head", "router")
"""Products that stay out of fp8 (Transformer Engine and torchao recipes)."""
KEPT_IN_FP8 = {"attention_norm": 0.75, "mlp_norm": 0.75, "activation": 0.5}
"""What products read is kept in 8 bits: the output of a norm (its input stays in 16), of the activation."""


def _op_seconds(op: Op, shapes: Shapes, gpu: Gpu, precision: str, runtime: Runtime) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds; backward of a product is the input-gradient and the weight-gradient product."""
    element = BYTES_OF[precision]
    other = OUTSIDE_PRODUCTS.get(precision, precision)
    traffic = op.traffic_bytes * runtime.execution.elementwise_traffic
    if op.attention is not None:
        return _attention_seconds(op.attention, np.asarray(traffic), shapes, gpu, other, runtime)
    product = other if op.name in SIXTEEN_BIT else precision
    forward = memory_bound_s(gpu, traffic)
    backward = memory_bound_s(gpu, BACKWARD_TRAFFIC * traffic)
    for g in op.gemms:
        forward = forward + gemm_s(gpu, product, element, g.m, g.n, g.k, g.count)
        backward = backward + gemm_s(gpu, product, element, g.m, g.k, g.n, g.count)
        backward = backward + gemm_s(gpu, product, element, g.k, g.n, g.m, g.count)
        if product == "fp8":
            forward = forward + memory_bound_s(gpu, runtime.execution.cast_bytes * g.count * g.k * (g.m + g.n))
            backward = backward + memory_bound_s(gpu, runtime.execution.cast_bytes * g.count * g.m * g.n)
    return forward, backward


def _attention_seconds(
    shape: AttentionShape, softmax_traffic: FloatArray, shapes: Shapes, gpu: Gpu, precision: str, runtime: Runtime
) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds of the attention core, fused where `shapes.flash`."""
    curve = gpu.attention_curve(runtime.execution.attention_kernels)
    fused = fused_attention_s(gpu, precision, curve, shape)
    ring = (np.asarray(shapes.cp) > 1) & (np.asarray(shapes.cp_kind) == RING)
    rate = runtime.execution.attention_rate * np.where(ring, runtime.execution.ring_attention_rate, 1.0)
    if shapes.flash.all():
        return fused[0] / rate, fused[1] / rate
    unfused = unfused_attention_s(gpu, precision, shapes.element_bytes, shape, softmax_traffic)
    return np.where(shapes.flash, fused[0], unfused[0]) / rate, np.where(shapes.flash, fused[1], unfused[1]) / rate
