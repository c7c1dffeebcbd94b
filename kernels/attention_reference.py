"""Attention in plain PyTorch, whole score matrices in fp32: what the kernels are tested against, and the CPU's path."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a call of attention asks for besides its tensors."""

    scale: float
    """Factor of q·k; positive."""
    left: int = -1
    """Keys before the diagonal that a query sees; -1: all."""
    right: int = -1
    """Keys after the diagonal that a query sees; -1: all, 0: causal."""
    top_left: bool = False
    """The diagonal starts at the first query and key (torch's `is_causal`) rather than ending at the last of both."""
    softcap: float = 0.0
    """c of c·tanh(score / c); 0: none."""
    dropout: float = 0.0
    """Share of probabilities that are dropped."""


def visible(queries: int, keys: int, shape: Shape, device: torch.device | str) -> Tensor:
    """(S_q, S_k) of whether each query sees each key."""
    shift = 0 if shape.top_left else keys - queries
    distance = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None] - shift
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if shape.right >= 0:
        seen &= distance <= shape.right
    if shape.left >= 0:
        seen &= distance >= -shape.left
    return seen


def philox(seed: int, column: Tensor, row: Tensor, stream: Tensor) -> Tensor:
    """First 32 bits of Philox4x32-10 (Salmon et al. 2011) at counter (column, row, stream, 0) and a 64-bit key, as int64."""
    c0, c1, c2, c3 = column.long(), row.long(), stream.long(), torch.zeros_like(column.long())
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high0, low0 = _wide_product(c0, 0xD2511F53)
        high2, low2 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0


def _wide_product(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 32-bit unsigned product, without leaving signed 64 bits."""
    low_part = (value & 0xFFFF) * factor
    high_part = (value >> 16) * factor + (low_part >> 16)
    return (high_part >> 16) & _MASK32, ((high_part & 0xFFFF) << 16 | (low_part & 0xFFFF)) & _MASK32


def kept(
    seed: int, first: int, sequences: int, heads: int, queries: int, keys: int, dropout: float, device: torch.device
) -> Tensor:
    """(B, H, S_q, S_k) of which probabilities survive dropout in sequences from `first` on; the same for any tiling."""
    b = torch.arange(first, first + sequences, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[None, :, None, None]
    i = torch.arange(queries, device=device)[None, None, :, None]
    j = torch.arange(keys, device=device)[None, None, None, :]
    zero = (b + h + i + j) * 0
    bits = philox(seed, j + zero, i + zero, b * heads + h + zero)
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return uniform >= dropout


def scores(q: Tensor, k: Tensor, shape: Shape, slopes: Tensor | None) -> Tensor:
    """(B, H, S_q, S_k) in fp32, -inf where a key is not seen; q and k are (B, S, H, D) and (B, S_k, H_kv, D)."""
    group = q.shape[2] // k.shape[2]
    wide_k = k.repeat_interleave(group, dim=2)
    score = torch.einsum("bihd,bjhd->bhij", q.float(), wide_k.float()) * shape.scale
    if shape.softcap:
        score = shape.softcap * torch.tanh(score / shape.softcap)
    queries, keys = q.shape[1], k.shape[1]
    if slopes is not None:
        shift = 0 if shape.top_left else keys - queries
        rows = torch.arange(queries, device=q.device)[:, None] + shift
        distance = (rows - torch.arange(keys, device=q.device)[None, :]).abs().float()
        per_head = slopes.float() if slopes.dim() == 2 else slopes.float()[None]
        score = score - per_head[:, :, None, None] * distance
    return score.masked_fill(~visible(queries, keys, shape, q.device), -math.inf)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    *,
    slopes: Tensor | None = None,
    seed: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(O, LSE): (B, S_q, H, D) in q's dtype and (B, H, S_q) in fp32; differentiable. A row that sees nothing: 0 and -inf.

    With cumulative lengths the sequences of a packed (1, T, H, D) are done one after the other; rows of none see nothing.
    """
    key = 0 if seed is None else int(seed)
    if cu_q is None or cu_k is None:
        return _dense(q, k, v, shape, slopes, key, 0)
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    outs, lses = [], []
    for index in range(len(q_ends) - 1):
        own_q, own_k = slice(q_ends[index], q_ends[index + 1]), slice(k_ends[index], k_ends[index + 1])
        own_slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[index : index + 1]
        out, lse = _dense(q[:, own_q], k[:, own_k], v[:, own_k], shape, own_slopes, key, index)
        outs.append(out)
        lses.append(lse)
    rest = q[:, q_ends[-1] :]
    outs.append(torch.zeros_like(rest))
    lses.append(torch.full((1, q.shape[2], rest.shape[1]), -math.inf, device=q.device))
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _probabilities(score: Tensor, lse: Tensor) -> Tensor:
    """Softmax over the keys, zero where a row sees none; not exp(score - LSE), whose error grows with the score."""
    empty = torch.isneginf(lse)[..., None]
    # filled on both sides: a row of -inf would be NaN, and would send NaN back
    return torch.softmax(score.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, slopes: Tensor | None, seed: int, first: int
) -> tuple[Tensor, Tensor]:
    if not k.shape[1]:
        nothing = (q * 0).to(q.dtype)
        return nothing, torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, device=q.device)
    score = scores(q, k, shape, slopes)
    lse = torch.logsumexp(score, dim=-1)
    weight = _probabilities(score, lse)
    if shape.dropout:
        keep = kept(seed, first, q.shape[0], q.shape[2], q.shape[1], k.shape[1], shape.dropout, q.device)
        weight = torch.where(keep, weight / (1 - shape.dropout), 0.0)
    wide_v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).float()
    return torch.einsum("bhij,bjhd->bihd", weight, wide_v).to(q.dtype), lse


