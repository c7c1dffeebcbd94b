"""The bytes of a block-quantised tensor: codes and their scales in ONE uint8 buffer, so that one collective moves both.

A tensor of `numel` elements, taken flat, is cut into `partitions` parts of `part = ceil(numel / partitions)` elements; each
part fills one row of a uint8 tensor [partitions, row_bytes]:

    | codes: blocks · block · bits / 8 bytes | scales: blocks · (4 or 2) bytes | zeros up to a multiple of 16 bytes |

with `blocks = ceil(part / block)`; what lies past the end of a part counts as zeros, so every byte of a row is defined.

* Codes. int8: two's complement, -127..127. fp8: e4m3fn, at most ±448. int4: two's complement, -7..7, two per byte; byte j
  of a block holds element j in its low half and element j + block / 2 in its high half (both halves of a block are read and
  written as contiguous runs, so no lane has to shuffle elements).
* Scales. One a block, fp32 or bf16, little-endian: the largest magnitude of the block over the largest code, rounded UP to
  15 (bf16: 8) significant bits. Rounded up, no value is clipped; with so few bits `code · scale` is exact in fp32, so a
  fused multiply-add and separate operations give the same sum and the kernels equal their reference bit for bit.
* A block of zeros (or of magnitudes under largest code · 2^-100) has scale 0 and codes 0: it returns as exact zeros.
* A block with a NaN or an infinity has scale NaN and codes 0: it returns as NaN throughout, so overflow is never hidden.

Swizzle of the hierarchical all-to-all (ZeRO++, arXiv 2306.10209, section 3.3): with L devices a node and n nodes, the part
of rank p lies in row (p mod L) · n + p div L. Rows for one local device are then contiguous for the all-to-all inside a
node, and what a device receives is already ordered by node for the second hop. L = 1 is the plain order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALIGN_BYTES = 16
MIN_BLOCK = 64
MAX_BLOCK = 8192
LARGEST_CODE = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
SMALLEST_SCALE = 2.0**-100
"""Below it a block counts as zeros: 1 / scale stays far from overflow and no result hangs on how denormals are treated."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a tensor is quantised: kind of code, elements per scale, type of the scale."""

    kind: str = "int8"
    """`int8`, `int4` (two per byte) or `fp8` (e4m3fn)."""
    block: int = 2048
    """Elements that share a scale: a power of two, 64 to 8192."""
    scale_dtype: torch.dtype = torch.float32
    """`torch.float32` or `torch.bfloat16`."""

    def __post_init__(self) -> None:
        if self.kind not in LARGEST_CODE:
            raise ValueError(f"kind={self.kind!r} is not a kind of code; use {', '.join(LARGEST_CODE)}")
        if not MIN_BLOCK <= self.block <= MAX_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two from {MIN_BLOCK} to {MAX_BLOCK}; use e.g. 512")
        if self.scale_dtype not in {torch.float32, torch.bfloat16}:
            raise ValueError(f"scale_dtype={self.scale_dtype}; use torch.float32 or torch.bfloat16")

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return self.scale_dtype.itemsize

    def blocks(self, numel: int) -> int:
        """Blocks that hold `numel` elements."""
        return -(-numel // self.block)

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of `numel` elements, whole blocks; the scales follow them."""
        return self.blocks(numel) * self.block // (2 if self.kind == "int4" else 1)

    def row_bytes(self, numel: int) -> int:
        """Bytes of a row that holds `numel` elements: codes, scales, padding."""
        used = self.code_bytes(numel) + self.blocks(numel) * self.scale_bytes
        return -(-used // ALIGN_BYTES) * ALIGN_BYTES


def part_numel(numel: int, partitions: int) -> int:
    """Elements of one part of a tensor of `numel` elements cut into `partitions`; the last parts may hold fewer, or none."""
    return -(-numel // partitions)


def swizzled_row(partition: int, partitions: int, devices_per_node: int) -> int:
    """Row in which the part of rank `partition` lies when there are `devices_per_node` devices in a node."""
    return partition % devices_per_node * (partitions // devices_per_node) + partition // devices_per_node


def check_split(partitions: int, devices_per_node: int) -> None:
    """Refuse a number of parts that no whole number of nodes makes up."""
    if partitions < 1 or devices_per_node < 1 or partitions % devices_per_node:
        raise ValueError(
            f"partitions={partitions}, devices_per_node={devices_per_node}: parts must be a positive multiple of the "
            "devices of a node; use partitions = nodes · devices_per_node, or devices_per_node=1 for no swizzle"
        )


def check_packed(packed: torch.Tensor, shape: tuple[int, ...], packing: Packing, numel: int) -> None:
    """Refuse a buffer that is not uint8 of `shape`, the shape that `packing` gives rows of `numel` elements."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed has dtype {packed.dtype}; pass the uint8 buffer that quantize returned")
    if tuple(packed.shape) != shape:
        raise ValueError(
            f"packed has shape {list(packed.shape)}, but rows of {numel} elements in {packing} need {list(shape)}; "
            "pass the numel, partitions and packing that quantize was called with"
        )
