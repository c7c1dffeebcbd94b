"""Can this plan run here? The cost model's rules for this runtime, then what only this machine and executor know."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator

from shardplan.costmodel.layout import V_PLACED, Layout
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.executor import compiling
from shardplan.executor.checkpoint_files import Progress
from shardplan.executor.data import BYTE_VOCABULARY
from shardplan.hw_profiles.load import cluster_from_document
from shardplan.hw_profiles.machine import PROCESSES_PER_CORE, Cluster
from shardplan.planner.plan import Plan, model_digest

RUNTIME = "shardplan"
GIB = 2.0**30
TORCH_OF_V_OVER_GLOO = (2, 13)
"""First torch release whose V schedules do not hang over gloo: receives are ordered by rank there (compare pytorch/pytorch#172668). 2.11
hangs with 2 and with 4 ranks; 2.12 was not tried."""


def plan_cluster(plan: Plan) -> Cluster:
    """The machine the plan was made for, in its size; InputError when the plan's description of it is damaged."""
    return cluster_from_document(plan.cluster, place="cluster of the plan").with_gpus(plan.gpus)


def cuda_devices_here() -> int:
    """CUDA devices torch sees on this machine (imports torch)."""
    import torch

    return torch.cuda.device_count()


def torch_version() -> str:
    """Of the installed torch, without importing it; "" where there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def refusals(
    plan: Plan, *, device: str, cuda_devices: int, force: bool = False, torch: str | None = None
) -> list[Rejection]:
    """Why `plan` cannot run on `device` ("cuda" or "cpu") of this machine; empty when it can. `force`: though it is not to fit; `torch`: a
    version other than the installed one."""
    runtime = f"{RUNTIME}+{compiling.SWITCH}" if compiling.is_compiled(plan.runtime) else RUNTIME
    setting = Setting(model=plan.model, job=plan.job, cluster=plan_cluster(plan), runtime=load_runtime(runtime))
    broken, _ = rejections(setting, plan.layout)
    machine = _machine(plan, device=device, cuda_devices=cuda_devices)
    version = torch_refusals(plan.layout, device=device, torch=torch)
    return [*broken, *machine, *version, *([] if force else _memory(plan))]


def shipped_text_refusals(plan: Plan) -> list[Rejection]:
    """Why `plan` cannot be trained on the shipped text, where no job is given; empty when it can."""
    if plan.model.vocab >= BYTE_VOCABULARY:
        return []
    return [
        Rejection(
            rule="shipped-text-vocabulary",
            detail=f"vocab={plan.model.vocab} of {plan.model.name} is below the {BYTE_VOCABULARY} byte tokens of the shipped text",
            remedy="train on your own tokens by --job, or plan a model with a larger vocabulary",
        )
    ]


def resume_refusals(plan: Plan, saved: Progress, *, steps: int) -> list[Rejection]:
    """Why `plan` cannot go on from a checkpoint up to step `steps`; empty when it can, in whatever layout it was saved."""
    found: list[Rejection] = []
    if saved.model != model_digest(plan.model):
        found.append(
            Rejection(
                rule="checkpoint-model",
                detail=f"the checkpoint is of another model than the plan's {plan.model.name}",
                remedy="resume with a plan of the model that was saved",
            )
        )
    if steps <= saved.step:
        found.append(
            Rejection(
                rule="checkpoint-step",
                detail=f"the checkpoint is at step {saved.step}, --steps asks for {steps} in all",
                remedy=f"give --steps above {saved.step}",
            )
        )
    return found


def _memory(plan: Plan) -> Iterator[Rejection]:
    """Not even the lower edge of the predicted band fits."""
    low = ((plan.prediction.get("error_band") or {}).get("device_peak_bytes") or (0.0,))[0]
    capacity = (plan.prediction.get("memory") or {}).get("capacity_bytes") or float("inf")
    if low > capacity:
        yield Rejection(
            rule="predicted-memory",
            detail=f"at least {low / GIB:.1f} GiB are predicted, the device has {capacity / GIB:.1f} GiB",
            remedy="plan a layout that fits, or give --force to try",
        )


def torch_refusals(layout: Layout, *, device: str, torch: str | None = None) -> Iterator[Rejection]:
    """What a version of `torch`, by default the installed one, gets wrong on `device`."""
    if device != "cpu" or layout.pp == 1 or layout.schedule not in V_PLACED:
        return
    torch = torch_version() if torch is None else torch
    release = re.match(r"(\d+)\.(\d+)", torch)
    if release and (int(release[1]), int(release[2])) < TORCH_OF_V_OVER_GLOO:
        yield Rejection(
            rule="v-schedule-torch",
            detail=f"schedule={layout.schedule} hangs over gloo, which CPU processes use, under torch {torch}",
            remedy=f"use torch {'.'.join(map(str, TORCH_OF_V_OVER_GLOO))} or later, or schedule=zero_bubble or interleaved",
        )


def _machine(plan: Plan, *, device: str, cuda_devices: int) -> Iterator[Rejection]:
    gpus, cores = plan.gpus, os.cpu_count() or 1
    if device == "cuda" and cuda_devices < gpus:
        needed = f"{gpus} CUDA GPU{'s' if gpus > 1 else ''}"
        yield Rejection(
            rule="cuda-devices",
            detail=f"the plan needs {needed}, this machine has {cuda_devices or 'none'}",
            remedy="run it where they are, or give --force to run it on local CPU processes",
        )
    if device == "cpu" and compiling.is_compiled(plan.runtime) and compiling.compiler_here() is None:
        yield Rejection(
            rule="compiler",
            detail=f"runtime {plan.runtime!r} compiles for the CPU, and no C++ compiler is found here",
            remedy="install g++, name a compiler in CXX, or plan with --runtime shardplan",
        )
    if device == "cpu" and gpus > PROCESSES_PER_CORE * cores:
        yield Rejection(
            rule="cpu-processes",
            detail=f"{gpus} processes are more than {PROCESSES_PER_CORE} on each of the {cores} cores",
            remedy=f"plan for at most {PROCESSES_PER_CORE * cores} processes",
        )
