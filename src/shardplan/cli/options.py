"""Options that several commands share, and what they mean as model, job, cluster and runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardplan.costmodel.job import Job
    from shardplan.costmodel.model import Model
    from shardplan.costmodel.runtime import Runtime
    from shardplan.hw_profiles.machine import Cluster

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Preset name, Hugging Face config.json, or a folder with one.")
]
ClusterOption = Annotated[str, typer.Option("--cluster", metavar="PROFILE", help="Catalog name or TOML file.")]
GpusOption = Annotated[int | None, typer.Option("--gpus", help="Number of GPUs; default: the profile's own.")]
GlobalBatchOption = Annotated[int, typer.Option("--global-batch", help="Sequences per optimizer step.")]
SeqOption = Annotated[int, typer.Option("--seq", help="Tokens per sequence.")]
RuntimeOption = Annotated[str, typer.Option("--runtime", help="Executing software: a shipped name or a TOML file.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="bf16, fp16, fp32, or fp8 (products of layers); default: the best 16-bit type of the GPU, fp32 on a CPU.",
    ),
]
OptimizerOption = Annotated[
    str,
    typer.Option("--optimizer", help="adamw, sgd, adafactor, adamw8bit, adamw16bit, paged_adamw or paged_adamw8bit."),
]
GradDtypeOption = Annotated[
    str | None, typer.Option("--grad-dtype", help="Gradient accumulation: fp32, bf16, fp16; default: the runtime's.")
]
ImbalanceOption = Annotated[
    float,
    typer.Option(
        "--expert-imbalance", help="Tokens that the busiest expert-parallel rank gets, relative to the mean; 1 = even."
    ),
]
CapacityOption = Annotated[
    float | None,
    typer.Option(
        "--capacity-factor",
        help="Every expert computes this times its even share, by dropping and padding; default: dropless.",
    ),
]
TokensOption = Annotated[float | None, typer.Option("--tokens", help="Token budget of the whole training.")]
PriceOption = Annotated[
    float | None, typer.Option("--price", help="USD per GPU and hour, in place of the profile's price.")
]
FailureOption = Annotated[
    float | None,
    typer.Option(
        "--gpu-hours-per-failure",
        help="GPU-hours of training per failure; default: the profile's, or Llama 3's 50,700.",
    ),
]
MethodOption = Annotated[str, typer.Option("--method", help="What is trained: full, lora or qlora (4-bit base).")]
LoraRankOption = Annotated[int, typer.Option("--lora-rank", help="With lora and qlora: rank of the adapters.")]
LoraTargetsOption = Annotated[
    str,
    typer.Option(
        "--lora-targets",
        help="With lora and qlora: products with adapters: all, attention, qv, or names such as q+k+v.",
    ),
]
DocumentOption = Annotated[
    int | None,
    typer.Option(
        "--document-tokens", help="Packed sequences: mean tokens of a document, which attends to itself only."
    ),
]
FixOption = Annotated[
    list[str] | None, typer.Option("--fix", help='Layout words to keep, for instance "tp=8 zero=1". Repeatable.')
]
HeadroomOption = Annotated[
    float,
    typer.Option(
        "--headroom",
        help="Fraction of GPU memory to keep free, and of host memory and flash where states are offloaded there.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else to stdout.")]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The four things every estimate needs."""

    model: Model
    job: Job
    cluster: Cluster
    cluster_document: dict[str, object]
    runtime: Runtime


def read_inputs(
    model: str,
    cluster: str,
    gpus: int | None,
    *,
    global_batch: int,
    seq: int,
    runtime: str,
    precision: str | None,
    optimizer: str,
    grad_dtype: str | None,
    expert_imbalance: float,
    capacity_factor: float | None,
    tokens: float | None,
    method: str = "full",
    lora_rank: int = 16,
    lora_targets: str = "all",
    document_tokens: int | None = None,
    price: float | None = None,
    gpu_hours_per_failure: float | None = None,
) -> Inputs:
    """Load and check everything; raises InputError."""
    from shardplan.costmodel.job import Job
    from shardplan.costmodel.model_config import load_model
    from shardplan.costmodel.runtime import load_runtime
    from shardplan.hw_profiles.load import cluster_document

    shapes = load_model(model)
    software = load_runtime(runtime)
    document, machine = with_given_figures(cluster_document(cluster), gpus, price, gpu_hours_per_failure)
    job = Job(
        seq=seq,
        global_batch=global_batch,
        precision=precision.lower() if precision else default_precision(machine, software),
        optimizer=optimizer.lower(),
        grad_dtype=grad_dtype.lower() if grad_dtype else None,
        expert_imbalance=expert_imbalance,
        capacity_factor=capacity_factor,
        tokens=tokens,
        method=method.lower(),
        lora_rank=lora_rank,
        lora_targets=lora_targets.lower(),
        document_tokens=document_tokens,
    )
    _refuse_idle(shapes, job)
    return Inputs(model=shapes, job=job, cluster=machine, cluster_document=document, runtime=software)


def _refuse_idle(model: Model, job: Job) -> None:
    """InputError for a word that would change nothing: who gives it means another model or method."""
    from shardplan.costmodel.job import Job
    from shardplan.hw_profiles.errors import InputError

    given = {
        "--expert-imbalance": job.expert_imbalance != Job.expert_imbalance,
        "--capacity-factor": job.capacity_factor is not None,
    }
    idle = next((word for word, is_given in given.items() if is_given), None)
    if idle and not any(kind.experts for kind, _ in model.layers):
        raise InputError(f"{model.name} has no experts", place=idle, remedy="leave it out")
    given = {"--lora-rank": job.lora_rank != Job.lora_rank, "--lora-targets": job.lora_targets != Job.lora_targets}
    idle = next((word for word, is_given in given.items() if is_given), None)
    if idle and job.method == "full":
        raise InputError(
            "no adapters with --method full", place=idle, remedy="give --method lora or qlora, or leave it out"
        )


def with_given_figures(
    document: dict[str, Any], gpus: int | None, price: float | None, gpu_hours_per_failure: float | None
) -> tuple[dict[str, Any], Cluster]:
    """(document with what the command line says of price and failures, the cluster with `gpus` GPUs that it describes)."""
    from shardplan.hw_profiles.load import cluster_from_document
    from shardplan.hw_profiles.override import with_failure_rate, with_price

    def machine() -> Cluster:
        whole = cluster_from_document(document)
        return whole if gpus is None else whole.with_gpus(gpus)

    if gpu_hours_per_failure is not None:
        document = with_failure_rate(document, gpu_hours_per_failure)
    if price is not None:
        whole = machine()
        document = with_price(document, price, whole.node_runs[0][0].gpus)
    return document, machine()


def default_precision(cluster: Cluster, runtime: Runtime) -> str:
    """The first of bf16, fp16, fp32 that GPU and runtime both have; fp32 on a CPU."""
    gpus = [node.gpu for node, _ in cluster.node_runs]
    known = [w for w in runtime.abilities.precisions if all(w in gpu.peak_flop_per_s for gpu in gpus)]
    both = [w for w in ("bf16", "fp16") if w in known]
    return both[0] if both and gpus[0].device != "cpu" else "fp32"


def check_writable(file: Path | None) -> None:
    """InputError, before anything is computed, for a file that cannot be written: a folder, or one in a folder that is not there."""
    from shardplan.hw_profiles.errors import InputError

    if file is None:
        return
    if file.is_dir():
        raise InputError("is a folder", place=str(file), remedy="name a file")
    if not file.parent.is_dir():
        raise InputError(f"folder {str(file.parent)!r} does not exist", place=str(file), remedy="create it first")
