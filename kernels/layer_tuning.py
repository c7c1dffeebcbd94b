"""Times candidate launches of the norm and rotary kernels: `python -m shardplan.kernels.layer_tuning -o FILE.csv`.

Candidates compile and are checked in parallel processes first; then those that are right take turns on the device, beside
a large copy. `--write` puts what is clearly fastest into `layer_tiles`; keep the device and date under reports/measured.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardplan.kernels import layer_tiles, norm_launch, rotary
from shardplan.kernels.benchmark_case import Setting, copy_bytes, copy_provider
from shardplan.kernels.benchmark_timing import Plan, Stopwatch, Timing, first_line
from shardplan.kernels.layer_tiles import (
    BACKWARD,
    FORWARD,
    ROTARY,
    SUM,
    HeadTiles,
    RowTiles,
    SumTile,
    backward_launch,
    forward_launch,
)
from shardplan.kernels.norm_reference import norm_backward_reference, norm_forward_reference
from shardplan.kernels.rotary_reference import rotary_reference

Candidate = tuple[int, ...]
ROWS, WIDTH, EPS = 16_384, 4_096, 1e-6
BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 4, 4_096, 32, 8, 128
PARTS = 264
"""Rows the second reduction is timed on: two programs for each of 132 multiprocessors."""
CHECKED_SHARE = 16
"""Of the rows this part is computed when a candidate is checked."""
BF16_ERROR = 0.01
"""Largest relative error (Frobenius norm) against the reference, which rounds to bf16 too."""
DEVICE = "cuda"

KERNELS: tuple[str, ...] = ("rms_norm forward", "rms_norm backward", "rms_norm backward sum", "rotary forward")
FORWARD_KERNEL, BACKWARD_KERNEL, SUM_KERNEL, ROTARY_KERNEL = KERNELS
COLUMNS: tuple[str, ...] = ("device", "kernel", "candidate", "median_us", "GB/s", "of_copy", "note")
CLEARLY = 0.99
"""A candidate replaces the constants where it takes no more of their time."""
NAMES: dict[str, str] = dict(zip(KERNELS, ("FORWARD", "BACKWARD", "SUM", "ROTARY"), strict=True))
"""The constants of each kernel in layer_tiles."""
CURRENT: dict[str, Candidate] = dict(zip(KERNELS, (FORWARD, BACKWARD, SUM, ROTARY), strict=True))
CANDIDATES: dict[str, list[Candidate]] = {
    FORWARD_KERNEL: [
        (4_096, 16, 1, 0),
        (4_096, 8, 1, 0),
        (4_096, 32, 1, 0),
        (8_192, 16, 1, 0),
        (8_192, 32, 1, 0),
        (4_096, 16, 2, 4),
        (4_096, 16, 3, 5),
        (4_096, 16, 4, 4),
        (4_096, 32, 3, 5),
        (4_096, 32, 4, 5),
        (4_096, 8, 3, 3),
        (8_192, 16, 3, 2),
    ],
    BACKWARD_KERNEL: [
        (4_096, 16, 3, 2),
        (4_096, 16, 2, 2),
        (4_096, 16, 4, 2),
        (4_096, 16, 6, 2),
        (4_096, 16, 1, 3),
        (4_096, 32, 3, 2),
        (4_096, 32, 4, 2),
        (4_096, 32, 6, 2),
        (4_096, 8, 3, 2),
        (4_096, 8, 4, 2),
        (4_096, 8, 2, 2),
        (8_192, 16, 3, 1),
    ],
    SUM_KERNEL: [
        (128, 16, 4),
        (64, 32, 4),
        (128, 32, 8),
        (256, 16, 8),
        (256, 32, 8),
        (64, 16, 4),
        (32, 16, 2),
        (64, 64, 8),
    ],
    ROTARY_KERNEL: [
        (1_024, 16),
        (512, 16),
        (1_024, 32),
        (2_048, 16),
        (2_048, 32),
        (4_096, 16),
        (4_096, 32),
        (1_024, 8),
    ],
}
"""The fields of RowTiles, SumTile and HeadTiles by kernel."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A kernel on its inputs, with any tiles: the call, what it wrote beside what it should, the bytes it must move."""

    call: Callable[[Candidate], object]
    results: Callable[[], Sequence[tuple[Tensor, Tensor]]]
    moved: int


