"""Causal attention over a sequence in zig-zag order whose keys and values every rank gathers (Llama 3, arXiv 2407.21783, 3.3.2).

Nothing gathered is kept: backward gathers again and scatters the sums of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardplan.executor.ring_attention import Blocks


def gathered_attention(
    q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, blocks: Blocks, group: dist.ProcessGroup
) -> Tensor:
    """(B, S/cp, N, D) from this rank's queries, keys and values in zig-zag order."""
    out: Tensor = _Gathered.apply(q_BSND, k_BSKD, v_BSKD, blocks, group)  # type: ignore[assignment]
    return out


def in_order(by_rank: Tensor) -> Tensor:
    """(cp, 2, B, S/cp, K, D), what each rank holds in zig-zag order -> (2, B, S, K, D) in the order of the sequence."""
    first, second = by_rank.unflatten(3, (2, -1)).unbind(3)
    chunks = torch.cat((first, second.flip(0)))
    return chunks.movedim(0, 2).flatten(2, 3)


def by_rank(whole: Tensor, ranks: int) -> Tensor:
    """The inverse of `in_order`."""
    chunks = whole.unflatten(2, (2 * ranks, -1)).movedim(2, 0)
    return torch.stack((chunks[:ranks], chunks[ranks:].flip(0)), dim=3).flatten(3, 4)


def _gather(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks, own = dist.get_world_size(group), torch.stack((k, v))
    every = torch.empty((ranks * 2, *k.shape), dtype=k.dtype, device=k.device)
    dist.all_gather_into_tensor(every, own, group=group)
    return in_order(every.unflatten(0, (ranks, 2)))


def _halves(rank: int, ranks: int, positions: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys they see) of the later chunk of this rank, which sees more, then of the earlier one."""
    chunk = positions // 2
    yield slice(chunk, positions), slice(0, (2 * ranks - rank) * chunk)
    yield slice(0, chunk), slice(0, (rank + 1) * chunk)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, group: dist.ProcessGroup) -> Tensor:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        whole = _gather(k, v, group)
        out, parts = torch.empty_like(q), []
        for queries, keys in _halves(rank, ranks, q.shape[1]):
            part, lse = blocks.attention(q[:, queries], *whole[:, :, keys], causal=True)
            out[:, queries] = part
            parts.append(lse)
        ctx.save_for_backward(q, k, v, out, torch.cat(parts[::-1], dim=2))
        ctx.blocks, ctx.group = blocks, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        whole = _gather(k, v, ctx.group)
        dq, dkv = torch.empty_like(q), torch.zeros_like(whole)
        for queries, keys in _halves(rank, ranks, q.shape[1]):
            part, *of_keys = ctx.blocks.gradients(
                grads[0][:, queries],
                q[:, queries],
                *whole[:, :, keys],
                out[:, queries],
                lse[:, :, queries],
                causal=True,
            )
            dq[:, queries] = part
            dkv[:, :, keys] += torch.stack(of_keys)
        own = torch.empty((2, *k.shape), dtype=k.dtype, device=k.device)
        dist.reduce_scatter_tensor(own, by_rank(dkv, ranks).flatten(0, 1).contiguous(), group=ctx.group)
        return dq, own[0], own[1], None, None
