"""Times candidate launches of the code kernels on this GPU: `python -m shardplan.kernels.code_tuning -o FILE.csv`.

Candidates compile in parallel processes first. Then each is checked against plain torch on a short input with a ragged
end, captured in a CUDA graph and timed in turns with a copy, the L2 cache flushed before each replay: the launches of the
host take no part. What is fastest is copied into code_tiles by hand, with the device and date under reports/measured.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardplan.kernels import dequantize, quantize, quantize_reduce
from shardplan.kernels import quantize_reference as reference
from shardplan.kernels.benchmark_timing import Flush
from shardplan.kernels.code_tiles import LAUNCHES, Launch
from shardplan.kernels.packing import Packing

ELEMENTS = 2**27
SOURCES = 8
BLOCKS = {"int8": 2_048, "int4": 512, "fp8": 2_048}
CHECKED = 5 * 16_384 + 768
"""Elements of the check: several tiles and a block that is not full; 16 divides it and an eighth of it, as it divides what
is timed, so that the same kernel is compiled."""
COPY = "copy"

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "quantize": ((8192, 8), (4096, 8), (4096, 4), (2048, 4), (16384, 8)),
    "dequantize": ((8192, 8), (4096, 8), (4096, 4), (2048, 4)),
    "reduce": ((8192, 8), (4096, 8), (4096, 4), (2048, 4), (2048, 2), (8192, 16)),
}
"""(elements of a program, warps) by step; a block of 2,048 is never cut."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One candidate."""

    step: str
    kind: str
    launch: Launch

    @property
    def packing(self) -> Packing:
        """Kind and block as the benchmark has them."""
        return Packing(kind=self.kind, block=BLOCKS[self.kind])

    @property
    def name(self) -> str:
        """In words."""
        one = self.launch
        return f"{one.tile} w{one.warps}{'' if one.packed else ' plain'}"

    @property
    def moved(self) -> float:
        """Bytes read and written at full size."""
        codes = ELEMENTS * (0.5 if self.kind == "int4" else 1.0) + ELEMENTS / BLOCKS[self.kind] * 4.0
        return codes * (1 + 1 / SOURCES) if self.step == "reduce" else codes + 2.0 * ELEMENTS


def cases(only: str) -> list[Case]:
    """Candidates whose step and kind hold `only`: those in the table first, then the next of each, should time run out."""
    ranked: list[tuple[int, Case]] = []
    for (step, kind), standing in LAUNCHES.items():
        if only not in f"{step} {kind}":
            continue
        launches: list[Launch] = [standing, *(Launch(tile=tile, warps=warps) for tile, warps in SHAPES[step])]
        if step != "dequantize":
            launches.append(Launch(tile=standing.tile, warps=standing.warps, packed=not standing.packed))
        unlike = list(dict.fromkeys(launches))
        ranked += [(rank, Case(step=step, kind=kind, launch=launch)) for rank, launch in enumerate(unlike)]
    return [case for _, case in sorted(ranked, key=lambda one: one[0])]


