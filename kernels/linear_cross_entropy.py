"""The output layer and its cross-entropy in one, in chunks of tokens, so that the logits of a batch never exist at once.

    for each chunk of hidden h (C, H):  x = h Wᵀ;  loss and dx in place of x (formulas in `cross_entropy.py`);
                                        dh = dx W;  dW += dxᵀ h

The products are torch's. Gradients are made in the forward, while the logits are there, and multiplied by the gradient of the
loss in the backward; dx is that of a sum, so that fp16 does not underflow before a loss scale reaches it. dW is added up in
fp32. Memory: C · V logits and, for weights of 16 bits, H · V fp32 sums, instead of T · V logits and as many gradients.

Sources: [1] Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2 (fused linear cross-entropy; prior art). [2] Wijmans et al.,
Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009.

Shapes: T tokens, C of them a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardplan.kernels.cross_entropy import check_targets
from shardplan.kernels.cross_entropy_launch import logit_gradient, reduce_losses, token_losses
from shardplan.kernels.launch import autocasts, in_given_precision

CHUNK_LOGITS = 2**27
"""Logits of a chunk unless its tokens are given: 256 MiB in bf16, large enough for the products to run at full rate."""


def chunk_of(vocabulary: int) -> int:
    """Tokens of a chunk, a multiple of 128."""
    return max(128, CHUNK_LOGITS // vocabulary // 128 * 128)


@torch.library.custom_op("shardplan::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    reduction: str,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, gradient of hidden, of weight), the gradients those of a sum; what is not needed is empty."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    sums = torch.zeros(weight.shape if need_weight else (0,), dtype=wide, device=weight.device)
    one = torch.ones((), dtype=wide, device=hidden.device)
    with in_given_precision(hidden):
        for first in range(0, hidden.shape[0], chunk):
            part = slice(first, first + chunk)
            h, t = hidden[part], targets[part]
            logits = h @ weight.t()
            losses[part], lse = token_losses(logits, t, ignore_index, smoothing, z_loss)
            if not (need_hidden or need_weight):
                continue
            logit_gradient(logits, t, lse, one, None, logits, 0, weight.shape[0], ignore_index, smoothing, z_loss)
            if need_hidden:
                torch.mm(logits, weight, out=grad_hidden[part])
            if need_weight and wide == weight.dtype:
                sums.addmm_(logits.t(), h)
            elif need_weight:
                sums += logits.t() @ h
    loss, scale = reduce_losses(losses, targets, ignore_index, reduction)
    # a sum over all tokens fits the range of bf16, not that of fp16
    grad_weight = sums.to(weight.dtype) if weight.dtype == torch.bfloat16 else sums
    return loss, scale, grad_hidden if need_hidden else hidden.new_empty(0), grad_weight


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    reduction: str,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.empty((), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    kept = torch.bfloat16 if weight.dtype == torch.bfloat16 else wide
    grad_weight = torch.empty(weight.shape if need_weight else (0,), dtype=kept, device=weight.device)
    return loss, torch.empty_like(loss), grad_hidden, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _hidden, weight, *_, ctx.need_hidden, ctx.need_weight = inputs
    _loss, *kept = output
    ctx.save_for_backward(*kept)
    ctx.weight_dtype = weight.dtype


@once_differentiable
def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    scale, grad_hidden, grad_weight = ctx.saved_tensors
    factor = grad * scale
    dh = grad_hidden * factor if ctx.need_hidden else None
    dw = (grad_weight * factor).to(ctx.weight_dtype) if ctx.need_weight else None
    return dh, dw, *[None] * 8


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, targets)`, fp32, a scalar, for `hidden` (…, H), `weight` (V, H) and `targets` (…).

    `chunk_tokens` bounds the logits that exist at once to chunk_tokens · V; by default CHUNK_LOGITS. Reduction "mean" or "sum".
    Differentiable in hidden and weight, once. Under autocast both are cast to its dtype, as a linear layer would. ValueError on shapes or
    dtypes that do not agree. Source [1] above.
    """
    if hidden.dim() < 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; give (..., H), a row a token")
    if autocasts(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    check_targets(hidden, hidden.shape[:-1], targets, label_smoothing)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}; give (V, {hidden.shape[-1]}) in the {hidden.dtype} of hidden"
        )
    if not weight.shape[0]:
        raise ValueError("weight has no rows; give (V, H) with V at least 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not possible here; use mean or sum, or cross_entropy for none")
    chunk = chunk_of(weight.shape[0]) if chunk_tokens is None else chunk_tokens
    if chunk < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}; give at least 1")
    how = (ignore_index, label_smoothing, z_loss, reduction, chunk)
    grown = torch.is_grad_enabled()
    needs = (grown and hidden.requires_grad, grown and weight.requires_grad)
    return _linear_cross_entropy(hidden.flatten(0, -2), weight, targets.reshape(-1), *how, *needs)[0]
