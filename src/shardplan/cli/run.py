"""`shardplan run`: run a plan on this machine, and hold its prediction against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardplan.planner.plan import Plan

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file made by `shardplan plan -o`.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to run.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Run a plan for CUDA GPUs on local CPU processes.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where run folders are made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else to stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the log of the ranks when the run fails.")]


def run(
    plan: PlanArgument,
    *,
    steps: StepsOption = 30,
    force: ForceOption = False,
    out: OutOption = Path("runs"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a plan on this machine: train on real text, measure, compare with the prediction.

    Example: shardplan run plan.json --steps 50

    Exit codes: 0 finished, 1 refused before the start, 2 malformed plan, 3 a rank failed.
    """
    import sys
    from importlib.util import find_spec

    from shardplan.executor.check import plan_cluster
    from shardplan.executor.launch import run_plan
    from shardplan.executor.progress import ProgressLine, summary
    from shardplan.planner.plan import Plan

    content = Plan.read(plan)
    if find_spec("torch") is None:
        _refuse([{"rule": "torch", "detail": "running needs torch", "remedy": "install shardplan[run]"}], as_json)
    device = "cpu" if force else plan_cluster(content).gpu.device
    _check(content, device, as_json)
    progress = ProgressLine(sys.stderr, steps=steps, prediction=content.prediction)
    print(f"{content.model.name} on {content.gpus} x {device}: {content.layout.words()}", file=sys.stderr)
    try:
        outcome = run_plan(plan, device=device, steps=steps, out=out, on_step=progress)
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
