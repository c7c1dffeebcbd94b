"""Every benchmark case, the headline of each kernel first and the largest shapes last."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from shardplan.kernels.benchmark_attention import attention_cases
from shardplan.kernels.benchmark_case import COPY, PRODUCT, Case, Setting, copy_bytes, copy_provider
from shardplan.kernels.benchmark_layers import layer_cases
from shardplan.kernels.benchmark_states import state_cases
from shardplan.kernels.benchmark_timing import Call

PRODUCT_EDGE = 8_192


def all_cases(setting: Setting, only: str = "", quick: bool = False) -> list[Case]:
    """The device's own rates, then the cases whose kernel or name holds `only`; with `quick` the headlines alone."""
    cases = [case for case in _kernel_cases(setting) if only in f"{case.kernel}, {case.name}"]
    if quick:
        cases = [case for case in cases if case.rank == 0]
    return [*_device_cases(setting), *sorted(cases, key=lambda case: case.rank)] if cases else []


def _kernel_cases(setting: Setting) -> list[Case]:
    return [*attention_cases(setting), *layer_cases(setting), *state_cases(setting)]


def _device_cases(setting: Setting) -> list[Case]:
    edge = 16 if setting.dry else PRODUCT_EDGE

    def product(where: Setting) -> Mapping[str, Callable[[], Call]]:
        left, right = (torch.randn(edge, edge, device=where.device, dtype=where.dtype) for _ in range(2))
        return {PRODUCT: lambda: lambda: torch.mm(left, right)}

    return [
        Case(kernel="device", name=f"bf16 product of {edge}: G", work=2.0 * edge**3, unit="TFLOP/s", providers=product),
        Case(
            kernel="device",
            name="copy of 512 MiB: W",
            work=float(copy_bytes(setting)),
            unit="GB/s",
            providers=lambda where: {COPY: lambda: copy_provider(where)},
        ),
    ]
