"""`shardplan explain`: why this plan, or what of the user's own layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.cli import options

if TYPE_CHECKING:
    from shardplan.planner.plan import Plan
    from shardplan.planner.watch import Watch


def explain(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="PLAN|MODEL", help="A plan.json, alone or with --layout, or a model with --layout.")
    ],
    layout: Annotated[
        str | None, typer.Option("--layout", help="Your own layout words, judged against the best.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="PROFILE", help="With --layout: catalog name or TOML file.")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", help="With --layout: sequences per step.")
    ] = None,
    seq: Annotated[int | None, typer.Option("--seq", help="With --layout: tokens per sequence.")] = None,
    gpus: options.GpusOption = None,
    runtime: options.RuntimeOption = "shardplan",
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
    headroom: options.HeadroomOption = 0.05,
    as_json: options.JsonOption = False,
) -> None:
    """Explain a plan term by term, or judge a layout of your own: does it fit, how far is it from the best, why.

    Examples: shardplan explain plan.json

    shardplan explain plan.json --layout "dp=8 tp=8 zero=1"

    shardplan explain llama-3-8b --cluster h100-ib --gpus 8 --global-batch 64 --seq 8192 --layout "dp=8 zero=3 micro_batch=2"
    """
    of_plan = subject.endswith(".json") and (layout is None or cluster is None)
    if of_plan:
        _refuse_what_the_plan_says(context)
    document = (
        _of_plan(subject, layout, tokens, price, gpu_hours_per_failure)
        if of_plan or layout is None
        else _of_layout(
            subject,
            layout,
            cluster,
            gpus,
            global_batch,
            seq,
            headroom,
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
    )
    if as_json:
        import json

        typer.echo(json.dumps(document, indent=1))
    else:
        from shardplan.cli.tables import print_explanation

        print_explanation(document)
    raise typer.Exit(0 if document["fits"] else 1)


BESIDE_A_PLAN = ("subject", "layout", "tokens", "price", "gpu_hours_per_failure", "as_json")
"""What may be said beside a plan file, which has the rest."""


def _refuse_what_the_plan_says(context: typer.Context) -> None:
    from shardplan.hw_profiles.errors import InputError

    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in BESIDE_A_PLAN and source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"{value} is given beside a plan file, which has its own",
                place=f"--{name.replace('_', '-')}",
                remedy="leave it out, or make another plan with it",
            )


def _of_plan(
    path: str, layout: str | None, tokens: float | None, price: float | None, gpu_hours_per_failure: float | None
) -> dict[str, Any]:
    """The plan, with another token budget, price or failure rate where given; or a `layout` beside it, on its machine for its job."""
    from dataclasses import replace

    from shardplan.cli.progress import TerminalWatch
    from shardplan.hw_profiles.errors import InputError
    from shardplan.planner.explain import explain_plan
    from shardplan.planner.plan import Plan

    if not path.endswith(".json"):
        raise InputError(
            f"{path!r} is not a plan file",
            place="explain",
            remedy='give a plan.json, or MODEL with --cluster and --layout "…"',
        )
    plan = Plan.read(path)
    try:
        document, _ = options.with_given_figures(dict(plan.cluster), plan.gpus, price, gpu_hours_per_failure)
        job = plan.job if tokens is None else replace(plan.job, tokens=tokens)
        plan = replace(plan, cluster=document, job=job)
        with TerminalWatch(keeps_best=False) as watch:
            return explain_plan(plan, watch) if layout is None else _beside_plan(plan, layout, watch)
    except InputError as bad:
        beside = {
            "layout": layout,
            "--tokens": tokens,
            "--price": price,
            "--gpu-hours-per-failure": gpu_hours_per_failure,
        }
        if beside.get(bad.place) is not None:
            raise
        raise InputError(bad.problem, place=f"{path}: {bad.place}", remedy=bad.remedy) from None


def _beside_plan(plan: Plan, words: str, watch: Watch) -> dict[str, Any]:
    from shardplan.cli.estimate import judged
    from shardplan.costmodel.estimates import DEFAULT_HEADROOM
    from shardplan.costmodel.layout import layout_table, parse_layout
    from shardplan.costmodel.runtime import load_runtime
    from shardplan.hw_profiles.load import cluster_from_document
    from shardplan.planner.explain import explain_layout

    asked: dict[str, Any] = {
        "model": plan.model,
        "job": plan.job,
        "cluster": cluster_from_document(dict(plan.cluster)).with_gpus(plan.gpus),
        "runtime": load_runtime(plan.runtime),
        "headroom": float(plan.search.get("headroom", DEFAULT_HEADROOM)),
    }
    document = explain_layout(judged(words, **asked), **asked, watch=watch)
    is_own = layout_table([parse_layout(words)]).row(0) == plan.layout
    own = ["this is the plan's own layout"] if is_own else []
    return {**document, "notes": [*plan.notes(), *own, *document["notes"]]}


def _of_layout(
    model: str,
    layout: str,
    cluster: str | None,
    gpus: int | None,
    global_batch: int | None,
    seq: int | None,
    headroom: float,
    **job_words: Any,
) -> dict[str, Any]:
    from shardplan.cli.estimate import evaluate
    from shardplan.cli.progress import TerminalWatch
    from shardplan.hw_profiles.errors import InputError
    from shardplan.planner.explain import explain_layout

    if cluster is None or global_batch is None or seq is None:
        missing = [
            n for n, v in (("--cluster", cluster), ("--global-batch", global_batch), ("--seq", seq)) if v is None
        ]
        raise InputError(f"{', '.join(missing)} missing", place="explain", remedy="a model and --layout need them")
    job_words = {**job_words, "global_batch": global_batch, "seq": seq}
    answer = evaluate(model, layout, cluster, gpus, headroom=headroom, **job_words)
    inputs = options.read_inputs(model, cluster, answer["gpus"] if gpus is None else gpus, **job_words)
    with TerminalWatch(keeps_best=False) as watch:
        return explain_layout(
            answer,
            model=inputs.model,
            job=inputs.job,
            cluster=inputs.cluster,
            runtime=inputs.runtime,
            headroom=headroom,
            watch=watch,
        )
