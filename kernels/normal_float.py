"""NF4: frozen weights in 4 bits, at levels a normal distribution fills evenly, with double-quantised block maxima.

    code = index of the level nearest to x / absmax_b,  x' = level[code] · absmax_b,  absmax_b = max |x_b|, blocks of 64
    double: absmax'_b = mean + int8(absmax_b - mean) · scale, one scale for 256 blocks

QLoRA (arXiv 2305.14314, section 3); the 16 levels are its published ones. bits per element: 4 + 8 / 64 + 32 / (64 · 256) =
4.127, or 4.5 without double quantisation. One uint8 buffer [bytes]:

    | codes, two per byte: blocks · block / 2 | double: int8 row of `packing.py` of the maxima; else fp32 maxima | mean |

each section padded to 16 bytes, the mean fp32 and there for double only. Byte j of a block holds element j in its low half
and element j + block / 2 in its high half. Codes are chosen by the exact maximum, as in the paper's implementation.

A block of zeros returns as exact zeros. A block with a NaN or infinity returns as NaN, with double quantisation together
with the other blocks of its group of 256; the mean is taken over the others.

Bytes moved per element to or from bf16: 2.5 + 4 / block (fp32: 2 more). Quantising also computes about 30 instructions an
element; weights are quantised once. CUDA tensors run the kernels, CPU tensors the reference.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from shardplan.kernels import normal_float_reference as reference
from shardplan.kernels.dequantize import aligned
from shardplan.kernels.interpreter import WIDEN, as_output, takes_kernel
from shardplan.kernels.normal_float_reference import LEVELS, MIDPOINTS, Nf4Layout
from shardplan.kernels.quantize import POINTERS, TILE, WARPS, check_floats, quantize
from shardplan.kernels.quantize_scale import SMALLEST, magnitude_bits
from shardplan.kernels.shipped import Shipped

CUTS: tl.constexpr = tl.constexpr(MIDPOINTS)


@triton.jit
def _nearest_level(value):
    """Index of the level nearest to `value`, by bisection of the 15 midpoints; a midpoint itself goes down."""
    bit3 = value > CUTS[7]
    bit2 = value > tl.where(bit3, CUTS[11], CUTS[3])
    upper = tl.where(bit2, CUTS[13], CUTS[9])
    lower = tl.where(bit2, CUTS[5], CUTS[1])
    bit1 = value > tl.where(bit3, upper, lower)
    upper = tl.where(bit2, tl.where(bit1, CUTS[14], CUTS[12]), tl.where(bit1, CUTS[10], CUTS[8]))
    lower = tl.where(bit2, tl.where(bit1, CUTS[6], CUTS[4]), tl.where(bit1, CUTS[2], CUTS[0]))
    bit0 = value > tl.where(bit3, upper, lower)
    return (bit3.to(tl.int32) << 3) | (bit2.to(tl.int32) << 2) | (bit1.to(tl.int32) << 1) | bit0.to(tl.int32)


@triton.jit(do_not_specialize=["blocks"])
def _quantize_nf4_kernel(
    x, codes, maxima, numel, blocks, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr
):  # fmt: skip
    """x [numel] -> codes [blocks, BLOCK / 2], maxima fp32 [blocks]; program (tile)."""
    WIDTH: tl.constexpr = BLOCK // 2
    tile = tl.program_id(0).to(tl.int64)
    first = tile * (TILE_BLOCKS * BLOCK)
    x += first
    left = numel - first
    block = tl.arange(0, TILE_BLOCKS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = block * BLOCK + column
    if left >= TILE_BLOCKS * BLOCK:
        low = tl.load(x + place).to(tl.float32)
        high = tl.load(x + place + WIDTH).to(tl.float32)
    else:
        low = tl.load(x + place, mask=place < left, other=0.0).to(tl.float32)
        high = tl.load(x + place + WIDTH, mask=place + WIDTH < left, other=0.0).to(tl.float32)
    bits = tl.max(tl.maximum(magnitude_bits(low), magnitude_bits(high)), axis=1, keep_dims=True)
    finite = bits < 0x7F800000
    largest = bits.to(tl.float32, bitcast=True)
    used = finite & (largest >= SMALLEST)
    inverse = tl.where(used, tl.div_rn(1.0, tl.where(used, largest, 1.0)), 0.0)
    largest = tl.where(used, largest, tl.where(finite, 0.0, float("nan")))
    code = _nearest_level(low * inverse) | (_nearest_level(high * inverse) << 4)
    code = tl.where(finite, code, 0x77)
    present = tile * TILE_BLOCKS + block < blocks
    tl.store(codes + tile * (TILE_BLOCKS * WIDTH) + block * WIDTH + column, code.to(tl.uint8), present)
    tl.store(maxima + tile * TILE_BLOCKS + block, largest, present)


@triton.jit
def _look_up(levels, code):
    """levels[code]. In PTX, because Triton spreads a gather over lanes anew and moves codes and levels between them."""
    if WIDEN:
        level = tl.load(levels + code)
    else:
        level = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [levels + code], dtype=tl.float32, is_pure=True, pack=1
        )
    return level


@triton.jit(do_not_specialize=["blocks"])
def _dequantize_nf4_kernel(
    codes, maxima_codes, maxima, mean, levels, out, numel, blocks,
    BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, DOUBLE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """codes [blocks, BLOCK / 2] and maxima (fp32, or int8 with a scale for GROUP of them) -> out [numel]; program (tile)."""
    WIDTH: tl.constexpr = BLOCK // 2
    tile = tl.program_id(0).to(tl.int64)
    first = tile * (TILE_BLOCKS * BLOCK)
    block = tl.arange(0, TILE_BLOCKS)[:, None]
    # As many codes a thread as it writes elements in 16 bytes: wider reads would go through shared memory to the writers.
    column = tl.max_contiguous(tl.arange(0, WIDTH), 128 // out.dtype.element_ty.primitive_bitwidth)[None, :]
    number = tile * TILE_BLOCKS + block
    present = number < blocks
    code = tl.load(codes + tile * (TILE_BLOCKS * WIDTH) + block * WIDTH + column, mask=present, other=0).to(tl.int32)
    if DOUBLE:
        deviation = tl.load(maxima_codes + number, mask=present, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        # The product is exact (`packing.py`), so that contracted or not, the sum is the same.
        largest = deviation * tl.load(maxima + number // GROUP, mask=present, other=0.0) + tl.load(mean)
        largest = tl.where(largest < 0.0, 0.0, largest)
    else:
        largest = tl.load(maxima + number, mask=present, other=0.0)
    low = as_output(_look_up(levels, code & 0xF) * largest, out)
    high = as_output(_look_up(levels, code >> 4) * largest, out)
    out += first
    left = numel - first
    place = block * BLOCK + column
    if left >= TILE_BLOCKS * BLOCK:
        tl.store(out + place, low)
        tl.store(out + place + WIDTH, high)
    else:
        tl.store(out + place, low, mask=place < left)
        tl.store(out + place + WIDTH, high, mask=place + WIDTH < left)


@functools.cache
def _level_table(device: torch.device) -> torch.Tensor:
    """The levels in the memory of `device`, copied at the first call: make that call before capturing a CUDA graph."""
    return torch.tensor(LEVELS, device=device)


@torch.library.custom_op(
    "shardplan::quantize_nf4", mutates_args=(), schema="(Tensor x, int block, bool double) -> Tensor"
)
def _quantize_nf4(x: torch.Tensor, block: int, double: bool) -> torch.Tensor:
    if not takes_kernel(x):
        return reference.quantize_nf4(x, block, double)
    x = x.reshape(-1).contiguous()  # a column of a matrix stays a view with strides
    layout = Nf4Layout(numel=x.numel(), block=block, double=double)
    packed = layout.empty(x.device)
    if x.numel() == 0:
        return packed
    maxima = torch.empty(layout.blocks, dtype=torch.float32, device=x.device) if double else layout.maxima(packed)
    with torch.cuda.device_of(x):
        _quantize_nf4_kernel[(triton.cdiv(x.numel(), TILE),)](
            x, packed, maxima, x.numel(), layout.blocks, BLOCK=block, TILE_BLOCKS=TILE // block,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    if double:
        mean = reference.finite_mean(maxima)
        layout.maxima_row(packed).copy_(quantize(maxima - mean, layout.packing))
        layout.mean(packed).copy_(mean)
    return packed


@_quantize_nf4.register_fake
def _(x, block, double):
    return x.new_empty(Nf4Layout(numel=x.numel(), block=block, double=double).total_bytes, dtype=torch.uint8)


@torch.library.custom_op(
    "shardplan::dequantize_nf4",
    mutates_args=(),
    schema="(Tensor packed, SymInt numel, ScalarType dtype, int block, bool double) -> Tensor",
)
def _dequantize_nf4(packed: torch.Tensor, numel: int, dtype: torch.dtype, block: int, double: bool) -> torch.Tensor:
    layout = Nf4Layout(numel=numel, block=block, double=double)
    if not takes_kernel(packed):
        return reference.dequantize_nf4(packed, dtype, layout)
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    if numel == 0:
        return out
    packed = aligned(packed)
    with torch.cuda.device_of(packed):
        _dequantize_nf4_kernel[(triton.cdiv(numel, TILE),)](
            packed, packed[layout.code_bytes :], layout.maxima(packed), layout.mean(packed), _level_table(packed.device), out,
            numel, layout.blocks, BLOCK=block, TILE_BLOCKS=TILE // block, DOUBLE=double, GROUP=reference.GROUP,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_dequantize_nf4.register_fake
def _(packed, numel, dtype, block, double):
    return packed.new_empty((numel,), dtype=dtype)


def quantize_nf4(x: torch.Tensor, *, block: int = 64, double: bool = True) -> torch.Tensor:
    """`x` [any shape] in bf16, fp16 or fp32, taken flat, as NF4 in one uint8 [bytes] laid out as above.

    `block`: elements that share a maximum, a power of two from 64 to 8192. `double`: the maxima in int8 as well.

    Raises `ValueError` for another dtype or block.
    """
    check_floats(x.dtype, "x")
    Nf4Layout(numel=x.numel(), block=block, double=double)
    return _quantize_nf4(x, block, double)


def dequantize_nf4(
    packed: torch.Tensor, numel: int, dtype: torch.dtype, *, block: int = 64, double: bool = True
) -> torch.Tensor:
    """`packed` of `quantize_nf4` as `dtype` [numel]: one fp32 product, rounded once, ties to even.

    Raises `ValueError` for a buffer that does not belong to numel, block and double, or a dtype other than bf16, fp16, fp32.
    """
    check_floats(dtype, "dtype")
    layout = Nf4Layout(numel=numel, block=block, double=double)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (layout.total_bytes,):
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)}, but {layout} needs uint8 [{layout.total_bytes}]; "
            "pass the numel, block and double that quantize_nf4 was called with"
        )
    return _dequantize_nf4(packed, numel, dtype, block, double)


def _shipped_quantize(dtype: torch.dtype) -> Shipped:
    return Shipped(
        name=f"quantize nf4 64 {POINTERS[dtype][1:]}",
        kernel=_quantize_nf4_kernel,
        signature={"x": POINTERS[dtype], "codes": "*u8", "maxima": "*fp32", "numel": "i32", "blocks": "i32"},
        constants={"BLOCK": 64, "TILE_BLOCKS": TILE // 64},
        warps=WARPS,
        stages=3,
        contracted=False,
        undivided=frozenset({"blocks"}),
    )


def _shipped_dequantize(dtype: torch.dtype, double: bool) -> Shipped:
    return Shipped(
        name=f"dequantize nf4 64 {POINTERS[dtype][1:]}{' double' * double}",
        kernel=_dequantize_nf4_kernel,
        signature={
            "codes": "*u8",
            "maxima_codes": "*u8",
            **dict.fromkeys(("maxima", "mean", "levels"), "*fp32"),
            "out": POINTERS[dtype],
            **dict.fromkeys(("numel", "blocks"), "i32"),
        },
        constants={"BLOCK": 64, "TILE_BLOCKS": TILE // 64, "DOUBLE": double, "GROUP": reference.GROUP},
        warps=WARPS,
        stages=3,
        contracted=False,
        undivided=frozenset({"blocks"}),
        capabilities=(80, 90, 100) if dtype == torch.bfloat16 else (90,),
    )


def shipped() -> list[Shipped]:
    """Every type, with and without double quantisation."""
    quantizers = [_shipped_quantize(dtype) for dtype in POINTERS]
    return quantizers + [_shipped_dequantize(dtype, double) for dtype in POINTERS for double in (True, False)]
