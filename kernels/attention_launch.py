"""Launches of the attention kernels: tensor layouts, descriptors or pointers, grids. Shapes as in `attention`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shardplan.kernels.attention_forward import attention_forward_kernel
from shardplan.kernels.attention_reference import Shape
from shardplan.kernels.attention_specialised import attention_specialised_kernel
from shardplan.kernels.attention_tiles import Tiles, tiles
from shardplan.kernels.interpreter import INTERPRETED

HOPPER = (9, 0)


class Sequences:
    """Lengths of a call: a dense batch, or packed sequences by their cumulative lengths."""

    def __init__(
        self, q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, longest: tuple[int, int]
    ) -> None:
        self.packed = cu_q is not None
        self.cu_q, self.cu_k = cu_q, cu_k
        self.count = q.shape[0] if cu_q is None else cu_q.numel() - 1
        self.queries, self.keys = (q.shape[1], k.shape[1]) if cu_q is None else longest


def padded_dimension(head_dim: int) -> int:
    """The head dimension as a tile holds it: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, row) strides of (B, S, H, D)."""
    return x.stride(0), x.stride(2), x.stride(1)


def describable(*tensors: Tensor) -> bool:
    """Whether tiles of (B, S, H, D) tensors can be loaded by descriptor (TMA): Hopper or later, 16-byte strides and base."""
    if not INTERPRETED and torch.cuda.get_device_capability(tensors[0].device) < HOPPER:
        return False
    return all(
        (x.element_size() == 2 or INTERPRETED)
        and x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 and stride > 0 for stride in strides(x))
        and all(size > 0 for size in x.shape)
        for x in tensors
    )


def source(x: Tensor, rows: int, block_d: int, tma: bool) -> Any:
    """What a kernel loads tiles of (rows, block_d) from: a descriptor of the (B, H, S, D) view, or the tensor."""
    if not tma:
        return x
    view = x.transpose(1, 2)
    return TensorDescriptor(view, list(view.shape), list(view.stride()), [1, 1, rows, block_d])


def flags(shape: Shape, sequences: Sequences, slopes: Tensor | None) -> dict[str, bool]:
    """The compile-time switches of every kernel."""
    return {
        "HAS_LEFT": shape.left >= 0,
        "HAS_RIGHT": shape.right >= 0,
        "TOP_LEFT": shape.top_left,
        "SOFTCAP": shape.softcap > 0,
        "ALIBI": slopes is not None,
        "DROPOUT": shape.dropout > 0,
        "VARLEN": sequences.packed,
    }


def constants(x: Tensor, tile: Tiles, *, tma: bool) -> dict[str, Any]:
    """Tile sizes and launch options."""
    return {
        "D": x.shape[3],
        "BLOCK_D": padded_dimension(x.shape[3]),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "TMA": tma,
        "PRECISION": "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def scalars(slopes: Tensor | None, q: Tensor, k: Tensor, sequences: Sequences, shape: Shape) -> tuple[Any, ...]:
    """The trailing run-time arguments that every kernel takes."""
    slope_stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    return (
        slope_stride,
        q.shape[2] // k.shape[2],
        sequences.queries,
        sequences.keys,
        shape.left,
        shape.right,
        float(shape.scale),
        float(shape.softcap),
        float(shape.dropout),
    )


def pick(kernel: str, q: Tensor, tma: bool) -> Tiles:
    """Tiles of `kernel` for this head dimension and dtype."""
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    return tiles(
        kernel,
        block_d=padded_dimension(q.shape[3]),
        tma=tma,
        element_bytes=q.element_size(),
        capability=10 * major + minor,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    sequences: Sequences,
    slopes: Tensor | None,
    seed: Tensor | None,
    tile: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(O, LSE) as (B, S, H, D) contiguous and (B, H, S); `tile` instead of the table's."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if sequences.packed or k.shape[1] == 0:  # rows of no sequence, or without any key
        out.zero_()
        lse.fill_(-torch.inf)
    if q.numel() == 0 or k.shape[1] == 0 or sequences.count == 0:
        return out, lse
    tma = describable(q, k, v)
    tile = tile or pick("forward", q, tma)
    block_d = padded_dimension(q.shape[3])
    grid = (triton.cdiv(sequences.queries, tile.queries), q.shape[2], sequences.count)
    attention_forward_kernel[grid](
        source(q, tile.queries, block_d, tma),
        source(k, tile.keys, block_d, tma),
        source(v, tile.keys, block_d, tma),
        out,
        lse,
        sequences.cu_q,
        sequences.cu_k,
        slopes,
        seed,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        lse.stride(0),
        lse.stride(1),
        *scalars(slopes, q, k, sequences, shape),
        **flags(shape, sequences, slopes),
        **constants(q, tile, tma=tma),
    )
    return out, lse


def specialisable(q: Tensor, k: Tensor, v: Tensor, shape: Shape, sequences: Sequences, slopes: Tensor | None) -> bool:
    """Whether the warp-specialised forward pass covers this call."""
    plain = slopes is None and not (shape.softcap or shape.dropout or sequences.packed or shape.top_left)
    masks = shape.left < 0 and shape.right <= 0
    return plain and masks and q.shape[3] in {64, 128} and q.numel() > 0 and k.numel() > 0 and describable(q, k, v)


def is_ragged(q: Tensor, keys: int, tile: Tiles | None = None) -> bool:
    """Whether the last tile of keys of the warp-specialised kernel is not full."""
    return keys % (tile or pick("specialised", q, True)).keys != 0


def specialised_forward(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, tile: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """(O, LSE) by the warp-specialised kernel; only where `specialisable`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    tile = tile or pick("specialised", q, True)
    triton.set_allocator(_workspace)
    attention_specialised_kernel[(triton.cdiv(q.shape[1], tile.queries), q.shape[2], q.shape[0])](
        q,
        k,
        v,
        out,
        lse,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        lse.stride(0),
        lse.stride(1),
        q.shape[2] // k.shape[2],
        q.shape[1],
        k.shape[1],
        k.shape[1] - q.shape[1],
        float(shape.scale),
        D=q.shape[3],
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        CAUSAL=shape.right == 0,
        RAGGED=is_ragged(q, k.shape[1], tile),
        SPECIALISE=True,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


def _workspace(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Where a kernel keeps descriptors that it makes itself."""
    return torch.empty(size, dtype=torch.int8, device="cpu" if INTERPRETED else "cuda")
