"""RMSNorm and LayerNorm over the last dim, forward and backward, optionally with the residual addition before them.

    s = x + r (or x)      RMSNorm: y = s · rstd · w,           rstd = 1 / sqrt(mean(s²) + eps)
                          LayerNorm: y = (s − mean) · rstd · w + b,   rstd = 1 / sqrt(var(s) + eps), biased variance
    g = dy · w, h = (s − mean) · rstd
    ds = rstd · (g − h · mean(g · h) − mean(g)) + ds';   dw = Σ_rows dy · h;   db = Σ_rows dy      (mean(g) for LayerNorm only)

Why it exists beside torch.nn.functional.rms_norm and layer_norm: the residual addition is read and written in the same
pass (torch: a pass of its own), and dw and db are summed in a fixed order, so that two runs give the same bits.

The forward holds whole rows in registers. In the backward a fixed number of programs walk over the rows, keep their part
of dw and db in registers and write it once; a second kernel adds the parts up in order. Rows wider than WIDEST_HELD are
read twice, the second time from cache, and their db is a sum of its own; rows wider than WIDEST go to the reference.

Sources: [1] Ba et al., Layer Normalization, arXiv 1607.06450. [2] Zhang and Sennrich, Root Mean Square Layer
Normalization, arXiv 1910.07467. [3] Hsu et al., Liger Kernel, arXiv 2410.10989 (fused norms in Triton; prior art).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardplan.kernels import norm_launch
from shardplan.kernels.launch import KERNEL_DTYPES, TRITON_TYPES, as_rows, uses_kernel
from shardplan.kernels.layer_tiles import SUM, WIDEST, WIDEST_HELD, backward_launch, forward_launch
from shardplan.kernels.norm_kernels import norm_backward_kernel, norm_forward_kernel, sum_parts_kernel
from shardplan.kernels.norm_reference import norm_backward_reference, norm_forward_reference
from shardplan.kernels.operators import operator
from shardplan.kernels.shipped import Shipped


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd); total is empty without a residual, mean for RMSNorm."""
    width = x.shape[-1]
    given = [tensor for tensor in (x, residual, weight, bias) if tensor is not None]
    if not uses_kernel(*given) or width > WIDEST:
        return norm_forward_reference(x, residual, weight, bias, eps, centered)
    x_rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y.new_empty(0) if residual is None else torch.empty_like(y)
    rstd = torch.empty(x_rows.shape[0], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else rstd.new_empty(0)
    if x.numel():
        norm_launch.forward(
            x_rows,
            None if residual is None else as_rows(residual),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            total,
            mean,
            rstd,
            eps,
            forward_launch(width, x.element_size()),
        )
    return y, total, mean, rstd


def _fake_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y.new_empty(0) if residual is None else torch.empty_like(y)
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.empty(x.numel() // x.shape[-1], dtype=wide, device=x.device)
    return y, total, torch.empty_like(rstd) if centered else rstd.new_empty(0), rstd


def _norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, value: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of value, of weight, of bias); the last is empty without a bias."""
    width = value.shape[-1]
    if not uses_kernel(grad_y, value, weight) or width > WIDEST:
        return norm_backward_reference(grad_y, grad_total, value, weight, mean, rstd, has_bias)
    dy_rows, value_rows = as_rows(grad_y), as_rows(value)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if not value.numel():
        return grad_value, torch.zeros_like(weight), torch.zeros_like(weight) if has_bias else weight.new_empty(0)
    grad_weight = weight.new_empty(width)
    held_bias = has_bias and width <= WIDEST_HELD  # in wider rows two sums a column do not fit the registers
    if has_bias and not held_bias:
        grad_bias = dy_rows.sum(0, dtype=torch.float32).to(weight.dtype)
    else:
        grad_bias = weight.new_empty(width if has_bias else 0)
    launch = backward_launch(width, value.element_size(), mean.numel() > 0)
    parts = norm_launch.parts_of(value_rows, 2 if held_bias else 1, launch)
    norm_launch.backward(
        dy_rows,
        None if grad_total is None else as_rows(grad_total),
        value_rows,
        weight.contiguous(),
        mean,
        rstd,
        grad_value,
        parts,
        launch,
    )
    norm_launch.sum_parts(parts, grad_weight, grad_bias if held_bias else None)
    return grad_value, grad_weight, grad_bias


def _fake_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, value: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = weight.new_empty(weight.shape)
    return (
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
        grad_weight,
        torch.empty_like(grad_weight) if has_bias else weight.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _eps, _centered = inputs
    _y, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    value, weight, mean, rstd = ctx.saved_tensors
    if grad_y is None:  # only the sum was used
        return grad_total, grad_total if ctx.has_residual else None, None, None, None, None
    grad_total = grad_total if ctx.has_residual else None
    dx, dw, db = _NORM_BACKWARD(grad_y, grad_total, value, weight, mean, rstd, ctx.has_bias)
    return dx, dx if ctx.has_residual else None, dw, db if ctx.has_bias else None, None, None


_NORM_BACKWARD = operator(_norm_backward, _fake_norm_backward)
_NORM = operator(_norm, _fake_norm, _differentiate, _save)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """RMSNorm of `x` (..., N) with `weight` (N,), in the dtype of `x` (fp32, fp16 or bf16), computed in fp32.

    Any strides; a last dim that is not contiguous costs a copy. Differentiable in x and weight. ValueError on shapes that
    do not agree. Sources [2], [3] above.
    """
    _check(x, None, weight, None)
    return _NORM(x, None, weight, None, eps, False)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual), x + residual) in one pass; both (..., N) and both differentiable."""
    _check(x, residual, weight, None)
    y, total, _, _ = _NORM(x, residual, weight, None, eps, False)
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """LayerNorm of `x` (..., N) with `weight` and `bias` (N,), in the dtype of `x`, computed in fp32.

    Any strides; a last dim that is not contiguous costs a copy. Differentiable in x, weight and bias. ValueError on shapes
    that do not agree. Sources [1], [3] above.
    """
    _check(x, None, weight, bias)
    return _NORM(x, None, weight, bias, eps, True)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(x + residual), x + residual) in one pass; both (..., N) and both differentiable."""
    _check(x, residual, weight, bias)
    y, total, _, _ = _NORM(x, residual, weight, bias, eps, True)
    return y, total


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; give a floating-point tensor (..., N), N > 0")
    given: object = weight
    if not isinstance(given, Tensor):
        raise ValueError(f"weight is {given!r}; give ({x.shape[-1]},), ones for none")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype} and weight {weight.dtype}; give both one dtype")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)} and x {x.dtype} {tuple(x.shape)}; make them alike"
        )


def shipped() -> list[Shipped]:
    """Every configuration of the three kernels, for widths 128 to 16,384; in bf16 also without a residual."""
    entries: list[Shipped] = []
    for dtype in KERNEL_DTYPES:
        for width in (128, 4096, 8192, 16_384):
            for centered in (False, True):
                entries += [_shipped_forward(dtype, width, centered), _shipped_backward(dtype, width, centered)]
                if dtype == torch.bfloat16:
                    entries.append(_shipped_forward(dtype, width, centered, residual=False))
                    entries.append(_shipped_backward(dtype, width, centered, residual=False))
    return [*entries, _shipped_sum()]


def _shipped_forward(dtype: torch.dtype, width: int, centered: bool, *, residual: bool = True) -> Shipped:
    launch = forward_launch(width, dtype.itemsize)
    name = TRITON_TYPES[dtype]
    pointers = dict.fromkeys(("x", "residual", "weight", "bias", "y", "total"), f"*{name}")
    integers = dict.fromkeys(("rows", "width", "x_stride", "residual_stride"), "i32")
    return Shipped(
        name=f"norm_forward {'layer' if centered else 'rms'} N{width} {name}{'' if residual else ' alone'}",
        kernel=norm_forward_kernel,
        signature=pointers | {"mean": "*fp32", "rstd": "*fp32"} | integers | {"eps": "fp32"},
        constants={"CENTERED": centered, "HAS_RESIDUAL": residual, "HAS_BIAS": centered}
        | {"ROWS": launch.rows, "BLOCK": launch.block, "STAGES": launch.stages},
        warps=launch.warps,
        stages=launch.stages,
    )


def _shipped_backward(dtype: torch.dtype, width: int, centered: bool, *, residual: bool = True) -> Shipped:
    launch = backward_launch(width, dtype.itemsize, centered)
    name = TRITON_TYPES[dtype]
    integers = dict.fromkeys(["rows", "width", "grad_y_stride", "grad_total_stride", "value_stride"], "i32")
    pointers = dict.fromkeys(["grad_y", "grad_total", "value", "weight", "grad_value"], f"*{name}")
    wide = width > WIDEST_HELD
    flags = {"CENTERED": centered, "HAS_TOTAL": residual, "HAS_BIAS": centered and not wide, "RELOAD": wide}
    return Shipped(
        name=f"norm_backward {'layer' if centered else 'rms'} N{width} {name}{'' if residual else ' alone'}",
        kernel=norm_backward_kernel,
        signature=pointers | dict.fromkeys(["mean", "rstd", "parts"], "*fp32") | integers,
        constants=flags | {"ROWS": launch.rows, "BLOCK": launch.block, "STAGES": launch.stages},
        warps=launch.warps,
        stages=launch.stages,
    )


def _shipped_sum() -> Shipped:
    return Shipped(
        name="norm_backward sum of parts",
        kernel=sum_parts_kernel,
        signature={
            "parts": "*fp32",
            "grad_weight": "*bf16",
            "grad_bias": "*bf16",
            "programs": "i32",
            "width": "i32",
        },
        constants={"ROWS": SUM.rows, "COLUMNS": SUM.columns},
        warps=SUM.warps,
        stages=1,
        undivided=frozenset({"programs"}),
    )
