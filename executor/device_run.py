"""Runs one case on one device, in this process: the executor's own training steps, then steps that look inside."""

from __future__ import annotations

import atexit
import contextlib
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend

from shardplan.costmodel.layout import Layout
from shardplan.executor.device_cases import Case
from shardplan.executor.measure import StepRecord
from shardplan.executor.mesh import build_mesh
from shardplan.executor.train import run_step, synchronize
from shardplan.executor.trainer import Trainer
from shardplan.planner.plan import Plan

KERNELS_TOLD = 30
"""Of a profiled step, those that take longest."""
FEWEST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one case took; seconds and bytes."""

    step_s: float
    """Median of the timed steps."""
    metrics: Mapping[str, float]
    """step_s among them; memory is the peak over all steps."""
    kernels: Mapping[str, float] = field(default_factory=dict[str, float])
    """Device seconds of one step by kernel."""


def start_alone(device: torch.device) -> DeviceMesh:
    """A process group of this process only, and the mesh of one rank that every case shares."""
    folder = tempfile.mkdtemp(prefix="shardplan-validate-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    meeting = Path(folder, "store").as_uri()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", init_method=meeting, rank=0, world_size=1, device_id=device)
    else:
        dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    return build_mesh(Layout(), device.type)


def case_plan(case: Case, *, cluster: Mapping[str, Any], prediction: Mapping[str, Any]) -> Plan:
    """The plan that `Trainer` takes."""
    return Plan(
        model=case.shapes(),
        job=case.job(),
        cluster=cluster,
        gpus=1,
        runtime=case.runtime,
        layout=case.layout(),
        prediction=prediction,
        search={},
        digests={},
        shardplan_version="",
    )


def run_case(
    plan: Plan, mesh: DeviceMesh, device: torch.device, case: Case, *, warmup: int, steps: int, limit_s: float
) -> Measured:
    """Train for `warmup` + `steps` steps, fewer when they would take longer than `limit_s`; raises what training raises.

    The caller calls `release` afterwards, whether this returned or raised.
    """
    start_bytes = float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0.0
    trainer = Trainer(plan, mesh, device)
    if case.kernel == "cudnn":
        trainer.attention = (SDPBackend.CUDNN_ATTENTION,)
    began = time.perf_counter()
    records: list[StepRecord] = []
    while len(records) < warmup + steps:
        records.append(run_step(trainer, len(records) + 1))
        if len(records) >= warmup + FEWEST_STEPS and time.perf_counter() - began > limit_s:
            break
    metrics = _step_metrics(records, warmup, plan.job.tokens_per_step)
    metrics["allocated_at_start_bytes"] = start_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        metrics["device_bytes"] = float(total - free)
        metrics |= _inside(trainer, len(records) + 1)
    kernels = profile_step(trainer, len(records) + 10) if case.profiled else {}
    return Measured(step_s=metrics["step_s"], metrics=metrics, kernels=kernels)


def _step_metrics(records: list[StepRecord], warmup: int, tokens: int) -> dict[str, float]:
    timed = [record.step_s for record in records[warmup:]]
    found: dict[str, float] = {
        "step_s": statistics.median(timed),
        "step_s_least": min(timed),
        "step_s_most": max(timed),
        "timed_steps": len(timed),
        "first_step_s": records[0].step_s,
        "tokens_per_s": tokens / statistics.median(timed),
        "first_loss": records[0].loss,
        "last_loss": records[-1].loss,
    }
    for name in ("allocated_bytes", "active_bytes", "reserved_bytes", "rss_bytes"):
        peaks = [getattr(record, name) for record in records if getattr(record, name) is not None]
        if peaks:
            found[name] = float(max(peaks))
    return found


def _inside(trainer: Trainer, step: int) -> dict[str, float]:
    """Of two more steps: device seconds of forward with backward and of the update, host seconds to queue both, last taken."""
    found: dict[str, float] = {}
    for turn in range(2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        synchronize(trainer.device)
        began = time.perf_counter()
        marks[0].record()
        trainer.forward_backward(step + turn)
        marks[1].record()
        queued_s = time.perf_counter() - began
        trainer.update(step + turn)
        marks[2].record()
        all_queued_s = time.perf_counter() - began
        if turn == 0:
            found |= _at_work(trainer.device)
        synchronize(trainer.device)
        found |= {
            "forward_backward_s": marks[0].elapsed_time(marks[1]) * 1e-3,
            "optimizer_s": marks[1].elapsed_time(marks[2]) * 1e-3,
            "host_forward_backward_s": queued_s,
            "host_optimizer_s": all_queued_s - queued_s,
        }
    return found


def _at_work(device: torch.device) -> dict[str, float]:
    """Clock and power while the queued step runs; empty where the driver's library is missing."""
    with contextlib.suppress(Exception):
        return {
            "sm_clock_mhz": float(torch.cuda.clock_rate(device)),
            "power_w": torch.cuda.power_draw(device) / 1e3,
            "temperature_c": float(torch.cuda.temperature(device)),
        }
    return {}


def profile_step(trainer: Trainer, step: int) -> dict[str, float]:
    """Device seconds (on a CPU: of operations) of one step by kernel, the KERNELS_TOLD largest, the rest summed as `other`,
    and the number of kernels as `count`."""
    activity = torch.profiler.ProfilerActivity
    cuda = trainer.device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        trainer.forward_backward(step)
        trainer.update(step)
        synchronize(trainer.device)
    seconds: dict[str, float] = {}
    count = 0
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0 and not getattr(event, "is_user_annotation", False):  # a range over kernels, not one
            seconds[event.key] = seconds.get(event.key, 0.0) + spent * 1e-6
            count += event.count
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    told = dict(ordered[:KERNELS_TOLD])
    return {**told, "other": sum(s for _, s in ordered[KERNELS_TOLD:]), "count": float(count)}


def release(device: torch.device) -> None:
    """Give back what the last case held; sharded models hold themselves in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
