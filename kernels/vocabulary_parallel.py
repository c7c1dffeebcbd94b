"""Cross-entropy over logits that are split over the vocabulary: each rank's statistics, their merge, the local gradient.

A rank with the range [start, start + V_r) reads its logits once and keeps four fp32 numbers a token:

    m_r = max_j x_j,   s_r = Σ_j exp(x_j − m_r),   x_t if the target is in the range, else 0,   Σ_j x_j
    merged: m = max_r m_r,   s = Σ_r s_r exp(m_r − m),   the other two add up;   lse = m + log s

so ranks exchange 16 bytes a token, never logits. The gradient of a rank's logits needs only its own logits and lse.

Sources: [1] Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3 (parallel cross-entropy). [2] as in `cross_entropy.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shardplan.kernels.cross_entropy import check_reduction, check_targets
from shardplan.kernels.cross_entropy_launch import launch_statistics
from shardplan.kernels.cross_entropy_reference import statistics_reference, token_losses_reference
from shardplan.kernels.launch import uses_kernel


class Statistics(NamedTuple):
    """What a range of the vocabulary tells about each of T tokens; fp32 (T,) each."""

    maximum: Tensor
    sum_exp: Tensor
    """Σ exp(x − maximum)."""
    target_logit: Tensor
    """0 where the target lies in another range."""
    logit_sum: Tensor
    """For label smoothing."""


@torch.library.custom_op("shardplan::vocabulary_statistics", mutates_args=())
def _statistics(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    if not uses_kernel(logits):
        return statistics_reference(logits, targets, start)
    out = torch.empty((4, logits.shape[0]), dtype=torch.float32, device=logits.device)
    launch_statistics(logits, targets, out, out, out, start, 0, 0.0, 0.0, whole=False)
    return out


@_statistics.register_fake
def _(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty((4, logits.shape[0]), dtype=wide, device=logits.device)


def local_statistics(logits: Tensor, targets: Tensor, *, start: int) -> Statistics:
    """Statistics of `logits` (T, V_r), columns start ≤ j < start + V_r of the vocabulary, for `targets` (T,) in all of it."""
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; give (T, V), tokens flattened")
    check_targets(logits, logits.shape[:1], targets, 0.0)
    return Statistics(*_statistics(logits.detach(), targets, start).unbind())


def merge(*parts: Statistics) -> Statistics:
    """Statistics of the union of disjoint ranges; associative, in any order up to rounding."""
    largest = torch.stack([part.maximum for part in parts]).amax(dim=0)
    sums = torch.stack([_addends(part, largest) for part in parts]).sum(dim=0)
    return Statistics(largest, *sums.unbind())


def merge_across(part: Statistics, group: dist.ProcessGroup | None) -> Statistics:
    """`merge` of every rank's statistics over `group`: one all-reduce (maximum) of 4 bytes a token, one (sum) of 12."""
    largest = part.maximum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = _addends(part, largest)
    dist.all_reduce(sums, group=group)
    return Statistics(largest, *sums.unbind())


def _addends(part: Statistics, largest: Tensor) -> Tensor:
    """(3, T): what adds up over ranges once the maximum of all is known."""
    shift = largest.masked_fill(largest == -torch.inf, 0.0)  # a token whose logits are all masked so far
    return torch.stack((part.sum_exp * (part.maximum - shift).exp(), part.target_logit, part.logit_sum))


def losses_of(
    whole: Statistics,
    targets: Tensor,
    *,
    vocabulary: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, log-sum-exp), fp32 (T,) each, from the statistics of the whole vocabulary; formulas in `cross_entropy.py`."""
    losses, lse = token_losses_reference(torch.stack(whole), targets, vocabulary, ignore_index, label_smoothing, z_loss)
    return losses, lse[0]


def local_gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    start: int,
    vocabulary: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Gradient of a rank's logits (T, V_r), in their dtype, given the global `lse` (T,), or with what it
    rounds off (2, T), and the losses' gradients (T,)."""
    how = (start, vocabulary, ignore_index, label_smoothing, z_loss)
    return torch.ops.shardplan.cross_entropy_backward(grad, logits, targets, lse, None, *how)


class _Split(torch.autograd.Function):
    """Losses (T,) of split logits; the collectives are those of `merge_across`, the backward has none."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, group: Any, how: dict[str, Any]) -> Tensor:
        whole = torch.stack(merge_across(local_statistics(logits, targets, start=start), group))
        losses, lse = token_losses_reference(
            whole, targets, how["vocabulary"], how["ignore_index"], how["label_smoothing"], how["z_loss"]
        )
        ctx.save_for_backward(logits, targets, lse)
        ctx.start, ctx.how = start, how
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        logits, targets, lse = ctx.saved_tensors
        return local_gradient(logits, targets, lse, grad_outputs[0], start=ctx.start, **ctx.how), None, None, None, None


def vocabulary_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    start: int,
    vocabulary: int,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy` of logits (T, V) of which this rank of `group` holds columns [start, start + V_r) as `logits` (T, V_r).

    Targets (T,) and the result are the same on every rank; each gets the gradient of its own logits.
    """
    how = {
        "vocabulary": vocabulary,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    check_targets(logits, logits.shape[:1], targets, label_smoothing)
    check_reduction(reduction)
    if start < 0 or start + logits.shape[1] > vocabulary:
        raise ValueError(
            f"columns {start} to {start + logits.shape[1] - 1} lie outside vocabulary={vocabulary}; "
            "give the first column of this rank as start"
        )
    losses = _Split.apply(logits, targets, start, group, how)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()
