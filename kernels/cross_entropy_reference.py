"""Cross-entropy in plain torch: what the kernels of `cross_entropy_kernels.py` are held against.

Logits (T, V) of the vocabulary range [start, start + V); arithmetic is fp32, fp64 for fp64 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_reference(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """(4, T): maximum, sum of exp(x − maximum), logit of the target (0 where it is not in the range), sum of the logits."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local = targets - start
    inside = (local >= 0) & (local < x.shape[1])
    target = x.gather(1, local.clamp(0, x.shape[1] - 1)[:, None].long())[:, 0]
    largest = x.amax(dim=1)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    return torch.stack((largest, (x - shift[:, None]).exp().sum(1), torch.where(inside, target, 0.0), x.sum(1)))


def token_losses_reference(
    statistics: Tensor, targets: Tensor, vocabulary: int, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(loss (T,), log-sum-exp and what it rounds off (2, T)) of the statistics (4, T) of the whole vocabulary; 0 for ignored tokens."""
    largest, sum_exp, target, total = statistics
    log_sum = sum_exp.log()
    lse = largest + log_sum
    near = lse - largest
    rest = ((largest - (lse - near)) + (log_sum - near)).masked_fill(~lse.isfinite(), 0.0)
    loss = lse - (1 - smoothing) * target + z_loss * lse * lse
    if smoothing:
        loss = loss - smoothing / vocabulary * total
    loss = torch.where((targets >= 0) & (targets < vocabulary), loss, torch.nan)
    ignored = targets == ignore_index
    return loss.masked_fill(ignored, 0.0), torch.stack((lse, rest)).masked_fill(ignored, 0.0)


def logit_gradient_reference(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    start: int,
    vocabulary: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    """Gradient of the logits (T, V), in fp32, for the loss gradients `grad`, one or (T,); `lse` (2, T)."""
    lse, rest = lse[:, :, None]
    columns = start + torch.arange(logits.shape[1], device=logits.device)
    out = ((logits.to(lse.dtype) - lse) - rest).exp() * (1 + 2 * z_loss * lse) - smoothing / vocabulary
    out = out - (1 - smoothing) * (columns == targets[:, None]).to(lse.dtype)
    return (out * grad.reshape(-1, 1)).masked_fill((targets == ignore_index)[:, None], 0.0)