def work_of(kernel: str, share: int = 1) -> Work:
    """The inputs of one kernel, a `share`-th of the rows."""
    torch.manual_seed(0)
    makers = dict(zip(KERNELS, (_forward, _backward, _sum, _rotary), strict=True))
    return makers[kernel](share)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def _forward(share: int) -> Work:
    x, weight = _random(ROWS // share, WIDTH), _random(WIDTH)
    y = torch.empty_like(x)
    rstd = torch.empty(ROWS // share, device=DEVICE)
    empty = rstd.new_empty(0)

    def call(tiles: Candidate) -> None:
        launch = forward_launch(WIDTH, x.element_size(), RowTiles(*tiles))
        norm_launch.forward(x, None, weight, None, y, empty, empty, rstd, EPS, launch)

    def results() -> list[tuple[Tensor, Tensor]]:
        wanted = norm_forward_reference(x, None, weight, None, EPS, False)
        return [(y, wanted[0]), (rstd, wanted[3])]

    return Work(call=call, results=results, moved=2 * x.nbytes)


def _backward(share: int) -> Work:
    grad, x, weight = _random(ROWS // share, WIDTH), _random(ROWS // share, WIDTH), _random(WIDTH)
    rstd = norm_forward_reference(x, None, weight, None, EPS, False)[3]
    grad_x, empty = torch.empty_like(x), rstd.new_empty(0)
    parts: dict[Candidate, Tensor] = {}
    latest: list[Tensor] = []

    def call(tiles: Candidate) -> None:
        launch = backward_launch(WIDTH, x.element_size(), False, RowTiles(*tiles))
        if tiles not in parts:
            parts[tiles] = norm_launch.parts_of(x, 1, launch)
        latest[:] = [parts[tiles]]
        norm_launch.backward(grad, None, x, weight, empty, rstd, grad_x, parts[tiles], launch)

    def results() -> list[tuple[Tensor, Tensor]]:
        wanted = norm_backward_reference(grad, None, x, weight, empty, rstd, False)
        return [(grad_x, wanted[0]), (latest[0].sum((0, 1)), wanted[1])]

    return Work(call=call, results=results, moved=3 * x.nbytes)


def _sum(share: int) -> Work:
    del share  # small already
    parts = torch.randn(1, PARTS, WIDTH, device=DEVICE)
    total = torch.empty(WIDTH, dtype=torch.bfloat16, device=DEVICE)
    return Work(
        call=lambda tile: norm_launch.sum_parts(parts, total, None, SumTile(*tile)),
        results=lambda: [(total, parts.sum((0, 1)))],
        moved=parts.nbytes,
    )


def _rotary(share: int) -> Work:
    seq = SEQ // share
    q, k = (_random(BATCH, seq, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    angles = torch.outer(torch.arange(seq, device=DEVICE), 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=DEVICE))
    cos, sin, q_out, k_out = angles.cos(), angles.sin(), torch.empty_like(q), torch.empty_like(k)

    def call(tiles: Candidate) -> None:
        rotary.launch(q, k, q_out, k_out, cos, sin, None, 0, False, False, HeadTiles(*tiles))

    def results() -> list[tuple[Tensor, Tensor]]:
        return [(out, rotary_reference(x, cos, sin, None, 0, False, False)) for x, out in ((q, q_out), (k, k_out))]

    return Work(call=call, results=results, moved=2 * (q.nbytes + k.nbytes))


def problem_of(kernel: str, tiles: Candidate) -> str:
    """Compile a candidate, in a process of its own, and run it once; what is wrong with it, or nothing."""
    try:
        work = work_of(kernel, CHECKED_SHARE)
        work.call(tiles)
        for number, (own, wanted) in enumerate(work.results()):
            error = ((own.float() - wanted.float()).norm() / wanted.float().norm()).item()
            if not error < BF16_ERROR:
                return f"result {number} is off by {error:.3g}"
    except Exception as error:  # a candidate that cannot run is a result
        return first_line(error)
    return ""


def problems(
    listed: Sequence[tuple[str, Candidate]], processes: int, compile_s: float
) -> dict[tuple[str, Candidate], str]:
    """What is wrong with each candidate; processes that hang are ended when the time is up."""
    end_s = time.monotonic() + compile_s
    found: dict[tuple[str, Candidate], str] = {}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        waiting = [(one, pool.apply_async(problem_of, one)) for one in listed]
        for one, result in waiting:
            try:
                found[one] = result.get(max(0.1, end_s - time.monotonic()))
            except multiprocessing.TimeoutError:
                found[one] = f"not compiled and run within {compile_s:g} s"
    return found


def timed(
    kernel: str, tiles: Sequence[Candidate], stopwatch: Stopwatch, plan: Plan
) -> dict[str, tuple[Timing | str, int]]:
    """Time and bytes of each candidate, and of a copy, in turn."""
    work, setting = work_of(kernel), Setting(device=torch.device(DEVICE))
    calls: dict[str, Callable[[], object]] = {str(one): lambda one=one: work.call(one) for one in tiles}
    found = stopwatch.interleaved(calls | {"copy": copy_provider(setting)}, plan)
    return {name: (one, copy_bytes(setting) if name == "copy" else work.moved) for name, one in found.items()}


def rows_of(
    kernel: str, found: Mapping[str, tuple[Timing | str, int]], wrong: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row a candidate, the fastest first, then those that are wrong."""
    start = {"device": torch.cuda.get_device_name(), "kernel": kernel}
    rates = {name: moved / one.p50_s for name, (one, moved) in found.items() if isinstance(one, Timing)}
    wrong = dict(wrong) | {name: one for name, (one, _) in found.items() if isinstance(one, str)}
    rows = []
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        timing, moved = found[name]
        assert isinstance(timing, Timing)
        share = f"{rate / rates['copy']:.3f}" if "copy" in rates else ""
        note = "current" if name == str(tuple(CURRENT[kernel])) else ""
        times = {"median_us": f"{1e6 * timing.p50_s:.2f}", "GB/s": f"{moved / timing.p50_s / 1e9:.0f}"}
        rows.append(start | {"candidate": name} | times | {"of_copy": share, "note": note})
    return rows + [start | {"candidate": name, "note": reason} for name, reason in wrong.items()]


def fastest(kernel: str, found: Mapping[str, tuple[Timing | str, int]]) -> Candidate | None:
    """The candidate that is clearly faster than the constants, if one is."""
    times = {name: one.p50_s for name, (one, _) in found.items() if isinstance(one, Timing) and name != "copy"}
    best = min(CANDIDATES[kernel], key=lambda one: times.get(str(one), float("inf")))
    current = times.get(str(tuple(CURRENT[kernel])), float("inf"))
    return best if times.get(str(best), float("inf")) < CLEARLY * current else None


def with_constants(source: str, kernel: str, tiles: Candidate) -> str:
    """The source of layer_tiles with other constants of one kernel."""
    numbers = ", ".join(f"{one:_}" for one in tiles)
    return re.sub(rf"^({NAMES[kernel]} = \w+)\(.*\)$", rf"\g<1>({numbers})", source, flags=re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, check and time the candidates; print a table and write a CSV after each kernel."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.kernels.layer_tuning", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", type=Path, default=Path("layer_tuning.csv"))
    parser.add_argument("--only", default="", help="kernels whose name holds this, e.g. rotary")
    parser.add_argument("--processes", type=int, default=12, help="that compile (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=45.0, help="seconds it may take, two thirds to compile")
    parser.add_argument("--write", action="store_true", help="put the fastest into layer_tiles.py")
    words = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device, and timing needs one", file=sys.stderr)
        return 1
    began_s = time.monotonic()
    chosen = [kernel for kernel in KERNELS if words.only in kernel]
    listed: list[tuple[str, Candidate]] = [(kernel, tiles) for kernel in chosen for tiles in CANDIDATES[kernel]]
    found = problems(listed, words.processes, words.budget_s * 2 / 3)
    print(f"{len(listed)} candidates compiled in {time.monotonic() - began_s:.0f} s on {torch.cuda.get_device_name()}")
    rows: list[dict[str, Any]] = []
    stopwatch = Stopwatch(torch.device(DEVICE))
    for index, kernel in enumerate(chosen):
        good = [tiles for tiles in CANDIDATES[kernel] if not found[kernel, tiles]]
        wrong = {str(tiles): found[kernel, tiles] for tiles in CANDIDATES[kernel] if found[kernel, tiles]}
        left_s = max(1.0, words.budget_s - (time.monotonic() - began_s)) / (len(chosen) - index)
        # a candidate takes a warm-up and three rounds, and between calls the flushes take about twice as long as they
        plan = Plan(round_s=min(0.01, left_s / (12 * (len(good) + 1))), warm_up_s=0.01)
        times = timed(kernel, good, stopwatch, plan)
        mine = rows_of(kernel, times, wrong)
        best = fastest(kernel, times)
        if best and words.write:
            file = Path(layer_tiles.__file__)
            file.write_text(with_constants(file.read_text(encoding="utf-8"), kernel, best), encoding="utf-8")
        rows += mine
        print(f"\n{kernel}: {f'{best} is faster' if best else 'the constants stay'}")
        for row in mine:
            print(
                "  "
                + "  ".join(
                    f"{row.get(column, ''):>{width}}"
                    for column, width in zip(COLUMNS[2:], (22, 9, 6, 7, 0), strict=True)
                )
            )
        with words.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
