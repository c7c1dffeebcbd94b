"""An embedding that is the head too, where a pipeline puts them into two chunks: two copies that stay one parameter.

Both start from the same values. After the backward pass each adds the other's gradient to its own (the sum of two numbers does not
depend on their order, so both get the same bits), in the norm of all gradients it counts once, and AdamW does the same to both. What is
exchanged is what the rank holds after ZeRO's reduction: its shard, in fp32. In V placement both chunks are on one rank, and nothing is
sent. Megatron-LM does the same with whole gradients in an "embedding group" (arXiv 2104.04473, released code).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardplan.executor.mesh import local_part
from shardplan.executor.transformer import Transformer


class TiedEmbedding:
    """This rank's copies of the tied table; empty where it holds none, or where embedding and head are in one chunk."""

    def __init__(self, chunks: Sequence[Transformer], mesh: DeviceMesh) -> None:
        self.mesh = mesh
        apart = [chunk for chunk in chunks if chunk.ties and not chunk.tied]
        self.embedding = _first(chunk.embedding.tokens for chunk in apart if chunk.embedding is not None)
        self.head = _first(chunk.head for chunk in apart if chunk.head is not None)

    @property
    def copies(self) -> list[nn.Parameter]:
        """Parameters whose gradient is another's too, which counts for both in the norm."""
        return [] if self.head is None else [self.head]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Make the gradients of both copies their sum; the ranks that hold one call it together."""
        mine = [local_part(one.grad) for one in (self.embedding, self.head) if one is not None and one.grad is not None]
        if len(mine) == 2:
            mine[0].add_(mine[1])
            mine[1].copy_(mine[0])
        elif mine:
            mine[0].add_(self._others(mine[0]))

    def _others(self, gradient: Tensor) -> Tensor:
        """The gradient of the copy at the other end of the pipeline."""
        group = self.mesh.get_group("pp")
        other = 0 if self.embedding is None else dist.get_world_size(group) - 1
        received = torch.empty_like(gradient)
        operations = [
            dist.P2POp(dist.isend, gradient.contiguous(), group=group, group_peer=other),
            dist.P2POp(dist.irecv, received, group=group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return received

    @torch.no_grad()
    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the head's copy what the embedding's on the same rank has: values and optimizer states."""
        if self.embedding is None or self.head is None:
            return
        local_part(self.head).copy_(local_part(self.embedding))
        for kind, value in optimizer.state.get(self.embedding, {}).items():
            local_part(optimizer.state[self.head][kind]).copy_(local_part(value))


def _first(modules: Iterable[nn.Module]) -> nn.Parameter | None:
    return next((one for module in modules for name, one in module.named_parameters() if name == "weight"), None)
