"""Inside the kernels that read codes: the sum over sources of code · scale, in fp32. Layout: `packing.py`.

One multiply-add for an element and source, by codes read behind an offset, bounds int4 by instructions, not memory, with
several sources. There the sum is one of integers instead: the bytes of four sources for one place are brought together and
multiplied with four scales in two dot products of 16 by 8 bits (dp2a), each half of a byte for itself.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.interpreter import WIDEN
from shardplan.kernels.quantize_scale import larger, load_scale
from shardplan.kernels.quantize_tiles import ROUND_MAGIC, decode

LARGEST_SCALE: tl.constexpr = tl.constexpr(2.0**16 - 1.0)
ROUND_MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B400000)
"""Of 1.5 · 2^23: such a float plus an integer, as bits."""
LEAST_EXPONENT: tl.constexpr = tl.constexpr((127 - 100) << 23)
"""Of 2^-100, the smallest scale, as bits."""
UNIT_EXPONENT: tl.constexpr = tl.constexpr(15 << 23)
"""From a number of 16 bits to that of its last bit."""
GROW_BITS: tl.constexpr = tl.constexpr((254 << 23) + (15 << 23) - (1 << 32))
"""Minus the bits of 2^e: those of 2^(15 - e)."""


@triton.jit
def scale_of(scales, source, source_bytes, block, HALF_SCALE: tl.constexpr):
    """Scales of the blocks of a tile from one source."""
    return load_scale(
        scales + tl.cast(source, tl.int64) * (source_bytes // (2 if HALF_SCALE else 4)) + block, HALF_SCALE
    )


@triton.jit
def add_four(low, high, code0, code1, code2, code3, scale01, scale23):
    """`low`, `high` plus scale · (code + 8) of the low and the high halves of four bytes, in 32-bit integers.

    `scale01`: 16 bits of the first scale, those of the second above them.
    """
    if WIDEN:
        scale0 = scale01 & 0xFFFF
        scale1 = (scale01 >> 16) & 0xFFFF
        scale2 = scale23 & 0xFFFF
        scale3 = (scale23 >> 16) & 0xFFFF
        for half in tl.static_range(2):
            added = (((code0.to(tl.int32) >> (4 * half)) & 0xF) ^ 8) * scale0
            added += (((code1.to(tl.int32) >> (4 * half)) & 0xF) ^ 8) * scale1
            added += (((code2.to(tl.int32) >> (4 * half)) & 0xF) ^ 8) * scale2
            added += (((code3.to(tl.int32) >> (4 * half)) & 0xF) ^ 8) * scale3
            if half == 0:
                low += added
            else:
                high += added
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second, four0, four1, four2, four3, half;
            prmt.b32 first, $16, $17, 0x5140;
            prmt.b32 second, $18, $19, 0x5140;
            prmt.b32 four0, first, second, 0x5410;
            prmt.b32 four1, first, second, 0x7632;
            prmt.b32 first, $16, $17, 0x7362;
            prmt.b32 second, $18, $19, 0x7362;
            prmt.b32 four2, first, second, 0x5410;
            prmt.b32 four3, first, second, 0x7632;
            lop3.b32 half, four0, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $0, $20, half, $8;
            dp2a.hi.u32.u32 $0, $24, half, $0;
            lop3.b32 half, four1, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $1, $20, half, $9;
            dp2a.hi.u32.u32 $1, $24, half, $1;
            lop3.b32 half, four2, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $2, $20, half, $10;
            dp2a.hi.u32.u32 $2, $24, half, $2;
            lop3.b32 half, four3, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $3, $20, half, $11;
            dp2a.hi.u32.u32 $3, $24, half, $3;
            shr.u32 half, four0, 4;
            lop3.b32 half, half, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $4, $20, half, $12;
            dp2a.hi.u32.u32 $4, $24, half, $4;
            shr.u32 half, four1, 4;
            lop3.b32 half, half, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $5, $20, half, $13;
            dp2a.hi.u32.u32 $5, $24, half, $5;
            shr.u32 half, four2, 4;
            lop3.b32 half, half, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $6, $20, half, $14;
            dp2a.hi.u32.u32 $6, $24, half, $6;
            shr.u32 half, four3, 4;
            lop3.b32 half, half, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp2a.lo.u32.u32 $7, $20, half, $15;
            dp2a.hi.u32.u32 $7, $24, half, $7;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [low, high, code0, code1, code2, code3, scale01, scale23],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def read_codes(codes, source_bytes, COUNT: tl.constexpr):
    """The tiles of COUNT sources from the one at `codes` on, 1 to 8; the first or fifth again for the rest of eight."""
    code0 = tl.load(codes)
    code1 = tl.load(codes + source_bytes) if COUNT > 1 else code0
    code2 = tl.load(codes + 2 * source_bytes) if COUNT > 2 else code0
    code3 = tl.load(codes + 3 * source_bytes) if COUNT > 3 else code0
    code4 = tl.load(codes + 4 * source_bytes) if COUNT > 4 else code0
    code5 = tl.load(codes + 5 * source_bytes) if COUNT > 5 else code4
    code6 = tl.load(codes + 6 * source_bytes) if COUNT > 6 else code4
    code7 = tl.load(codes + 7 * source_bytes) if COUNT > 7 else code4
    return code0, code1, code2, code3, code4, code5, code6, code7


@triton.jit
def read_scales(scales, source_bytes, block, first, COUNT: tl.constexpr, HALF_SCALE: tl.constexpr):
    """Scales of COUNT sources from `first` on, 1 to 8; zeros for the rest of eight."""
    none = tl.zeros(block.shape, tl.float32)
    scale0 = scale_of(scales, first, source_bytes, block, HALF_SCALE)
    scale1 = scale_of(scales, first + 1, source_bytes, block, HALF_SCALE) if COUNT > 1 else none
    scale2 = scale_of(scales, first + 2, source_bytes, block, HALF_SCALE) if COUNT > 2 else none
    scale3 = scale_of(scales, first + 3, source_bytes, block, HALF_SCALE) if COUNT > 3 else none
    scale4 = scale_of(scales, first + 4, source_bytes, block, HALF_SCALE) if COUNT > 4 else none
    scale5 = scale_of(scales, first + 5, source_bytes, block, HALF_SCALE) if COUNT > 5 else none
    scale6 = scale_of(scales, first + 6, source_bytes, block, HALF_SCALE) if COUNT > 6 else none
    scale7 = scale_of(scales, first + 7, source_bytes, block, HALF_SCALE) if COUNT > 7 else none
    return scale0, scale1, scale2, scale3, scale4, scale5, scale6, scale7


@triton.jit
def largest_of(scale0, scale1, scale2, scale3, scale4, scale5, scale6, scale7):
    """Of eight scales, NaN if one is."""
    first = larger(larger(scale0, scale1), larger(scale2, scale3))
    return larger(first, larger(larger(scale4, scale5), larger(scale6, scale7)))


@triton.jit
def fixed_pair(scale0, scale1, grow):
    """round(scale · grow) of two scales as integers of 16 bits: the second above the first, and their sum."""
    first = (tl.minimum(scale0 * grow, LARGEST_SCALE) + ROUND_MAGIC).to(tl.int32, bitcast=True) & 0xFFFF
    second = (tl.minimum(scale1 * grow, LARGEST_SCALE) + ROUND_MAGIC).to(tl.int32, bitcast=True) & 0xFFFF
    return first | (second << 16), first + second


@triton.jit
def add_sources(
    low, high, grow, code0, code1, code2, code3, code4, code5, code6, code7,
    scale0, scale1, scale2, scale3, scale4, scale5, scale6, scale7, COUNT: tl.constexpr,
):  # fmt: skip
    """`low`, `high` plus sums of scale · code over COUNT sources, 1 to 8, as floats that are integers."""
    pair0, sum0 = fixed_pair(scale0, scale1, grow)
    pair1, sum1 = fixed_pair(scale2, scale3, grow)
    pair2, sum2 = fixed_pair(scale4, scale5, grow)
    pair3, sum3 = fixed_pair(scale6, scale7, grow)
    bits = tl.broadcast_to(-8 * ((sum0 + sum1) + (sum2 + sum3)) + ROUND_MAGIC_BITS, low.shape)
    pair0 = tl.broadcast_to(pair0, low.shape)
    pair1 = tl.broadcast_to(pair1, low.shape)
    low_bits, high_bits = add_four(bits, bits, code0, code1, code2, code3, pair0, pair1)
    if COUNT > 4:
        pair2 = tl.broadcast_to(pair2, low.shape)
        pair3 = tl.broadcast_to(pair3, low.shape)
        low_bits, high_bits = add_four(low_bits, high_bits, code4, code5, code6, code7, pair2, pair3)
    low += low_bits.to(tl.float32, bitcast=True) - ROUND_MAGIC
    high += high_bits.to(tl.float32, bitcast=True) - ROUND_MAGIC
    return low, high


@triton.jit
def sum_halves(
    codes, scales, source_bytes, block, column, factor,
    SOURCES: tl.constexpr, UNROLL: tl.constexpr, WIDTH: tl.constexpr, HALF_SCALE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """`decode_sum` of several int4 sources.

    Scales are rounded to 16 bits of the largest of their place, at most 1.1e-4 of its code step for each other source; sums
    of up to 36 sources are then exact.
    """
    source_bytes = tl.cast(source_bytes, tl.int64)
    codes += block * WIDTH + column
    code_group = read_codes(codes, source_bytes, UNROLL)
    scale_group = read_scales(scales, source_bytes, block, 0, UNROLL, HALF_SCALE)
    largest = largest_of(*scale_group)
    for first in tl.range(UNROLL, SOURCES, UNROLL):
        largest = larger(largest, largest_of(*read_scales(scales, source_bytes, block, first, UNROLL, HALF_SCALE)))
    bits = largest.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, LEAST_EXPONENT)
    grow = (-exponent + GROW_BITS).to(tl.float32, bitcast=True)
    weight = (exponent - UNIT_EXPONENT).to(tl.float32, bitcast=True) * factor
    weight = tl.where(bits < 0x7F800000, weight, float("nan"))
    low = tl.zeros((TILE_BLOCKS, WIDTH), tl.float32)
    high = tl.zeros((TILE_BLOCKS, WIDTH), tl.float32)
    low, high = add_sources(low, high, grow, *code_group, *scale_group, UNROLL)
    for first in tl.range(UNROLL, SOURCES, UNROLL):
        code_group = read_codes(codes + first * source_bytes, source_bytes, UNROLL)
        scale_group = read_scales(scales, source_bytes, block, first, UNROLL, HALF_SCALE)
        low, high = add_sources(low, high, grow, *code_group, *scale_group, UNROLL)
    if not FOLD:
        low *= weight
        high *= weight
        weight = tl.where(bits < 0x7F800000, 1.0, float("nan"))
    return low, high, weight


@triton.jit
def sum_codes(
    codes, scales, source_bytes, block, column, factor,
    SOURCES: tl.constexpr, UNROLL: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, HALF_SCALE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, HARDWARE_FP8: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The sum of `decode_sum` of several int8 or fp8 sources.

    Codes are read as code + offset, whose product with a scale is exact; sums start at minus the offsets' share, so that an
    element and source cost one multiply-add. That adds at most 3e-5 of a code step a source.
    """
    OFFSET: tl.constexpr = 384.0 if KIND == "int8" else 0.0
    start = tl.zeros((TILE_BLOCKS, 1), tl.float32)
    if KIND == "int8":
        for group in tl.range(0, SOURCES, UNROLL):
            for step in tl.static_range(UNROLL):
                scale = scale_of(scales, group + step, source_bytes, block, HALF_SCALE)
                if FOLD:
                    scale *= factor
                start = tl.fma(scale, tl.full((TILE_BLOCKS, 1), -OFFSET, tl.float32), start)
    total = tl.broadcast_to(start, (TILE_BLOCKS, WIDTH))
    for group in tl.range(0, SOURCES, UNROLL):
        for step in tl.static_range(UNROLL):
            source = tl.cast(group + step, tl.int64)
            code = tl.load(codes + source * source_bytes + block * WIDTH + column)
            scale = scale_of(scales, group + step, source_bytes, block, HALF_SCALE)
            if FOLD:
                scale *= factor
            value, _ = decode(code, KIND, HARDWARE_FP8)
            total = tl.fma(value, tl.broadcast_to(scale, (TILE_BLOCKS, WIDTH)), total)
    if not FOLD:
        total *= factor
    return total


