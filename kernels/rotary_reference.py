"""Rotary embedding in plain torch: what the kernel of `rotary.py` is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool, inverse: bool
) -> Tensor:
    """`x` (B, S, N, D) turned in plain torch, in fp32 (fp64 for fp64 inputs); contiguous."""
    wide = torch.promote_types(x.dtype, torch.float32)
    index = torch.arange(offset, offset + x.shape[1], device=x.device) if positions is None else positions
    if positions is not None and not index.is_meta and index.numel() and int(index.min()) < 0:
        raise IndexError(f"position {int(index.min())} is below 0")
    c, s = (table.to(wide)[index].unsqueeze(-2) for table in (cos, sin))  # ((B,) S, 1, R/2)
    s = -s if inverse else s
    half = cos.shape[1]
    turning, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.split(half, dim=-1)
    turned = (a * c - b * s, b * c + a * s)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), rest), dim=-1).contiguous()
