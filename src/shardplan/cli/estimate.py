"""`shardplan estimate`: memory and step time of one layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.cli import options

if TYPE_CHECKING:
    from shardplan.costmodel.job import Job
    from shardplan.costmodel.layout import Layout
    from shardplan.costmodel.model import Model
    from shardplan.costmodel.runtime import Runtime
    from shardplan.hw_profiles.machine import Cluster

LayoutOption = Annotated[
    str,
    typer.Option(
        "--layout",
        help='Layout words, for instance "dp=8 tp=8 pp=8 micro_batch=1 zero=1 recompute=selective". '
        "Left-out words take plain defaults, except dp: the GPUs that remain.",
    ),
]


def estimate(
    model: options.ModelArgument,
    layout: LayoutOption,
    cluster: options.ClusterOption,
    global_batch: options.GlobalBatchOption,
    seq: options.SeqOption,
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
    """Memory by stage and step time by part of one layout.

    Example: shardplan estimate gpt3-175b --cluster selene --global-batch 1536 --seq 2048
    --layout "dp=16 tp=8 pp=8 recompute=full" --runtime megatron-2021

    Without --gpus the layout's own product counts. Exit code 1 when it does not fit or is not valid.
    """
    answer = evaluate(
        model,
        layout,
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
        headroom=headroom,
    )
    if as_json:
        import json

        typer.echo(json.dumps(answer, indent=1))
    else:
        from shardplan.cli.tables import print_answer

        print_answer(answer)
    raise typer.Exit(0 if answer["fits"] else 1)


def evaluate(
    model: str, layout: str, cluster: str, gpus: int | None, *, headroom: float, **job_words: Any
) -> dict[str, Any]:
    """The answer for one layout given as words, valid or not."""
    from shardplan.costmodel.layout import given_words, parse_layout
    from shardplan.hw_profiles.errors import InputError

    if not 0.0 <= headroom < 1.0:
        raise InputError(f"headroom={headroom:g} is not a fraction", place="--headroom", remedy="use 0 up to below 1")
    wanted = parse_layout(layout)
    words = given_words(layout)
    inputs = options.read_inputs(model, cluster, _sized(gpus, wanted, words), **job_words)
    return judged(
        layout,
        model=inputs.model,
        job=inputs.job,
        cluster=inputs.cluster,
        runtime=inputs.runtime,
        headroom=headroom,
    )


def judged(
    layout: str, *, model: Model, job: Job, cluster: Cluster, runtime: Runtime, headroom: float
) -> dict[str, Any]:
    """The same for inputs that are read already."""
    from shardplan.costmodel.answer import refused_answer
    from shardplan.costmodel.layout import given_words, parse_layout
    from shardplan.planner.search import judge

    wanted = _with_dp(parse_layout(layout), given_words(layout), cluster.gpus)
    verdict = judge(wanted, model=model, job=job, cluster=cluster, runtime=runtime, headroom=headroom)
    return verdict if isinstance(verdict, dict) else refused_answer(wanted, runtime=runtime, rejections=verdict)


def _sized(gpus: int | None, layout: Layout, words: frozenset[str]) -> int | None:
    """The layout's own GPUs where --gpus is left out and dp is given (or nothing is)."""
    return layout.gpus if gpus is None and ("dp" in words or not words) else gpus


def _with_dp(layout: Layout, words: frozenset[str], gpus: int) -> Layout:
    """dp takes the GPUs that remain when it is left out and they divide."""
    from dataclasses import replace

    rest = layout.tp * layout.pp * layout.cp
    return replace(layout, dp=gpus // rest) if "dp" not in words and gpus % rest == 0 else layout
