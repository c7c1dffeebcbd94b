"""Block-quantised codes back to bf16, fp16 or fp32: one tensor, or the mean or sum of several in one pass.

    x' = factor · sum over sources of code · scale        factor = 1 for a sum, 1 / sources for a mean

The last step of qgZ (ZeRO++, arXiv 2306.10209, section 3.3) and the step behind the all-gather of qwZ. Layout of the buffer:
`packing.py`; plain torch beside it: `quantize_reference.py`.

Bytes moved per element to bf16 (fp32: 2 more) from S sources: S · (1 + s) + 2 (int8, fp8), S · (0.5 + s) + 2 (int4), with
s = scale bytes / block.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from shardplan.kernels import quantize_reference as reference
from shardplan.kernels.code_sum import decode_sum
from shardplan.kernels.code_tiles import LAUNCHES, Launch
from shardplan.kernels.interpreter import as_output, takes_kernel
from shardplan.kernels.packing import Packing, check_packed, check_split, part_numel
from shardplan.kernels.quantize import (
    POINTERS,
    VARIANTS,
    check_floats,
    hardware_fp8,
    scale_view,
    variant_name,
)
from shardplan.kernels.shipped import Shipped

MAX_UNROLL = 8


@triton.jit
def last_repeated(block, left):
    """Blocks of a tile of which `left` are present, the last of them for all behind it: reads need no mask then."""
    return tl.minimum(block, (left - 1).to(tl.int32))


@triton.jit(do_not_specialize=["blocks", "devices_per_node", "nodes"])
def _dequantize_kernel(
    codes, scales, out, numel, part, blocks, row_bytes, source_bytes, devices_per_node, nodes, factor,
    SOURCES: tl.constexpr, UNROLL: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
    HALF_SCALE: tl.constexpr, PARTED: tl.constexpr, HARDWARE_FP8: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """[SOURCES, rows] of `packing.py` -> out [numel] = factor · sum over sources; program (tile of a part, part)."""
    WIDTH: tl.constexpr = BLOCK // 2 if KIND == "int4" else BLOCK
    tile = tl.program_id(0).to(tl.int64)
    part_index = tl.program_id(1)
    first = tile * (TILE_BLOCKS * BLOCK)
    row = (part_index % devices_per_node * nodes + part_index // devices_per_node).to(tl.int64)
    block = tl.arange(0, TILE_BLOCKS)[:, None]
    # As many codes a thread as it writes elements in 16 bytes: wider reads would go through shared memory to the writers.
    column = tl.max_contiguous(tl.arange(0, WIDTH), 128 // out.dtype.element_ty.primitive_bitwidth)[None, :]
    codes += row * row_bytes + tile * (TILE_BLOCKS * WIDTH)
    scales += row * (row_bytes // (2 if HALF_SCALE else 4)) + tile * TILE_BLOCKS
    low, high, weight = decode_sum(
        codes, scales, source_bytes, last_repeated(block, blocks - tile * TILE_BLOCKS), column, factor,
        SOURCES, UNROLL, KIND, WIDTH, HALF_SCALE, TILE_BLOCKS, HARDWARE_FP8, FOLD,
    )  # fmt: skip
    if PARTED:
        start = part_index.to(tl.int64) * part
        out += start + first
        left = tl.minimum(start + part, numel) - start - first
    else:
        out += first
        left = numel - first
    place = block * BLOCK + column
    low = as_output(low * weight, out)
    high = as_output(high * weight, out)
    if left >= TILE_BLOCKS * BLOCK:
        tl.store(out + place, low)
        if KIND == "int4":
            tl.store(out + place + WIDTH, high)
    else:
        tl.store(out + place, low, mask=place < left)
        if KIND == "int4":
            tl.store(out + place + WIDTH, high, mask=place + WIDTH < left)


def unroll(sources: int) -> int:
    """Sources read in one go: the largest divisor of their number that is at most 8."""
    return max(count for count in range(1, MAX_UNROLL + 1) if sources % count == 0)


def launch_of(kind: str, sources: int) -> Launch:
    """Several sources are read as a reduction reads them: fewer elements a thread, more reads in flight."""
    return LAUNCHES["dequantize" if sources == 1 else "reduce", kind]


def power_of_two(factor: float) -> bool:
    """Whether multiplying by `factor` rounds nothing."""
    return math.frexp(factor)[0] == 0.5


def aligned(packed: torch.Tensor) -> torch.Tensor:
    """`packed` contiguous and on a 16-byte boundary, which its view as fp32 and wide loads need; a copy only if it is not."""
    packed = packed.contiguous()
    return packed.clone() if packed.data_ptr() % 16 else packed


def combine_factor(combine: str, sources: int) -> float:
    """What the sum over sources is multiplied with."""
    if combine not in {"mean", "sum"}:
        raise ValueError(f"combine={combine!r}; use 'mean' or 'sum'")
    return 1.0 / sources if combine == "mean" else 1.0


torch.library.define(
    "shardplan::dequantize",
    "(Tensor packed, SymInt numel, ScalarType dtype, str kind, int block, ScalarType scale_dtype,"
    " int devices_per_node, float factor) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("shardplan::dequantize", "CompositeExplicitAutograd")
def _dequantize(
    packed: torch.Tensor,
    numel: int,
    dtype: torch.dtype,
    kind: str,
    block: int,
    scale_dtype: torch.dtype,
    devices_per_node: int,
    factor: float,
) -> torch.Tensor:
    packing = Packing(kind=kind, block=block, scale_dtype=scale_dtype)
    if not takes_kernel(packed):
        return reference.dequantize(packed, numel, dtype, packing, devices_per_node, factor)
    return run(packed, numel, dtype, packing, devices_per_node, factor, launch_of(kind, packed.shape[0]))


def run(
    packed: torch.Tensor,
    numel: int,
    dtype: torch.dtype,
    packing: Packing,
    devices_per_node: int,
    factor: float,
    launch: Launch,
) -> torch.Tensor:
    """Launch the kernel as `launch` says."""
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    if numel == 0:
        return out
    packed = aligned(packed)
    sources, partitions, row_bytes = packed.shape
    part = part_numel(numel, partitions)
    kind, block, tile = packing.kind, packing.block, launch.elements(packing.block)
    with torch.cuda.device_of(packed):
        _dequantize_kernel[(triton.cdiv(part, tile), partitions)](
            packed, scale_view(packed, packing.code_bytes(part), packing.scale_bytes), out,
            numel, part, packing.blocks(part), row_bytes, partitions * row_bytes,
            devices_per_node, partitions // devices_per_node, factor,
            SOURCES=sources, UNROLL=unroll(sources), KIND=kind, BLOCK=block, TILE_BLOCKS=tile // block,
            HALF_SCALE=packing.scale_bytes == 2, PARTED=partitions > 1,
            HARDWARE_FP8=kind == "fp8" and hardware_fp8(packed.device), FOLD=power_of_two(factor),
            num_warps=launch.warps_for(block), enable_fp_fusion=False,
        )  # fmt: skip
    return out


@torch.library.register_fake("shardplan::dequantize")
def _(packed, numel, dtype, kind, block, scale_dtype, devices_per_node, factor):
    return packed.new_empty((numel,), dtype=dtype)


def dequantize(
    packed: torch.Tensor,
    numel: int,
    dtype: torch.dtype,
    packing: Packing,
    *,
    devices_per_node: int = 1,
) -> torch.Tensor:
    """`packed` uint8 [partitions, row_bytes] of `quantize` as `dtype` [numel]; the same arguments undo a swizzle.

    A block quantised from zeros returns exact zeros, one with a NaN or infinity NaN throughout. Products are exact in fp32
    and rounded once, ties to even, to `dtype`.

    Raises `ValueError` for a buffer that does not belong to numel and packing, or a dtype other than bf16, fp16, fp32.
    """
    return dequantize_reduce(
        packed.unsqueeze(0), numel, dtype, packing, combine="sum", devices_per_node=devices_per_node
    )


def dequantize_reduce(
    packed: torch.Tensor,
    numel: int,
    dtype: torch.dtype,
    packing: Packing,
    *,
    combine: str = "mean",
    devices_per_node: int = 1,
) -> torch.Tensor:
    """Mean (or `combine="sum"`) over sources of `packed` uint8 [sources, partitions, row_bytes] as `dtype` [numel].

    Summed in fp32 in the order of the sources (int4: in integers, see `code_sum.py`), so results repeat bit for bit. |x| up to
    2^120: above, a sum may overflow.

    Raises `ValueError` as `dequantize` does, and for a `combine` that is neither mean nor sum.
    """
    check_floats(dtype, "dtype")
    if packed.dim() != 3 or packed.shape[0] == 0 or packed.shape[1] == 0:
        raise ValueError(
            f"packed has shape {list(packed.shape)}; pass [sources, partitions, row_bytes] with none of them 0"
        )
    sources, partitions = packed.shape[:2]
    check_split(partitions, devices_per_node)
    row_bytes = packing.row_bytes(part_numel(numel, partitions))
    check_packed(packed, (sources, partitions, row_bytes), packing, numel)
    factor = combine_factor(combine, sources)
    return torch.ops.shardplan.dequantize.default(
        packed, numel, dtype, packing.kind, packing.block, packing.scale_dtype, devices_per_node, factor
    )


def _shipped(
    packing: Packing, dtype: torch.dtype, sources: int, parted: bool, capabilities: tuple[int, ...]
) -> Shipped:
    old = packing.kind == "fp8" and capabilities == (80,)
    launch = launch_of(packing.kind, sources)
    words = " parts" * parted + " software" * old
    return Shipped(
        name=f"dequantize {variant_name(packing)} {POINTERS[dtype][1:]} sources {sources}{words}",
        kernel=_dequantize_kernel,
        signature={
            "codes": "*u8",
            "scales": "*fp32" if packing.scale_bytes == 4 else "*i16",
            "out": POINTERS[dtype],
            **dict.fromkeys(
                ("numel", "part", "blocks", "row_bytes", "source_bytes", "devices_per_node", "nodes"), "i32"
            ),
            "factor": "fp32",
        },
        constants={
            "SOURCES": sources,
            "UNROLL": unroll(sources),
            "KIND": packing.kind,
            "BLOCK": packing.block,
            "TILE_BLOCKS": launch.elements(packing.block) // packing.block,
            "HALF_SCALE": packing.scale_bytes == 2,
            "PARTED": parted,
            "HARDWARE_FP8": packing.kind == "fp8" and not old,
            "FOLD": power_of_two(1.0 / sources),
        },
        warps=launch.warps_for(packing.block),
        stages=3,
        contracted=False,
        undivided=frozenset({"devices_per_node", "nodes", "blocks"}),
        capabilities=capabilities,
    )


def shipped() -> list[Shipped]:
    """Every kind and block to bf16; every kind and type once; several sources, as nodes of a cluster give them."""
    rows = [
        _shipped(packing, torch.bfloat16, 1, False, (90, 100) if packing.kind == "fp8" else (80, 90, 100))
        for packing in VARIANTS
    ]
    rows.append(_shipped(Packing(kind="fp8"), torch.bfloat16, 1, False, (80,)))
    for dtype in (torch.float16, torch.float32):
        rows += [_shipped(Packing(kind=kind, block=512), dtype, 1, True, (90,)) for kind in ("int8", "int4", "fp8")]
    for sources in (2, 8, 12):
        rows += [
            _shipped(Packing(kind=kind, block=512), torch.float32, sources, False, (90,))
            for kind in ("int8", "int4", "fp8")
        ]
    return rows
