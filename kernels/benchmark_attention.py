"""Benchmark cases of attention: forward, backward and both, at 16k tokens and a model width of 2048.

Shapes and FLOP as in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): B·S = 16k, H·D = 2048; the forward pass has
4·B·H·S²·D FLOP, half of that with a causal mask, the backward pass 2.5 times as many.

B batch, S sequence, H heads, D head width; ours takes (B, S, H, D), torch the same memory seen as (B, H, S, D).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shardplan.kernels.benchmark_case import (
    CUDNN,
    EFFICIENT,
    FLASH,
    FLEX,
    GOOD,
    MUST,
    OURS,
    STRETCH,
    Case,
    NotSupportedError,
    Setting,
    Target,
    loaded,
)
from shardplan.kernels.benchmark_timing import Call

TOKENS = 16_384
WIDTH = 2_048
HEADLINE_S = 4_096
DRY_S = 32
FLEX_TARGETS = (Target(level=MUST, baseline=FLEX, ratio=0.95), Target(level=GOOD, baseline=FLEX, ratio=1.1))
PASSES = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
"""Name -> FLOP relative to the forward pass."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def attention_cases(setting: Setting) -> list[Case]:
    """Every head width, mask, pass and length; in a dry run one tiny length."""
    lengths = {"forward": (512, 1_024, 2_048, HEADLINE_S, 8_192, TOKENS)}
    shapes = [(passes, width, causal) for passes in PASSES for width in (128, 64, 256) for causal in (False, True)]
    fixed = [
        _case(*shape, seq, setting)
        for shape in shapes
        for seq in ((DRY_S,) if setting.dry else lengths.get(shape[0], (2_048, HEADLINE_S, 8_192, TOKENS)))
    ]
    return [*fixed, *(_case(*shape, DRY_S if setting.dry else HEADLINE_S, setting, flex=True) for shape in shapes)]


def _case(passes: str, width: int, causal: bool, seq: int, setting: Setting, *, flex: bool = False) -> Case:
    """`flex`: beside flex_attention, in a case of its own, because it compiles for many seconds a shape."""
    batch, heads = (1, 1) if setting.dry else (TOKENS // seq, WIDTH // width)
    headline = seq in {HEADLINE_S, DRY_S} and not flex
    targets = FLEX_TARGETS if flex else tuple(attention_targets(passes, width, causal, seq))
    return Case(
        kernel=f"attention {passes}",
        name=f"D{width} {'causal' if causal else 'full'} S{seq}{', flex' * flex}",
        work=PASSES[passes] * 4.0 * batch * heads * seq**2 * width * (0.5 if causal else 1.0),
        unit="TFLOP/s",
        providers=lambda where: _providers(where, passes, (batch, seq, heads, width), causal, flex),
        targets=targets,
        rank=0 if headline else 2 if seq == TOKENS else 1,
    )


def attention_targets(passes: str, width: int, causal: bool, seq: int) -> Iterable[Target]:
    """Ratios to reach, by shape class: a forward kernel without warp specialisation, a backward pass split in two."""
    if passes == "forward" and causal and seq <= 1_024:
        yield Target(level=MUST, baseline=FLASH, ratio=0.85)
        yield Target(level=GOOD, baseline=FLASH, ratio=1.0)
        return
    least_seq = 2_048 if passes == "forward" and (width != 128 or not causal) else 4_096
    if seq >= least_seq:
        for level, flash, cudnn in _ratios(passes, width, causal):
            if flash:
                yield Target(level=level, baseline=FLASH, ratio=flash)
            if cudnn:
                yield Target(level=level, baseline=CUDNN, ratio=cudnn)


def _ratios(passes: str, width: int, causal: bool) -> list[tuple[str, float, float]]:
    """(level, ratio to FLASH, ratio to cuDNN), 0 where there is none."""
    rows: dict[tuple[str, int], tuple[tuple[float, float], ...]] = {
        ("forward", 128): ((1.05, 0.65), (1.2, 0.75), (0, 0.88)) if causal else ((1.15, 0.7), (1.25, 0.8), (0, 0.9)),
        ("forward", 64): ((1.05 if causal else 1.1, 0.8), (0, 0.95), (0, 1.0)),
        ("forward", 256): ((1.1, 0.6), (0, 0.75), (0, 0.85)),
        ("backward", 128): ((0.85, 0.5), (1.0, 0.62), (1.2, 0.72)),
        ("backward", 64): ((0.9, 0.55), (1.05, 0.68), (0, 0.75)),
        ("backward", 256): ((0.65, 0), (0.85, 0), (0, 0.55)),
    }
    if passes == "forward+backward" and width == 128 and causal:
        rows[passes, width] = ((0.95, 0), (1.1, 0.65), (0, 0.75))
    return [(level, *pair) for level, pair in zip((MUST, GOOD, STRETCH), rows.get((passes, width), ()), strict=False)]


def _providers(
    setting: Setting, passes: str, shape: tuple[int, ...], causal: bool, flex: bool
) -> Mapping[str, Callable[[], Call]]:
    generator = torch.Generator(setting.device).manual_seed(0)
    qkvo = [
        torch.randn(shape, generator=generator, device=setting.device)
        .to(setting.dtype)
        .requires_grad_(index < 3 and passes != "forward")
        for index in range(4)
    ]
    makers: dict[str, Callable[[], Attend]] = {OURS: lambda: _ours(causal)}
    makers |= (
        {FLEX: lambda: _flex(setting, causal, shape[1])}
        if flex
        else {
            FLASH: lambda: _sdpa(SDPBackend.FLASH_ATTENTION, causal),
            CUDNN: lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, causal),
            EFFICIENT: lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION, causal),
        }
    )
    return {name: lambda maker=maker: _passes(maker(), passes, qkvo) for name, maker in makers.items()}


def _passes(attend: Attend, passes: str, qkvo: list[torch.Tensor]) -> Call:
    """The call that is timed, after one try that says whether it is supported."""
    *qkv, grad = qkvo
    if passes == "forward":
        with torch.no_grad():
            _tried(lambda: attend(*qkv))

        @torch.no_grad()
        def forward() -> object:
            return attend(*qkv)

        return forward
    if passes == "forward+backward":

        def both() -> object:
            return torch.autograd.grad(attend(*qkv), qkv, grad)

        _tried(both)
        return both
    out = _tried(lambda: attend(*qkv))
    _tried(lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True))
    return lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True)


def _tried(call: Callable[[], Any]) -> Any:
    """The result of `call`; NotSupportedError with torch's reason, which it gives as warnings, where there is none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return call()
        except RuntimeError as error:
            if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise
            reasons = [str(one.message).split(" (Triggered")[0] for one in said]
            told = [one for one in reasons if "not used because" not in one] or ["no available kernel"]
            raise NotSupportedError("; ".join(told[-2:])) from error


def _ours(causal: bool) -> Attend:
    attention = loaded("shardplan.kernels.attention", "attention")
    return lambda q, k, v: attention(q, k, v, causal=causal)


def _sdpa(backend: SDPBackend, causal: bool) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return attend


def _flex(setting: Setting, causal: bool, seq: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = setting.compile(flex_attention)
    mask = None
    if causal:
        mask = create_block_mask(_past, None, None, seq, seq, device=str(setting.device))
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def _past(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= key
