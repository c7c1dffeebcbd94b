"""`shardplan plan`: every layout of a model on a cluster, ranked; the best becomes plan.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.cli import options

if TYPE_CHECKING:
    from shardplan.planner.plan import Plan
    from shardplan.planner.search import SearchResult
    from shardplan.planner.variants import Answer


def plan(
    model: options.ModelArgument,
    cluster: options.ClusterOption,
    global_batch: Annotated[
        str,
        typer.Option(
            "--global-batch",
            help="Sequences per optimizer step: a number, or a range 512:2048 (doubling; the smallest within 1 % of the best).",
        ),
    ],
    seq: options.SeqOption,
    gpus: options.GpusOption = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="throughput, cost (least per token, on any number of the GPUs), gpus (fewest that fit), memory, or deadline (fewest "
            "GPUs that train --tokens in --days).",
        ),
    ] = "throughput",
    runtime: options.RuntimeOption = "shardplan",
    fix: options.FixOption = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", help="Word or word=value to leave out: offload, zero=3, pp. Repeatable."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            help="Also look at a precision (fp8), a switch of the runtime (compile) or qwz, qgz: they change results. Repeatable.",
        ),
    ] = None,
    days: Annotated[float | None, typer.Option("--days", help="With --objective deadline: days for --tokens.")] = None,
    headroom: options.HeadroomOption = 0.05,
    front: Annotated[
        bool,
        typer.Option(
            "--front",
            help="Also search what less memory costs: the fastest layout, that with 10 % less memory, and so on, a search each "
            "(money and GPUs too: sweep --front).",
        ),
    ] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write the best plan to this file.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Layouts to list.")] = 10,
    precision: options.PrecisionOption = None,
    optimizer: options.OptimizerOption = "adamw",
    grad_dtype: options.GradDtypeOption = None,
    expert_imbalance: options.ImbalanceOption = 1.0,
    capacity_factor: options.CapacityOption = None,
    tokens: options.TokensOption = None,
    method: options.MethodOption = "full",
    lora_rank: options.LoraRankOption = 16,
    lora_targets: options.LoraTargetsOption = "all",
    document_tokens: options.DocumentOption = None,
    price: options.PriceOption = None,
    gpu_hours_per_failure: options.FailureOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Rank every valid layout of MODEL on the cluster and explain the winner.

    Example: shardplan plan llama-3-70b --cluster h100-ib --gpus 64 --global-batch 1024 --seq 8192 -o plan.json

    Exit code 1 when nothing fits (then it says what would have to change), 130 after Ctrl-C, which leaves the best so far.
    """
    from shardplan.planner.variants import batch_range

    batches = batch_range(global_batch)
    inputs = options.read_inputs(
        model,
        cluster,
        gpus,
        global_batch=batches[0],
        seq=seq,
        runtime=runtime,
        precision=precision,
        optimizer=optimizer,
        grad_dtype=grad_dtype,
        expert_imbalance=expert_imbalance,
        capacity_factor=capacity_factor,
        tokens=tokens,
        method=method,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        document_tokens=document_tokens,
        price=price,
        gpu_hours_per_failure=gpu_hours_per_failure,
    )
    options.check_writable(Path(output) if output else None)
    words = [word.lower() for item in allow or [] for word in item.replace(",", " ").split()]
    asked: dict[str, Any] = {
        "fix": " ".join(fix or []),
        "forbid": forbid or [],
        "allow": words,
        "objective": objective.lower(),
    }
    answers, chosen = _search(inputs, runtime, batches, asked, days, headroom)
    result, inputs = chosen.result, replace(inputs, job=chosen.form.job, runtime=chosen.form.runtime)
    stopped = any(one.result.partial for one in answers)
    if stopped:
        _tell_stopped(replace(result, partial=True), as_json=as_json)
    if result.ranked is None:
        if not stopped:
            _nothing_fits(inputs, result, asked["fix"], forbid or [], headroom, as_json=as_json)
        raise typer.Exit(130 if stopped else 1)
    if len(answers) > 1:
        asked["forms"] = [one.row() for one in answers]
    best = _best_plan(inputs, replace(result, partial=stopped), chosen.form.runtime_name, top, headroom, asked)
    if front and not stopped:
        best, stopped = _with_front(best, replace(inputs, cluster=result.cluster), asked, headroom)
    if output:
        best.write(output)
    if as_json:
        import json

        typer.echo(json.dumps(best.document(), indent=1))
    else:
        from shardplan.cli.tables import print_plan

        print_plan(best.document(), written_to=output)
    if stopped:
        raise typer.Exit(130)


