"""Block quantisation of bf16, fp16 and fp32 tensors to int8, int4 or fp8 codes.

    scale_b = max |x_b| / Q (rounded up),  code = round_half_even(x / scale_b),  Q = 127, 7, 448

ZeRO++ (arXiv 2306.10209): int8 of weights before their all-gather (qwZ, section 3.1), int4 of gradients before their
all-to-all (qgZ, section 3.3). Blockwise scales as in Dettmers' optimizer states (arXiv 2110.02861). Layout of the buffer,
zeros, NaN and the swizzle: `packing.py`. Plain torch beside it: `quantize_reference.py`. Way back: `dequantize.py`.

Bytes moved per element from bf16 (fp32: 2 more), with s = scale bytes / block: 3 + s (int8, fp8), 2.5 + s (int4).

CUDA tensors run the kernels, CPU tensors the reference. No host synchronisation, no autotuning: the ops compile whole and
can be captured in a CUDA graph.
"""

# Triton's own words in and around a kernel - constexpr, launch options - are beyond a type checker.
# pyright: reportCallIssue=false

# pyright: reportPossiblyUnboundVariable=false
# (a branch on a constexpr picks code when the kernel is compiled)
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from shardplan.kernels import quantize_reference as reference
from shardplan.kernels.code_tiles import LAUNCHES, Launch
from shardplan.kernels.interpreter import INTERPRETED, takes_kernel
from shardplan.kernels.packing import Packing, check_split, part_numel
from shardplan.kernels.quantize_scale import block_scale, largest_bits, store_scale
from shardplan.kernels.quantize_tiles import draw_dither, encode
from shardplan.kernels.shipped import Shipped

TILE = 8192
"""Elements a program of `normal_float` handles: 16 KiB of bf16, 32 elements a thread of 8 warps."""
WARPS = 8
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


