"""RMSNorm and LayerNorm in plain torch, forward and backward: what the kernels of `norm.py` are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_forward_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd) for x (..., N): total = x + residual, empty without one; mean is empty for RMSNorm.

    Statistics are fp32 (fp64 for fp64 inputs), one for each row.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if residual is None else x + residual
    value = (x if residual is None else total).to(wide)
    mean = value.mean(-1, keepdim=True) if centered else value.new_zeros(())
    rstd = ((value - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (value - mean) * rstd * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return (
        y.to(x.dtype).contiguous(),
        total.contiguous(),
        mean.reshape(-1) if centered else value.new_empty(0),
        rstd.reshape(-1),
    )


def norm_backward_reference(
    grad_y: Tensor, grad_total: Tensor | None, value: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of value, of weight, of bias); `value` (..., N) is what was normalised, the last is empty without bias."""
    wide = torch.promote_types(value.dtype, torch.float32)
    rows = value.reshape(-1, value.shape[-1]).to(wide)
    dy = grad_y.reshape(rows.shape).to(wide)
    centered = mean.numel() > 0
    x_hat = (rows - mean[:, None] if centered else rows) * rstd[:, None]
    g = dy * weight.to(wide)
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if centered:
        dx = dx - g.mean(-1, keepdim=True)
    dx = (dx * rstd[:, None]).reshape(value.shape)
    if grad_total is not None:
        dx = dx + grad_total.to(wide)
    dbias = dy.sum(0).to(weight.dtype) if has_bias else weight.new_empty(0)
    return dx.to(value.dtype), (dy * x_hat).sum(0).to(weight.dtype), dbias
