"""Dequantise, reduce, requantise in one pass: the step between the two hops of qgZ (ZeRO++, arXiv 2306.10209, section 3.3).

    y = factor · sum over sources of code · scale,  then y to codes and scales again        factor = 1 / sources for a mean

A gradient reduced over N nodes of L devices, without torch.distributed; each device:

    rows  = quantize(gradient, packing, partitions=N * L, devices_per_node=L)      # [L · N, row_bytes], swizzled
    rows  -> all-to-all inside the node, N rows for each device                    # [L, N, row_bytes], one N-block a peer
    rows  = dequantize_reduce_quantize(rows, part, packing)                        # [N, row_bytes], one row a node
    rows  -> all-to-all between devices of the same place in their nodes           # [N, row_bytes], one row a node
    shard = dequantize_reduce(rows[:, None], part, dtype, packing)                 # [part], part = ceil(numel / (N · L))

Two quantisations on the way of a value instead of the N · L of a ring, and 1 / L of the bytes of one all-to-all over all
devices between nodes. Layout of the rows: `packing.py`; plain torch beside it: `quantize_reference.py`.

Bytes moved per element from S sources: (S + 1) · (1 + s) (int8, fp8), (S + 1) · (0.5 + s) (int4), s = scale bytes / block.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shardplan.kernels import quantize_reference as reference
from shardplan.kernels.code_sum import decode_sum
from shardplan.kernels.code_tiles import LAUNCHES, Launch
from shardplan.kernels.dequantize import (
    aligned,
    combine_factor,
    last_repeated,
    power_of_two,
    unroll,
)
from shardplan.kernels.interpreter import takes_kernel
from shardplan.kernels.packing import Packing, check_packed
from shardplan.kernels.quantize import (
    VARIANTS,
    empty_rows,
    hardware_fp8,
    scale_view,
    seed_tensor,
    variant_name,
)
from shardplan.kernels.quantize_scale import block_scale, largest_bits, store_scale
from shardplan.kernels.quantize_tiles import draw_dither, encode
from shardplan.kernels.shipped import Shipped


@triton.jit(do_not_specialize=["blocks"])
def _reduce_kernel(
    codes, scales, out_codes, out_scales, seed, blocks, row_bytes, source_bytes, factor,
    SOURCES: tl.constexpr, UNROLL: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
    HALF_SCALE: tl.constexpr, DITHERED: tl.constexpr, HARDWARE_FP8: tl.constexpr, PACKED: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """[SOURCES, rows] of `packing.py` -> [rows]; program (tile of a row, row)."""
    WIDTH: tl.constexpr = BLOCK // 2 if KIND == "int4" else BLOCK
    tile = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    block = tl.arange(0, TILE_BLOCKS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    present = tile * TILE_BLOCKS + block < blocks
    code_start = row.to(tl.int64) * row_bytes + tile * (TILE_BLOCKS * WIDTH)
    scale_start = row.to(tl.int64) * (row_bytes // (2 if HALF_SCALE else 4)) + tile * TILE_BLOCKS
    low, high, weight = decode_sum(
        codes + code_start, scales + scale_start, source_bytes,
        last_repeated(block, blocks - tile * TILE_BLOCKS), column, factor,
        SOURCES, UNROLL, KIND, WIDTH, HALF_SCALE, TILE_BLOCKS, HARDWARE_FP8, FOLD,
    )  # fmt: skip
    largest = largest_bits(low, high, KIND == "int4").to(tl.float32, bitcast=True) * weight
    scale, inverse, finite = block_scale(largest.to(tl.int32, bitcast=True), KIND, HALF_SCALE)
    inverse *= weight
    low_dither = 0.0
    high_dither = 0.0
    if DITHERED:
        key = tl.load(seed)
        first = tile * (TILE_BLOCKS * BLOCK)
        low_dither = draw_dither(key, row, 1, first, TILE_BLOCKS, BLOCK, WIDTH)
        if KIND == "int4":
            high_dither = draw_dither(key, row, 1, first + WIDTH, TILE_BLOCKS, BLOCK, WIDTH)
    code = encode(low, high, inverse, finite, low_dither, high_dither, KIND, DITHERED, HARDWARE_FP8, PACKED)
    tl.store(out_codes + code_start + block * WIDTH + column, code, present)
    store_scale(out_scales + scale_start + block, scale, present, HALF_SCALE)


torch.library.define(
    "shardplan::dequantize_reduce_quantize",
    "(Tensor packed, Tensor? seed, SymInt numel, str kind, int block, ScalarType scale_dtype, float factor) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("shardplan::dequantize_reduce_quantize", "CompositeExplicitAutograd")
def _reduce(
    packed: torch.Tensor,
    seed: torch.Tensor | None,
    numel: int,
    kind: str,
    block: int,
    scale_dtype: torch.dtype,
    factor: float,
) -> torch.Tensor:
    packing = Packing(kind=kind, block=block, scale_dtype=scale_dtype)
    if not takes_kernel(packed):
        return reference.dequantize_reduce_quantize(packed, numel, packing, factor, seed)
    return run(packed, seed, numel, packing, factor, LAUNCHES["reduce", kind])


def run(
    packed: torch.Tensor,
    seed: torch.Tensor | None,
    numel: int,
    packing: Packing,
    factor: float,
    launch: Launch,
) -> torch.Tensor:
    """Launch the kernel as `launch` says."""
    packed = aligned(packed)
    sources, rows, row_bytes = packed.shape
    out = empty_rows(packed, rows, numel, packing)
    if out.numel() == 0:
        return out
    code_bytes, scale_bytes = packing.code_bytes(numel), packing.scale_bytes
    kind, block, tile = packing.kind, packing.block, launch.elements(packing.block)
    with torch.cuda.device_of(packed):
        _reduce_kernel[(triton.cdiv(numel, tile), rows)](
            packed, scale_view(packed, code_bytes, scale_bytes), out, scale_view(out, code_bytes, scale_bytes),
            packed if seed is None else seed, packing.blocks(numel), row_bytes, rows * row_bytes, factor,
            SOURCES=sources, UNROLL=unroll(sources), KIND=kind, BLOCK=block, TILE_BLOCKS=tile // block,
            HALF_SCALE=scale_bytes == 2, DITHERED=seed is not None,
            HARDWARE_FP8=kind == "fp8" and hardware_fp8(packed.device), PACKED=launch.packed,
            FOLD=power_of_two(factor), num_warps=launch.warps_for(block), enable_fp_fusion=False,
        )  # fmt: skip
    return out


@torch.library.register_fake("shardplan::dequantize_reduce_quantize")
def _(packed, seed, numel, kind, block, scale_dtype, factor):
    return packed.new_empty(packed.shape[1:])


def dequantize_reduce_quantize(
    packed: torch.Tensor,
    numel: int,
    packing: Packing,
    *,
    combine: str = "mean",
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean (or `combine="sum"`) over sources of uint8 [sources, rows, row_bytes], quantised again, as [rows, row_bytes].

    `numel`: elements of one row, `packing.part_numel` of the whole. Summed in fp32 in the order of the sources (int4: in
    integers, see `code_sum.py`). `seed` as in `quantize`; the draws differ from those of a `quantize` with the same seed. A
    block in which any source holds a NaN or infinity becomes NaN. |x| up to 2^120: above, a sum may overflow.

    Raises `ValueError` for a buffer that does not belong to numel and packing, an unknown `combine`, or a seed with fp8.
    """
    if packed.dim() != 3 or packed.shape[0] == 0:
        raise ValueError(
            f"packed has shape {list(packed.shape)}; pass [sources, rows, row_bytes] of at least one source"
        )
    if seed is not None and packing.kind == "fp8":
        raise ValueError("seed with kind='fp8': stochastic rounding is for int8 and int4; leave the seed out")
    sources, rows = packed.shape[:2]
    check_packed(packed, (sources, rows, packing.row_bytes(numel)), packing, numel)
    factor = combine_factor(combine, sources)
    key = seed_tensor(seed, packed.device)
    return torch.ops.shardplan.dequantize_reduce_quantize.default(
        packed, key, numel, packing.kind, packing.block, packing.scale_dtype, factor
    )


