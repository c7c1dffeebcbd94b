"""What launching a kernel over the rows of a tensor needs: rows, the right device, how many programs fill it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shardplan.kernels.interpreter import takes_kernel

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes the pointwise and row-wise kernels read and write; they compute in fp32."""

TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Triton's name of each of them, as in a kernel's signature."""

INTERPRETER_PROGRAMS = 4
"""Programs that share a reduction in the interpreter: enough to test the second reduction, few enough to be quick."""


def uses_kernel(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors; where not (CPU without the interpreter, fp64), plain torch does the work."""
    return all(takes_kernel(tensor) and tensor.dtype in KERNEL_DTYPES for tensor in tensors)


def as_rows(x: Tensor) -> Tensor:
    """`x` (..., N) as (rows, N) with its last dim contiguous: a view where the strides allow one, else a copy."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def next_power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count` (> 0): blocks of a kernel are powers of two."""
    return 1 << (count - 1).bit_length()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; inside this context that is the device of `x`."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether the caller is under autocast for the device of `x`; tensors of no device are never."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def in_given_precision(x: Tensor) -> AbstractContextManager[object]:
    """Inside an operator whose caller may be under autocast: products in the dtypes they are given in."""
    return torch.autocast(x.device.type, enabled=False)


def resident_programs(x: Tensor, per_multiprocessor: int) -> int:
    """Programs of a kernel that loops over its share of the rows: `per_multiprocessor` for each multiprocessor."""
    if not x.is_cuda:
        return INTERPRETER_PROGRAMS
    return per_multiprocessor * torch.cuda.get_device_properties(x.device).multi_processor_count
