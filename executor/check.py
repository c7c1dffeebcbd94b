"""Can this plan run here? The cost model's rules for this runtime, then what only this machine and executor know."""

from __future__ import annotations

import os
from collections.abc import Iterator

from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.executor.checkpoint_files import Progress
from shardplan.hw_profiles.load import cluster_from_document
from shardplan.hw_profiles.machine import PROCESSES_PER_CORE, Cluster
from shardplan.planner.plan import Plan, model_digest

RUNTIME = "shardplan"
GIB = 2.0**30


def plan_cluster(plan: Plan) -> Cluster:
    """The machine the plan was made for, in its size; InputError when the plan's description of it is damaged."""
    return cluster_from_document(plan.cluster, place="cluster of the plan").with_gpus(plan.gpus)


def cuda_devices_here() -> int:
    """CUDA devices torch sees on this machine (imports torch)."""
    import torch

    return torch.cuda.device_count()


def refusals(plan: Plan, *, device: str, cuda_devices: int, force: bool = False) -> list[Rejection]:
    """Why `plan` cannot run on `device` ("cuda" or "cpu") of this machine; empty when it can. `force`: though it is not to fit."""
    setting = Setting(model=plan.model, job=plan.job, cluster=plan_cluster(plan), runtime=load_runtime(RUNTIME))
    broken, _ = rejections(setting, plan.layout)
    machine = _machine(plan, device=device, cuda_devices=cuda_devices)
    return [*broken, *machine, *([] if force else _memory(plan))]


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


def _machine(plan: Plan, *, device: str, cuda_devices: int) -> Iterator[Rejection]:
    gpus, cores = plan.gpus, os.cpu_count() or 1
    if device == "cuda" and cuda_devices < gpus:
        needed = f"{gpus} CUDA GPU{'s' if gpus > 1 else ''}"
        yield Rejection(
            rule="cuda-devices",
            detail=f"the plan needs {needed}, this machine has {cuda_devices or 'none'}",
            remedy="run it where they are, or give --force to run it on local CPU processes",
        )
    if device == "cpu" and gpus > PROCESSES_PER_CORE * cores:
        yield Rejection(
            rule="cpu-processes",
            detail=f"{gpus} processes are more than {PROCESSES_PER_CORE} on each of the {cores} cores",
            remedy=f"plan for at most {PROCESSES_PER_CORE * cores} processes",
        )
