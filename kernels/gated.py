"""Gated linear units: y = act(gate) · up, forward and backward, on a pair of tensors or on the halves of one.

    act: "silu"       x · σ(x)                                                        (SwiGLU)
         "gelu_tanh"  x · σ(2u), u = √(2/π) · (x + 0.044715 x³), which is ½ x (1 + tanh u)   (GeGLU, as in GPT-2)
         "gelu"       ½ x (1 + erf(x/√2))                                             (GeGLU, exact)
    backward: dgate = dy · up · act'(gate), dup = dy · act(gate); act is computed again, only gate and up are saved.

torch has no fused one: its eager form writes act(gate) to memory and keeps it for the backward. Arithmetic is fp32.

Sources: [1] Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202. [2] Hendrycks and Gimpel, Gaussian Error Linear
Units, arXiv 1606.08415. [3] Hsu et al., Liger Kernel, arXiv 2410.10989 (SwiGLU and GeGLU in Triton; prior art).

Shapes: M rows, F width of gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from shardplan.kernels.interpreter import as_output
from shardplan.kernels.launch import KERNEL_DTYPES, TRITON_TYPES, as_rows, on_device_of, uses_kernel
from shardplan.kernels.operators import operator
from shardplan.kernels.shipped import Shipped

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
BLOCK = 2_048
WARPS = 4


@triton.jit
def _activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """(act(x), act'(x)); what is not used is dropped by the compiler."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * tl.sigmoid(-x)
    elif ACTIVATION == "gelu_tanh":
        # ½ (1 + tanh u) = σ(2u); 1.5957691216 = 2 √(2/π)
        z = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        s = tl.sigmoid(z)
        value = x * s
        slope = s + value * tl.sigmoid(-z) * 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)
    else:
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * s
        slope = s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return value, slope


@triton.jit
def gated_forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of a row; a grid of one dim, as M and the blocks of a row may each pass 65,535."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(g, ACTIVATION)
    tl.store(y + row * width + column, as_output(value * u, y), mask=mask)


@triton.jit
def gated_backward_kernel(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    grad_gate: tl.tensor,
    grad_up: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    out_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of a row; a grid of one dim, as M and the blocks of a row may each pass 65,535."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activate(g, ACTIVATION)
    place = row * out_stride + column
    tl.store(grad_gate + place, as_output(dy * u * slope, grad_gate), mask=mask)
    tl.store(grad_up + place, as_output(dy * value, grad_up), mask=mask)


def _activation_reference(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up in plain torch, in fp32 (fp64 for fp64 inputs), rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_activation_reference(gate.to(wide), activation) * up.to(wide)).to(gate.dtype)


def gated_backward_reference(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of gate, of up) in plain torch, in fp32 (fp64 for fp64 inputs)."""
    x, u, dy = (each.to(torch.promote_types(gate.dtype, torch.float32)) for each in (gate, up, grad))
    if activation == "silu":
        s = x.sigmoid()
        slope = s + x * s * (-x).sigmoid()
    elif activation == "gelu_tanh":
        z = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        s = z.sigmoid()
        slope = s + x * s * (-z).sigmoid() * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
    else:
        slope = 0.5 * (1 + (x * 0.7071067811865476).erf()) + x * 0.3989422804014327 * (-0.5 * x * x).exp()
    return (dy * u * slope).to(gate.dtype), (dy * _activation_reference(x, activation)).to(gate.dtype)


def _flat(*tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """The tensors over (M, F), as one row where all are contiguous, which leaves no ragged ends; M and F."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors], 1, tensors[0].numel()
    rows = [as_rows(tensor) for tensor in tensors]
    return rows, rows[0].shape[0], rows[0].shape[1]


def _run_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not uses_kernel(gate, up):
        return gated_reference(gate, up, activation).contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        (gate_rows, up_rows), count, width = _flat(gate, up)
        strides = (gate_rows.stride(0), up_rows.stride(0))
        with on_device_of(y):
            gated_forward_kernel[(triton.cdiv(width, BLOCK) * count,)](
                gate_rows,
                up_rows,
                y,
                width,
                *strides,
                ACTIVATION=activation,
                BLOCK=BLOCK,
                num_warps=WARPS,
                num_stages=1,
            )
    return y


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, out: tuple[Tensor, Tensor]) -> None:
    """Write the gradients of gate and up into `out`, both contiguous or both halves of one tensor."""
    if not uses_kernel(grad, gate, up):
        for place, value in zip(out, gated_backward_reference(grad, gate, up, activation), strict=True):
            place.copy_(value)
    elif grad.numel():
        (dy, gate_rows, up_rows, *out_rows), count, width = _flat(grad, gate, up, *out)
        strides = (dy.stride(0), gate_rows.stride(0), up_rows.stride(0), out_rows[0].stride(0))
        with on_device_of(grad):
            gated_backward_kernel[(triton.cdiv(width, BLOCK) * count,)](
                dy,
                gate_rows,
                up_rows,
                *out_rows,
                width,
                *strides,
                ACTIVATION=activation,
                BLOCK=BLOCK,
                num_warps=WARPS,
                num_stages=1,
            )


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _run_forward(gate, up, activation)


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _run_backward(grad, gate, up, activation, (grad_gate, grad_up))
    return grad_gate, grad_up


