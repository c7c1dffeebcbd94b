"""Cross-entropy over a large vocabulary, forward and backward, without a second copy of the logits in fp32.

    lse = log Σ_j exp(x_j)                         (online: running maximum and rescaled sum over blocks of the vocabulary)
    loss = lse − (1 − ε) x_t − ε/V Σ_j x_j + z lse²
    dx_j = g · (exp(x_j − lse) (1 + 2 z lse) − (1 − ε) [j = t] − ε/V)

ε is label smoothing, z the weight of the z-loss. Why it exists beside torch.nn.functional.cross_entropy: that one writes the
log-softmax of all logits (in fp32 if they are converted first), has no z-loss and no split vocabulary; this one reads the
logits once, keeps an fp32 log-sum-exp a token and writes the gradient in the logits' dtype. The statistics of a part of the
vocabulary are in `vocabulary_parallel.py`, the loss fused with the output layer in `linear_cross_entropy.py`.

Columns that are a multiple of 16 (a padded vocabulary) are read in wide accesses; others work, slower.

Sources: [1] Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867. [2] Chowdhery et al., PaLM,
arXiv 2204.02311, section 5 (z-loss). [3] Szegedy et al., arXiv 1512.00567, section 7 (label smoothing). [4] Hsu et al., Liger
Kernel, arXiv 2410.10989 (prior art).

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardplan.kernels.cross_entropy_kernels import (
    GRADIENT_BLOCK,
    GRADIENT_WARPS,
    STATISTICS_BLOCK,
    STATISTICS_WARPS,
    SUM_BLOCK,
    SUM_WARPS,
    logit_gradient_kernel,
    statistics_kernel,
    sum_losses_kernel,
)
from shardplan.kernels.cross_entropy_launch import logit_gradient, reduce_losses, token_losses
from shardplan.kernels.launch import KERNEL_DTYPES, TRITON_TYPES
from shardplan.kernels.shipped import Shipped

REDUCTIONS = ("mean", "sum", "none")


@torch.library.custom_op("shardplan::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-sum-exp (2, T), scale); without a reduction the loss is (T,) and the scale empty."""
    losses, lses = token_losses(logits, targets, ignore_index, smoothing, z_loss)
    if reduction == "none":
        return losses, lses, losses.new_empty(0)
    loss, scale = reduce_losses(losses, targets, ignore_index, reduction)
    return loss, lses, scale


@_cross_entropy.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    lses = losses.new_empty((2, logits.shape[0]))
    if reduction == "none":
        return losses, lses, losses.new_empty(0)
    return losses.new_empty(()), lses, losses.new_empty(())


@torch.library.custom_op("shardplan::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: Tensor | None,
    start: int,
    vocabulary: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    """Gradient of logits (T, V), in their dtype, for the range [start, start + V) of a vocabulary with log-sum-exp `lse`."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    how = (start, vocabulary, ignore_index, smoothing, z_loss)
    logit_gradient(logits, targets, lse, grad, scale, out, *how)
    return out


@cross_entropy_backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: Tensor | None,
    start: int,
    vocabulary: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, *ctx.how, reduction = inputs
    _loss, lse, scale = output
    ctx.save_for_backward(logits, targets, lse, None if reduction == "none" else scale)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    logits, targets, lse, scale = ctx.saved_tensors
    operator = torch.ops.shardplan.cross_entropy_backward
    return operator(grad, logits, targets, lse, scale, 0, logits.shape[1], *ctx.how), *[None] * 5


_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy (nats) of `logits` (…, V) with integer `targets` (…); fp32, a scalar or, for "none", (…).

    Tokens whose target is `ignore_index` count for nothing; the mean is over the others, NaN if there are none, as in torch. Any
    other target outside [0, V) gives NaN. Differentiable in the logits; the gradient has their dtype. ValueError on shapes
    that do not agree, an unknown reduction or a smoothing outside [0, 1]. Sources [1] to [4] above.
    """
    if logits.dim() == 0:
        raise ValueError("logits are a scalar; give (..., V)")
    check_targets(logits, logits.shape[:-1], targets, label_smoothing)
    check_reduction(reduction)
    rows, flat = logits.flatten(0, -2) if logits.dim() > 1 else logits[None], targets.reshape(-1)
    loss = _cross_entropy(rows, flat, ignore_index, label_smoothing, z_loss, reduction)[0]
    return loss.reshape(targets.shape) if reduction == "none" else loss


def check_reduction(reduction: str) -> None:
    """ValueError for an unknown word."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")


def check_targets(scores: Tensor, shape: torch.Size, targets: Tensor, label_smoothing: float) -> None:
    """ValueError unless the scores, logits or what makes them, are floating-point, the targets integers of this shape and the smoothing a
    fraction."""
    if not scores.is_floating_point():
        raise ValueError(f"the first argument is {scores.dtype}; give a floating-point tensor")
    if targets.shape != shape or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"targets are {targets.dtype} {tuple(targets.shape)}; give int64 or int32 of shape {tuple(shape)}, a token each"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is no fraction; use 0 to 1")


def shipped() -> list[Shipped]:
    """Statistics of the whole vocabulary and of a part, gradients a token and a scalar, in every dtype."""
    entries = [_shipped_sum()]
    for dtype in KERNEL_DTYPES:
        for flag in (False, True):
            entries += [_shipped_statistics(TRITON_TYPES[dtype], flag), _shipped_gradient(TRITON_TYPES[dtype], flag)]
    return entries


def _shipped_statistics(name: str, whole: bool) -> Shipped:
    return Shipped(
        name=f"cross_entropy_statistics {'whole' if whole else 'part'} {name}",
        kernel=statistics_kernel,
        signature={"logits": f"*{name}", "targets": "*i64"}
        | dict.fromkeys(("statistics", "losses", "lses"), "*fp32")
        | dict.fromkeys(("tokens", "columns", "stride", "start", "ignore_index"), "i32")
        | dict.fromkeys(("smoothing", "z_loss"), "fp32"),
        constants={"WHOLE": whole, "SUM": True, "BLOCK": STATISTICS_BLOCK},
        warps=STATISTICS_WARPS,
        stages=1,
        undivided=frozenset({"tokens", "ignore_index"}),
    )


def _shipped_gradient(name: str, per_token: bool) -> Shipped:
    return Shipped(
        name=f"cross_entropy_gradient {'per token' if per_token else 'scalar'} {name}",
        kernel=logit_gradient_kernel,
        signature=dict.fromkeys(("logits", "out"), f"*{name}")
        | {"targets": "*i64"}
        | dict.fromkeys(("lses", "grad", "scale"), "*fp32")
        | dict.fromkeys(("tokens", "columns", "stride", "out_stride", "start", "vocabulary", "ignore_index"), "i32")
        | dict.fromkeys(("smoothing", "z_loss"), "fp32"),
        constants={"PER_TOKEN": per_token, "HAS_SCALE": not per_token, "BLOCK": GRADIENT_BLOCK},
        warps=GRADIENT_WARPS,
        stages=1,
        undivided=frozenset({"tokens", "ignore_index", "grad", "scale"}),
    )


def _shipped_sum() -> Shipped:
    return Shipped(
        name="cross_entropy sum of losses",
        kernel=sum_losses_kernel,
        signature={
            "losses": "*fp32",
            "targets": "*i64",
            "loss": "*fp32",
            "scale": "*fp32",
            "tokens": "i32",
            "ignore_index": "i32",
        },
        constants={"MEAN": True, "BLOCK": SUM_BLOCK},
        warps=SUM_WARPS,
        stages=1,
        undivided=frozenset({"ignore_index"}),
    )
