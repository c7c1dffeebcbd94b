"""Inside the quantise kernels: value to code, code to value, random dither. Layout: `packing.py`.

Tiles are [blocks, elements of a block]. Codes are made and read by adding a power of two, never by int-to-float conversion
units (16 lanes a clock against 128): 1.5 · 2^23 + v holds round-half-even(v) in its low bits, and 128 + n (256 + n) is the bits
of n behind a fixed exponent. The launches switch the contraction of a · b + c off, so that rounding equals the reference.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.interpreter import WIDEN

ROUND_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
WIDE_ROUND_MAGIC: tl.constexpr = tl.constexpr(1.5 * 2.0**52)
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)
"""Fewest that pass BigCrush (Salmon 2011, table 2); the customary ten cost more than the memory traffic."""


@triton.jit
def e4m3_bits(value):
    """Bits of e4m3fn of |value| <= 448, ties to even, in integers: for the interpreter and GPUs before compute 8.9."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return ((bits >> 24) & 0x80) | tl.where(magnitude < 0x3C800000, small, normal)


@triton.jit
def code_bits(value, inverse, dither, KIND: tl.constexpr, DITHERED: tl.constexpr):
    """Bits of 1.5 · 2^23 + code: int8 and int4 codes in the low bits, something else above.

    Without dither the exact product is rounded, once: the multiply-add that scales also rounds.
    """
    if DITHERED:
        LARGEST_CODE: tl.constexpr = 127.0 if KIND == "int8" else 7.0
        # 1 / scale is rounded, so the largest can come out a hair above its code, and dither would carry it over.
        scaled = tl.minimum(tl.maximum(value * inverse, -LARGEST_CODE), LARGEST_CODE) + dither
        bits = (scaled + ROUND_MAGIC).to(tl.int32, bitcast=True)
    elif WIDEN:  # whose multiply-add rounds twice
        exact = value.to(tl.float64) * inverse.to(tl.float64)
        bits = (exact + WIDE_ROUND_MAGIC).to(tl.int64, bitcast=True).to(tl.int32)
    else:
        magic = tl.full(value.shape, ROUND_MAGIC, tl.float32)
        bits = tl.fma(value, tl.broadcast_to(inverse, value.shape), magic).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def pack_bytes(bits, kept):
    """Low bytes of `bits` where `kept` is 0xFF, else 0, as uint8: one instruction a byte."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        prmt.b32 low, $1, $2, 0x0040;
        prmt.b32 high, $3, $4, 0x0040;
        prmt.b32 low, low, high, 0x5410;
        and.b32 $0, low, $5;
        }""",
        "=r,r,r,r,r,r",
        [bits, kept],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def pack_halves(low, high, kept):
    """Low four bits of `low`, and of `high` above them, where `kept` is 0xFF, else 0, as uint8."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, next;
        prmt.b32 low, $1, $2, 0x0040;
        prmt.b32 next, $3, $4, 0x0040;
        prmt.b32 low, low, next, 0x5410;
        prmt.b32 high, $5, $6, 0x0040;
        prmt.b32 next, $7, $8, 0x0040;
        prmt.b32 high, high, next, 0x5410;
        shl.b32 high, high, 4;
        lop3.b32 low, low, high, 0x0F0F0F0F, 0xE4;
        and.b32 $0, low, $9;
        }""",
        "=r,r,r,r,r,r,r,r,r,r",
        [low, high, kept],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def pack_e4m3(value, kept):
    """e4m3fn of `value` where `kept` is 0xFF, else 0, as uint8: two values a conversion, four codes a register."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 word;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 word, {low, high};
        and.b32 $0, word, $5;
        }""",
        "=r,f,f,f,f,r",
        [value, kept],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def encode(
    low, high, inverse, finite, low_dither, high_dither,
    KIND: tl.constexpr, DITHERED: tl.constexpr, HARDWARE_FP8: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes of `low`, for int4 with those of `high` in the upper halves, as uint8; 0 where not finite."""
    if PACKED and not WIDEN and (HARDWARE_FP8 or KIND != "fp8"):
        # Of the shape of the codes: what a pack of four takes from it hangs on no layout, and equal words are made once.
        kept = tl.broadcast_to(tl.where(finite, 0xFF, 0).to(tl.uint8), low.shape)
        if KIND == "fp8":
            code = pack_e4m3(low * inverse, kept)
        elif KIND == "int8":
            code = pack_bytes(code_bits(low, inverse, low_dither, KIND, DITHERED), kept)
        else:
            code = pack_halves(
                code_bits(low, inverse, low_dither, KIND, DITHERED),
                code_bits(high, inverse, high_dither, KIND, DITHERED),
                kept,
            )
        return code
    if KIND == "fp8":
        if HARDWARE_FP8:
            bits = (low * inverse).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        else:
            bits = e4m3_bits(low * inverse)
    else:
        bits = code_bits(low, inverse, low_dither, KIND, DITHERED)
        if KIND == "int4":
            bits = (bits & 0xF) | (code_bits(high, inverse, high_dither, KIND, DITHERED) << 4)
    return (bits & tl.where(finite, 0xFF, 0)).to(tl.uint8)


@triton.jit
def decode_bytes(code):
    """int8: value + 384, the code behind the exponent of 256 with its sign bit flipped: two instructions, no conversion.

    In PTX, four codes a register: from Triton's own operations, byte by byte, come twice as many instructions, and those,
    not memory, would then bound the sum over eight sources.
    """
    if WIDEN:
        bits = ((code.to(tl.int32) << 15) & 0x7F8000) ^ 0x43C00000
    else:
        bits = tl.inline_asm_elementwise(
            """{
            .reg .b32 byte0, byte1, byte2, byte3;
            shl.b32 byte0, $4, 15;
            shl.b32 byte1, $4, 7;
            shr.u32 byte2, $4, 1;
            shr.u32 byte3, $4, 9;
            lop3.b32 $0, byte0, 0x7F8000, 0x43C00000, 0x6A;
            lop3.b32 $1, byte1, 0x7F8000, 0x43C00000, 0x6A;
            lop3.b32 $2, byte2, 0x7F8000, 0x43C00000, 0x6A;
            lop3.b32 $3, byte3, 0x7F8000, 0x43C00000, 0x6A;
            }""",
            "=r,=r,=r,=r,r",
            [code],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_halves(code):
    """int4: value + 136 of the low and of the high halves: each, sign bit flipped, is put behind the exponent of 128.

    In PTX, eight values a register: the byte that holds a half and the byte of the exponent come together in one permute.
    """
    if WIDEN:
        low = ((code.to(tl.int32) << 16) & 0xF0000) ^ 0x43080000
        high = ((code.to(tl.int32) << 12) & 0xF0000) ^ 0x43080000
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, exponent;
            mov.b32 exponent, 0x43000000;
            lop3.b32 low, $8, 0x0F0F0F0F, 0x08080808, 0x6A;
            shr.u32 high, $8, 4;
            lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6A;
            prmt.b32 $0, low, exponent, 0x7044;
            prmt.b32 $1, low, exponent, 0x7144;
            prmt.b32 $2, low, exponent, 0x7244;
            prmt.b32 $3, low, exponent, 0x7344;
            prmt.b32 $4, high, exponent, 0x7044;
            prmt.b32 $5, high, exponent, 0x7144;
            prmt.b32 $6, high, exponent, 0x7244;
            prmt.b32 $7, high, exponent, 0x7344;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [code],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def decode(code, KIND: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """Values of uint8 codes plus an offset, exact in 9 bits: (value + 384, again), (value, again) for fp8; int4 see above."""
    if KIND == "int4":
        low, high = decode_halves(code)
        return low, high
    if KIND == "int8":
        shifted = decode_bytes(code)
    elif HARDWARE_FP8:
        shifted = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = code.to(tl.int32)
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        shifted = half.to(tl.float32) * 256.0
    return shifted, shifted


@triton.jit
def half_words(word0, word1, word2, word3, SHIFT: tl.constexpr):
    """The 16 bits from SHIFT of four words per counter, as a last axis [2, 2]: index 2a + b is word 2a + b."""
    first = tl.join((word0 >> SHIFT) & 0xFFFF, (word2 >> SHIFT) & 0xFFFF)
    second = tl.join((word1 >> SHIFT) & 0xFFFF, (word3 >> SHIFT) & 0xFFFF)
    return tl.join(first, second)


@triton.jit
def draw_dither(seed, row, stage, first, ROWS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Uniform in (-1/2, 1/2), [ROWS, WIDTH], for elements first + r · STRIDE + c of part `row`: 16 bits of Philox4x32-7 each.

    Key: seed. Counter: (element / 8, its high word, row, stage); element % 8 picks word and half. So what an element draws
    hangs on its place alone, not on tiles or launches. `first` is a multiple of the tile, so low words never carry.
    """
    group = first >> 3
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    counters = tl.arange(0, ROWS)[:, None] * (STRIDE // 8) + tl.arange(0, WIDTH // 8)[None, :]
    counters = counters.to(tl.uint32) + low
    zero = counters * 0
    high = zero + (group >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, counters, high, zero + row.to(tl.uint32), zero + stage, n_rounds=PHILOX_ROUNDS
    )
    bits = tl.join(half_words(word0, word1, word2, word3, 0), half_words(word0, word1, word2, word3, 16))
    bits = tl.reshape(bits, (ROWS, WIDTH))
    # 1 + bits / 2^16 as a float, moved to the middle of its cell: symmetric about 0, so rounding is unbiased.
    return ((bits << 7) | 0x3F800000).to(tl.float32, bitcast=True) - 1.49999237060546875
