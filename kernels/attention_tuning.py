"""Times candidate tiles of the attention kernels on this GPU: `python -m shardplan.kernels.attention_tuning -o FILE.csv`.

Candidates compile in parallel processes first; then every candidate and PyTorch's flash and cuDNN backends take turns, so
that ratios are of one run at one clock. A candidate counts only where its result agrees with PyTorch's. What is fastest
is copied into attention_tiles by hand, with the device and date under reports/measured.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shardplan.kernels import attention_launch, attention_launch_backward
from shardplan.kernels.attention_reference import Shape
from shardplan.kernels.attention_tiles import Tiles
from shardplan.kernels.benchmark_timing import Flush

TOKENS, WIDTH, SEQ = 16_384, 2_048, 4_096
BF16_ERROR = 0.03
"""Largest relative error (Frobenius norm) of a bf16 result against PyTorch's."""

CANDIDATES: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {
    ("forward", 64): [
        (64, 128, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 4),
        (64, 64, 4, 2),
        (128, 128, 8, 3),
        (128, 64, 4, 4),
    ],
    ("forward", 128): [
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 4),
        (64, 32, 4, 3),
        (128, 64, 4, 3),
        (128, 128, 8, 3),
    ],
    ("forward", 256): [
        (128, 64, 8, 2),
        (64, 32, 4, 3),
        (64, 32, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 1),
        (128, 32, 8, 4),
    ],
    ("key_gradient", 64): [
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (128, 64, 4, 2),
        (64, 128, 4, 2),
        (128, 64, 8, 3),
        (64, 128, 8, 4),
    ],
    ("key_gradient", 128): [
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (32, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (32, 64, 4, 4),
    ],
    ("key_gradient", 256): [
        (64, 64, 8, 2),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (128, 64, 8, 1),
        (64, 64, 4, 1),
        (32, 64, 4, 2),
    ],
    ("query_gradient", 64): [
        (128, 64, 8, 3),
        (64, 64, 4, 4),
        (128, 64, 8, 4),
        (64, 64, 4, 3),
        (128, 64, 4, 3),
        (128, 32, 8, 4),
    ],
    ("query_gradient", 128): [
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (128, 32, 8, 4),
        (128, 32, 8, 3),
        (64, 32, 4, 4),
    ],
    ("query_gradient", 256): [
        (128, 64, 8, 1),
        (128, 32, 8, 2),
        (64, 32, 4, 2),
        (128, 32, 8, 3),
        (64, 64, 8, 3),
        (64, 32, 4, 3),
    ],
    ("specialised", 64): [(128, 128, 4, 2), (128, 64, 4, 2), (128, 256, 4, 2)],
    ("specialised", 128): [(128, 128, 4, 2), (128, 64, 4, 2)],
}
"""(queries, keys, warps, stages) by kernel and head dimension: the fastest so far and their neighbours."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One candidate: kernel, head dimension, mask, tiles."""

    kernel: str
    head_dim: int
    causal: bool
    tile: Tiles


def cases(only: str) -> list[Case]:
    """Every candidate whose kernel's name starts with `only`."""
    return [
        Case(kernel=kernel, head_dim=d, causal=causal, tile=Tiles(queries=m, keys=n, warps=w, stages=s))
        for (kernel, d), listed in CANDIDATES.items()
        if kernel.startswith(only)
        for causal in (False, True)
        for m, n, w, s in listed
    ]


@dataclass(frozen=True)
class Inputs:
    """Tensors of one head dimension and mask, and PyTorch's results."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    out: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    shape: Shape
    sequences: attention_launch.Sequences
    prepared: attention_launch_backward.Prepared
    scratch: Tensor


def inputs(head_dim: int, causal: bool) -> Inputs:
    """16,384 tokens in sequences of 4,096 with heads · head_dim = 2,048, as the FlashAttention papers time."""
    torch.manual_seed(0)
    size = (TOKENS // SEQ, SEQ, WIDTH // head_dim, head_dim)
    q, k, v, grad = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=causal)
    gradients = torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    shape = Shape(scale=head_dim**-0.5, right=0 if causal else -1)
    sequences = attention_launch.Sequences(q, k, None, None, (0, 0))
    mine, lse = attention_launch.forward(q, k, v, shape, sequences, None, None)
    dq, dk, dv = (g.transpose(1, 2) for g in gradients)
    prepared = attention_launch_backward.prepare(grad, None, q, k, v, mine, lse, shape, sequences, None, None)
    theirs = out.detach().transpose(1, 2)
    return Inputs(q, k, v, grad, theirs, (dq, dk, dv), shape, sequences, prepared, torch.empty_like(q))


def run(case: Case, given: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the candidate's kernel once: what it writes beside what PyTorch gives."""
    if case.kernel == "specialised":
        return {
            "out": (
                attention_launch.specialised_forward(given.q, given.k, given.v, given.shape, case.tile)[0],
                given.out,
            )
        }
    if case.kernel == "forward":
        out, _ = attention_launch.forward(
            given.q, given.k, given.v, given.shape, given.sequences, None, None, case.tile
        )
        return {"out": (out, given.out)}
    dq, dk, dv = given.gradients
    if case.kernel == "query_gradient":
        attention_launch_backward.query_gradient(given.prepared, given.scratch, case.tile)
        return {"dq": (given.scratch, dq)}
    own_dk, own_dv = torch.empty_like(given.k), torch.empty_like(given.v)
    attention_launch_backward.key_gradient(given.prepared, own_dk, own_dv, case.tile)
    return {"dk": (own_dk, dk), "dv": (own_dv, dv)}


