"""Mixture-of-experts layers as in Mixtral (arXiv 2401.04088, section 2.1), which do not know how they are spread.

Every token goes to the `experts_per_token` experts its router scores highest, whatever their load: nothing is dropped or padded. Copies of
the tokens are sorted by expert, computed expert after expert or in one grouped product, and put back in the tokens' order.

Shape suffixes: B sequences, S positions, H hidden, T tokens, E experts of this rank's parameters, K experts of a token, R rows (copies
of tokens), F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from shardplan.costmodel.model import LayerKind
from shardplan.executor.mesh import local_part

HOPPER = 9
"""Major compute capability from which torch's grouped product has a kernel of its own."""
GROUPED_MULTIPLE = 8
"""Of widths: its rows begin at multiples of 16 bytes."""

Stream = Callable[[Tensor], Tensor]
"""Between what a rank holds of the residual stream and what its experts see of it, (B, S, H) both."""
Back = Callable[[Tensor], Tensor]
Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Back]]
"""Rows sorted by expert and how many each expert gets -> the same for the experts of this rank, and the way back for what they return."""


def same(x: Tensor) -> Tensor:
    """What one rank does of a `Stream`: nothing."""
    return x


def stay(rows_RH: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Back]:
    """The `Exchange` of a rank that has all experts."""
    return rows_RH, counts_E, same


class Router(nn.Module):
    """Which experts a token goes to, and with what weights, in fp32; the loss that keeps experts evenly used.

    Scores are the softmax over all experts; those of the chosen ones are scaled to add up to 1 (not with `raw_scores`).

    Of the T tokens of one micro-batch, f_e is the number sent to expert e over T, and p_e the mean score of e. The loss is
    balance_weight * E * sum_e f_e p_e: equations 4 to 6 of the Switch Transformer (arXiv 2101.03961, section 2.2), with all K copies of a
    token counted in f as transformers' `load_balancing_loss_func` does, so that perfect balance gives K. Layers are averaged; transformers
    averages f and p over the layers first, which no stage of a pipeline could compute alone. As in Megatron-Core it belongs to a
    micro-batch of one data-parallel rank; micro-batches and ranks are averaged as the cross-entropy is. It only enters the gradients: the
    loss that is told is the cross-entropy.
    """

    def __init__(self, kind: LayerKind, *, routers: int) -> None:
        super().__init__()
        self.experts, self.copies, self.normalised = kind.experts, kind.experts_per_token, not kind.raw_scores
        self.weight = nn.Parameter(torch.empty(kind.experts, kind.hidden))
        self.balance_weight = kind.balance_weight / routers
        self.gradient_scale = 1.0
        """Of this loss, as the cross-entropy's gradient is scaled at the start of the backward."""
        self.seen: Stream = same
        """Sums numbers over the ranks that hold other tokens of the same micro-batch."""
        self.share = 1.0
        """What this rank's gradients of this loss are multiplied with, so that they add up as those of the cross-entropy do."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (as precise as `x_TH`) and indices of each token's experts, highest first, (T, K) both; tokens of each expert, (E,)."""
        scores_TE = functional.linear(x_TH.float(), shared_parameter(self.weight).float()).softmax(dim=-1)
        weights_TK, chosen_TK = scores_TE.topk(self.copies, dim=-1)
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        none_E = torch.zeros(self.experts, dtype=torch.int64, device=x_TH.device)
        ones_TK = torch.ones_like(chosen_TK)
        sent_E = none_E.scatter_add(0, chosen_TK.flatten(), ones_TK.flatten())  # bincount waits for the GPU
        if self.balance_weight and torch.is_grad_enabled():
            weights_TK = _AddGradient.apply(weights_TK, self._balance_loss(scores_TE, sent_E), self)
        return weights_TK.to(x_TH.dtype), chosen_TK, sent_E

    def _balance_loss(self, scores_TE: Tensor, sent_E: Tensor) -> Tensor:
        sent_E = self.seen(sent_E.float())
        tokens = sent_E.sum() / self.copies
        even = (sent_E / tokens * (scores_TE.sum(dim=0) / tokens)).sum() * self.experts
        return even * (self.balance_weight * self.share)


class _AddGradient(torch.autograd.Function):
    """`x` as it is; in the backward `loss` gets the gradient that it would have as a part of the total loss.

    So a loss from inside the model needs no way to its end, past pipeline stages (Megatron-Core, `MoEAuxLossAutoScaler`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, router: Router) -> Tensor:
        ctx.router, ctx.like = router, loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full_like(ctx.like, ctx.router.gradient_scale), None


class _Pick(torch.autograd.Function):
    """Rows `x[order // copies]`, where `order` is a permutation and `inverse` its inverse: each row of x comes `copies` times.

    The gradient is gathered and summed, in a fixed order: that of indexing is scattered.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(dim=1)
        return grad, None, None, None


