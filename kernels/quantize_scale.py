"""Inside the quantise kernels: the scale of a block, from its largest magnitude to the bytes in memory. Layout: `packing.py`.

Divisions are written out in multiply-adds: what the compiler puts around them for numbers that no scale is made of, a test
and a call each, would be as much work as the codes of a block.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.interpreter import WIDEN
from shardplan.kernels.packing import SMALLEST_SCALE

SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
"""Below it a block counts as zeros."""


@triton.jit
def magnitude_bits(value):
    """|value| as integers, which order as the floats do, with infinity and NaN above all: one max finds both."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def larger(a, b):
    """The larger of two, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_bits(low, high, TWO: tl.constexpr):
    """Bits of the largest magnitude of each row of `low`, and of `high` if TWO, as a column; those of a NaN if there is one.

    As floats, of which instructions take the magnitude for nothing; in integers in the interpreter, where that is quicker.
    """
    if WIDEN:
        largest = magnitude_bits(low)
        if TWO:
            largest = tl.maximum(largest, magnitude_bits(high))
        bits = tl.max(largest, axis=1, keep_dims=True)
    else:
        largest = tl.abs(low)
        if TWO:
            largest = larger(largest, tl.abs(high))
        bits = tl.reduce(largest, 1, larger, keep_dims=True).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def over(value, CODE: tl.constexpr):
    """value / CODE rounded to nearest, for values that make a scale (2^-100 and more): one step from value · (1 / CODE).

    The steps of the division itself, without its test for numbers out of range and the call behind it.
    """
    if WIDEN:
        quotient = tl.div_rn(value, CODE)
    else:
        inverse = tl.full(value.shape, 1.0 / CODE, tl.float32)
        quotient = value * inverse
        rest = tl.fma(quotient, tl.full(value.shape, -CODE, tl.float32), value)
        quotient = tl.fma(rest, inverse, quotient)
    return quotient


@triton.jit
def one_over(scale):
    """1 / scale rounded to nearest, for scales of at most 15 significant bits.

    One Newton step from within 2^-23 leaves a relative error of 2^-46. Such a quotient is nearer than 2^-40 to no middle
    between two floats, as scale · middle has 40 bits and is not 1; so the rounding of that step is the right one.
    """
    if WIDEN:
        inverse = tl.div_rn(1.0, scale)
    else:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1
        )
        error = tl.fma(-scale, near, tl.full(scale.shape, 1.0, tl.float32))
        inverse = tl.fma(near, error, near)
    return inverse


@triton.jit
def block_scale(largest, KIND: tl.constexpr, HALF_SCALE: tl.constexpr):
    """(scale, 1 / scale, finite) of blocks whose largest magnitude has the bits `largest`; scale NaN where not finite."""
    LARGEST_CODE: tl.constexpr = 127.0 if KIND == "int8" else (7.0 if KIND == "int4" else 448.0)
    DROPPED: tl.constexpr = 0xFFFF if HALF_SCALE else 0x1FF
    finite = largest < 0x7F800000
    scale = over(largest.to(tl.float32, bitcast=True), LARGEST_CODE)
    scale = ((scale.to(tl.int32, bitcast=True) + DROPPED) & ~DROPPED).to(tl.float32, bitcast=True)
    used = finite & (scale >= SMALLEST)
    inverse = tl.where(used, one_over(tl.where(used, scale, 1.0)), 0.0)
    return tl.where(used, scale, tl.where(finite, 0.0, float("nan"))), inverse, finite


@triton.jit
def store_scale(pointer, scale, mask, HALF_SCALE: tl.constexpr):
    """Write scales; bf16 ones as their bits, exact because `block_scale` rounded them."""
    if HALF_SCALE:
        tl.store(pointer, (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(pointer, scale, mask=mask)


@triton.jit
def load_scale(pointer, HALF_SCALE: tl.constexpr):
    """Read scales as fp32."""
    if HALF_SCALE:
        scale = (tl.load(pointer).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(pointer)
    return scale
