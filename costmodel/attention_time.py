"""Seconds of fused (flash) attention: plateau by kernel generation, architecture and head width, ramp by sequence length.

A GPU profile states what its best causal kernel with heads of 128 reaches (`attention_efficiency`); older kernels and other head
widths are given relative to that (`attention_kernels.toml`, from the FlashAttention repository's published figures).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.machine import Gpu

FloatArray = NDArray[np.float64]

FLASH_BACKWARD_FLOP = 2.5
"""Backward over forward FLOP of flash attention: five matrix products against two (arXiv 2205.14135)."""
FLASH_RAMP_TOKENS = 350.0
"""Sequence length at which causal flash attention reaches half its plateau (published A100 and H100 curves: 300 to 500)."""


@cache
def attention_kernels() -> Mapping[str, Any]:
    """Kernel -> architecture -> head_dim, forward and backward lists."""
    text = (resources.files("shardplan.costmodel") / "attention_kernels.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["kernels"]


def flash_attention_s(
    gpu: Gpu, precision: str, kernel: str, head_dim: ArrayLike, flop_forward: FloatArray, seq: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """(forward, backward) seconds of fused causal attention with `flop_forward` FLOP on sequences of `seq` tokens.

    `kernel` is a generation of `attention_kernels.toml`; an architecture it does not list runs it as `other` does. A CPU
    has no tensor cores that narrow heads leave empty: its profile alone counts.
    """
    tokens, width = np.asarray(seq, dtype=np.float64), np.asarray(head_dim, dtype=np.float64)
    ramp = tokens / (tokens + FLASH_RAMP_TOKENS)
    by_architecture = attention_kernels()[kernel]
    table: Mapping[str, list[float]] = by_architecture.get(gpu.architecture, by_architecture["other"])
    peak = gpu.peak_flop_per_s[precision]
    seconds: list[FloatArray] = []
    for phase, flop in (("forward", flop_forward), ("backward", FLASH_BACKWARD_FLOP * flop_forward)):
        relative: FloatArray = (
            np.ones_like(width) if gpu.device == "cpu" else np.interp(width, table["head_dim"], table[phase])
        )
        seconds.append(flop / (peak * gpu.attention_efficiency[phase] * relative * ramp))
    return seconds[0], seconds[1]
