"""One row of `Estimates` as the JSON that `shardplan estimate --json` answers (and plan files carry as `prediction`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardplan.costmodel.adapters import trainable_parameters
from shardplan.costmodel.attention_time import OWN_KERNEL, takes_own_kernel
from shardplan.costmodel.estimate import model_flop_per_token
from shardplan.costmodel.estimates import DEFAULT_HEADROOM, Estimates
from shardplan.costmodel.fitted import is_fitted
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.remedies import GIB, memory_remedy
from shardplan.costmodel.result import cost_assumptions, cost_document, result_document
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_document import mixed_document, stage_documents
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.hw_profiles.machine import Cluster, Gpu


def answer(
    estimates: Estimates,
    row: int,
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime,
    rejections: Sequence[Rejection] = (),
    headroom: float = DEFAULT_HEADROOM,
) -> dict[str, Any]:
    """Everything known of one layout, plain JSON values; memory in bytes, time in seconds."""
    layout = estimates.layouts.row(row)
    told = list(rejections) + memory_rejections(
        estimates, row, Setting(model=model, job=job, cluster=cluster, runtime=runtime), headroom
    )
    step_s = float(estimates.step_s[row])
    peak = float(estimates.device_peak_bytes[row])
    band, memory_band = estimates.band_of(row), estimates.bands.memory
    return {
        "fits": not told,
        "fits_likely": not rejections and bool(estimates.fits_likely()[row]),
        "rejections": [{"rule": r.rule, "detail": r.detail, "remedy": r.remedy} for r in told],
        "layout": layout.document(),
        "gpus": layout.gpus,
        "runtime": runtime.name,
        "memory": _memory(estimates, row),
        "stages": stage_documents(
            Setting(model=model, job=job, cluster=cluster, runtime=runtime), layout, estimates, row
        ),
        **mixed_document(Setting(model=model, job=job, cluster=cluster, runtime=runtime), layout),
        "time": {
            "step_s": step_s,
            **{part: float(estimates.time[part][row]) for part in TIME_PARTS},
            "phases": _phases(estimates, row),
            "hidden": {axis: float(seconds[row]) for axis, seconds in estimates.hidden.items()},
        },
        "throughput": _throughput(estimates, row, layout.gpus),
        "cost": cost_document(cluster, job, step_s),
        "result": result_document(model=model, job=job, cluster=cluster, runtime=runtime, layout=layout, step_s=step_s),
        "error_band": {
            "step_s": [step_s * (1.0 - band), step_s * (1.0 + band)],
            "device_peak_bytes": [peak * (1.0 - memory_band), peak * (1.0 + memory_band)],
        },
        "assumptions": assumptions(model, job, cluster, runtime, layout, headroom),
    }


def refused_answer(
    layout: Layout, *, runtime: Runtime, rejections: Sequence[Rejection], assumptions: Sequence[str] = ()
) -> dict[str, Any]:
    """The same keys for a layout that has no meaning on this machine: numbers are null, `rejections` says why."""
    return {
        "fits": False,
        "fits_likely": False,
        "rejections": [{"rule": r.rule, "detail": r.detail, "remedy": r.remedy} for r in rejections],
        "layout": layout.document(),
        "gpus": layout.gpus,
        "runtime": runtime.name,
        "memory": None,
        "stages": None,
        "time": None,
        "throughput": None,
        "cost": None,
        "result": None,
        "error_band": None,
        "assumptions": list(assumptions),
    }


def memory_rejections(estimates: Estimates, row: int, setting: Setting, headroom: float) -> list[Rejection]:
    """Rejections of a layout that does not fit GPU or host memory with `headroom` to spare."""
    told: list[Rejection] = []
    need, capacity = float(estimates.device_peak_bytes[row]), float(estimates.capacities[row])
    usable = capacity * (1.0 - headroom)
    if need * (1.0 + estimates.bands.memory) > usable:
        stage = fullest_stage(estimates, row)
        parts = {
            p: float(estimates.stages[p][row, stage]) for p in ("parameters", "gradients", "optimizer", "activations")
        }
        largest = max(parts, key=lambda part: parts[part])
        told.append(
            Rejection(
                rule="device-memory",
                detail=(
                    f"stage {int(estimates.stage_index[row, stage])} needs {need / GIB:.1f} GiB (+{estimates.bands.memory:.0%} band) of "
                    f"{usable / GIB:.1f} GiB usable ({capacity / GIB:.1f} GiB less {headroom:.0%} headroom) on "
                    f"{_gpu_of(setting.cluster, capacity)}"
                ),
                remedy=(
                    f"largest part is {largest} ({parts[largest] / GIB:.1f} GiB): "
                    f"{memory_remedy(setting, estimates.layouts.row(row), float(estimates.step_s[row]), headroom)}"
                ),
            )
        )
    for rule, what, need, capacity in (
        ("host-memory", "host memory", float(estimates.host_bytes[row]), estimates.host_capacity_bytes),
        ("nvme-capacity", "local flash", float(estimates.nvme_bytes[row]), estimates.nvme_capacity_bytes),
    ):
        usable = capacity * (1.0 - headroom)
        if need > usable:
            told.append(
                Rejection(
                    rule=rule,
                    detail=f"offload needs {need / GIB:.0f} GiB of {what} per node, {usable / GIB:.0f} GiB are usable",
                    remedy="shard over more nodes or offload less",
                )
            )
    return told


def fullest_stage(estimates: Estimates, row: int) -> int:
    """Column of the stage with least memory to spare."""
    needed, own = estimates.stages["device"][row], estimates.stage_capacity_bytes
    return int((needed if own is None else needed / own).argmax())


def _gpu_of(cluster: Cluster, capacity_bytes: float) -> str:
    """Name of the GPU of that memory."""
    return next((node.gpu.name for node, _ in cluster.node_runs if node.gpu.memory_bytes == capacity_bytes), "the GPU")


def _memory(estimates: Estimates, row: int) -> dict[str, Any]:
    stages = {part: values[row] for part, values in estimates.stages.items()}
    peak = fullest_stage(estimates, row)
    return {
        "capacity_bytes": float(estimates.capacities[row]),
        "allocated_peak_bytes": float(stages["allocated"][peak]),
        "reserved_peak_bytes": float(stages["allocated"][peak] + stages["slack"][peak]),
        "device_peak_bytes": float(stages["device"][peak]),
        "host_bytes": float(estimates.host_bytes[row]),
        "nvme_bytes": float(estimates.nvme_bytes[row]),
        "stages": [
            {
                "stage": int(estimates.stage_index[row, s]),
                "layers": int(estimates.stage_layer_counts[row, s]),
                **{
                    f"{p}_bytes": float(stages[p][s])
                    for p in ("parameters", "gradients", "optimizer", "activations", "buffers", "allocated")
                },
                "allocator_slack_bytes": float(stages["slack"][s]),
                "context_bytes": estimates.context_bytes,
                "device_bytes": float(stages["device"][s]),
            }
            for s in range(min(stages["device"].shape[0], int(estimates.layouts.pp[row])))
        ],
    }


def _phases(estimates: Estimates, row: int) -> dict[str, float]:
    """Compute of the slowest stage by phase, recomputation in the backward: compute_s and recompute_s in another cut."""
    forward_s = float(estimates.time["forward_s"][row])
    both_s = float(estimates.time["compute_s"][row] + estimates.time["recompute_s"][row])
    return {"forward_s": forward_s, "backward_s": both_s - forward_s}


def _throughput(estimates: Estimates, row: int, gpus: int) -> dict[str, float]:
    step_s = float(estimates.step_s[row])
    return {
        "tokens_per_s": float(estimates.tokens_per_s[row]),
        "tokens_per_s_per_gpu": float(estimates.tokens_per_s[row]) / gpus,
        "model_flop_per_s_per_gpu": estimates.model_flop_per_step / step_s / gpus,
        "hardware_flop_per_s_per_gpu": float(estimates.hardware_flop_per_step[row]) / step_s / gpus,
        "mfu": float(estimates.mfu[row]),
        "hfu": float(estimates.hfu[row]),
    }


def _experts_in_words(job: Job, layout: Layout) -> str:
    """How many tokens the busiest experts are taken to get."""
    if job.capacity_factor is not None:
        return f"every expert computes {job.capacity_factor:g} times its even share of the tokens (dropped or padded)"
    if job.expert_imbalance > 1 and layout.ep > 1:
        load = min(job.expert_imbalance, layout.ep)
        return f"the busiest of {layout.ep} expert-parallel ranks gets {load:g} times the mean: time and memory are its"
    return (
        "experts get equal shares of the tokens; --expert-imbalance says by how much the busiest rank exceeds the mean"
    )


def _why_fp32(gpu: Gpu, runtime: Runtime, found: list[str]) -> str:
    """What 16 bits would give: all GPUs, of which this is one, have the formats `found`."""
    rates = gpu.peak_flop_per_s
    faster = f"fp32, though {gpu.name} multiplies {rates[found[0]] / rates['fp32']:.0f} times as fast in {found[0]}"
    if any(word in runtime.abilities.precisions for word in found):
        return f"{faster}: --precision {next(word for word in found if word in runtime.abilities.precisions)}"
    known = " and ".join(word for word in runtime.abilities.precisions if word in ("bf16", "fp16")) or "no format"
    return f"{faster}: of 16 bits runtime {runtime.name} has {known}, these GPUs {' and '.join(found)}; another --runtime may have both"


def _attention(model: Model, job: Job, cluster: Cluster, runtime: Runtime, word: str) -> str:
    """Which attention runs, by GPU where they differ."""
    own = word == "auto" and OWN_KERNEL in runtime.execution.attention_kernels
    own &= all(takes_own_kernel(job.precision, kind.head_dim) for kind, _ in model.runs)
    usual = runtime.abilities.attention[0] if word == "auto" else word
    kernels = {
        node.gpu.name: "triton" if own and OWN_KERNEL in node.gpu.attention_efficiency else usual
        for node, _ in cluster.node_runs
    }
    if len(set(kernels.values())) == 1:
        return next(iter(kernels.values()))
    return " and ".join(f"{kernel} ({gpu})" for gpu, kernel in kernels.items())


UNTIMED_SCHEDULES = ("looped_bfs", "zero_bubble_v", "dualpipe_v")
"""Of runs with these none is restated in reports/published."""


def assumptions(
    model: Model, job: Job, cluster: Cluster, runtime: Runtime, layout: Layout, headroom: float
) -> list[str]:
    """What the numbers rest on, in sentences."""
    attention = _attention(model, job, cluster, runtime, layout.attention)
    gradient = job.grad_dtype or runtime.states[job.precision].gradient_dtype
    gpus = list(
        dict.fromkeys((node.gpu.name, node.gpu.peak_flop_per_s[job.precision]) for node, _ in cluster.node_runs)
    )
    peak = " and ".join(f"{rate / 1e12:g}" for _, rate in gpus)
    lines = [
        f"runtime {runtime.name}: {runtime.version}; {attention} attention; gradients in {gradient}",
        f"MFU counts {'6' if job.adapters is None else '4 (frozen)'} FLOP per matrix parameter and token plus full attention, no "
        f"recompute, of {peak} dense {job.precision} TFLOP/s ({' and '.join(name for name, _ in gpus)})",
        f"ranks are placed {layout.order.replace('-', ', then ')}; `fits` keeps {headroom:.0%} headroom below the upper edge of "
        "the memory band",
    ]
    once = job.global_batch == layout.dp * layout.micro_batch
    if runtime.working_set.gradients_freed and once and (layout.zero or layout.dp * layout.cp == 1):
        lines.append(
            "gradients take the place of activations as the backward goes: not allocated at the peak, counted as slack"
        )
    if layout.pp > 1 and layout.schedule in UNTIMED_SCHEDULES:
        lines.append(
            f"no published run has timed {layout.schedule}: its bubble is that of its action lists, checked by their replay alone"
        )
    if job.adapters is not None:
        no = "no " if runtime.tuning.dropout == "none" else ""
        lines.append(
            f"{job.method}: adapters of rank {job.lora_rank} on {'all products' if job.lora_targets == 'all' else job.lora_targets}, "
            f"{trainable_parameters(model, job):,.0f} trainable parameters; {no}dropout before them"
        )
    if any(kind.experts for kind, _ in model.runs):
        lines.append(_experts_in_words(job, layout))
    lacked = [
        word for word in ("bf16", "fp16") if all(word in node.gpu.peak_flop_per_s for node, _ in cluster.node_runs)
    ]
    gpu = cluster.node_runs[0][0].gpu
    if job.precision == "fp32" and gpu.device != "cpu" and lacked:
        lines.append(_why_fp32(gpu, runtime, lacked))
    if job.precision == "fp8":
        lines.append(
            "fp8: products of layers only; attention, head, activations and states as in bf16, parameters gathered in 8 bits"
        )
    if model.max_positions and job.seq > model.max_positions:
        lines.append(f"seq {job.seq} exceeds the {model.max_positions} positions {model.name} was made for")
    attention_share = 1.0 - model_flop_per_token(model, 0) / model_flop_per_token(model, job.attended)
    if attention_share > 0.3:
        lines.append(
            f"{attention_share:.0%} of the counted FLOP is attention, of which a causal fused kernel computes half: MFU and HFU "
            "overstate how busy the GPU is and can pass 100 %"
        )
    alien = list(dict.fromkeys(node.gpu.architecture for node, _ in cluster.node_runs if not is_fitted(node.gpu)))
    if alien:
        lines.append(
            f"no published run on {' or '.join(alien)} was fitted: what training sustains of its rates is the mean of other GPUs "
            "(`shardplan calibrate` measures it)"
        )
    guesses = cluster.guesses()
    if guesses:
        lines.append(f"guessed hardware figures: {', '.join(guesses)}")
    return [*runtime.warnings_of(layout), *lines, *cost_assumptions(job, cluster)]
