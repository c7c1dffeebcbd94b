"""What a benchmark case is: one kernel at one shape, the ways to compute it, and the ratios it should reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from shardplan.kernels.benchmark_timing import Call

OURS = "shardplan"
FLASH, CUDNN, EFFICIENT, FLEX = "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex_attention"
EAGER, COMPILED, LIGER = "torch", "torch.compile", "liger"
COPY = "copy"
"""A large copy on the device, interleaved with the rest: bytes read and written per second are W."""
PRODUCT = "matmul"
"""A large bf16 product: FLOP/s are G."""

MUST, GOOD, STRETCH = LEVELS = ("must", "good", "stretch")


class NotSupportedError(Exception):
    """A provider cannot compute this case; the message says why."""


def loaded(module: str, name: str) -> Any:
    """A function of a module that may not be installed; NotSupportedError says so."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotSupportedError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Target:
    """Rate of ours over the rate of a baseline timed in the same rounds."""

    level: str
    """must, good or stretch."""
    baseline: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where, and whether shapes are the real ones."""

    device: torch.device
    dry: bool = False
    """Tiny shapes, each thing once, nothing compiled."""

    @property
    def dtype(self) -> torch.dtype:
        """bf16; fp32 in a dry run, which the interpreter computes exactly."""
        return torch.float32 if self.dry else torch.bfloat16

    def compile(self, function: Callable[..., object]) -> Callable[..., object]:
        """torch.compile for exactly these shapes."""
        if self.dry:
            return function
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # else a compiled backward pass may run only once
        return torch.compile(function, dynamic=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    """e.g. `attention forward`."""
    name: str
    """The shape in words; with the kernel, unique."""
    work: float
    """FLOP, or bytes read and written, of one call."""
    unit: str
    """`TFLOP/s` or `GB/s`: what work per second is shown in."""
    providers: Callable[[Setting], Mapping[str, Callable[[], Call]]]
    """Name -> prepares the call; preparing raises NotSupportedError, or anything, where it cannot."""
    targets: tuple[Target, ...] = ()
    rank: int = 1
    """0 = the headline, measured first and by --quick; 2 = the largest, given up first when time runs out."""
    works: Mapping[str, float] | None = None
    """Work of one call of a provider where it is another, e.g. the copy."""

    def work_of(self, provider: str) -> float:
        """FLOP or bytes of one call of that provider."""
        return (self.works or {}).get(provider, self.work)


def copy_bytes(setting: Setting) -> int:
    """Bytes read and written by one call of `copy_provider`."""
    return 2 * (2**10 if setting.dry else 2**29)


def copy_provider(setting: Setting) -> Call:
    """A copy of half a GiB."""
    source = torch.ones(copy_bytes(setting) // 2, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
