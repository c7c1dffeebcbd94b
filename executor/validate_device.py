"""Does the cost model meet this device? Runs a list of jobs on one GPU and sets predicted beside measured.

    python -m shardplan.executor.validate_device -o FOLDER [--profile h200.toml] [--budget-s 150]
    python -m shardplan.executor.validate_device -o FOLDER --profile cpu.toml --layouts 2

Predicts every case with the catalog's profile of this machine and, with --profile, with a calibrated one. Writes
FOLDER/validation.csv in long format after every case and prints a table as it goes. A case that fails is a row, not the end.

With --layouts, layouts of that many processes on the CPU (`validate_layouts.py`), beside the calibrated profile alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.executor.device_cases import CPU_CASES, GPU_CASES, Case
from shardplan.executor.device_run import Measured, case_plan, release, run_case, start_alone
from shardplan.executor.device_table import HEADER, append_rows, case_rows, start_file, table_line
from shardplan.executor.validate_layouts import (
    LAYOUT_HEADER,
    layout_line,
    summary_line,
    validate_layouts,
    write_results,
)
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, cluster_from_document
from shardplan.planner.search import judge

WARMUP_STEPS, TIMED_STEPS = 4, 8
CASE_LIMIT_S = 3.0
"""Steps of one case take no longer, unless fewer than 3 of them do."""
CASE_OVERHEAD_S = 2.0
"""Building, first step, profiling: what a case takes beside its steps."""
PROFILED_STEPS = 3
"""Of a profiled case, without more warm-up: its time was measured before."""
NO_TIME = "skipped: no time left"
"""A case that is told on the screen and not written."""
HOPELESS = 1.2
"""A case whose predicted memory is so many times the device's is not tried."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case: what each profile predicts and what was measured, or why it was not."""

    case: Case
    predicted: Mapping[str, Mapping[str, Any]]
    """By profile: "catalog", "calibrated"; the answer of `shardplan estimate --json`."""
    measured: Measured | None = None
    error: str = ""


@dataclass(kw_only=True)
class Bench:
    """The device, and the profiles to hold against it."""

    device: torch.device
    profiles: Mapping[str, dict[str, Any]]
    mesh: DeviceMesh
    runtime: Runtime = field(default_factory=lambda: load_runtime("shardplan"))

    def predictions(self, case: Case) -> dict[str, Mapping[str, Any]]:
        """By profile; raises ValueError for a case that the rules refuse."""
        switched = load_runtime(case.runtime) if case.compiled else self.runtime
        execution = switched.execution
        if case.kernel == "cudnn":
            execution = replace(execution, attention_kernels=("cudnn",))
        runtime = replace(switched, execution=execution)
        found: dict[str, Mapping[str, Any]] = {}
        for label, document in self.profiles.items():
            cluster = cluster_from_document(document).with_gpus(1)
            answer = judge(case.layout(), model=case.shapes(), job=case.job(), cluster=cluster, runtime=runtime)
            if not isinstance(answer, dict):
                raise ValueError("; ".join(f"{one.rule}: {one.detail}" for one in answer))
            found[label] = answer
        return found

    def run(self, case: Case, *, left_s: float) -> CaseResult:
        """Predict and run one case; never raises."""
        predicted: dict[str, Mapping[str, Any]] = {}
        try:
            predicted = self.predictions(case)
            first = next(iter(predicted.values()))
            memory, step_s = first["memory"], first["time"]["step_s"]
            if memory["allocated_peak_bytes"] > HOPELESS * memory["capacity_bytes"]:
                return CaseResult(case=case, predicted=predicted, error="skipped: predicted not to fit")
            steps = (PROFILED_STEPS, PROFILED_STEPS) if case.profiled else (WARMUP_STEPS, TIMED_STEPS)
            if case_s(case, step_s) > left_s:
                return CaseResult(case=case, predicted=predicted, error=NO_TIME)
            plan = case_plan(case, cluster=self.profiles["catalog"], prediction=first)
            measured = run_case(
                plan,
                self.mesh,
                self.device,
                case,
                warmup=steps[0],
                steps=steps[1],
                limit_s=min(CASE_LIMIT_S, left_s),
            )
            return CaseResult(case=case, predicted=predicted, measured=measured)
        except torch.OutOfMemoryError as bad:
            return CaseResult(case=case, predicted=predicted, error=f"out of memory: {_first_line(bad)}")
        except Exception as bad:
            traceback.print_exc(limit=-4)
            return CaseResult(case=case, predicted=predicted, error=f"{type(bad).__name__}: {_first_line(bad)}")


def case_s(case: Case, step_s: float) -> float:
    """Least seconds that a case takes."""
    return CASE_OVERHEAD_S + step_s * ((2 if case.profiled else 1) * PROFILED_STEPS + WARMUP_STEPS)


def _first_line(bad: BaseException) -> str:
    return (str(bad).splitlines() or [""])[0][:200]


def chosen_profiles(profile: Path | None) -> dict[str, dict[str, Any]]:
    """What the catalog says of this machine, and the calibrated profile if there is one that loads."""
    found: dict[str, dict[str, Any]] = {"catalog": cluster_document("localhost")}
    try:
        if profile is not None:
            found["calibrated"] = cluster_document(str(profile))
    except InputError as bad:  # what can be measured is measured
        print(f"predicted with the catalog's profile only: {bad}", file=sys.stderr)
    return found


def validate(bench: Bench, cases: Sequence[Case], out: Path, *, budget_s: float, date: str) -> list[CaseResult]:
    """Run `cases` until the budget is spent; each is in the file and on the screen before the next begins."""
    ends = time.monotonic() + budget_s
    results: list[CaseResult] = []
    path = out / "validation.csv"
    origin = start_file(path, bench.device, date=date)
    print(HEADER, flush=True)
    kept_s = min(budget_s / 4, 2 * CASE_OVERHEAD_S * sum(case.profiled for case in cases))
    for case in cases:
        result = bench.run(case, left_s=ends - time.monotonic() - (0.0 if case.profiled else kept_s))
        release(bench.device)
        results.append(result)
        if result.error != NO_TIME:
            append_rows(path, origin, case_rows(result.case, result.predicted, result.measured, result.error))
        print(table_line(result.case, result.predicted, result.measured, result.error), flush=True)
    return results


def _layouts(out: Path, profile: Path | str, *, ranks: int) -> int:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"layouts-{ranks}.csv"
    origin = start_file(path, torch.device("cpu"), date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    results = validate_layouts(cluster_document(str(profile)), ranks=ranks)
    write_results(path, origin, results)
    print("\n".join([LAYOUT_HEADER, *map(layout_line, results), summary_line(ranks, results)]), flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 when no case ran to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--profile", type=Path, help="calibrated profile (TOML) of this machine")
    parser.add_argument("--budget-s", type=float, default=150.0, help="start no case that would end later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--layouts", type=int, choices=(1, 2, 4), metavar="RANKS", help="layouts of 1, 2 or 4 processes"
    )
    given = parser.parse_args(arguments)
    if given.layouts:
        return _layouts(given.out, given.profile or "localhost", ranks=given.layouts)
    began = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    bench = Bench(device=device, profiles=chosen_profiles(given.profile), mesh=start_alone(device))
    results = validate(
        bench,
        GPU_CASES if device.type == "cuda" else CPU_CASES,
        given.out,
        budget_s=given.budget_s - (time.monotonic() - began),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    return 0 if any(result.measured for result in results) else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in train.py: no tearing down of process groups
