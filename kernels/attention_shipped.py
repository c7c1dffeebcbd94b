"""Configurations in which the attention kernels are shipped, for the static gate."""

from __future__ import annotations

from typing import Any

from shardplan.kernels.attention_backward import attention_delta_kernel
from shardplan.kernels.attention_forward import attention_forward_kernel
from shardplan.kernels.attention_key_gradient import attention_key_gradient_kernel
from shardplan.kernels.attention_launch import padded_dimension
from shardplan.kernels.attention_launch_backward import DELTA_ROWS
from shardplan.kernels.attention_query_gradient import attention_query_gradient_kernel
from shardplan.kernels.attention_specialised import attention_specialised_kernel
from shardplan.kernels.attention_tiles import BLACKWELL_TMA, HOPPER_TMA, POINTERS, WIDE, Tiles
from shardplan.kernels.shipped import Shipped

KERNELS = {
    "forward": attention_forward_kernel,
    "key_gradient": attention_key_gradient_kernel,
    "query_gradient": attention_query_gradient_kernel,
}
SWITCHES = ("HAS_LEFT", "HAS_RIGHT", "TOP_LEFT", "SOFTCAP", "ALIBI", "DROPOUT", "VARLEN")
USUAL = ("VARLEN", "DROPOUT", "SOFTCAP", "HAS_LEFT", "ALIBI")
"""What a causal mask is often trained with: packed documents, dropout, a soft cap, a window, slopes."""
EVERYTHING = frozenset(SWITCHES) - {"TOP_LEFT"}
TYPES = {"cu_q": "*i32", "cu_k": "*i32", "slopes": "*fp32", "seeds": "*i64"} | dict.fromkeys(
    ("scale", "softcap", "dropout"), "fp32"
)
ABSENT = {"cu_q": "VARLEN", "cu_k": "VARLEN", "slopes": "ALIBI", "seeds": "DROPOUT"}
"""Arguments that are None unless their switch is on."""
QUERY_SIDE, KEY_SIDE = ("q", "grad"), ("k", "v")
WARP_PRODUCTS = frozenset({("key_gradient", 64), ("key_gradient", 128), ("key_gradient", 256), ("query_gradient", 256)})
"""Kernels and head dimensions whose tiles by pointer are too short for the tensor cores' instructions of a warp group."""
SPILLED: dict[tuple[str, int], int] = {("key_gradient", 128): 64, ("key_gradient", 256): 64}
"""Stack bytes a thread that are accepted where tiles load by descriptor: faster as measured than tiles without."""
SPILLED_WITH: dict[tuple[str, int, str], int] = {
    ("forward", 64, "DROPOUT"): 128,
    ("forward", 128, "DROPOUT"): 8,
    ("key_gradient", 64, "VARLEN"): 216,
    ("key_gradient", 64, "DROPOUT"): 16,
    ("key_gradient", 128, "VARLEN"): 128,
    ("key_gradient", 128, "DROPOUT"): 80,
    ("query_gradient", 128, "DROPOUT"): 32,
    ("forward", 256, "DROPOUT"): 104,
    ("key_gradient", 256, "VARLEN"): 144,
    ("key_gradient", 256, "DROPOUT"): 280,
    ("key_gradient", 256, "SOFTCAP"): 104,
    ("query_gradient", 256, "VARLEN"): 16,
    ("query_gradient", 256, "DROPOUT"): 168,
}
"""The same with one switch beside a causal mask: the tiles are those of the mask alone, no others have been timed with it."""
SPILLED_FP32 = {64: 512, 128: 512, 256: 2560}
"""For fp32, by head dimension, which is there to be right."""
SPILLED_WITH_EVERYTHING = 1280
"""For every switch at once, likewise."""


def shipped() -> list[Shipped]:
    """Every tile with and without a causal mask; that mask with each of USUAL for three head dimensions, and every switch at
    once."""
    entries: list[Shipped] = []
    for kernel in KERNELS:
        for head_dim in (32, 64, 96, 128, 256):
            for on in (frozenset[str](), frozenset({"HAS_RIGHT"})):
                entries.append(_entry(kernel, head_dim, "bf16", on, tma=True, capabilities=(90,)))
            entries.append(_entry(kernel, head_dim, "bf16", frozenset({"HAS_RIGHT"}), tma=True, capabilities=(100,)))
            entries.append(_entry(kernel, head_dim, "bf16", frozenset({"HAS_RIGHT"}), tma=False, capabilities=(80, 90)))
        for head_dim in (64, 128, 256):
            for switch in USUAL:
                on = frozenset({"HAS_RIGHT", switch})
                entries.append(_entry(kernel, head_dim, "bf16", on, tma=True, capabilities=(90,)))
        for head_dim in (64, 128, 256):
            entries.append(_entry(kernel, head_dim, "fp16", EVERYTHING, tma=True, capabilities=(90,)))
            entries.append(_entry(kernel, head_dim, "fp32", frozenset({"HAS_RIGHT"}), tma=False, capabilities=(80, 90)))
        entries.append(_entry(kernel, 128, "bf16", EVERYTHING, tma=False, capabilities=(80, 90)))
        entries.append(_entry(kernel, 128, "fp32", EVERYTHING, tma=False, capabilities=(90,)))
    entries += [_specialised(head_dim) for head_dim in (64, 128)]
    return [*entries, _delta()]


