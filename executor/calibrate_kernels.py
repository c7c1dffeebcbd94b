"""Measuring functions for one device: matrix products, element-wise kernels, attention, dispatch, AdamW, copies.

Data are random normal: matrix units draw less power on zeros and would run up to 15 % faster.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shardplan.executor.attention_kernel import (
    attention_backends,
    attention_context,
    capability_of,
    own_attention,
    runs_own_attention,
)
from shardplan.executor.calibrate_measurements import Timing
from shardplan.executor.calibrate_timing import Call, Timer
from shardplan.hw_profiles.load import TIMED_PRODUCTS

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLD_BYTES = 512e6
"""Working set that no GPU cache holds."""
KEPT_BYTES, MOST_KEPT = 256e6, 64
"""Of a CPU's results: as much as a small model keeps."""
DISPATCH_CHAIN = 50


def gemm_timings(timer: Timer, precision: str, edges: Sequence[int]) -> tuple[Timing, ...]:
    """Mean seconds of the shapes of each FLOP count 2·edge³, x[M, K] @ weight[N, K].T as a linear layer calls it.

    Stops before an edge of which one product would outlast the time budget, and where a GPU's memory ends.
    """
    timings: list[Timing] = []
    with matmul_precision(precision):
        for edge in sorted(edges):
            flop = 2.0 * edge**3
            if timings and flop / timings[-1].rate > timer.budget_s:
                break
            try:
                seconds = [
                    _gemm_seconds(timer, precision, *(int(edge * share) for share in one)) for one in TIMED_PRODUCTS
                ]
            except torch.OutOfMemoryError:
                break
            timings.append(Timing(size=flop, seconds=sum(seconds) / len(seconds)))
    return tuple(timings)


def _gemm_seconds(timer: Timer, precision: str, m: int, k: int, n: int) -> float:
    dtype = DTYPES[precision]
    x_MK = torch.randn(m, k, device=timer.device).to(dtype)
    weight_NK = torch.randn(n, k, device=timer.device).to(dtype)
    weight_KN = weight_NK.t()
    if timer.device.type == "cpu":
        return timer.device_seconds(_kept(lambda: torch.mm(x_MK, weight_KN), m * n * x_MK.element_size()))
    out_MN = torch.empty(m, n, device=timer.device, dtype=dtype)
    return timer.device_seconds(lambda: torch.mm(x_MK, weight_KN, out=out_MN))


def _kept(call: Callable[[], Tensor], result_bytes: float) -> Call:
    """Call and keep the last results, like activations until the backward pass: the next one is written where no cache is warm."""
    kept: deque[Tensor] = deque(maxlen=max(1, min(MOST_KEPT, int(KEPT_BYTES / result_bytes))))
    return lambda: kept.append(call())


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it, fp32 products use tf32 for the word "tf32" and full fp32 otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def memory_timings(timer: Timer, sizes_bytes: Sequence[float]) -> tuple[Timing, ...]:
    """Seconds of y = b + a·x in fp32 by bytes moved (two tensors read, one written).

    A GPU goes through enough tensors that its cache holds none of them. A CPU process reads one set, for what an operation
    reads is mostly what the last one wrote, and writes a new tensor each time, as autograd does.
    """
    timings: list[Timing] = []
    for size in sorted(sizes_bytes):
        try:
            timings.append(_memory_timing(timer, size))
        except torch.OutOfMemoryError:
            break
    return tuple(timings)


def _memory_timing(timer: Timer, moved_bytes: float) -> Timing:
    elements = max(1, int(moved_bytes / 12))
    if timer.device.type == "cpu":
        x, b = torch.randn(elements), torch.randn(elements)
        seconds = timer.device_seconds(_kept(lambda: torch.add(b, x, alpha=1.5), 4 * elements))
        return Timing(size=12.0 * elements, seconds=seconds)
    sets = max(1, int(COLD_BYTES / moved_bytes))
    pool_x = torch.randn(sets, elements, device=timer.device)
    pool_b, pool_y = torch.randn_like(pool_x), torch.zeros_like(pool_x)
    turns = itertools.cycle([(pool_x[i], pool_b[i], pool_y[i]) for i in range(sets)])

    def call() -> None:
        x, b, y = next(turns)
        torch.add(b, x, alpha=1.5, out=y)

    return Timing(size=12.0 * elements, seconds=timer.device_seconds(call))


def attention_timings(
    timer: Timer, precision: str, *, batch: int, heads: int, seq: int, head_dims: Sequence[int]
) -> dict[str, Timing]:
    """Fused causal attention by the executor's kernel, forward and backward: FLOP and seconds, summed over the head dimensions.

    FLOP of a forward is 4·batch·heads·seq²·head_dim, half of it masked; of a backward 2.5 times that.
    """
    forward_flop = forward_s = backward_s = 0.0
    for head_dim in head_dims:
        shape = (batch, heads, seq, head_dim)
        q, k, v = (torch.randn(shape, device=timer.device).to(DTYPES[precision]).requires_grad_() for _ in range(3))
        forward_flop += 2.0 * batch * heads * seq**2 * head_dim
        own = runs_own_attention("auto", precision=precision, head_dim=head_dim, capability=capability_of(timer.device))
        run = _own_attention if own else partial(scaled_dot_product_attention, is_causal=True)
        with attention_context(attention_backends("auto", device_type=timer.device.type, precision=precision)):
            out = run(q, k, v)
            grad = torch.randn_like(out)
            forward_s += timer.device_seconds(_bound(run, q, k, v))
            backward_s += timer.device_seconds(_bound(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True))
    return {
        "forward": Timing(size=forward_flop, seconds=forward_s),
        "backward": Timing(size=2.5 * forward_flop, seconds=backward_s),
    }


def _own_attention(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    return own_attention(*(x.transpose(1, 2) for x in (q_BNSD, k_BNSD, v_BNSD))).transpose(1, 2)


def _bound(function: Callable[..., object], *args: object, **words: object) -> Callable[[], object]:
    return lambda: function(*args, **words)


def dispatch_seconds(timer: Timer) -> float:
    """Host seconds of one tiny eager operation: a chain of products and its backward, divided by its operations."""
    x = torch.randn(8, device=timer.device, requires_grad=True)

    def call() -> None:
        y = x
        for _ in range(DISPATCH_CHAIN):
            y = y * 1.0001
        torch.autograd.grad(y.sum(), x)

    operations = 2 * DISPATCH_CHAIN + 3  # the sum, the first gradient, its expansion
    seconds = timer.device_seconds if timer.device.type == "cpu" else timer.host_seconds
    return seconds(call) / operations


def adam_timing(timer: Timer, parameters: int) -> Timing:
    """One step of the fused AdamW on fp32 parameters in host memory; size = parameters."""
    parameter = torch.nn.Parameter(torch.randn(parameters))
    parameter.grad = torch.randn(parameters)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    return Timing(size=float(parameters), seconds=timer.host_seconds(optimizer.step))


def copy_timing(timer: Timer, copied_bytes: float, *, source: str, target: str) -> Timing:
    """One copy between two devices, pinned when one is a GPU; host to host counts bytes read and written."""
    crosses = source != target
    elements = int(copied_bytes / 4)
    x = torch.randn(elements, device=source, pin_memory=crosses and source == "cpu")
    y = torch.zeros(elements, device=target, pin_memory=crosses and target == "cpu")
    moved = 4.0 * elements * (1 if crosses else 2)
    return Timing(size=moved, seconds=timer.device_seconds(lambda: y.copy_(x, non_blocking=True)))