def _tell_stopped(result: SearchResult, *, as_json: bool) -> None:
    """One line on stderr; where nothing was found by then the account of the search is all there is to say."""
    found = "what follows is the best" if result.ranked is not None else "nothing fits"
    typer.echo(f"shardplan: stopped; {found} of the {result.looked_at:,} layouts looked at so far", err=True)
    if result.ranked is None and as_json:
        import json

        from shardplan.planner.search import search_document

        account: dict[str, Any] = {"search": search_document(result, 0), "closest": None, "would_fit": []}
        typer.echo(json.dumps({"fits": False, "rejections": [], **account}, indent=1))


def _search(
    inputs: options.Inputs,
    runtime: str,
    batches: tuple[int, ...],
    asked: dict[str, Any],
    days: float | None,
    headroom: float,
) -> tuple[list[Answer], Answer]:
    """(what every form of the question found, the best of it)."""
    from shardplan.cli.progress import TerminalWatch
    from shardplan.hw_profiles.errors import InputError, nearest
    from shardplan.planner.search import OBJECTIVES, Objective, search
    from shardplan.planner.space import parse_wishes
    from shardplan.planner.variants import ask_all, best_answer, forms

    word = asked["objective"]
    chosen: Objective | None = next((known for known in OBJECTIVES if known == word), None)
    if chosen is None:
        raise InputError(f"objective={word!r} is unknown", place="--objective", remedy=nearest(word, OBJECTIVES))
    wishes = parse_wishes(asked["fix"], asked["forbid"], asked["allow"])
    questions = list(forms(inputs.job, runtime, batches, asked["allow"]))
    watch = TerminalWatch()
    try:
        answers = ask_all(
            questions,
            lambda form: search(
                model=inputs.model,
                job=form.job,
                cluster=inputs.cluster,
                runtime=form.runtime,
                wishes=wishes,
                objective=chosen,
                headroom=headroom,
                days=days,
                watch=watch,
            ),
        )
    finally:
        watch.close()
    return answers, best_answer(answers, chosen)


def _with_front(best: Plan, inputs: options.Inputs, asked: dict[str, Any], headroom: float) -> tuple[Plan, bool]:
    """(the plan with the front over time and memory on its GPUs, whether it was stopped before its end)."""
    from shardplan.cli.progress import TerminalWatch
    from shardplan.costmodel.rule import Setting
    from shardplan.planner.front import searched_front
    from shardplan.planner.space import parse_wishes

    setting = Setting(model=inputs.model, job=inputs.job, cluster=inputs.cluster, runtime=inputs.runtime)
    wishes, watch = parse_wishes(asked["fix"], asked["forbid"], asked["allow"]), TerminalWatch()
    try:
        rows, stopped = searched_front(setting, wishes, headroom, watch)
    finally:
        watch.close()
    if stopped:
        typer.echo("shardplan: stopped; the plan is whole, its front ends where it was", err=True)
    return replace(best, search={**best.search, "front": rows}), stopped


def _best_plan(
    inputs: options.Inputs, result: SearchResult, runtime: str, top: int, headroom: float, asked: dict[str, Any]
) -> Plan:
    from shardplan import __version__
    from shardplan.planner.choose import make_plan

    return make_plan(
        result,
        model=inputs.model,
        job=inputs.job,
        runtime=inputs.runtime,
        runtime_name=runtime,
        cluster_document=inputs.cluster_document,
        top=top,
        headroom=headroom,
        version=__version__,
        **asked,
    )


def _nothing_fits(
    inputs: options.Inputs, result: SearchResult, fix: str, forbid: list[str], headroom: float, *, as_json: bool
) -> None:
    """Say what was looked at, how far the closest layout is off and what would have to change."""
    from shardplan.cli.progress import TerminalWatch
    from shardplan.planner.nothing_fits import what_would_fit
    from shardplan.planner.space import parse_wishes

    with TerminalWatch(keeps_best=False) as watch:
        document: dict[str, Any] = what_would_fit(
            result,
            model=inputs.model,
            job=inputs.job,
            cluster=inputs.cluster,
            runtime=inputs.runtime,
            wishes=parse_wishes(fix, forbid),
            headroom=headroom,
            watch=watch,
        )
    if as_json:
        import json

        typer.echo(json.dumps(document, indent=1))
        return
    from shardplan.cli.tables import print_nothing_fits

    print_nothing_fits(document)