# Numbers that need no kernel of their own where they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["blocks", "devices_per_node", "nodes"])
def _quantize_kernel(
    x, codes, scales, seed, numel, part, blocks, row_bytes, devices_per_node, nodes,
    KIND: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, HALF_SCALE: tl.constexpr,
    PARTED: tl.constexpr, DITHERED: tl.constexpr, HARDWARE_FP8: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """x [numel] -> rows of `packing.py`; program (tile of a part, part)."""
    WIDTH: tl.constexpr = BLOCK // 2 if KIND == "int4" else BLOCK
    tile = tl.program_id(0).to(tl.int64)
    part_index = tl.program_id(1)
    first = tile * (TILE_BLOCKS * BLOCK)
    if PARTED:
        start = part_index.to(tl.int64) * part
        x += start + first
        left = tl.minimum(start + part, numel) - start - first
    else:
        x += first
        left = numel - first
    block = tl.arange(0, TILE_BLOCKS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = block * BLOCK + column
    whole = left >= TILE_BLOCKS * BLOCK
    # Two ways to load, because a mask that ends anywhere would cost the 16-byte accesses of all the tiles that need none.
    if whole:
        low = tl.load(x + place).to(tl.float32)
    else:
        low = tl.load(x + place, mask=place < left, other=0.0).to(tl.float32)
    high = low
    if KIND == "int4":
        if whole:
            high = tl.load(x + place + WIDTH).to(tl.float32)
        else:
            high = tl.load(x + place + WIDTH, mask=place + WIDTH < left, other=0.0).to(tl.float32)
    scale, inverse, finite = block_scale(largest_bits(low, high, KIND == "int4"), KIND, HALF_SCALE)
    low_dither = 0.0
    high_dither = 0.0
    if DITHERED:
        key = tl.load(seed)
        low_dither = draw_dither(key, part_index, 0, first, TILE_BLOCKS, BLOCK, WIDTH)
        if KIND == "int4":
            high_dither = draw_dither(key, part_index, 0, first + WIDTH, TILE_BLOCKS, BLOCK, WIDTH)
    code = encode(low, high, inverse, finite, low_dither, high_dither, KIND, DITHERED, HARDWARE_FP8, PACKED)
    row = (part_index % devices_per_node * nodes + part_index // devices_per_node).to(tl.int64)
    present = tile * TILE_BLOCKS + block < blocks
    tl.store(codes + row * row_bytes + tile * (TILE_BLOCKS * WIDTH) + block * WIDTH + column, code, present)
    scales += row * (row_bytes // (2 if HALF_SCALE else 4)) + tile * TILE_BLOCKS
    store_scale(scales + block, scale, present, HALF_SCALE)


def scale_view(packed: torch.Tensor, code_bytes: int, scale_bytes: int) -> torch.Tensor:
    """The scales of the first row of `packed`, as kernels address them: fp32, or the bits of bf16."""
    return packed.view(-1)[code_bytes:].view(torch.float32 if scale_bytes == 4 else torch.int16)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Asked once a device: the host must stay ahead of kernels of some 20 µs."""
    return torch.cuda.get_device_capability(device)


def hardware_fp8(device: torch.device) -> bool:
    """Whether the device converts to e4m3 itself; the interpreter's own conversion is off by one step in places."""
    return not INTERPRETED and _capability(device) >= (8, 9)


def check_floats(dtype: torch.dtype, name: str) -> None:
    """Refuse a type that is not bf16, fp16 or fp32."""
    if dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}; use bfloat16, float16 or float32")


def seed_tensor(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The seed where the kernel reads it; written by the device itself, so nothing waits."""
    if seed is None:
        return None
    if not isinstance(seed, torch.Tensor):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}; use one int64 on {device}")
    return seed


def empty_rows(like: torch.Tensor, rows: int, part: int, packing: Packing) -> torch.Tensor:
    """A buffer for `rows` parts of `part` elements each, zero where neither codes nor scales are written."""
    packed = torch.empty((rows, packing.row_bytes(part)), dtype=torch.uint8, device=like.device)
    used = packing.code_bytes(part) + packing.blocks(part) * packing.scale_bytes
    if used < packed.shape[1]:
        packed[:, used:].zero_()
    return packed


torch.library.define(
    "shardplan::quantize",
    "(Tensor x, Tensor? seed, str kind, int block, ScalarType scale_dtype,"
    " int partitions, int devices_per_node) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("shardplan::quantize", "CompositeExplicitAutograd")
def _quantize(
    x: torch.Tensor,
    seed: torch.Tensor | None,
    kind: str,
    block: int,
    scale_dtype: torch.dtype,
    partitions: int,
    devices_per_node: int,
) -> torch.Tensor:
    packing = Packing(kind=kind, block=block, scale_dtype=scale_dtype)
    if not takes_kernel(x):
        return reference.quantize(x, packing, partitions, devices_per_node, seed)
    return run(x, seed, packing, partitions, devices_per_node, LAUNCHES["quantize", kind])


def run(
    x: torch.Tensor,
    seed: torch.Tensor | None,
    packing: Packing,
    partitions: int,
    devices_per_node: int,
    launch: Launch,
) -> torch.Tensor:
    """Launch the kernel as `launch` says."""
    x = x.reshape(-1).contiguous()  # a column of a matrix stays a view with strides
    part = part_numel(x.numel(), partitions)
    packed = empty_rows(x, partitions, part, packing)
    if packed.numel() == 0:
        return packed
    kind, block, tile = packing.kind, packing.block, launch.elements(packing.block)
    scales = scale_view(packed, packing.code_bytes(part), packing.scale_bytes)
    with torch.cuda.device_of(x):
        _quantize_kernel[(triton.cdiv(part, tile), partitions)](
            x, packed, scales, x if seed is None else seed,
            x.numel(), part, packing.blocks(part), packed.shape[1], devices_per_node, partitions // devices_per_node,
            KIND=kind, BLOCK=block, TILE_BLOCKS=tile // block, HALF_SCALE=packing.scale_bytes == 2,
            PARTED=partitions > 1, DITHERED=seed is not None,
            HARDWARE_FP8=kind == "fp8" and hardware_fp8(x.device), PACKED=launch.packed,
            num_warps=launch.warps_for(block), enable_fp_fusion=False,
        )  # fmt: skip
    return packed


@torch.library.register_fake("shardplan::quantize")
def _(x, seed, kind, block, scale_dtype, partitions, devices_per_node):
    packing = Packing(kind=kind, block=block, scale_dtype=scale_dtype)
    return x.new_empty((partitions, packing.row_bytes(part_numel(x.numel(), partitions))), dtype=torch.uint8)


def quantize(
    x: torch.Tensor,
    packing: Packing,
    *,
    partitions: int = 1,
    devices_per_node: int = 1,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` [any shape] in bf16, fp16 or fp32, taken flat, as uint8 [partitions, row_bytes]: codes, scales behind them.

    Part p of ceil(numel / partitions) elements lies in row p; with `devices_per_node` > 1 in the row where the hierarchical
    all-to-all wants it (`packing.swizzled_row`), at no cost. `seed` (an int, or one int64 on the device, which a CUDA graph
    can be replayed with other values of) turns on stochastic rounding of int8 and int4, unbiased to 2^-17 of a step: for
    gradients, with a seed of its own for every rank and step. Without it, ties go to even.

    Raises `ValueError` for another dtype, partitions that are no multiple of devices_per_node, or a seed with fp8.
    """
    check_floats(x.dtype, "x")
    check_split(partitions, devices_per_node)
    if seed is not None and packing.kind == "fp8":
        raise ValueError("seed with kind='fp8': stochastic rounding is for int8 and int4; leave the seed out")
    key = seed_tensor(seed, x.device)
    return torch.ops.shardplan.quantize.default(
        x, key, packing.kind, packing.block, packing.scale_dtype, partitions, devices_per_node
    )


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
VARIANTS = (
    *(Packing(kind=kind, block=block) for kind in ("int8", "int4", "fp8") for block in (128, 512, 2048)),
    Packing(kind="int4", block=512, scale_dtype=torch.bfloat16),
    Packing(kind="int8", block=64),
    Packing(kind="int8", block=8192),
)
"""What the static gate compiles: the usual blocks, and the smallest and the largest."""


def variant_name(packing: Packing) -> str:
    """A packing in words, e.g. `int4 512 bf16 scale`."""
    return f"{packing.kind} {packing.block}{' bf16 scale' if packing.scale_bytes == 2 else ''}"


def _shipped(
    packing: Packing, dtype: torch.dtype, parted: bool, dithered: bool, capabilities: tuple[int, ...]
) -> Shipped:
    old = packing.kind == "fp8" and capabilities == (80,)
    launch = LAUNCHES["quantize", packing.kind]
    words = (variant_name(packing), POINTERS[dtype][1:], "parts" * parted, "stochastic" * dithered, "software" * old)
    return Shipped(
        name=" ".join(("quantize", *filter(None, words))),
        kernel=_quantize_kernel,
        signature={
            "x": POINTERS[dtype],
            "codes": "*u8",
            "scales": "*fp32" if packing.scale_bytes == 4 else "*i16",
            "seed": "*i64" if dithered else POINTERS[dtype],
            **dict.fromkeys(("numel", "part", "blocks", "row_bytes", "devices_per_node", "nodes"), "i32"),
        },
        constants={
            "KIND": packing.kind,
            "BLOCK": packing.block,
            "TILE_BLOCKS": launch.elements(packing.block) // packing.block,
            "HALF_SCALE": packing.scale_bytes == 2,
            "PARTED": parted,
            "DITHERED": dithered,
            "HARDWARE_FP8": packing.kind == "fp8" and not old,
            "PACKED": launch.packed,
        },
        warps=launch.warps_for(packing.block),
        stages=3,
        contracted=False,
        undivided=frozenset({"devices_per_node", "nodes", "blocks"}),
        capabilities=capabilities,
    )


def shipped() -> list[Shipped]:
    """Every kind and block from bf16; every kind and type once; parts and stochastic rounding where gradients use them."""
    both, newest = (80, 90, 100), (90, 100)
    rows = [
        _shipped(packing, torch.bfloat16, False, False, newest if packing.kind == "fp8" else both)
        for packing in VARIANTS
    ]
    rows.append(_shipped(Packing(kind="fp8"), torch.bfloat16, False, False, (80,)))
    for dtype in (torch.float16, torch.float32):
        rows += [
            _shipped(Packing(kind=kind, block=512), dtype, False, False, (90,)) for kind in ("int8", "int4", "fp8")
        ]
    for dtype in (torch.bfloat16, torch.float32):
        rows += [_shipped(Packing(kind=kind, block=512), dtype, True, True, (90,)) for kind in ("int8", "int4")]
    rows.append(_shipped(Packing(kind="int4", block=512), torch.bfloat16, True, False, (90,)))
    return rows
