"""NF4 in plain torch, and its levels and byte layout: what the kernels must equal bit for bit, and what CPU tensors run.

Formulas and layout: `normal_float.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from shardplan.kernels import quantize_reference
from shardplan.kernels.packing import ALIGN_BYTES, MAX_BLOCK, MIN_BLOCK, SMALLEST_SCALE, Packing

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution scaled to [-1, 1], with an exact zero: QLoRA, appendix E."""
MIDPOINTS = tuple((low + high) / 2 for low, high in itertools.pairwise(LEVELS))
GROUP = 256
"""Block maxima that share a scale under double quantisation (QLoRA, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Nf4Layout:
    """Where the parts of an NF4 buffer lie."""

    numel: int
    block: int
    double: bool

    def __post_init__(self) -> None:
        if not MIN_BLOCK <= self.block <= MAX_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two from {MIN_BLOCK} to {MAX_BLOCK}; use e.g. 64")

    @property
    def packing(self) -> Packing:
        """How the maxima are quantised."""
        return Packing(kind="int8", block=GROUP)

    @property
    def blocks(self) -> int:
        """Blocks, each with a maximum."""
        return -(-self.numel // self.block)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes; the maxima follow."""
        return self.blocks * self.block // 2

    @property
    def total_bytes(self) -> int:
        """Bytes of the buffer."""
        if self.double:
            return self.code_bytes + self.packing.row_bytes(self.blocks) + ALIGN_BYTES * (self.blocks > 0)
        return -(-(self.code_bytes + 4 * self.blocks) // ALIGN_BYTES) * ALIGN_BYTES

    def empty(self, device: torch.device) -> torch.Tensor:
        """A buffer of which only the padding is written, with zeros."""
        packed = torch.empty(self.total_bytes, dtype=torch.uint8, device=device)
        packed[-ALIGN_BYTES:].zero_()
        return packed

    def maxima(self, packed: torch.Tensor) -> torch.Tensor:
        """The fp32 maxima [blocks], or with double quantisation their scales, a view."""
        if self.double:
            start = self.code_bytes + self.packing.code_bytes(self.blocks)
            return packed[start : start + 4 * self.packing.blocks(self.blocks)].view(torch.float32)
        return packed[self.code_bytes : self.code_bytes + 4 * self.blocks].view(torch.float32)

    def maxima_row(self, packed: torch.Tensor) -> torch.Tensor:
        """With double quantisation: the int8 row of the maxima, [1, row_bytes], a view."""
        return packed[self.code_bytes : self.code_bytes + self.packing.row_bytes(self.blocks)].unsqueeze(0)

    def mean(self, packed: torch.Tensor) -> torch.Tensor:
        """With double quantisation: the mean that was taken off the maxima, fp32 [1], a view of the last 16 bytes."""
        return packed[self.total_bytes - ALIGN_BYTES :].view(torch.float32)[:1]


def finite_mean(maxima: torch.Tensor) -> torch.Tensor:
    """Mean of the finite ones of `maxima`, fp32 [1]; 0 if there are none."""
    finite = torch.isfinite(maxima)
    return (torch.where(finite, maxima, 0.0).sum() / finite.sum().clamp(min=1)).reshape(1)


def quantize_nf4(x: torch.Tensor, block: int, double: bool) -> torch.Tensor:
    """Any shape as NF4, uint8 [bytes]."""
    layout = Nf4Layout(numel=x.numel(), block=block, double=double)
    packed = layout.empty(x.device)
    if layout.numel == 0:
        return packed
    flat = torch.nn.functional.pad(x.reshape(-1).float(), (0, layout.blocks * block - layout.numel)).view(-1, block)
    largest = flat.abs().amax(dim=1, keepdim=True)
    finite = torch.isfinite(largest)
    used = finite & (largest >= SMALLEST_SCALE)
    maxima = torch.where(used, largest, torch.where(finite, 0.0, float("nan")))
    scaled = torch.where(finite, flat * torch.where(used, 1.0 / torch.where(used, largest, 1.0), 0.0), 0.0)
    codes = torch.bucketize(scaled, torch.tensor(MIDPOINTS, device=x.device)).to(torch.uint8)
    low, high = codes.chunk(2, dim=1)
    packed[: layout.code_bytes] = (low | (high << 4)).reshape(-1)
    if not double:
        layout.maxima(packed).copy_(maxima.reshape(-1))
        return packed
    mean = finite_mean(maxima.reshape(-1))
    layout.maxima_row(packed).copy_(quantize_reference.quantize(maxima.reshape(-1) - mean, layout.packing, 1, 1, None))
    layout.mean(packed).copy_(mean)
    return packed


def dequantize_nf4(packed: torch.Tensor, dtype: torch.dtype, layout: Nf4Layout) -> torch.Tensor:
    """NF4 uint8 [bytes] as `dtype` [numel]."""
    if layout.numel == 0:
        return torch.empty(0, dtype=dtype, device=packed.device)
    codes = packed[: layout.code_bytes].view(layout.blocks, -1)
    values = torch.tensor(LEVELS, device=packed.device)[torch.cat([codes & 0xF, codes >> 4], dim=1).long()]
    if layout.double:
        row = layout.maxima_row(packed)
        codes, scales = quantize_reference.decode(row, layout.packing.blocks(layout.blocks), layout.packing)
        maxima = (codes * scales).reshape(-1)[: layout.blocks] + layout.mean(packed)
        maxima = torch.where(maxima < 0, 0.0, maxima)
    else:
        maxima = layout.maxima(packed)
    return (values * maxima[:, None]).reshape(-1)[: layout.numel].to(dtype)
