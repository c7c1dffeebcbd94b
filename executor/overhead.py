"""What the executor adds to a step: its own loop body beside a bare PyTorch loop of the same model, in one process, taking turns.

Both train the same layers on the same text with fused AdamW and clipping. The bare loop is what a careful person writes by hand; the
executor's also times phases, averages the loss over ranks and writes the step down. The ratio is the median over pairs of steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model_config import load_model
from shardplan.executor.attention_kernel import attention_context
from shardplan.executor.data import ShippedText
from shardplan.executor.device_run import start_alone
from shardplan.executor.recorder import RankRecorder
from shardplan.executor.schedule import MAX_NORM, learning_rate
from shardplan.executor.train import LOOK_EVERY, run_step, synchronize, waits_of
from shardplan.executor.trainer import Trainer
from shardplan.executor.transformer import build_transformer, whole
from shardplan.planner.plan import Plan

WARMUP_PAIRS = 3


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds of a step, medians over the pairs."""

    model: str
    device: str
    precision: str
    pairs: int
    clock: str
    """What was read: wall, or on a CPU the time of the process, which other programs do not change."""
    bare_s: float
    executor_s: float
    ratio: float
    """Executor over bare: the median of the pairs' ratios."""
    ratio_p20: float
    ratio_p80: float
    last_loss: tuple[float, float]
    """Of the bare loop and of the executor, which train the same."""


def measure_overhead(*, model: str, seq: int, micro_batch: int, accumulation: int, pairs: int) -> Overhead:
    """Train `pairs` + WARMUP_PAIRS steps each way, on a GPU where there is one; needs a process without a process group, and starts one.

    fp32 on one core of a CPU; on a GPU bf16, where the bare loop is autocast over fp32 parameters.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    mesh = start_alone(device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    plan = Plan(
        model=load_model(model),
        job=Job(seq=seq, global_batch=micro_batch * accumulation, precision=precision),
        cluster={},
        gpus=1,
        runtime="shardplan",
        layout=Layout(micro_batch=micro_batch),
        prediction={},
        search={},
        digests={},
        shardplan_version="",
    )
    trainer = Trainer(plan, mesh, device)
    waits, every = waits_of(trainer), LOOK_EVERY[device.type]
    with (
        tempfile.TemporaryDirectory(prefix="shardplan-overhead-") as folder,
        RankRecorder(Path(folder), rank=0) as recorder,
    ):

        def executor(step: int) -> float:
            record = run_step(trainer, step, waits if step % every == 0 else None)
            recorder.write(record)
            return record.loss

        found, losses = _take_turns(bare_loop(plan, trainer, device), executor, pairs=pairs, device=device)
    ratios = found[:, 1] / found[:, 0]
    low, middle, high = np.percentile(ratios, (20, 50, 80)).tolist()
    return Overhead(
        model=model,
        device=device.type,
        precision=precision,
        pairs=pairs,
        clock="process time" if device.type == "cpu" else "wall",
        bare_s=median(found[:, 0].tolist()),
        executor_s=median(found[:, 1].tolist()),
        ratio=middle,
        ratio_p20=low,
        ratio_p80=high,
        last_loss=losses,
    )


def _take_turns(
    bare: Callable[[int], float], executor: Callable[[int], float], *, pairs: int, device: torch.device
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Seconds of (bare, executor) by pair, (pairs, 2), and their last losses; each goes first every other time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds, losses = np.zeros((pairs, 2)), [0.0, 0.0]
    for pair in range(-WARMUP_PAIRS, pairs):
        both = [(0, bare), (1, executor)]
        for column, run in both if pair % 2 else both[::-1]:
            synchronize(device)
            began = clock()
            losses[column] = run(pair + WARMUP_PAIRS + 1)
            synchronize(device)
            if pair >= 0:
                seconds[pair, column] = clock() - began
    return seconds, (losses[0], losses[1])


def bare_loop(plan: Plan, trainer: Trainer, device: torch.device) -> Callable[[int], float]:
    """A step of plain PyTorch, by its number from 1; returns the loss. It runs the attention kernel that `trainer` runs."""
    job, layout = plan.job, plan.layout
    model = build_transformer(plan.model, seq=job.seq, part=whole(plan.model), seed=0, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    text = ShippedText(seq=job.seq, seed=0)
    pieces = job.global_batch // layout.micro_batch
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16")

    def step(number: int) -> float:
        arrays = text.batch(number, first=0, count=job.global_batch)
        inputs, targets = (torch.from_numpy(array.copy()).to(device) for array in arrays)
        total = torch.zeros((), device=device)
        for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
            with mixed, attention_context(trainer.attention):
                logits = model(x)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / pieces
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, plan.model.hidden)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step
