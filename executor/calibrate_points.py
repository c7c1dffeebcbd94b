"""Single points that no profile holds, for fitting the cost model: products off and on the edges of waves in the three layouts of a
linear layer, attention by length and kernel, launches, host time by kind of operation, copies pinned and pageable.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from shardplan.executor.attention_kernel import attention_context
from shardplan.executor.calibrate_measurements import Point
from shardplan.executor.calibrate_timing import Timer

COLUMNS = ("date", "device", "software", "driver", "kernel", "shape", "metric", "value", "unit")


@dataclass(frozen=True, kw_only=True)
class PointGrid:
    """What to measure, the products that matter first."""

    gemm_mnk: tuple[tuple[int, int, int], ...]
    attention_tokens: int
    """Batch times sequence of every attention."""
    attention_seqs: tuple[int, ...]
    attention_heads: tuple[tuple[int, int, int], ...]
    """Query heads, key heads, head dimension."""
    copy_bytes: tuple[int, ...]


_LLAMA = tuple(
    (m, n, k)
    for m in (1024, 2048, 4096, 8192, 16384)
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
)
"""Products of Llama-3-8B's layers by tokens: wq and wo, wk and wv, w1 and w3, w2."""
_WAVES = (
    *(
        (m, 4096, 4096) for m in (2112, 4224, 4352, 8448, 8576)
    ),  # 132 multiprocessors, tiles of 128 x 256: on, just past an edge
    *((n, n, n) for n in (1024, 1536, 2048, 3072, 6144, 8192, 12288)),
    (8192, 128256, 4096),  # the head
    (4096, 5120, 5120),
    (4096, 8192, 8192),
    (4096, 28672, 8192),
    (8192, 1600, 1600),
    (8192, 6400, 1600),
    (8192, 8192, 512),
    (8192, 8192, 128),
)
GPU_POINTS = PointGrid(
    gemm_mnk=(*_LLAMA, *_WAVES),
    attention_tokens=16384,
    attention_seqs=(512, 1024, 2048, 4096, 8192, 16384),
    attention_heads=((32, 8, 128), (32, 32, 64)),
    copy_bytes=(64 * 2**10, 2**20, 16 * 2**20, 256 * 2**20),
)
CPU_POINTS = PointGrid(
    gemm_mnk=((64, 64, 64), (128, 96, 64)),
    attention_tokens=256,
    attention_seqs=(128,),
    attention_heads=((4, 4, 64),),
    copy_bytes=(2**20,),
)


def measure_points(timer: Timer, grid: PointGrid, *, limit_s: float) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """Points of `grid`, and notes of what failed; kinds that would begin later than `limit_s` from now are left out."""
    ends = time.monotonic() + limit_s
    points: list[Point] = []
    notes: list[str] = []
    for call in _calls(timer, grid):
        if time.monotonic() > ends:
            notes.append(f"points: the {limit_s:.0f} s were over after {len(points)} of them")
            break
        try:
            points += call()
        except (RuntimeError, NotImplementedError, MemoryError) as bad:
            notes.append(f"point not measured: {(str(bad).splitlines() or [type(bad).__name__])[0]}")
    return tuple(points), tuple(notes)


Measure = Callable[[], list[Point]]


