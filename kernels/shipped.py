"""What the static gate compiles: one entry for each configuration in which a kernel is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One kernel in one configuration, as it is launched."""

    name: str
    """Kernel and configuration for people, e.g. `attention_forward D128 causal bf16`; unique."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Type of every argument that is not a constant: `*bf16`, `i32`, `fp32`, `tensordesc<bf16[1, 1, 128, 128]>`."""
    constants: Mapping[str, Any]
    """Value of every `tl.constexpr` argument."""
    warps: int
    stages: int
    undivided: frozenset[str] = field(default_factory=frozenset[str])
    """Pointers and integers not known to be multiples of 16 at a launch; all others are."""
    tensor_cores: bool = False
    """Whether products must run on the tensor cores (`HGMMA` on sm_90)."""
    tma: bool = False
    """Whether tiles must be loaded by the tensor memory accelerator (`UTMALDG` on sm_90)."""
    specialised: bool = False
    """Whether warps of its own must load tiles: more threads than `warps` has."""
    contracted: bool = True
    """Whether the compiler may contract a · b + c to one operation (`enable_fp_fusion` of a launch)."""
    most_stack_bytes: int = 0
    """Spilled bytes a thread that are known and accepted."""
    capabilities: tuple[int, ...] = (90,)
    """Compute capabilities it is shipped for, of 80, 90, 100."""
