"""What ranks of a context-parallel group send each other: passes around a ring, and all-to-alls between sequence and heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Pass:
    """`tensor` on its way to the next rank of a ring, while another comes from the rank before.

    Neither of the two may be touched until `wait`. `tag` tells passes apart that are under way together.
    """

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup, tag: int = 0) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.sent, self.received = tensor, torch.empty_like(tensor)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, group=group, tag=tag, group_peer=(rank + 1) % ranks),
                dist.P2POp(dist.irecv, self.received, group=group, tag=tag, group_peer=(rank - 1) % ranks),
            ]
        )

    def wait(self) -> Tensor:
        """What came; afterwards both tensors are free."""
        for work in self.works:
            work.wait()
        return self.received


class _AllToAll(torch.autograd.Function):
    """Row i of dim 0 goes to rank i; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


def sequence_to_heads(x_BSND: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S/cp, N, D) of neighbouring positions -> (B, S, N/cp, D): every position of this rank's heads."""
    ranks = dist.get_world_size(group)
    parts = x_BSND.unflatten(2, (ranks, -1)).movedim(2, 0)
    received: Tensor = _AllToAll.apply(parts, group)  # type: ignore[assignment]
    return received.movedim(0, 1).flatten(1, 2)


def heads_to_sequence(x_BSND: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S, N/cp, D) -> (B, S/cp, N, D), the inverse of `sequence_to_heads`."""
    ranks = dist.get_world_size(group)
    parts = x_BSND.unflatten(1, (ranks, -1)).movedim(1, 0)
    received: Tensor = _AllToAll.apply(parts, group)  # type: ignore[assignment]
    return received.movedim(0, 2).flatten(2, 3)
