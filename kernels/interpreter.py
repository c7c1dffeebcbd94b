"""Where a kernel runs: on a GPU, or in Triton's interpreter on the CPU (TRITON_INTERPRET=1 before the first import)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels defined in this process are interpreted; Triton decides that where a kernel is decorated."""

WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)
"""Inside a kernel: widen bf16 to fp32 before arithmetic, which the interpreter gets silently wrong in bf16."""


def takes_kernel(tensor: torch.Tensor) -> bool:
    """Whether a kernel can read `tensor`: CUDA memory, or any memory under the interpreter; else use the reference."""
    return tensor.is_cuda or INTERPRETED


@triton.jit
def as_output(value, pointer):
    """`value` in the type `pointer` points at, ties to even; the interpreter would truncate to bf16, so round before it."""
    if WIDEN and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)  # noqa: PLR0124 - NaN
    return value.to(pointer.dtype.element_ty)
