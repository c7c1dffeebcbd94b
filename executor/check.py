"""Can this plan run here? The cost model's rules for this runtime, then what only this machine and executor know."""

from __future__ import annotations

import os
from collections.abc import Iterator

from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import cluster_from_document
from shardplan.hw_profiles.machine import PROCESSES_PER_CORE, Cluster
from shardplan.planner.plan import Plan

RUNTIME = "shardplan"


def plan_cluster(plan: Plan) -> Cluster:
    """The machine the plan was made for, in its size; InputError when the plan's description of it is damaged."""
    return cluster_from_document(plan.cluster, place="cluster of the plan").with_gpus(plan.gpus)


def cuda_devices_here() -> int:
    """CUDA devices torch sees on this machine (imports torch)."""
    import torch

    return torch.cuda.device_count()


def refusals(plan: Plan, *, device: str, cuda_devices: int) -> list[Rejection]:
    """Why `plan` cannot run on `device` ("cuda" or "cpu") of this machine; empty when it can."""
    setting = Setting(model=plan.model, job=plan.job, cluster=plan_cluster(plan), runtime=load_runtime(RUNTIME))
    broken, _ = rejections(setting, plan.layout)
    return [*broken, *_machine(plan, device=device, cuda_devices=cuda_devices)]


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
