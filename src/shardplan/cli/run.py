"""`shardplan run`: run a plan on this machine, and hold its prediction against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardplan.costmodel.rule import Rejection
    from shardplan.planner.plan import Plan

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file made by `shardplan plan -o`.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps in all, those of --resume included.")]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Run a plan that is predicted not to fit; without its CUDA GPUs, on local CPU processes."
    ),
]
EveryOption = Annotated[
    int | None,
    typer.Option("--checkpoint-every", min=1, metavar="N", help="Save every N steps and at the last, beside training."),
]
KeepOption = Annotated[int, typer.Option("--keep", min=1, metavar="K", help="Newest checkpoints kept.")]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="FOLDER|last",
        help="Go on from the newest whole checkpoint of a run folder (or one checkpoint), whatever layout saved it; "
        "`last`: of the newest run below --out that has one.",
    ),
]
RestartsOption = Annotated[
    int,
    typer.Option("--max-restarts", min=0, metavar="N", help="Start all ranks again after a failure, at most N times."),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1.0, metavar="SECONDS", help="Longest that one rank waits for another.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where run folders are made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else to stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the log of the ranks when the run fails.")]


def run(
    plan: PlanArgument,
    *,
    steps: StepsOption = 30,
    force: ForceOption = False,
    checkpoint_every: EveryOption = None,
    keep: KeepOption = 3,
    resume: ResumeOption = None,
    max_restarts: RestartsOption = 0,
    timeout: TimeoutOption = 300.0,
    out: OutOption = Path("runs"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a plan on this machine: train on real text, measure, compare with the prediction.

    Example: shardplan run plan.json --steps 50 --checkpoint-every 10 --max-restarts 2

    Go on, here in another layout: shardplan run other.json --steps 100 --resume last

    Exit codes: 0 finished, 1 refused before the start, 2 malformed plan, 3 a rank failed.
    """
    import sys
    from importlib.util import find_spec

    from shardplan.executor.launch import Recovery, run_plan
    from shardplan.executor.progress import ProgressLine, summary
    from shardplan.planner.plan import Plan

    content = Plan.read(plan)
    if find_spec("torch") is None:
        _refuse([{"rule": "torch", "detail": "running needs torch", "remedy": "install shardplan[run]"}], as_json)
    device = _check(content, force, as_json)
    source = None if resume is None else _find_checkpoint(content, resume, out, steps, as_json)
    recovery = Recovery(
        checkpoint_every=checkpoint_every, keep=keep, resume=source, max_restarts=max_restarts, timeout_s=timeout
    )
    progress = ProgressLine(sys.stderr, steps=steps, prediction=content.prediction)
    print(f"{content.model.name} on {content.gpus} x {device}: {content.layout.words()}", file=sys.stderr)
    try:
        outcome = run_plan(
            plan, device=device, steps=steps, out=out, on_step=progress, on_event=progress.tell, recovery=recovery
        )
    finally:
        progress.end()
    if as_json:
        _print_json({"folder": str(outcome.folder), **outcome.document, "rejections": []})
    elif outcome.error is None:
        typer.echo(f"{outcome.folder}\n{summary(outcome.document)}")
    if outcome.error is not None:
        log = outcome.folder / "log.txt"
        print(f"shardplan: run failed: {outcome.error}; full log: {log}", file=sys.stderr)
        for line in outcome.details:
            print(line, file=sys.stderr)
        if debug:
            print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        raise typer.Exit(3)


def _check(plan: Plan, force: bool, as_json: bool) -> str:
    """The device to run on; leaves with the reasons where the plan cannot."""
    from shardplan.executor.check import cuda_devices_here, plan_cluster, refusals

    device = plan_cluster(plan).gpu.device
    cuda_devices = cuda_devices_here() if device == "cuda" else 0
    if force and cuda_devices < plan.gpus:
        device = "cpu"
    _refuse_any(refusals(plan, device=device, cuda_devices=cuda_devices, force=force), as_json)
    return device


def _find_checkpoint(plan: Plan, resume: str, out: Path, steps: int, as_json: bool) -> Path:
    """The whole checkpoint that `--resume` means; tells of newer ones that are refused."""
    import sys

    from shardplan.executor.check import resume_refusals
    from shardplan.executor.checkpoint_files import find, last_run, read_progress

    folder, refused = find(last_run(out) if resume == "last" else Path(resume))
    for line in refused:
        print(f"shardplan: {line}; using {folder.name}", file=sys.stderr)
    _refuse_any(resume_refusals(plan, read_progress(folder), steps=steps), as_json)
    return folder


def _refuse_any(found: list[Rejection], as_json: bool) -> None:
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
