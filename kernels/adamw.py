"""One AdamW step in one pass over a parameter and its moments, in place, with a low-precision copy written on the way.

    g ← s · g                       s: gradient scale, as clipping gives it
    m ← β1 m + (1 − β1) g           v ← β2 v + (1 − β2) g²
    p ← p − lr λ p                  (decoupled weight decay)
    p ← p − lr (m / c1) / (√(v / c2) + ε),    c1 = 1 − β1^t, c2 = 1 − β2^t at step t = 1, 2, …
    copy ← p, rounded

Why it exists beside torch.optim.AdamW(fused=True): it reads bf16 gradients beside an fp32 master parameter, keeps each moment
in fp32 or bf16, writes the bf16 copy that the next forward reads and applies the clipping scale, all in the one pass; torch
needs a pass more for each. With one dtype throughout and no copy, use torch's, which also takes a list of tensors a launch.
Bytes an element with an fp32 master and fp32 moments, bf16 gradient and copy: 2 + 3 · 8 + 2 = 28.

Learning rate and corrections may be device tensors, so that a CUDA graph of a step replays with new values. A bf16 second
moment stands still where 1 − β2 < 2^−9, half its spacing: keep it in fp32, or β2 at 0.99 or less.

Sources: [1] Kingma and Ba, Adam, arXiv 1412.6980, algorithm 1. [2] Loshchilov and Hutter, Decoupled Weight Decay
Regularization, arXiv 1711.05101, algorithm 2. [3] Dettmers et al., 8-bit Optimizers, arXiv 2110.02861 (low-precision moments).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardplan.kernels.interpreter import as_output
from shardplan.kernels.launch import on_device_of, uses_kernel
from shardplan.kernels.shipped import Shipped

BLOCK = 1_024
WARPS = 4


@triton.jit
def adamw_kernel(
    parameter: tl.tensor,
    gradient: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    copy: tl.tensor,
    schedule: tl.tensor,
    gradient_scale: tl.tensor,
    numel: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    rest1: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    HAS_COPY: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """schedule holds lr, c1, c2 in fp32; rest is 1 − β, computed in fp64 on the host."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(parameter + at, mask=mask, other=0.0).to(tl.float32)
    learning_rate = tl.load(schedule)
    step_size = learning_rate / tl.load(schedule + 1)
    root2 = tl.sqrt(tl.load(schedule + 2))
    if HAS_SCALE:
        g *= tl.load(gradient_scale)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p -= learning_rate * weight_decay * p
    p -= step_size * m / (tl.sqrt(v) / root2 + eps)
    tl.store(first + at, as_output(m, first), mask=mask)
    tl.store(second + at, as_output(v, second), mask=mask)
    tl.store(parameter + at, as_output(p, parameter), mask=mask)
    if HAS_COPY:
        tl.store(copy + at, as_output(p, copy), mask=mask)


def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    schedule: Tensor,
    gradient_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same step in plain torch, in place, in fp32 (fp64 for an fp64 parameter)."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    learning_rate, correction1, correction2 = schedule.to(wide).unbind()
    g = gradient.to(wide) * (1.0 if gradient_scale is None else gradient_scale.to(wide))
    m = beta1 * first.to(wide) + (1 - beta1) * g
    v = beta2 * second.to(wide) + (1 - beta2) * g * g
    p = parameter.to(wide) * (1 - learning_rate * weight_decay)
    p = p - learning_rate / correction1 * m / (v.sqrt() / correction2.sqrt() + eps)
    for place, value in ((first, m), (second, v), (parameter, p), (copy, p)):
        if place is not None:
            place.copy_(value)


@torch.library.custom_op("shardplan::adamw", mutates_args=("parameter", "first", "second", "copy"))
def _adamw(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    schedule: Tensor,
    gradient_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if not uses_kernel(parameter, gradient, first, second):
        adamw_reference(
            parameter, gradient, first, second, copy, schedule, gradient_scale, beta1, beta2, eps, weight_decay
        )
    elif parameter.numel():
        with on_device_of(parameter):
            adamw_kernel[(triton.cdiv(parameter.numel(), BLOCK),)](
                parameter,
                gradient,
                first,
                second,
                parameter if copy is None else copy,
                schedule,
                schedule if gradient_scale is None else gradient_scale,
                parameter.numel(),
                beta1,
                beta2,
                1 - beta1,
                1 - beta2,
                eps,
                weight_decay,
                HAS_COPY=copy is not None,
                HAS_SCALE=gradient_scale is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
                num_stages=1,
            )


@_adamw.register_fake
def _(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    schedule: Tensor,
    gradient_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    return None


def adamw_schedule(
    step: int | Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    device: torch.device | str | None = None,
) -> Tensor:
    """(lr, 1 − β1^step, 1 − β2^step), fp32 (3,), for `adamw_step`; computed once a step for all parameters.

    `step` counts from 1. With a tensor for `step` (one element, on the device) nothing is copied from the host, so that a CUDA
    graph may hold it; with an int the three values are copied to `device`. ValueError for an int step below 1 or a β outside [0, 1).
    """
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}={beta} lies outside [0, 1); use e.g. 0.9 and 0.95")
    if isinstance(step, Tensor):
        # in fp64: 1 − β2^t loses four digits in fp32 at the first steps
        t = step.reshape(()).to(torch.float64)
        corrections = [-torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t) for beta in betas]
        rate = learning_rate.reshape(()) if isinstance(learning_rate, Tensor) else torch.full_like(t, learning_rate)
        return torch.stack((rate.to(t), *corrections)).to(torch.float32)
    if step < 1:
        raise ValueError(f"step={step}; steps count from 1")
    corrections = [1.0 - beta**step for beta in betas]
    if isinstance(learning_rate, Tensor):
        given = torch.tensor(corrections, dtype=torch.float32, device=learning_rate.device)
        return torch.cat((learning_rate.reshape(1).to(torch.float32), given))
    return torch.tensor([learning_rate, *corrections], dtype=torch.float32, device=device)