def _shipped(packing: Packing, sources: int, dithered: bool, capabilities: tuple[int, ...]) -> Shipped:
    scales = "*fp32" if packing.scale_bytes == 4 else "*i16"
    launch = LAUNCHES["reduce", packing.kind]
    old = packing.kind == "fp8" and capabilities == (80,)
    return Shipped(
        name=f"reduce {variant_name(packing)} sources {sources}{' stochastic' * dithered}{' software' * old}",
        kernel=_reduce_kernel,
        signature={
            "codes": "*u8",
            "scales": scales,
            "out_codes": "*u8",
            "out_scales": scales,
            "seed": "*i64" if dithered else "*u8",
            **dict.fromkeys(("blocks", "row_bytes", "source_bytes"), "i32"),
            "factor": "fp32",
        },
        constants={
            "SOURCES": sources,
            "UNROLL": unroll(sources),
            "KIND": packing.kind,
            "BLOCK": packing.block,
            "TILE_BLOCKS": launch.elements(packing.block) // packing.block,
            "HALF_SCALE": packing.scale_bytes == 2,
            "DITHERED": dithered,
            "HARDWARE_FP8": packing.kind == "fp8" and not old,
            "PACKED": launch.packed,
            "FOLD": power_of_two(1.0 / sources),
        },
        warps=launch.warps_for(packing.block),
        stages=3,
        contracted=False,
        undivided=frozenset({"blocks"}),
        capabilities=capabilities,
    )


def shipped() -> list[Shipped]:
    """Every kind and block over the 8 devices of a node; other numbers of sources and stochastic rounding of gradients."""
    rows = [_shipped(packing, 8, False, (90, 100) if packing.kind == "fp8" else (80, 90, 100)) for packing in VARIANTS]
    rows.append(_shipped(Packing(kind="fp8"), 8, False, (80,)))
    rows += [_shipped(Packing(kind="int4", block=512), sources, False, (90,)) for sources in (2, 4, 12, 16)]
    rows += [_shipped(Packing(kind=kind, block=512), 8, True, (90,)) for kind in ("int8", "int4")]
    return rows
