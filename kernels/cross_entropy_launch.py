"""The steps of the cross-entropy over (T, V) logits, each by its kernel or, where that cannot run, by its reference."""

from __future__ import annotations

import torch
import triton
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
from shardplan.kernels.cross_entropy_reference import (
    logit_gradient_reference,
    statistics_reference,
    token_losses_reference,
)
from shardplan.kernels.launch import as_rows, next_power_of_two, on_device_of, uses_kernel


def statistics_block(columns: int) -> int:
    """Columns that a program reads at a time."""
    return max(256, min(STATISTICS_BLOCK, next_power_of_two(columns)))


def token_losses(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(loss (T,), log-sum-exp (2, T)), fp32, of whole logits (T, V), by kernel or reference; not differentiable itself.

    The second row of the log-sum-exp is what the first rounds off: exp(x - lse) would lose as much as lse is large.
    """
    if not uses_kernel(logits):
        statistics = statistics_reference(logits, targets, 0)
        return token_losses_reference(statistics, targets, logits.shape[1], ignore_index, smoothing, z_loss)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lses = torch.empty((2, logits.shape[0]), dtype=torch.float32, device=logits.device)
    launch_statistics(logits, targets, losses, losses, lses, 0, ignore_index, smoothing, z_loss, whole=True)
    return losses, lses


def launch_statistics(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    losses: Tensor,
    lses: Tensor,
    start: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    *,
    whole: bool,
) -> None:
    """Run the statistics kernel over all tokens, into `losses` and `lses` when `whole`, else into `statistics` (4, T)."""
    rows = as_rows(logits)
    if not rows.shape[0]:
        return
    with on_device_of(rows):
        statistics_kernel[(rows.shape[0],)](
            rows,
            targets.contiguous(),
            statistics,
            losses,
            lses,
            rows.shape[0],
            rows.shape[1],
            rows.stride(0),
            start,
            ignore_index,
            smoothing,
            z_loss,
            WHOLE=whole,
            SUM=smoothing > 0 or not whole,
            BLOCK=statistics_block(rows.shape[1]),
            num_warps=STATISTICS_WARPS,
            num_stages=1,
        )


def logit_gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    out: Tensor,
    start: int,
    vocabulary: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> None:
    """Write the gradient of the logits (T, V) into `out`, which may be `logits`; `grad` is one or (T,), `scale` one,
    `lse` (2, T) as of `token_losses`, or (T,)."""
    lse = (torch.stack((lse, torch.zeros_like(lse))) if lse.dim() == 1 else lse).contiguous()
    if not uses_kernel(logits):
        given = grad if scale is None else grad * scale
        how = (start, vocabulary, ignore_index, smoothing, z_loss)
        out.copy_(logit_gradient_reference(logits, targets, lse, given, *how))
        return
    rows, columns = logits.shape
    if not logits.numel():
        return
    lse = lse.float()
    source = as_rows(logits)
    with on_device_of(logits):
        logit_gradient_kernel[(rows * triton.cdiv(columns, GRADIENT_BLOCK),)](
            source,
            out,
            targets.contiguous(),
            lse,
            grad.contiguous(),
            lse if scale is None else scale,
            rows,
            columns,
            source.stride(0),
            out.stride(0),
            start,
            vocabulary,
            ignore_index,
            smoothing,
            z_loss,
            PER_TOKEN=grad.dim() == 1,
            HAS_SCALE=scale is not None,
            BLOCK=GRADIENT_BLOCK,
            num_warps=GRADIENT_WARPS,
            num_stages=1,
        )


def reduce_losses(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, scale), both 0-dim: the sum (scale 1) or mean (scale 1 / tokens that count) of the losses (T,)."""
    if not uses_kernel(losses):
        if reduction == "sum":
            return losses.sum(), losses.new_ones(())
        counted = (targets != ignore_index).sum().to(losses.dtype)
        return losses.sum() / counted, 1.0 / counted.clamp(min=1.0)
    loss, scale = losses.new_empty(()), losses.new_empty(())
    with on_device_of(losses):
        sum_losses_kernel[(1,)](
            losses,
            targets.contiguous(),
            loss,
            scale,
            losses.shape[0],
            ignore_index,
            MEAN=reduction == "mean",
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
            num_stages=1,
        )
    return loss, scale