@torch.no_grad()
def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    schedule: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    copy: Tensor | None = None,
    gradient_scale: Tensor | None = None,
) -> None:
    """One AdamW step, in place on the parameter, both moments and, where given, its `copy`.

    All of one shape, contiguous, on one device; each fp32, fp16 or bf16 of its own (usually an fp32 master, a bf16 gradient and
    copy). `schedule` is what `adamw_schedule` returns; `gradient_scale` is one fp32 element on the device, multiplied into the
    gradient. Give local tensors of a DTensor. ValueError on shapes, layouts or devices that do not agree. Sources [1], [2] above.
    """
    named = {"gradient": gradient, "first_moment": first_moment, "second_moment": second_moment, "copy": copy}
    for name, tensor in {"parameter": parameter, **named}.items():
        if tensor is None:
            continue
        if tensor.shape != parameter.shape or tensor.device != parameter.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}; "
                f"the parameter is {tuple(parameter.shape)} on {parameter.device}, make them alike"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it is updated in place, give contiguous memory")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; give a floating-point tensor")
    if not all(0.0 <= beta < 1.0 for beta in betas) or not eps >= 0.0 or not weight_decay >= 0.0:
        raise ValueError(
            f"betas={betas}, eps={eps}, weight_decay={weight_decay}; betas lie in [0, 1), the others are not negative"
        )
    if schedule.shape != (3,) or schedule.dtype != torch.float32 or schedule.device != parameter.device:
        raise ValueError(
            f"schedule is {schedule.dtype} {tuple(schedule.shape)} on {schedule.device}; "
            f"give adamw_schedule(...), fp32 (3,) on {parameter.device}"
        )
    if gradient_scale is not None and (gradient_scale.numel() != 1 or gradient_scale.device != parameter.device):
        raise ValueError(
            f"gradient_scale is {tuple(gradient_scale.shape)} on {gradient_scale.device}; "
            f"give one element on {parameter.device}"
        )
    _adamw(
        parameter,
        gradient,
        first_moment,
        second_moment,
        copy,
        schedule,
        gradient_scale,
        *betas,
        eps,
        weight_decay,
    )


def shipped() -> list[Shipped]:
    """Fp32 masters with fp32 or bf16 gradients and moments, with and without a copy; bf16 throughout; with and, the usual one, without a
    gradient scale."""
    numbers = dict.fromkeys(("beta1", "beta2", "rest1", "rest2", "eps", "weight_decay"), "fp32")
    kinds = [
        ("fp32", gradient, moment, copy, True)
        for gradient in ("fp32", "bf16")
        for moment in ("fp32", "bf16")
        for copy in (0, 1)
    ]
    return [
        Shipped(
            name=f"adamw parameter {parameter} gradient {gradient} moments {moment}{' copy bf16' if copy else ''}"
            + " unscaled" * (not scaled),
            kernel=adamw_kernel,
            signature={
                "parameter": f"*{parameter}",
                "gradient": f"*{gradient}",
                "first": f"*{moment}",
                "second": f"*{moment}",
                "copy": "*bf16" if copy else f"*{parameter}",
                "schedule": "*fp32",
                "gradient_scale": "*fp32",
                "numel": "i32",
                **numbers,
            },
            constants={"HAS_COPY": bool(copy), "HAS_SCALE": scaled, "BLOCK": BLOCK},
            warps=WARPS,
            stages=1,
            undivided=frozenset({"gradient_scale"}),
        )
        for parameter, gradient, moment, copy, scaled in [
            *kinds,
            ("bf16", "bf16", "bf16", 0, True),
            ("fp32", "bf16", "fp32", 1, False),
        ]
    ]
