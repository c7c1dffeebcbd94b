"""Causal attention over a sequence that is spread in zig-zag order: keys and values go around a ring (arXiv 2310.01889).

A sequence is cut into 2·cp chunks; rank r holds chunks r and 2·cp-1-r. At step s it has the keys of rank r - s and computes

    s = 0                 its own positions, which stand in order: causal
    keys of a rank < r    all queries against their first chunk; nobody here sees the second
    keys of a rank > r    the queries of the second chunk against both

so every step after the first is as much work for everyone. Partial outputs are merged by their log-sum-exp. Backward the keys go
around again, and with each block the gradient that ranks before have gathered for it; it comes home in the last pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shardplan.executor.context_exchange import Pass


class Blocks(NamedTuple):
    """Attention to a part of the keys, as in `kernels/attention_block_reference.py`."""

    attention: Callable[..., tuple[Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]


def ring_attention(q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, blocks: Blocks, group: dist.ProcessGroup) -> Tensor:
    """(B, S/cp, N, D) from this rank's queries, keys and values in zig-zag order."""
    out: Tensor = _Ring.apply(q_BSND, k_BSKD, v_BSKD, blocks, group)  # type: ignore[assignment]
    return out


def part_in_sight(rank: int, source: int, positions: int) -> tuple[slice, slice, bool]:
    """(queries, keys, causal) of what `rank` computes with the keys of `source`, each holding `positions`."""
    everything, half = slice(0, positions), positions // 2
    if source == rank:
        return everything, everything, True
    if source < rank:
        return everything, slice(0, half), False
    return slice(half, positions), everything, False


def merge(out_BSND: Tensor, lse_BNS: Tensor, more_BSND: Tensor, more_lse_BNS: Tensor) -> None:
    """Add the result over further keys to `out` and `lse`, in place: O += sigmoid(LSE' - LSE)·(O' - O), LSE = logaddexp."""
    share_BSN1 = torch.sigmoid(more_lse_BNS - lse_BNS).transpose(1, 2)[..., None]
    out_BSND += share_BSN1 * (more_BSND - out_BSND)
    lse_BNS.copy_(torch.logaddexp(lse_BNS, more_lse_BNS))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, group: dist.ProcessGroup) -> Tensor:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        held = torch.stack((k, v))
        out, lse = q, q  # of the first step
        for step in range(ranks):
            passing = Pass(held, group) if step + 1 < ranks else None
            queries, keys, causal = part_in_sight(rank, (rank - step) % ranks, q.shape[1])
            part, part_lse = blocks.attention(q[:, queries], *held[:, :, keys], causal=causal)
            if step == 0:
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                merge(out[:, queries], lse[:, :, queries], part, part_lse)
            if passing is not None:
                held = passing.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.group = blocks, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        own = torch.zeros((2, *k.shape), dtype=lse.dtype, device=k.device)
        held, coming = torch.stack((k, v)), None
        for step in range(ranks):
            passing = Pass(held, ctx.group) if step + 1 < ranks else None
            queries, keys, causal = part_in_sight(rank, (rank - step) % ranks, q.shape[1])
            part, *of_keys = ctx.blocks.gradients(
                grads[0][:, queries],
                q[:, queries],
                *held[:, :, keys],
                out[:, queries],
                lse[:, :, queries],
                causal=causal,
            )
            dq[:, queries] += part
            total = own if step == 0 else torch.zeros_like(own)
            total[:, :, keys] += torch.stack(of_keys)
            if step > 0:
                if coming is not None:
                    total += coming.wait()
                coming = Pass(total.to(k.dtype), ctx.group, tag=1)
            if passing is not None:
                held = passing.wait()
        if coming is not None:
            own += coming.wait()
        return dq.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype), None, None