def reference_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    *,
    slopes: Tensor | None = None,
    seed: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) of `reference` by the formulas of attention_backward, for where autograd does not reach: inside an operator."""
    key = 0 if seed is None else int(seed)
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    if cu_q is None or cu_k is None:
        parts = [(0, (0, q.shape[1]), (0, k.shape[1]))]
    else:
        q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
        parts = [(i, (q_ends[i], q_ends[i + 1]), (k_ends[i], k_ends[i + 1])) for i in range(len(q_ends) - 1)]
    for index, own_q, own_k in parts:
        of_q, of_k = slice(*own_q), slice(*own_k)
        own_slopes = slopes if cu_q is None or slopes is None or slopes.dim() == 1 else slopes[index : index + 1]
        own_lse = None if grad_lse is None else grad_lse[:, :, of_q]
        found = _dense_gradients(
            grad[:, of_q], own_lse, q[:, of_q], k[:, of_k], v[:, of_k], shape, own_slopes, key, index
        )
        for whole, part, own in zip((dq, dk, dv), found, (of_q, of_k, of_k), strict=True):
            whole[:, own] = part
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _dense_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    slopes: Tensor | None,
    seed: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[2], k.shape[2]
    wide_k, wide_v = (x.float().repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    score = scores(q, k, shape, slopes)
    lse = torch.logsumexp(score, dim=-1)
    weight = _probabilities(score, lse)
    keep: Tensor | float = 1.0
    if shape.dropout:
        kept_pairs = kept(seed, first, q.shape[0], heads, q.shape[1], k.shape[1], shape.dropout, q.device)
        keep = kept_pairs.float() / (1 - shape.dropout)
    dp = torch.einsum("bihd,bjhd->bhij", grad.float(), wide_v) * keep
    delta = (weight * dp).sum(-1)  # = rowsum(dO ∘ O)
    if grad_lse is not None:
        delta = delta - torch.where(torch.isneginf(lse), 0.0, grad_lse.float())
    ds = weight * (dp - delta[..., None])
    if shape.softcap:
        plain = torch.einsum("bihd,bjhd->bhij", q.float(), wide_k) * shape.scale
        ds = ds * (1 - torch.tanh(plain / shape.softcap) ** 2)
    dq = torch.einsum("bhij,bjhd->bihd", ds, wide_k) * shape.scale
    dk = torch.einsum("bhij,bihd->bjhd", ds, q.float()) * shape.scale
    dv = torch.einsum("bhij,bihd->bjhd", weight * keep, grad.float())
    dk, dv = (x.unflatten(2, (kv_heads, heads // kv_heads)).sum(3) for x in (dk, dv))
    return dq, dk, dv