def pick(x: Tensor, order: Tensor, inverse: Tensor, *, copies: int = 1) -> Tensor:
    """Rows of `x`, each `copies` times, in the order of the permutation `order`, whose inverse is `inverse`."""
    return _Pick.apply(x, order, inverse, copies)  # type: ignore[no-any-return]


def inverse_of(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    return torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def shared_parameter(parameter: Tensor) -> Tensor:
    """The same of one that ranks share and use on different tokens, or for different parts of a sum: their gradients add up."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    return parameter


class Experts(nn.Module):
    """The experts' matrices, stacked: of each SwiGLU (w2(silu(w1 x) * w3 x)), or a two-matrix MLP with GELU.

    ZeRO gathers what a module holds while it is called. Experts that are sharded apart from their layer have to be gathered before
    recomputation begins in it, not within, so a call of them surrounds the layer: `experts(layer, x, table)`.
    """

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        count, wide, hidden = kind.experts, kind.ffn, kind.hidden
        self.gated = kind.gated_mlp
        self.w1 = nn.Parameter(torch.empty(count, wide, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, wide))
        if self.gated:
            self.w3 = nn.Parameter(torch.empty(count, wide, hidden))

    def forward(self, layer: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """`layer(*inputs)`."""
        return layer(*inputs)

    def compute(self, rows_RH: Tensor, counts_E: Tensor) -> Tensor:
        """(R, H) -> (R, H): the first counts_E[0] rows through expert 0, and so on; every expert gets a gradient, of no rows zeros."""
        held = (self.w1, self.w2, self.w3) if self.gated else (self.w1, self.w2)
        matrices = [local_part(parameter) for parameter in held]
        if can_group(rows_RH, matrices[0]):
            return self._grouped(rows_RH, counts_E.cumsum(0).to(torch.int32), *matrices)
        each = zip(rows_RH.split(counts_E.tolist()), *(stack.unbind() for stack in matrices), strict=True)
        return torch.cat([self._one(*rows_and_matrices) for rows_and_matrices in each])

    def _one(self, x_RH: Tensor, up_FH: Tensor, down_HF: Tensor, side_FH: Tensor | None = None) -> Tensor:
        side = functional.linear(x_RH, side_FH) if side_FH is not None else None
        return functional.linear(self._activate(functional.linear(x_RH, up_FH), side), down_HF)

    def _grouped(self, rows_RH: Tensor, ends_E: Tensor, up: Tensor, down: Tensor, side: Tensor | None = None) -> Tensor:
        """The same in one product for all experts; `ends_E` are the rows behind each."""
        grouped = torch.ops.aten._grouped_mm  # of rows (R, in) with matrices (E, in, out)
        sides = grouped(rows_RH, side.mT, ends_E) if side is not None else None
        return grouped(self._activate(grouped(rows_RH, up.mT, ends_E), sides), down.mT, ends_E)

    def _activate(self, up_RF: Tensor, side_RF: Tensor | None) -> Tensor:
        return functional.gelu(up_RF, approximate="tanh") if side_RF is None else functional.silu(up_RF) * side_RF


def can_group(rows_RH: Tensor, up_EFH: Tensor) -> bool:
    """Whether torch's grouped product runs on these: bf16 on Hopper and later, in widths it can load."""
    if rows_RH.device.type != "cuda" or rows_RH.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    widths_fit = all(width % GROUPED_MULTIPLE == 0 for width in up_EFH.shape[1:])
    return widths_fit and torch.cuda.get_device_capability(rows_RH.device)[0] >= HOPPER


class MixtureOfExperts(nn.Module):
    """Router and experts in the place of a dense MLP; `expert_parallel` replaces `enter`, `exchange` and `leave`."""

    def __init__(self, kind: LayerKind, *, routers: int) -> None:
        super().__init__()
        self.router = Router(kind, routers=routers)
        self.experts = Experts(kind)
        self.enter: Stream = same
        self.leave: Stream = same
        self.exchange: Exchange = stay

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        x_BSH = self.enter(x_BSH)
        x_TH = x_BSH.flatten(0, 1)
        weights_TK, chosen_TK, sent_E = self.router(x_TH)
        order = chosen_TK.flatten().argsort(stable=True)
        inverse = inverse_of(order)
        rows_RH = pick(x_TH, order, inverse, copies=self.router.copies)
        rows_RH, counts_E, back = self.exchange(rows_RH, sent_E)
        rows_RH = back(self.experts.compute(rows_RH, counts_E))
        y_TKH = pick(rows_RH, inverse, order).unflatten(0, weights_TK.shape)
        return self.leave((y_TKH * weights_TK.unsqueeze(-1)).sum(dim=1).view_as(x_BSH))
