"""Benchmark cases of the memory-bound kernels of a layer: RMSNorm, SwiGLU, rotary positions, cross-entropy.

Work is what must be read and written at least, in bytes; the rate is held to that of a copy, W. N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from shardplan.kernels.benchmark_case import (
    COMPILED,
    COPY,
    EAGER,
    GOOD,
    LIGER,
    MUST,
    OURS,
    Case,
    NotSupportedError,
    Setting,
    Target,
    copy_bytes,
    copy_provider,
    loaded,
)
from shardplan.kernels.benchmark_timing import Call

Function = Callable[..., Any]
EPS = 1e-6
LIGER_MODULE = "liger_kernel.transformers.functional"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A differentiable function, its inputs, and who computes it."""

    ours: Callable[[], Function]
    plain: Function
    liger: Callable[[], Function]
    inputs: Callable[[Setting], list[torch.Tensor]]
    trained: int
    """The first so many inputs have gradients."""


def held_to_copy(must: float, good: float = 0.92, *, compiled: bool = True) -> tuple[Target, ...]:
    """W, and never more than 5 % slower than what torch.compile makes of the plain formula."""
    beside = (Target(level=MUST, baseline=COMPILED, ratio=0.95),) if compiled else ()
    return (
        Target(level=MUST, baseline=COPY, ratio=must),
        Target(level=GOOD, baseline=COPY, ratio=good),
        *beside,
    )


def _case(kernel: str, name: str, layer: Layer, passes: str, work: float, must: float, setting: Setting) -> Case:
    return Case(
        kernel=f"{kernel} {passes}",
        name=name,
        work=work,
        unit="GB/s",
        providers=lambda where: _providers(where, layer, passes),
        targets=held_to_copy(must),
        rank=0,
        works={COPY: copy_bytes(setting)},
    )


def _providers(setting: Setting, layer: Layer, passes: str) -> Mapping[str, Callable[[], Call]]:
    inputs = layer.inputs(setting)

    def call(function: Function, *, own: bool = False) -> Call:
        """Liger writes over its inputs, so it has its own."""
        given = [x.clone() for x in inputs] if own else inputs
        return _passes(function, given, layer.trained, passes)

    return {
        OURS: lambda: call(layer.ours()),
        EAGER: lambda: call(layer.plain),
        COMPILED: lambda: call(setting.compile(layer.plain)),
        LIGER: lambda: call(_liger(layer.liger, setting), own=True),
        COPY: lambda: copy_provider(setting),
    }


def _passes(function: Function, inputs: list[torch.Tensor], trained: int, passes: str) -> Call:
    if passes == "forward":

        @torch.no_grad()
        def forward() -> object:
            return function(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs[:trained]]
    seeds: list[torch.Tensor] = []

    def gradients(out: Any) -> object:
        outs = list(out) if isinstance(out, tuple) else [out]
        if not seeds:
            seeds.extend(torch.randn_like(one) if one.dim() else torch.ones_like(one) for one in outs)
        return torch.autograd.grad(outs, leaves, seeds, retain_graph=passes == "backward")

    if passes == "forward+backward":
        return lambda: gradients(function(*leaves, *inputs[trained:]))
    out = function(*leaves, *inputs[trained:])
    return lambda: gradients(out)


def _random(setting: Setting, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=setting.device).to(setting.dtype)


def _liger(load: Callable[[], Function], setting: Setting) -> Function:
    if setting.device.type != "cuda":
        raise NotSupportedError("needs a GPU")
    return load()


def _ours_rms_norm() -> Function:
    rms_norm = loaded("shardplan.kernels.norm", "rms_norm")
    return lambda x, weight: rms_norm(x, weight, eps=EPS)


def _liger_rms_norm() -> Function:
    liger_rms_norm = loaded(LIGER_MODULE, "liger_rms_norm")
    return lambda x, weight: liger_rms_norm(x, weight, EPS)


RMS_NORM = Layer(
    ours=_ours_rms_norm,
    plain=lambda x, weight: functional.rms_norm(x, weight.shape, weight, EPS),
    liger=_liger_rms_norm,
    inputs=lambda at: [_random(at, *((4, 64) if at.dry else (16_384, 4_096))), _random(at, 64 if at.dry else 4_096)],
    trained=2,
)


SWIGLU = Layer(
    ours=lambda: loaded("shardplan.kernels.gated", "gated"),
    plain=lambda gate, up: functional.silu(gate) * up,
    liger=lambda: loaded(LIGER_MODULE, "liger_swiglu"),
    inputs=lambda at: [_random(at, *((4, 64) if at.dry else (16_384, 11_008))) for _ in range(2)],
    trained=2,
)


def _liger_rotary() -> Function:
    liger_rope = loaded(LIGER_MODULE, "liger_rope")

    def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        tables = (torch.cat([table, table], dim=-1)[None] for table in (cos, sin))
        return liger_rope(q.transpose(1, 2), k.transpose(1, 2), *tables)

    return turn


def _rotary_inputs(setting: Setting) -> list[torch.Tensor]:
    batch, seq, heads, pairs = (1, 8, (2, 1), 8) if setting.dry else (4, 4_096, (32, 8), 64)
    position = torch.arange(seq, device=setting.device, dtype=torch.float32)
    angle = torch.outer(position, 10_000.0 ** -(torch.arange(pairs, device=setting.device) / pairs))
    return [*(_random(setting, batch, seq, one, 2 * pairs) for one in heads), angle.cos(), angle.sin()]


def _plain_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    c, s = cos[:, None], sin[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)

    return turn(q), turn(k)


ROTARY = Layer(
    ours=lambda: loaded("shardplan.kernels.rotary", "rotary"),
    plain=_plain_rotary,
    liger=_liger_rotary,
    inputs=_rotary_inputs,
    trained=2,
)


def _logits(setting: Setting) -> list[torch.Tensor]:
    rows, words = (4, 64) if setting.dry else (4_096, 128_256)
    return [_random(setting, rows, words), torch.randint(words, (rows,), device=setting.device)]


CROSS_ENTROPY = Layer(
    ours=lambda: loaded("shardplan.kernels.cross_entropy", "cross_entropy"),
    plain=lambda logits, targets: functional.cross_entropy(logits.float(), targets),
    liger=lambda: loaded(LIGER_MODULE, "liger_cross_entropy"),
    inputs=_logits,
    trained=1,
)


def layer_cases(setting: Setting) -> list[Case]:
    """Forward and backward of each; bf16 tensors of 128 MiB to 1 GiB."""
    rows = [
        ("rms_norm", "16384 x 4096", RMS_NORM, 16_384 * 4_096, {"forward": (2, 0.85), "backward": (3, 0.75)}),
        ("swiglu", "16384 x 11008", SWIGLU, 16_384 * 11_008, {"forward": (3, 0.85), "backward": (5, 0.85)}),
        (
            "rotary",
            "4 x 4096, 32 + 8 heads D128",
            ROTARY,
            16_384 * 5_120,
            {"forward": (2, 0.85), "backward": (2, 0.85)},
        ),
        # Both passes together: a kernel may compute the gradient in the forward pass already.
        ("cross_entropy", "4096 x 128256", CROSS_ENTROPY, 4_096 * 128_256, {"forward+backward": (3, 0.85)}),
    ]
    return [
        _case(kernel, name, layer, one, tensors * elements * 2.0, must, setting)
        for kernel, name, layer, elements, passes in rows
        for one, (tensors, must) in passes.items()
    ]