def _entry(
    kernel: str, head_dim: int, dtype: str, on: frozenset[str], *, tma: bool, capabilities: tuple[int, ...]
) -> Shipped:
    function, block_d = KERNELS[kernel], padded_dimension(head_dim)
    by_descriptor = BLACKWELL_TMA if capabilities == (100,) else HOPPER_TMA
    table = WIDE if dtype == "fp32" else by_descriptor if tma else POINTERS
    tile = table[(kernel, max(block_d, 64))]
    constants: dict[str, Any] = {name: name in on for name in SWITCHES}
    constants |= {"D": head_dim, "BLOCK_D": block_d, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
    constants |= {"TMA": tma, "PRECISION": "ieee"}
    constants |= {name: None for name, switch in ABSENT.items() if switch not in on and name in function.arg_names}
    words = "+".join(sorted(on)).lower() or "full"
    return Shipped(
        name=f"attention_{kernel} D{head_dim} {dtype} {words} {'descriptors' if tma else 'pointers'}"
        + " Blackwell" * (capabilities == (100,)),
        kernel=function,
        signature=_signature(function.arg_names, constants, tile, dtype, block_d, tma=tma),
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        tensor_cores=dtype != "fp32" and (tma or (kernel, max(block_d, 64)) not in WARP_PRODUCTS),
        tma=tma,
        most_stack_bytes=_accepted(kernel, block_d, dtype, on) if tma or dtype == "fp32" or on == EVERYTHING else 0,
        capabilities=capabilities,
    )


def _accepted(kernel: str, block_d: int, dtype: str, on: frozenset[str]) -> int:
    """Accepted stack bytes a thread."""
    if dtype == "fp32":
        return SPILLED_FP32[max(block_d, 64)]
    if on == EVERYTHING:
        return SPILLED_WITH_EVERYTHING
    return max([SPILLED.get((kernel, block_d), 0), *(SPILLED_WITH.get((kernel, block_d, switch), 0) for switch in on)])


def _signature(
    names: list[str], constants: dict[str, Any], tile: Tiles, dtype: str, block_d: int, *, tma: bool
) -> dict[str, str]:
    types: dict[str, str] = {}
    for name in names:
        if name in constants:
            continue
        if name in QUERY_SIDE or name in KEY_SIDE:
            rows = tile.queries if name in QUERY_SIDE else tile.keys
            types[name] = f"tensordesc<{dtype}[1, 1, {rows}, {block_d}]>" if tma else f"*{dtype}"
        elif name in {"out", "dq", "dk", "dv"}:
            types[name] = f"*{dtype}"
        elif name in {"lse", "delta", "lse2"}:
            types[name] = "*fp32"
        else:
            types[name] = TYPES.get(name, "i32")
    return types


def _specialised(head_dim: int) -> Shipped:
    function, tile = attention_specialised_kernel, HOPPER_TMA[("specialised", head_dim)]
    constants = {"D": head_dim, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
    constants |= {"CAUSAL": False, "RAGGED": False, "SPECIALISE": True}
    return Shipped(
        name=f"attention_specialised D{head_dim} bf16 full",
        kernel=function,
        signature={
            name: "*fp32"
            if name == "lse"
            else "fp32"
            if name == "scale"
            else "i32"
            if name not in {"q", "k", "v", "out"}
            else "*bf16"
            for name in function.arg_names
            if name not in constants
        },
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        tensor_cores=True,
        tma=True,
        specialised=True,
    )


def _delta() -> Shipped:
    names = attention_delta_kernel.arg_names
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_M": DELTA_ROWS, "HAS_GRAD_LSE": True}
    types = {"out": "*bf16", "grad": "*bf16"} | dict.fromkeys(("lse", "grad_lse", "delta", "lse2"), "*fp32")
    return Shipped(
        name="attention_delta D128 bf16",
        kernel=attention_delta_kernel,
        signature={name: types.get(name, "i32") for name in names if name not in constants},
        constants=constants,
        warps=4,
        stages=3,
        capabilities=(80, 90, 100),
    )
