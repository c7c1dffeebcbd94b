"""Block quantisation in plain torch: what the kernels must equal bit for bit, and what CPU tensors run.

Formulas and layout: `packing.py`. Everything is done in fp32 and int64 on whole tensors; nothing here is fast.
"""

from __future__ import annotations

import torch

from shardplan.kernels.packing import LARGEST_CODE, SMALLEST_SCALE, Packing, part_numel, swizzled_row

PHILOX_ROUNDS = 7
_LOW = 0xFFFFFFFF


def _rows(partitions: int, devices_per_node: int, device: torch.device) -> torch.Tensor:
    """Row of every part."""
    order = [swizzled_row(part, partitions, devices_per_node) for part in range(partitions)]
    return torch.tensor(order, device=device)


def block_scale(largest: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Scale of blocks with these largest magnitudes (fp32): rounded up, 0 for zeros, NaN for NaN and infinity."""
    finite = torch.isfinite(largest)
    # By a tensor: CUDA would multiply by the rounded inverse of a number instead of dividing.
    scale = torch.where(finite, largest, 0.0) / torch.full_like(largest, LARGEST_CODE[packing.kind])
    dropped = 0xFFFF if packing.scale_bytes == 2 else 0x1FF
    scale = ((scale.view(torch.int32) + dropped) & ~dropped).view(torch.float32)
    return torch.where(finite, torch.where(scale >= SMALLEST_SCALE, scale, 0.0), float("nan"))


def _multiply_high(a: int, b: torch.Tensor) -> torch.Tensor:
    """High 32 bits of the product of unsigned 32-bit numbers held in int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16


def dither(seed: torch.Tensor, parts: int, numel: int, stage: int) -> torch.Tensor:
    """Uniform in (-1/2, 1/2), fp32 [parts, numel]: 16 bits of Philox4x32-7 (Salmon 2011) for each element of each part.

    Key: seed. Counter: (element / 8, its high word, part, stage); element % 8 picks word (of four) and half (low, high).
    """
    group = torch.arange(-(-numel // 8), device=seed.device)[None, :]
    part = torch.arange(parts, device=seed.device)[:, None]
    zero = torch.zeros_like(group + part)
    words = [zero + (group & _LOW), zero + (group >> 32), zero + part, zero + stage]
    key = [seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW]
    for _ in range(PHILOX_ROUNDS):
        word0, word1, word2, word3 = words
        words = [
            _multiply_high(0xCD9E8D57, word2) ^ word1 ^ key[0],
            (0xCD9E8D57 * word2) & _LOW,
            _multiply_high(0xD2511F53, word0) ^ word3 ^ key[1],
            (0xD2511F53 * word0) & _LOW,
        ]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    bits = halves.reshape(parts, -1)[:, :numel]
    return (bits.float() / 65536 - 0.5) + 2.0**-17


def encode(x: torch.Tensor, packing: Packing, seed: torch.Tensor | None, stage: int) -> torch.Tensor:
    """fp32 [rows, blocks · block] as uint8 [rows, row_bytes]."""
    rows = x.shape[0]
    blocks = x.reshape(rows, -1, packing.block)
    scale = block_scale(blocks.abs().amax(dim=2, keepdim=True), packing)
    used = scale > 0
    inverse = torch.where(used, 1.0 / torch.where(used, scale, 1.0), 0.0)
    scaled = torch.where(torch.isnan(scale), 0.0, blocks * inverse)
    if packing.kind == "fp8":
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        if seed is not None:
            most = LARGEST_CODE[packing.kind]
            scaled = scaled.clamp(-most, most) + dither(seed, rows, x.shape[1], stage).view_as(scaled)
        else:  # the exact product is rounded, once
            scaled = torch.where(torch.isnan(scale), 0.0, blocks.double() * inverse.double())
        codes = scaled.round().to(torch.int8).view(torch.uint8)
        if packing.kind == "int4":
            low, high = codes.chunk(2, dim=2)
            codes = (low & 0xF) | ((high & 0xF) << 4)
    bits = scale.reshape(rows, -1).view(torch.int32)
    # The upper half of an fp32, rounded by block_scale, is the bf16; torch's own cast writes NaN in more than one way.
    scales = (bits if packing.scale_bytes == 4 else (bits >> 16).to(torch.int16)).view(torch.uint8)
    row = torch.cat([codes.reshape(rows, -1), scales], dim=1)
    return torch.nn.functional.pad(row, (0, packing.row_bytes(x.shape[1]) - row.shape[1]))


def quantize(
    x: torch.Tensor, packing: Packing, partitions: int, devices_per_node: int, seed: torch.Tensor | None
) -> torch.Tensor:
    """Any shape as uint8 [partitions, row_bytes]; arguments as in `quantize.quantize`, the seed as a tensor."""
    part = part_numel(x.numel(), partitions)
    if part == 0:
        return torch.empty((partitions, 0), dtype=torch.uint8, device=x.device)
    flat = torch.nn.functional.pad(x.reshape(-1).float(), (0, partitions * part - x.numel())).view(partitions, part)
    flat = torch.nn.functional.pad(flat, (0, packing.blocks(part) * packing.block - part))
    packed = encode(flat, packing, seed, stage=0)
    out = torch.empty_like(packed)
    out[_rows(partitions, devices_per_node, x.device)] = packed
    return out


def decode(packed: torch.Tensor, blocks: int, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [..., row_bytes] of `blocks` blocks as (codes, scales), fp32 [..., blocks, block] and [..., blocks, 1]."""
    lead = packed.shape[:-1]
    code_bytes = packing.code_bytes(blocks * packing.block)
    codes = packed[..., :code_bytes].reshape(*lead, blocks, -1)
    scales = packed[..., code_bytes : code_bytes + blocks * packing.scale_bytes].contiguous().view(packing.scale_dtype)
    if packing.kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    elif packing.kind == "int8":
        values = codes.view(torch.int8).float()
    else:
        nibbles = torch.cat([codes & 0xF, codes >> 4], dim=-1).float()
        values = torch.where(nibbles < 8, nibbles, nibbles - 16)
    return values, scales.float().unsqueeze(-1)


def sum_sources(codes: torch.Tensor, scales: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Sum over the first axis of code · scale, fp32, in the kernels' order of operations.

    int4 of several sources: scales as integers of 16 bits of the largest, whose sums with the codes are exact up to 36
    sources. Else, from several, the offsets are taken off first, then come sums of (code + offset) · scale.
    """
    if len(codes) == 1:
        return codes[0] * scales[0]
    if packing.kind == "int4":
        largest = scales.amax(dim=0)
        exponent = (largest.view(torch.int32) & 0x7F800000).clamp(min=(127 - 100) << 23)
        unit = (exponent - (15 << 23)).view(torch.float32)
        fixed = (scales / unit).round().clamp(max=2.0**16 - 1)
        return torch.where(torch.isfinite(largest), (codes * fixed).sum(0) * unit, float("nan"))
    offset = {"int8": 384.0, "fp8": 0.0}[packing.kind]
    total = torch.zeros_like(scales[0])
    for scale in scales:
        total = total - offset * scale
    for code, scale in zip(codes, scales, strict=True):
        total = total + (code + offset) * scale
    return total


def reduce_sources(packed: torch.Tensor, blocks: int, packing: Packing, factor: float) -> torch.Tensor:
    """factor · sum over the first axis of uint8 [sources, rows, row_bytes], fp32 [rows, blocks · block]."""
    codes, scales = decode(packed, blocks, packing)
    return (sum_sources(codes, scales, packing) * factor).reshape(packed.shape[1], -1)


def dequantize(
    packed: torch.Tensor, numel: int, dtype: torch.dtype, packing: Packing, devices_per_node: int, factor: float
) -> torch.Tensor:
    """uint8 [sources, partitions, row_bytes] as `dtype` [numel]: factor · sum over sources."""
    partitions = packed.shape[1]
    part = part_numel(numel, partitions)
    if part == 0:
        return torch.empty(0, dtype=dtype, device=packed.device)
    parts = packed[:, _rows(partitions, devices_per_node, packed.device)]
    values = reduce_sources(parts, packing.blocks(part), packing, factor)
    return values[:, :part].reshape(-1)[:numel].to(dtype)


def dequantize_reduce_quantize(
    packed: torch.Tensor, numel: int, packing: Packing, factor: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """uint8 [sources, rows, row_bytes] as [rows, row_bytes]: factor · sum over sources, quantised again."""
    if numel == 0:
        return torch.empty_like(packed[0])
    return encode(reduce_sources(packed, packing.blocks(numel), packing, factor), packing, seed, stage=1)