@triton.jit
def decode_sum(
    codes, scales, source_bytes, block, column, factor,
    SOURCES: tl.constexpr, UNROLL: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, HALF_SCALE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, HARDWARE_FP8: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """(low, high, weight) of the tile at `codes`, `scales`: weight · low, fp32, is factor · sum over sources of the blocks.

    int4: of their low halves, weight · high of the others; else high is nothing. `weight`: of a block, a power of two, or
    NaN where a scale is. FOLD: the factor is a power of two, so multiplying the scales with it rounds nothing. Of one source
    every product is exact.
    """
    weight = tl.full((TILE_BLOCKS, 1), 1.0, tl.float32)
    high = tl.zeros((TILE_BLOCKS, 1), tl.float32)
    if SOURCES == 1:
        OFFSET: tl.constexpr = 136.0 if KIND == "int4" else (384.0 if KIND == "int8" else 0.0)
        scale = scale_of(scales, 0, source_bytes, block, HALF_SCALE)
        value, other = decode(tl.load(codes + block * WIDTH + column), KIND, HARDWARE_FP8)
        low = (value - OFFSET) * scale * factor
        if KIND == "int4":
            high = (other - OFFSET) * scale * factor
    elif KIND == "int4":
        low, high, weight = sum_halves(
            codes, scales, source_bytes, block, column, factor, SOURCES, UNROLL, WIDTH, HALF_SCALE, TILE_BLOCKS, FOLD
        )
    else:
        low = sum_codes(
            codes, scales, source_bytes, block, column, factor,
            SOURCES, UNROLL, KIND, WIDTH, HALF_SCALE, TILE_BLOCKS, HARDWARE_FP8, FOLD,
        )  # fmt: skip
    return low, high, weight