def prepare(case: Case, numel: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What to time at `numel` elements, and what plain torch gives for it."""
    torch.manual_seed(0)
    x = torch.randn(numel, device="cuda", dtype=torch.bfloat16)
    packing, launch = case.packing, case.launch
    if case.step == "quantize":
        return lambda: quantize.run(x, None, packing, 1, 1, launch), lambda: reference.quantize(x, packing, 1, 1, None)
    if case.step == "dequantize":
        packed = quantize.quantize(x, packing)[None]
        return (
            lambda: dequantize.run(packed, numel, x.dtype, packing, 1, 1.0, launch),
            lambda: reference.dequantize(packed, numel, x.dtype, packing, 1, 1.0),
        )
    part, factor = -(-numel // SOURCES), 1.0 / SOURCES
    sources = quantize.quantize(x, packing, partitions=SOURCES)[:, None]
    return (
        lambda: quantize_reduce.run(sources, None, part, packing, factor, launch),
        lambda: reference.dequantize_reduce_quantize(sources, part, packing, factor, None),
    )


def compile_one(case: Case) -> str:
    """Compile and check a candidate in a process of its own; what is wrong with it, or nothing."""
    try:
        call, expected = prepare(case, CHECKED)
        own, theirs = (one.reshape(-1).view(torch.uint8) for one in (call(), expected()))
        if not torch.equal(own, theirs):
            return f"{(own != theirs).sum().item()} of {own.numel()} bytes differ from plain torch"
    except Exception as problem:  # a candidate that cannot run is a result
        return f"{type(problem).__name__}: {str(problem)[:120]}"
    return ""


def compile_all(listed: list[Case], processes: int, seconds: float) -> dict[Case, str]:
    """What is wrong with each; one that is not done in time counts as wrong."""
    ends = time.monotonic() + seconds
    problems: dict[Case, str] = {}
    pool = multiprocessing.get_context("spawn").Pool(processes)
    waiting = [(case, pool.apply_async(compile_one, (case,))) for case in listed]
    for case, result in waiting:
        try:
            problems[case] = result.get(max(0.05, ends - time.monotonic()))
        except multiprocessing.TimeoutError:
            problems[case] = f"not compiled and checked within {seconds:g} s"
    pool.terminate()
    pool.join()
    return problems


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`call` as a graph; run before, so that nothing is compiled in the capture."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, flush: Flush, repeats: int) -> list[float]:
    """Times of replays on the device, the L2 cache flushed before each; the flush also lets the host run ahead."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def time_together(mine: list[Case], source: Tensor, target: Tensor, flush: Flush, rounds: int) -> dict[str, float]:
    """Least median of each candidate's rounds, in microseconds, and of a copy's; a failure is left out and told."""
    calls: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(source)}
    calls |= {case.name: prepare(case, ELEMENTS)[0] for case in mine}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        try:
            graphs[name] = captured(call)
        except RuntimeError as problem:
            print(f"  {name}: {str(problem)[:120]}")
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, graph in graphs.items():
            microseconds(graph, flush, 2)
            best[name] = min(best.get(name, 1e9), statistics.median(microseconds(graph, flush, 15)))
    return best


def main() -> None:
    """Compile, check and time the candidates; print a table and write a CSV as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("code_tuning.csv"))
    parser.add_argument("--only", default="", help="steps and kinds that hold this, e.g. `reduce int4`")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds in all; two thirds may go to compiling")
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    began = time.monotonic()
    listed = cases(wanted.only)
    problems = compile_all(listed, wanted.processes, wanted.budget_s * 2 / 3)
    device = torch.cuda.get_device_name()
    print(f"{len(listed)} candidates compiled and checked in {time.monotonic() - began:.0f} s on {device}", flush=True)
    flush = Flush(torch.device("cuda"))
    source, target = (torch.empty(2**28, dtype=torch.uint8, device="cuda") for _ in range(2))
    with wanted.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("device", "step", "kind", "launch", "median_us", "GB/s", "of_copy", "problem"))
        for step, kind in LAUNCHES:
            mine = [case for case in listed if (case.step, case.kind) == (step, kind)]
            if not mine:
                continue
            if time.monotonic() - began > wanted.budget_s:
                print(f"{step} {kind}: left out, the budget of {wanted.budget_s:g} s is spent")
                continue
            best = time_together([case for case in mine if not problems[case]], source, target, flush, wanted.rounds)
            copied = 2 * source.nbytes / best[COPY] / 1e3
            print(f"\n{step} {kind}/{BLOCKS[kind]}   copy {copied:.0f} GB/s")
            for case in sorted(mine, key=lambda case: best.get(case.name, 1e9)):
                us = best.get(case.name)
                row: tuple[object, ...] = ("", "", "", problems[case] or "not captured")
                if us is not None:
                    rate = case.moved / us / 1e3
                    row = (round(us, 2), round(rate, 1), round(rate / copied, 3), "")
                note = "  <- in the table" if case.launch == LAUNCHES[step, kind] else ""
                print(f"  {case.name:<16} {row[0]:>8} us {row[1]:>8} GB/s {row[2]:>6} of a copy {row[3]}{note}")
                writer.writerow((device, step, kind, case.name, *row))
            file.flush()
            print(end="", flush=True)


if __name__ == "__main__":
    main()
