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
