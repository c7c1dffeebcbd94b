"""Attention to a part of the keys in plain PyTorch, tile by tile: what `attention_block` is tested against, and the CPU's path.

    O_i = Σ_j P_ij·v_j,   P_ij = exp(scale·q_i·k_j - LSE_i),   LSE_i = ln Σ_j exp(scale·q_i·k_j)
    dv_j = Σ_i P_ij·dO_i,   dS_ij = P_ij·(dO_i·v_j - dO_i·O_i),   dq_i = scale·Σ_j dS_ij·k_j,   dk_j = scale·Σ_i dS_ij·q_i

In the backward O and LSE are those over all keys, whichever part `k` and `v` are: then the gradients of parts add up to the whole.
Sources: FlashAttention-2 (arXiv 2307.08691, algorithm 2), Ring Attention (arXiv 2310.01889). Statistics and sums are fp32, or fp64.

Shape suffixes: B sequences, S queries, T keys, N query heads, K key/value heads, G = N / K, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

QUERY_TILE = 256
"""Rows of the score matrix that exist at a time."""


def block_attention(q_BSND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(O (B, S, N, D), LSE (B, N, S)) in fp32 or wider; `causal` ends at the last query and key. Every query must see a key."""
    wide = torch.promote_types(q_BSND.dtype, torch.float32)
    k, v = k_BTKD.to(wide), v_BTKD.to(wide)
    out = torch.empty(q_BSND.shape, dtype=wide, device=q_BSND.device)
    lse = torch.empty(q_BSND.shape[0], q_BSND.shape[2], q_BSND.shape[1], dtype=wide, device=q_BSND.device)
    for rows, seen in _tiles(q_BSND.shape[1], k.shape[1], causal=causal):
        score = _scores(q_BSND[:, rows].to(wide), k[:, :seen], rows, k.shape[1] - q_BSND.shape[1], causal=causal)
        lse_BKGS = torch.logsumexp(score, dim=-1)
        weight = torch.exp(score - lse_BKGS[..., None])
        out[:, rows] = torch.einsum("bkgst,btkd->bskgd", weight, v[:, :seen]).flatten(2, 3)
        lse[:, :, rows] = lse_BKGS.flatten(1, 2)
    return out, lse


def block_gradients(
    grad_BSND: Tensor,
    q_BSND: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    out_BSND: Tensor,
    lse_BNS: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) of this part in fp32 or wider; `out` and `lse` are over all keys."""
    wide = torch.promote_types(q_BSND.dtype, torch.float32)
    heads, scale = k_BTKD.shape[2], q_BSND.shape[3] ** -0.5
    k, v = k_BTKD.to(wide), v_BTKD.to(wide)
    dq = torch.empty(q_BSND.shape, dtype=wide, device=q_BSND.device)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, seen in _tiles(q_BSND.shape[1], k.shape[1], causal=causal):
        q, grad, out = (x[:, rows].to(wide) for x in (q_BSND, grad_BSND, out_BSND))
        score = _scores(q, k[:, :seen], rows, k.shape[1] - q_BSND.shape[1], causal=causal)
        weight = torch.exp(score - lse_BNS[:, :, rows].to(wide).unflatten(1, (heads, -1))[..., None])
        grad_BSKGD, q_BSKGD = grad.unflatten(2, (heads, -1)), q.unflatten(2, (heads, -1))
        delta_BKGS = (grad * out).sum(-1).unflatten(2, (heads, -1)).permute(0, 2, 3, 1)
        score_grad = weight * (torch.einsum("bskgd,btkd->bkgst", grad_BSKGD, v[:, :seen]) - delta_BKGS[..., None])
        dv[:, :seen] += torch.einsum("bkgst,bskgd->btkd", weight, grad_BSKGD)
        dk[:, :seen] += torch.einsum("bkgst,bskgd->btkd", score_grad, q_BSKGD) * scale
        dq[:, rows] = torch.einsum("bkgst,btkd->bskgd", score_grad, k[:, :seen]).flatten(2, 3) * scale
    return dq, dk, dv


def _tiles(queries: int, keys: int, *, causal: bool) -> Iterator[tuple[slice, int]]:
    """Rows of queries, and how many of the keys any of them sees."""
    for first in range(0, queries, QUERY_TILE):
        last = min(first + QUERY_TILE, queries)
        yield slice(first, last), keys - queries + last if causal else keys


def _scores(q_BSND: Tensor, k_BTKD: Tensor, rows: slice, shift: int, *, causal: bool) -> Tensor:
    """(B, K, G, S, T), -inf where a key comes after the query; query i of the whole stands at key i + shift."""
    q_BSKGD = q_BSND.unflatten(2, (k_BTKD.shape[2], -1))
    score = torch.einsum("bskgd,btkd->bkgst", q_BSKGD, k_BTKD) * q_BSND.shape[3] ** -0.5
    if not causal:
        return score
    row = torch.arange(rows.start, rows.stop, device=score.device)[:, None] + shift
    return score.masked_fill(torch.arange(k_BTKD.shape[1], device=score.device) > row, -math.inf)
