"""Layouts of several processes on this machine's CPU, predicted beside measured: what `validate_device --layouts` runs.

One launch for each number of ranks walks through its cases, and that ROUNDS times, so that what disturbs the machine for a while
disturbs all cases. Each step tells the wall clock and the CPU time of the busiest rank. On a machine that others use too the second is
what to compare, with what is predicted without waiting: compute, recompute, host, optimizer.

Virtual CPUs share cores with other guests, and their speed moves by half within minutes. So before and after each case the ranks time one
point of the calibration again; `pace` is the speed then over the calibrated one, and predictions at that pace are told beside the others.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from shardplan.costmodel.runtime import load_runtime
from shardplan.executor.compare import BUSY
from shardplan.executor.device_table import COLUMNS
from shardplan.executor.layout_cases import LayoutCase, layout_cases
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_from_document
from shardplan.planner.plan import Plan
from shardplan.planner.search import judge

ROUNDS, WARMUP_STEPS, TIMED_STEPS = 3, 2, 5
PER_ROUND = WARMUP_STEPS + TIMED_STEPS
PROBED, PROBE_S = 256, 0.1
"""Edge of the products that tell the pace (calibrate_kernels.gemm_timings), seconds for each shape."""
LIMIT_S = 1500.0
"""Of one launch."""
WORKING = ("compute_s", "recompute_s", "optimizer_s", "host_s")
"""Predicted parts that are CPU time of a rank."""


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """One case: medians of its steps, of the slowest rank and of the rank with most CPU time."""

    case: LayoutCase
    predicted_s: float
    working_s: float
    """Predicted without waiting."""
    pace: float
    """Speed of products while the case ran, over the calibrated one."""
    step_s: float
    cpu_s: float
    phases: Mapping[str, float]

    @property
    def step_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.step_s - 1.0

    @property
    def step_error_at_pace(self) -> float:
        """The same, predicted for a machine as fast as it was."""
        return self.predicted_s / self.pace / self.step_s - 1.0

    @property
    def cpu_error(self) -> float:
        """The same of what is not waiting."""
        return self.working_s / self.cpu_s - 1.0


def validate_layouts(profile: Mapping[str, Any], *, ranks: int) -> list[LayoutResult]:
    """Run all cases of so many ranks beside what `profile` predicts; raises RuntimeError with the log when a rank fails."""
    cases, plans = layout_cases(ranks), list[Plan]()
    for case in cases:
        cluster = cluster_from_document(dict(profile)).with_gpus(ranks)
        answer = judge(
            case.layout(), model=case.model(), job=case.job(), cluster=cluster, runtime=load_runtime("shardplan")
        )
        if not isinstance(answer, dict):
            raise InputError("; ".join(map(str, answer)), place=case.name)
        plans.append(case.plan(profile, answer))
    with tempfile.TemporaryDirectory(prefix="shardplan-layouts-") as folder:
        for number, plan in enumerate(plans):
            plan.write(Path(folder) / f"{number}.json")
        _launch(Path(folder), ranks=ranks, cases=len(plans))
        steps = json.loads((Path(folder) / "steps.json").read_text(encoding="utf-8"))
    return [_result(case, plan, found) for case, plan, found in zip(cases, plans, steps, strict=True)]


def _launch(folder: Path, *, ranks: int, cases: int) -> None:
    torchrun = [sys.executable, "-m", "shardplan.executor.torchrun", str(os.getpid())]
    torchrun += ["--standalone", "--nproc-per-node", str(ranks), "--local-addr", "127.0.0.1"]
    torchrun += ["-m", "shardplan.executor.validate_layouts", str(folder), str(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-6000:])


def _result(case: LayoutCase, plan: Plan, steps: Sequence[Sequence[Mapping[str, float]]]) -> LayoutResult:
    """`steps` by rank, those of the warm-up among them."""
    timed = [[one for i, one in enumerate(of_rank) if i % PER_ROUND >= WARMUP_STEPS] for of_rank in steps]
    busiest = max(timed, key=lambda of_rank: median(one["cpu_s"] for one in of_rank))
    time = plan.prediction["time"]
    names = [name for name in busiest[0] if name in BUSY or name.endswith("_exposed_s")]
    return LayoutResult(
        case=case,
        predicted_s=time["step_s"],
        pace=_calibrated_probe_s(plan) / median(one["probe_s"] for one in busiest),
        working_s=sum(time[part] for part in WORKING),
        step_s=median(max(one["step_s"] for one in together) for together in zip(*timed, strict=True)),
        cpu_s=median(one["cpu_s"] for one in busiest),
        phases={name: median(one[name] for one in busiest) for name in names if busiest[0][name] is not None},
    )


def _calibrated_probe_s(plan: Plan) -> float:
    gpu = cluster_from_document(dict(plan.cluster)).gpu
    flop = 2.0 * PROBED**3
    return flop / (gpu.peak_flop_per_s["fp32"] * float(gpu.gemm_curve("fp32").at(flop)))


LAYOUT_HEADER = (
    f"{'case':<58}{'step ms':>9}{'predicted':>10}{'err %':>7}{'pace':>6}{'err %':>7}"
    f"{'cpu ms':>9}{'predicted':>10}{'err %':>7}{'waiting ms':>11}"
)


def layout_line(one: LayoutResult) -> str:
    """A line of the table; `waiting` is measured, all axes together."""
    waited = sum(seconds for name, seconds in one.phases.items() if name.endswith("_exposed_s"))
    return (
        f"{one.case.name:<58}{one.step_s * 1e3:>9.1f}{one.predicted_s * 1e3:>10.1f}{one.step_error * 100:>+7.1f}"
        f"{one.pace:>6.2f}{one.step_error_at_pace * 100:>+7.1f}"
        f"{one.cpu_s * 1e3:>9.1f}{one.working_s * 1e3:>10.1f}{one.cpu_error * 100:>+7.1f}{waited * 1e3:>11.1f}"
    )


def summary_line(ranks: int, results: Sequence[LayoutResult]) -> str:
    """Median error, and pairs of layouts of one size in the predicted order, where measured they are 10 % apart or more."""
    wall, paced, cpu = (
        median(abs(getattr(one, name)) for one in results) for name in ("step_error", "step_error_at_pace", "cpu_error")
    )
    orders = " and ".join(
        f"{right} of {right + wrong} pairs by {what}"
        for what, right, wrong in (
            ("the wall", *pairs_in_order(results, "predicted_s", "step_s")),
            ("CPU time", *pairs_in_order(results, "working_s", "cpu_s")),
        )
    )
    return (
        f"{ranks} rank{'s' if ranks > 1 else ''}, {len(results)} cases: median error {wall:.1%} of the step "
        f"({paced:.1%} at the pace of the machine), {cpu:.1%} of CPU time; "
        f"in the right order {orders}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


APART = 1.1


def pairs_in_order(results: Sequence[LayoutResult], predicted: str, measured: str) -> tuple[int, int]:
    """(right, wrong) pairs of one size whose measured times differ by APART or more."""
    right, wrong = 0, 0
    for one, other in itertools.combinations(results, 2):
        short, long = sorted((one, other), key=lambda result: getattr(result, measured))
        if one.case.size == other.case.size and getattr(long, measured) >= APART * getattr(short, measured):
            fits = getattr(long, predicted) > getattr(short, predicted)
            right, wrong = right + fits, wrong + (not fits)
    return right, wrong


def write_results(path: Path, origin: tuple[str, ...], results: Sequence[LayoutResult]) -> None:
    """Add to a CSV of `device_table.start_file`."""
    assert len(origin) + 5 == len(COLUMNS)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for one in results:
            measured = {"step_s": one.step_s, "cpu_s": one.cpu_s, **one.phases}
            rows = [("measured", name, value, "s") for name, value in measured.items()]
            rows += [
                ("measured", "pace", one.pace, ""),
                ("predicted:calibrated", "step_s", one.predicted_s, "s"),
                ("predicted:calibrated", "cpu_s", one.working_s, "s"),
            ]
            for source, name, value, unit in rows:
                writer.writerow((*origin, one.case.name, source, name, f"{value:.7g}", unit))


def run_rank(folder: Path, cases: int) -> None:
    """What a rank of a launch does: all cases, ROUNDS times; rank 0 writes down everyone's steps."""
    import torch.distributed as dist

    from shardplan.executor.calibrate_kernels import gemm_timings
    from shardplan.executor.calibrate_timing import Timer
    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.start import start_process_group
    from shardplan.executor.train import run_step, waits_of
    from shardplan.executor.trainer import Trainer
    from shardplan.hw_profiles.detect import cpu_facts

    device = start_process_group("cpu", timedelta(seconds=300.0))
    together = dist.get_world_size() > 1
    crowd = max(dist.get_world_size() / cpu_facts().cores, 1.0)
    timer = Timer(device=device, budget_s=PROBE_S, per_core=crowd, group=dist.group.WORLD if together else None)
    steps: list[list[dict[str, Any]]] = [[] for _ in range(cases)]
    for number in [*range(cases)] * ROUNDS:
        plan = Plan.read(folder / f"{number}.json")
        (before,) = gemm_timings(timer, "fp32", (PROBED,))
        trainer = Trainer(plan, build_mesh(plan.layout, "cpu"), device)
        waits = waits_of(trainer)
        visit = [vars(run_step(trainer, step, waits)) for step in range(1, PER_ROUND + 1)]
        (after,) = gemm_timings(timer, "fp32", (PROBED,))
        steps[number] += [{**one, "probe_s": 0.5 * (before.seconds + after.seconds)} for one in visit]
    every: list[list[list[dict[str, Any]]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, steps)
    if dist.get_rank() == 0:
        by_case = [[of_rank[number] for of_rank in every] for number in range(cases)]
        (folder / "steps.json").write_text(json.dumps(by_case), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # as in train.py: no tearing down of process groups
