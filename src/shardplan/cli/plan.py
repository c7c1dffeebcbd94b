"""`shardplan plan`: every layout of a model on a cluster, ranked; the best becomes plan.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.cli import options

if TYPE_CHECKING:
    from shardplan.planner.plan import Plan
    from shardplan.planner.search import SearchResult


def plan(
    model: options.ModelArgument,
    cluster: options.ClusterOption,
    global_batch: options.GlobalBatchOption,
    seq: options.SeqOption,
    gpus: options.GpusOption = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective", help="throughput, cost (of any part of the GPUs), gpus (fewest that fit) or memory."
        ),
    ] = "throughput",
    runtime: options.RuntimeOption = "shardplan",
    fix: Annotated[str, typer.Option("--fix", help='Layout words to keep, for instance "tp=8 zero=1".')] = "",
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", help="Word or word=value to leave out: offload, zero=3, pp. Repeatable."),
    ] = None,
    headroom: options.HeadroomOption = 0.05,
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

    Exit code 1 when nothing fits; then it says what would have to change.
    """
    inputs = options.read_inputs(
        model,
        cluster,
        gpus,
        global_batch=global_batch,
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
    result = _search(inputs, fix, forbid or [], objective, headroom)
    if result.ranked is None:
        _nothing_fits(inputs, result, fix, forbid or [], headroom, as_json=as_json)
        raise typer.Exit(1)
    asked: dict[str, Any] = {"fix": fix, "forbid": forbid or [], "objective": objective.lower()}
    best = _best_plan(inputs, result, runtime, top, headroom, asked)
    if output:
        best.write(output)
    if as_json:
        import json

        typer.echo(json.dumps(best.document(), indent=1))
        return
    from shardplan.cli.tables import print_plan

    print_plan(best.document(), written_to=output)


def _search(inputs: options.Inputs, fix: str, forbid: list[str], objective: str, headroom: float) -> SearchResult:
    from shardplan.hw_profiles.errors import InputError, nearest
    from shardplan.planner.search import OBJECTIVES, Objective, search
    from shardplan.planner.space import parse_wishes

    chosen: Objective | None = next((word for word in OBJECTIVES if word == objective.lower()), None)
    if chosen is None:
        raise InputError(
            f"objective={objective!r} is unknown", place="--objective", remedy=nearest(objective, OBJECTIVES)
        )
    return search(
        model=inputs.model,
        job=inputs.job,
        cluster=inputs.cluster,
        runtime=inputs.runtime,
        wishes=parse_wishes(fix, forbid),
        objective=chosen,
        headroom=headroom,
    )


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
    from shardplan.planner.explain import what_would_fit
    from shardplan.planner.space import parse_wishes

    document: dict[str, Any] = what_would_fit(
        result,
        model=inputs.model,
        job=inputs.job,
        cluster=inputs.cluster,
        runtime=inputs.runtime,
        wishes=parse_wishes(fix, forbid),
        headroom=headroom,
    )
    if as_json:
        import json

        typer.echo(json.dumps(document, indent=1))
        return
    from shardplan.cli.tables import print_nothing_fits

    print_nothing_fits(document)