def compile_one(case: Case) -> str:
    """Compile and run a candidate in a process of its own; what is wrong with it, or nothing."""
    try:
        for name, (own, theirs) in run(case, inputs(case.head_dim, case.causal)).items():
            error = ((own.float() - theirs.float()).norm() / theirs.float().norm()).item()
            if not error < BF16_ERROR:
                return f"{name} off by {error:.3g}"
    except Exception as problem:  # a candidate that cannot run is a result
        return f"{type(problem).__name__}: {str(problem)[:120]}"
    return ""


def milliseconds(call: Callable[[], object], flush: Flush, repeats: int) -> float:
    """Median time of a call on the device, with the L2 cache flushed before each."""
    times = []
    for _ in range(repeats):
        flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


def baselines(given: Inputs, causal: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """PyTorch's flash and cuDNN backends, forward and backward."""
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (given.q, given.k, given.v)]
    grad = given.grad.transpose(1, 2)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def forward(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=causal)

        try:
            out = forward()
        except RuntimeError:
            continue
        yield f"{name} forward", forward
        yield f"{name} backward", lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def main() -> None:
    """Compile, check and time the candidates; print a table and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("attention_tuning.csv"))
    parser.add_argument("--only", default="", help="kernels whose name starts so")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--compile-s", type=float, default=120.0, help="seconds for compiling and checking")
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    listed = sorted(cases(wanted.only), key=lambda case: case.kernel == "specialised")  # what may hang, last
    began = time.monotonic()
    problems: dict[Case, str] = {}
    with multiprocessing.get_context("spawn").Pool(wanted.processes) as pool:
        waiting = [(case, pool.apply_async(compile_one, (case,))) for case in listed]
        for case, result in waiting:
            try:
                problems[case] = result.get(max(0.1, began + wanted.compile_s - time.monotonic()))
            except multiprocessing.TimeoutError:
                problems[case] = f"not compiled and run within {wanted.compile_s} s"
    print(f"{len(listed)} candidates compiled in {time.monotonic() - began:.0f} s on {torch.cuda.get_device_name()}")
    flush = Flush(torch.device("cuda"))
    rows = []
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            mine = [c for c in listed if c.head_dim == head_dim and c.causal == causal]
            if not mine:
                continue
            given = inputs(head_dim, causal)
            flop = 4 * TOKENS * SEQ * WIDTH * (0.5 if causal else 1.0)
            calls = dict(baselines(given, causal))
            calls |= {
                f"{c.kernel} {c.tile.queries}x{c.tile.keys} w{c.tile.warps} s{c.tile.stages}": lambda c=c, given=given: (
                    run(c, given)
                )
                for c in mine
                if not problems[c]
            }
            best: dict[str, float] = {}
            for _ in range(wanted.rounds):
                for name, call in calls.items():
                    call()
                    best[name] = min(best.get(name, 1e9), milliseconds(call, flush, 8))
            print(f"\nD{head_dim} {'causal' if causal else 'full'}")
            for name, ms in sorted(best.items(), key=lambda item: item[1]):
                rate = flop * (2.5 if "forward" not in name and "specialised" not in name else 1) / ms / 1e9
                print(f"  {name:<34} {ms:8.3f} ms  {rate:6.0f} TFLOP/s")
                rows.append((torch.cuda.get_device_name(), head_dim, causal, name, round(ms, 4), round(rate, 1), ""))
            for c in mine:
                if problems[c]:
                    print(f"  {c.kernel} {c.tile}: {problems[c]}")
                    rows.append(
                        (torch.cuda.get_device_name(), head_dim, causal, f"{c.kernel} {c.tile}", "", "", problems[c])
                    )
    with wanted.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("device", "head_dim", "causal", "kernel", "median_ms", "tflops", "problem"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