def _calls(timer: Timer, grid: PointGrid) -> Iterator[Measure]:
    yield lambda: _launches(timer)
    for copied in grid.copy_bytes:
        if timer.device.type == "cuda":
            yield lambda copied=copied: _copies(timer, copied)
    kernels = {"flash2": SDPBackend.FLASH_ATTENTION}
    if timer.device.type == "cuda":
        kernels["cudnn"] = SDPBackend.CUDNN_ATTENTION
    for heads in grid.attention_heads:
        for seq in grid.attention_seqs:
            for word, backend in kernels.items():
                batch = max(1, grid.attention_tokens // seq)
                yield lambda w=word, b=backend, h=heads, n=batch, s=seq: _attention(
                    timer, w, b, batch=n, heads=h, seq=s
                )
    for m, n, k in grid.gemm_mnk:
        yield lambda m=m, n=n, k=k: _products(timer, m, n, k)


def _products(timer: Timer, m: int, n: int, k: int) -> list[Point]:
    """x[m, k] weight[n, k].T, gradient[m, n] weight, gradient.T x: forward, gradient of the input, gradient of the weight; bf16."""
    x_MK, weight_NK, gradient_MN = (
        torch.randn(*shape, device=timer.device).to(torch.bfloat16) for shape in ((m, k), (n, k), (m, n))
    )
    ways = {
        "forward": (x_MK, weight_NK.t()),
        "input_gradient": (gradient_MN, weight_NK),
        "weight_gradient": (gradient_MN.t(), x_MK),
    }
    shape = f"m={m} n={n} k={k}"
    points: list[Point] = []
    for way, (left, right) in ways.items():
        out = torch.empty(left.shape[0], right.shape[1], device=timer.device, dtype=torch.bfloat16)
        seconds = timer.device_seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
        points.append(Point(kernel=f"gemm_bf16_{way}", shape=shape, metric="seconds", value=seconds, unit="s"))
        points.append(_rate(f"gemm_bf16_{way}", shape, 2.0 * m * n * k / seconds))
    return points


def _rate(kernel: str, shape: str, flop_per_s: float) -> Point:
    return Point(kernel=kernel, shape=shape, metric="rate", value=flop_per_s / 1e12, unit="TFLOP/s")


def _attention(
    timer: Timer, word: str, backend: SDPBackend, *, batch: int, heads: tuple[int, int, int], seq: int
) -> list[Point]:
    """As the executor calls it: (B, S, N, D) turned to (B, N, S, D), grouped keys; FLOP without the masked half."""
    query_heads, key_heads, head_dim = heads
    q, k, v = (
        torch.randn(batch, seq, count, head_dim, device=timer.device)
        .to(torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for count in (query_heads, key_heads, key_heads)
    )

    def forward() -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=query_heads != key_heads)

    flop = 2.0 * batch * query_heads * seq**2 * head_dim
    shape = f"b={batch} s={seq} heads={query_heads}/{key_heads} d={head_dim}"
    with attention_context((backend,)):
        out = forward()
        gradient = torch.randn_like(out)
        seconds = {
            "forward": timer.device_seconds(forward),
            "backward": timer.device_seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)),
        }
    points: list[Point] = []
    for way, spent in seconds.items():
        name = f"attention_{word}_{way}"
        points.append(Point(kernel=name, shape=shape, metric="seconds", value=spent, unit="s"))
        points.append(_rate(name, shape, flop * (2.5 if way == "backward" else 1.0) / spent))
    return points


def _launches(timer: Timer) -> list[Point]:
    """Host seconds of one call of a small operation, the queue of the device never full."""
    x = torch.randn(256, 256, device=timer.device)
    tracked = x.clone().requires_grad_()
    linear = torch.nn.Linear(256, 256, device=timer.device)
    norm = torch.nn.RMSNorm(256, device=timer.device)
    y = torch.empty_like(x)
    with torch.no_grad():
        plain: Mapping[str, Callable[[], object]] = {
            "add_out": lambda: torch.add(x, x, out=y),
            "mm": lambda: torch.mm(x, x),
            "zero_": y.zero_,
        }
        seconds = {f"{name}_without_autograd": _queue_seconds(timer, call) for name, call in plain.items()}
        device = {name: timer.device_seconds(call) for name, call in plain.items()}
    graph: Mapping[str, Callable[[], object]] = {
        "mul": lambda: tracked * 1.5,
        "linear": lambda: linear(tracked),
        "rms_norm": lambda: norm(tracked),
        "linear_forward_backward": lambda: linear(tracked).sum().backward(),
    }
    seconds |= {name: _queue_seconds(timer, call) for name, call in graph.items()}
    points = [Point(kernel=n, shape="256x256", metric="host_seconds", value=s, unit="s") for n, s in seconds.items()]
    return points + [
        Point(kernel=name, shape="256x256", metric="device_seconds", value=s, unit="s") for name, s in device.items()
    ]


def _queue_seconds(timer: Timer, call: Callable[[], object], *, calls: int = 200, rounds: int = 7) -> float:
    """Least seconds per call that the host needs to queue it, the device idle at the start of each round."""
    best = float("inf")
    for _ in range(rounds):
        if timer.device.type == "cuda":
            torch.cuda.synchronize(timer.device)
        start_s = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start_s) / calls)
    return best


def _copies(timer: Timer, copied_bytes: int) -> list[Point]:
    """Host to device and back, from pinned and from pageable memory; wall time of one call until it is done."""
    on_device = torch.zeros(copied_bytes, dtype=torch.uint8, device=timer.device)
    points: list[Point] = []
    for kind in ("pinned", "pageable"):
        on_host = torch.zeros(copied_bytes, dtype=torch.uint8, pin_memory=kind == "pinned")
        ways: Mapping[str, Callable[[], object]] = {
            "host_to_device": lambda h=on_host: on_device.copy_(h, non_blocking=True),
            "device_to_host": lambda h=on_host: h.copy_(on_device, non_blocking=True),
        }
        for way, call in ways.items():
            rate = copied_bytes / timer.host_seconds(call) / 1e9
            name = f"copy_{way}_{kind}"
            points.append(Point(kernel=name, shape=f"{copied_bytes} B", metric="rate", value=rate, unit="GB/s"))
    return points


def write_points(path: Path, points: tuple[Point, ...], *, date: str, device: str, software: str, driver: str) -> None:
    """Long format, one value a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in points:
            value = f"{one.value:.6g}"
            writer.writerow((date, device, software, driver, one.kernel, one.shape, one.metric, value, one.unit))
