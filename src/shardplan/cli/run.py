"""`shardplan run`: run a plan on this machine, and hold its prediction against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardplan.planner.plan import Plan

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file made by `shardplan plan -o`.")]
JobOption = Annotated[
    Path | None,
    typer.Option(
        "--job", metavar="FILE", help="What to train on and how (TOML, docs/training.md); default: shipped text."
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Optimizer steps to run; default: the job file's, else 30.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Run a plan for CUDA GPUs on local CPU processes.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Where run folders are made; default: the job file's, else runs."),
]
DEFAULT_STEPS = 30
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else to stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the log of the ranks when the run fails.")]


def run(
    plan: PlanArgument,
    *,
    job: JobOption = None,
    steps: StepsOption = None,
    force: ForceOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a plan on this machine: train on real text or a job's data, measure, compare with the prediction.

    Example: shardplan run plan.json --job job.toml

    Exit codes: 0 finished, 1 refused before the start, 2 malformed plan, job or token file, 3 a rank failed.
    """
    import sys
    from importlib.util import find_spec

    from shardplan.executor.check import plan_cluster
    from shardplan.executor.job_file import read_job
    from shardplan.executor.launch import run_plan
    from shardplan.executor.progress import ProgressLine, summary
    from shardplan.executor.recipe import check_job
    from shardplan.planner.plan import Plan

    content = Plan.read(plan)
    wanted = read_job(job, steps=steps) if job else None
    if find_spec("torch") is None:
        _refuse([{"rule": "torch", "detail": "running needs torch", "remedy": "install shardplan[run]"}], as_json)
    device = "cpu" if force else plan_cluster(content).gpu.device
    _check(content, device, as_json)
    if wanted is not None:
        check_job(content, wanted)
    count = wanted.steps if wanted else steps or DEFAULT_STEPS
    folder = out or Path(wanted.output if wanted else "runs")
    progress = ProgressLine(sys.stderr, steps=count, prediction=content.prediction)
    print(f"{content.model.name} on {content.gpus} x {device}: {content.layout.words()}", file=sys.stderr)
    try:
        outcome = run_plan(plan, device=device, steps=count, out=folder, on_step=progress, job=wanted)
    finally:
        progress.end()
    if as_json:
        _print_json({"folder": str(outcome.folder), **outcome.document, "rejections": []})
    elif outcome.error is None:
        typer.echo(f"{outcome.folder}\n{summary(outcome.document)}")
    if outcome.error is not None:
        log = outcome.folder / "log.txt"
        print(f"shardplan: run failed: {outcome.error}; full log: {log}", file=sys.stderr)
        if debug:
            print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        raise typer.Exit(3)


def _check(plan: Plan, device: str, as_json: bool) -> None:
    from shardplan.executor.check import cuda_devices_here, refusals

    cuda_devices = cuda_devices_here() if device == "cuda" else 0
    found = refusals(plan, device=device, cuda_devices=cuda_devices)
    if found:
        _refuse([{"rule": r.rule, "detail": r.detail, "remedy": r.remedy} for r in found], as_json)


def _refuse(rejections: list[dict[str, str]], as_json: bool) -> None:
    """Say why the plan does not run, one line a reason, and leave with exit code 1."""
    if as_json:
        _print_json({"folder": None, "rejections": rejections})
    for rejection in rejections:
        typer.echo(f"shardplan: {rejection['detail']}; {rejection['remedy']}", err=True)
    raise typer.Exit(1)


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=1))
