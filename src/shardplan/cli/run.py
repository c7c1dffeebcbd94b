"""`shardplan run`: run a plan on this machine, and hold its prediction against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardplan.costmodel.rule import Rejection
    from shardplan.executor.job_file import JobFile
    from shardplan.planner.plan import Plan

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file made by `shardplan plan -o`.")]
JobOption = Annotated[
    Path | None,
    typer.Option(
        "--job", metavar="FILE", help="What to train on and how (TOML, docs/training.md); default: shipped text."
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="Optimizer steps in all, those of --resume included; default: the job file's, else 30.",
    ),
]
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
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Where run folders are made; default: the job file's, else runs."),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Print predicted and measured of every phase and part of memory at the end.")
]
ProfileOption = Annotated[
    int | None,
    typer.Option(
        "--profile",
        min=0,
        metavar="N",
        help="Time phases and waits in every N-th step; 0: never; default: 1 on CPUs, 10 on GPUs.",
    ),
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
    checkpoint_every: EveryOption = None,
    keep: KeepOption = 3,
    resume: ResumeOption = None,
    max_restarts: RestartsOption = 0,
    timeout: TimeoutOption = 300.0,
    out: OutOption = None,
    compare: CompareOption = False,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a plan on this machine: train on real text or a job's data, measure, compare with the prediction.

    Example: shardplan run plan.json --job job.toml --checkpoint-every 10 --max-restarts 2

    Go on, here in another layout: shardplan run other.json --steps 100 --resume last

    Exit codes: 0 finished, 1 refused before the start, 2 malformed plan, job or token file, 3 a rank failed.
    """
    import sys
    from importlib.util import find_spec

    from shardplan.executor.check import shipped_text_refusals
    from shardplan.executor.compare import comparison_lines
    from shardplan.executor.hugging_face import unlike_its_config
    from shardplan.executor.job_file import read_job
    from shardplan.executor.launch import Recovery, run_plan
    from shardplan.executor.progress import ProgressLine, summary
    from shardplan.executor.recipe import check_job
    from shardplan.planner.plan import Plan

    content = Plan.read(plan)
    for note in content.notes():
        print(f"shardplan: {plan}: {note}", file=sys.stderr)
    wanted = read_job(job, steps=steps) if job else None
    if find_spec("torch") is None:
        _refuse([{"rule": "torch", "detail": "running needs torch", "remedy": "install shardplan[run]"}], as_json)
    device = _check(content, force, as_json)
    if wanted is not None:
        check_job(content, wanted)
    else:
        _refuse_any(shipped_text_refusals(content), as_json)
    count = wanted.steps if wanted else steps or DEFAULT_STEPS
    folder = out or Path(wanted.output if wanted else "runs")
    source = None if resume is None else _find_checkpoint(content, wanted, resume, folder, count, as_json)
    recovery = Recovery(
        checkpoint_every=checkpoint_every, keep=keep, resume=source, max_restarts=max_restarts, timeout_s=timeout
    )
    progress = ProgressLine(sys.stderr, steps=count, prediction=content.prediction)
    print(f"{content.model.name} on {content.gpus} x {device}: {content.layout.words()}", file=sys.stderr)
    unlike = [] if resume or (wanted and wanted.weights.initial) else unlike_its_config(content.model)
    if unlike:
        print(
            f"shardplan: random values, so not trained with {', '.join(unlike)} of {content.model.source}",
            file=sys.stderr,
        )
    try:
        outcome = run_plan(
            plan,
            device=device,
            steps=count,
            out=folder,
            on_step=progress,
            on_event=progress.tell,
            recovery=recovery,
            job=wanted,
            look_every=profile,
        )
    finally:
        progress.end()
    if as_json:
        _print_json({"folder": str(outcome.folder), **outcome.document, "rejections": []})
    elif outcome.error is None:
        typer.echo(f"{outcome.folder}\n{summary(outcome.document)}")
        if compare:
            typer.echo("\n".join(comparison_lines(outcome.document)))
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


def _find_checkpoint(plan: Plan, job: JobFile | None, resume: str, out: Path, steps: int, as_json: bool) -> Path:
    """The whole checkpoint that `--resume` means, of the same data; tells of newer ones that are refused."""
    import sys

    from shardplan.executor.check import resume_refusals
    from shardplan.executor.checkpoint_files import find, find_last, read_progress
    from shardplan.executor.recipe import follow, make_recipe

    folder, refused = find_last(out) if resume == "last" else find(Path(resume))
    for line in refused:
        used = folder.name if str(folder.parent) in line else f"{folder.name} of {folder.parents[1].name}"
        print(f"shardplan: {line}; using {used}", file=sys.stderr)
    saved = read_progress(folder)
    _refuse_any(resume_refusals(plan, saved, steps=steps), as_json)
    follow(make_recipe(plan, job), saved).data.restore(saved.data)
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
