"""Benchmark cases of kernels over parameters and gradients: AdamW, and block quantisation with its inverse and reduction.

Work is the bytes that must be read and written, scales included; the rate is held to that of a copy, W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardplan.kernels.benchmark_case import (
    COMPILED,
    COPY,
    EAGER,
    GOOD,
    MUST,
    OURS,
    STRETCH,
    Case,
    NotSupportedError,
    Setting,
    Target,
    copy_bytes,
    copy_provider,
    loaded,
)
from shardplan.kernels.benchmark_layers import held_to_copy
from shardplan.kernels.benchmark_timing import Call

PARAMETERS = 2**26
ELEMENTS = 2**27
LARGE_ELEMENTS = 2**29
"""Of a reduction as well: of ELEMENTS int4 codes it moves so few bytes that a copy of them reaches 0.88 of a large one."""
STEPS = ("quantize", "dequantize", "reduce")
BLOCKS = {"int8": 2_048, "int4": 512, "fp8": 2_048}
SOURCES = 8
RATE, BETA1, BETA2, DECAY, TERM = 1e-4, 0.9, 0.95, 0.1, 1e-8
TO_COPY = (
    Target(level=MUST, baseline=COPY, ratio=0.8),
    Target(level=GOOD, baseline=COPY, ratio=0.88),
    Target(level=STRETCH, baseline=COPY, ratio=0.92),
)

Makers = Mapping[str, Callable[[], Call]]


def state_cases(setting: Setting) -> list[Case]:
    """AdamW on fp32 states, then each kind of code: quantise, dequantise, and reduce 8 sources."""
    adamw = Case(
        kernel="adamw",
        name="64 Mi fp32",
        work=PARAMETERS * 7 * 4.0,
        unit="GB/s",
        providers=_adamw,
        targets=held_to_copy(0.85),
        rank=0,
        works={COPY: copy_bytes(setting)},
    )
    kinds = [_quantise_case(kind, step, ELEMENTS, setting) for step in STEPS for kind in BLOCKS]
    large = [_quantise_case(kind, "reduce", LARGE_ELEMENTS, setting) for kind in BLOCKS]
    return [adamw, *kinds, *large, _normal_float_case(setting)]


def _adamw(setting: Setting) -> Makers:
    numel = 64 if setting.dry else PARAMETERS
    states = [torch.rand(numel, device=setting.device) for _ in range(4)]

    def ours() -> Call:
        step, schedule = (loaded("shardplan.kernels.adamw", name) for name in ("adamw_step", "adamw_schedule"))
        betas = (BETA1, BETA2)
        rates = schedule(10, learning_rate=RATE, betas=betas, device=setting.device)
        return lambda: step(*states, rates, betas=betas, eps=TERM, weight_decay=DECAY)

    def fused() -> Call:
        parameter = torch.nn.Parameter(states[0])
        parameter.grad = states[1]
        optimizer = torch.optim.AdamW([parameter], RATE, (BETA1, BETA2), TERM, DECAY, fused=True)
        return optimizer.step

    def compiled() -> Call:
        function: Any = setting.compile(_plain_adamw)
        return lambda: function(*states)

    return {OURS: ours, "torch fused": fused, COMPILED: compiled, COPY: lambda: copy_provider(setting)}


@torch.no_grad()
def _plain_adamw(parameter: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor) -> None:
    mean.lerp_(grad, 1 - BETA1)
    square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    parameter.mul_(1 - RATE * DECAY).addcdiv_(mean, square.sqrt().add_(TERM), value=-RATE)


def _code_bytes(kind: str, elements: int) -> float:
    """Codes and fp32 scales."""
    return elements * (0.5 if kind == "int4" else 1.0) + elements / BLOCKS[kind] * 4.0


def _quantise_case(kind: str, step: str, elements: int, setting: Setting) -> Case:
    codes = _code_bytes(kind, elements)
    if step == "reduce":
        name, work = f"{kind} block {BLOCKS[kind]}, {SOURCES} x {elements // SOURCES >> 20} Mi", codes + codes / SOURCES
    else:
        name, work = f"{kind} block {BLOCKS[kind]}, {elements >> 20} Mi bf16", codes + 2.0 * elements
    return Case(
        kernel={"reduce": "dequantize-reduce-quantize"}.get(step, step),
        name=name,
        work=work,
        unit="GB/s",
        providers=lambda where: _quantise(where, kind, step, elements),
        targets=TO_COPY,
        rank=0,
        works={COPY: copy_bytes(setting)},
    )


def _quantise(setting: Setting, kind: str, step: str, elements: int) -> Makers:
    numel = 8 * BLOCKS[kind] if setting.dry else elements
    x = torch.randn(numel, device=setting.device, dtype=setting.dtype)

    def ours() -> Call:
        quantize = loaded("shardplan.kernels.quantize", "quantize")
        packing = loaded("shardplan.kernels.packing", "Packing")(kind=kind, block=BLOCKS[kind])
        if step == "quantize":
            return lambda: quantize(x, packing)
        if step == "dequantize":
            dequantize = loaded("shardplan.kernels.dequantize", "dequantize")
            packed = quantize(x, packing)
            return lambda: dequantize(packed, numel, setting.dtype, packing)
        reduce = loaded("shardplan.kernels.quantize_reduce", "dequantize_reduce_quantize")
        sources = quantize(x, packing, partitions=SOURCES)[:, None]
        return lambda: reduce(sources, numel // SOURCES, packing)

    makers: dict[str, Callable[[], Call]] = {OURS: ours, COPY: lambda: copy_provider(setting)}
    if kind == "int8" and step != "reduce":
        makers[EAGER] = lambda: _plain_int8(x, step, setting, lambda function: function)
        makers[COMPILED] = lambda: _plain_int8(x, step, setting, setting.compile)
    return makers


def _plain_int8(x: torch.Tensor, step: str, setting: Setting, wrap: Callable[..., Any]) -> Call:
    """Plain torch, for scale: no packing of scales behind codes."""
    codes, scales = _encode(x)
    if step == "quantize":
        encode = wrap(_encode)
        return lambda: encode(x)
    decode = wrap(_decode)
    return lambda: decode(codes, scales, setting.dtype)


def _encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.view(-1, BLOCKS["int8"]).float()
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127.0
    return torch.round(blocks / scales).to(torch.int8), scales


def _decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float() * scales).to(dtype)


def _normal_float_case(setting: Setting) -> Case:
    return Case(
        kernel="dequantize",
        name="nf4 block 64, 128 Mi bf16",
        work=ELEMENTS * (2.0 + 0.5 + 1.0 / 64),
        unit="GB/s",
        providers=_normal_float,
        targets=TO_COPY,
        rank=0,
        works={COPY: copy_bytes(setting)},
    )


def _normal_float(setting: Setting) -> Makers:
    numel = 2**14 if setting.dry else ELEMENTS
    x = torch.randn(numel, device=setting.device, dtype=setting.dtype)

    def ours() -> Call:
        quantize_nf4, dequantize_nf4 = (
            loaded("shardplan.kernels.normal_float", name) for name in ("quantize_nf4", "dequantize_nf4")
        )
        packed = quantize_nf4(x)
        return lambda: dequantize_nf4(packed, numel, setting.dtype)

    def bitsandbytes() -> Call:
        if setting.device.type != "cuda":
            raise NotSupportedError("needs a GPU")
        quantize_4bit, dequantize_4bit = (
            loaded("bitsandbytes.functional", name) for name in ("quantize_4bit", "dequantize_4bit")
        )
        codes, state = quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
        return lambda: dequantize_4bit(codes, state)

    return {OURS: ours, "bitsandbytes": bitsandbytes, COPY: lambda: copy_provider(setting)}