def _gated_halves(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _run_forward(gate, up, activation)


def _gated_halves_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate, up = x.chunk(2, dim=-1)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    _run_backward(grad, gate, up, activation, (grad_gate, grad_up))
    return out


def _fake_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _fake_gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return out, torch.empty_like(out)


def _fake_gated_halves(x: Tensor, activation: str) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _fake_gated_halves_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_GATED_BACKWARD(grad, *ctx.saved_tensors, ctx.activation), None


def _differentiate_halves(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _GATED_HALVES_BACKWARD(grad, *ctx.saved_tensors, ctx.activation), None


_GATED_BACKWARD = operator(_gated_backward, _fake_gated_backward)
_GATED = operator(_gated, _fake_gated, _differentiate, _save)
_GATED_HALVES_BACKWARD = operator(_gated_halves_backward, _fake_gated_halves_backward)
_GATED_HALVES = operator(_gated_halves, _fake_gated_halves, _differentiate_halves, _save)


def gated(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(gate) · up, elementwise, contiguous, in the inputs' dtype; gate and up (..., F) of one shape and dtype.

    Any strides; a last dim that is not contiguous costs a copy. `activation` is "silu", "gelu_tanh" or "gelu".
    Differentiable in both. ValueError on an unknown activation or inputs that are not alike. Sources [1] to [3] above.
    """
    _check_activation(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() == 0 or not gate.is_floating_point():
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}; make them alike and floating-point, (..., F)"
        )
    return _GATED(gate, up, activation)


def gated_halves(x: Tensor, *, activation: str = "silu") -> Tensor:
    """act(x[..., :F]) · x[..., F:] of `x` (..., 2F), as one matrix product for gate and up leaves it; its gradient is one tensor.

    ValueError on an unknown activation, an odd last dim or numbers that are not floating-point.
    """
    _check_activation(activation)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; give (..., 2F), gate before up")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; make it floating-point")
    return _GATED_HALVES(x, activation)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")


def shipped() -> list[Shipped]:
    """Forward and backward of every activation in every dtype."""
    forward = ("gate", "up", "y"), ("width", "gate_stride", "up_stride")
    backward = (
        ("grad", "gate", "up", "grad_gate", "grad_up"),
        ("width", "grad_stride", "gate_stride", "up_stride", "out_stride"),
    )
    kernels = (("forward", gated_forward_kernel, forward), ("backward", gated_backward_kernel, backward))
    return [
        Shipped(
            name=f"gated_{direction} {activation} {TRITON_TYPES[dtype]}",
            kernel=kernel,
            signature=dict.fromkeys(pointers, f"*{TRITON_TYPES[dtype]}") | dict.fromkeys(integers, "i32"),
            constants={"ACTIVATION": activation, "BLOCK": BLOCK},
            warps=WARPS,
            stages=1,
        )
        for dtype in KERNEL_DTYPES
        for activation in ACTIVATIONS
        for direction, kernel, (pointers, integers) in kernels
    ]
