"""What one rank does: build its part of the model, spread it, train it, write down what it measured.

Started by `launch.py` through torchrun: python -m shardplan.executor.train RUN_FOLDER --steps N --device cpu
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardplan.executor.attention_kernel import (
    attention_backends,
    attention_context,
    capability_of,
    runs_own_attention,
    use_own_attention,
)
from shardplan.executor.job_file import read_resolved
from shardplan.executor.loss import loss_context, loss_function
from shardplan.executor.measure import RankRecorder, StepRecord, host_peak_bytes
from shardplan.executor.mesh import build_mesh, data_rank
from shardplan.executor.optimizer import build_optimizer, clip_gradients, settle_gradients
from shardplan.executor.parallelize import parallelize
from shardplan.executor.pipeline import Schedule, build_schedule, chunk_layers, chunks_of_rank, parts
from shardplan.executor.recipe import Batches, Recipe, job_recipe, plain_recipe
from shardplan.executor.transformer import Part, Transformer, build_transformer
from shardplan.executor.zero import reshard, set_micro_step
from shardplan.planner.plan import Plan

GROUP_TIMEOUT = timedelta(minutes=5)
"""No collective waits longer: a dead or stuck rank ends the run."""


class Trainer:
    """One rank's share of training `plan`: the model chunks it holds, the optimizer over them, the loop body."""

    def __init__(self, plan: Plan, mesh: DeviceMesh, device: torch.device, recipe: Recipe | None = None) -> None:
        layout, job = plan.layout, plan.job
        self.plan, self.mesh, self.device = plan, mesh, device
        self.recipe = recipe or plain_recipe(plan)
        self.sequences = job.global_batch // layout.dp
        self.micro_batches = self.sequences // layout.micro_batch
        every = parts(chunk_layers(layout, plan.model.layer_count, plan.prediction))
        self.chunks: list[Transformer] = [
            parallelize(self._build(every[number]), layout, job, mesh)
            for number in chunks_of_rank(layout, mesh.get_local_rank("pp"))
        ]
        self.attention = attention_backends(layout.attention, device_type=device.type, precision=job.precision)
        self.own_attention = runs_own_attention(
            layout.attention,
            precision=job.precision,
            head_dim=max(kind.head_dim for kind, _ in plan.model.layers),
            capability=capability_of(device),
        )
        if self.own_attention:
            for chunk in self.chunks:
                use_own_attention(chunk)
        self.holds_first = self.chunks[0].embedding is not None
        self.holds_last = self.chunks[-1].head is not None
        self.loss = loss_function(mesh["tp"])
        self.schedule: Schedule | None = None
        if layout.pp > 1:
            self.schedule = build_schedule(
                self.chunks, layout, mesh, device=device, micro_batches=self.micro_batches, loss=self.loss
            )
        self.optimizer = build_optimizer(
            self.parameters(), rate=self.recipe.learning_rate(1), words=self.recipe.optimizer
        )
        self.data_s = 0.0

    def _build(self, part: Part) -> Transformer:
        job, recipe = self.plan.job, self.recipe
        chunk = build_transformer(self.plan.model, seq=job.seq, part=part, seed=recipe.seed, device=self.device)
        if recipe.initial is not None:
            from shardplan.executor import weights

            weights.load(chunk, recipe.initial)
        return chunk

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter this rank holds a piece of."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def batch(self, step: int, data: Batches | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this data-parallel rank for `step`, each (sequences, seq); `data_s` tells the seconds it took."""
        began = time.perf_counter()
        first = data_rank(self.mesh) * self.sequences
        arrays = (data or self.recipe.data).batch(step, first=first, count=self.sequences)
        inputs, targets = (torch.from_numpy(array.copy()).to(self.device) for array in arrays)
        self.data_s = time.perf_counter() - began
        return inputs, targets

    def forward_backward(self, step: int) -> Tensor:
        """Gradients of the mean loss over the global batch; returns this rank's mean loss (0 where the head is not)."""
        inputs, targets = self.batch(step)
        with ExitStack() as contexts:
            contexts.enter_context(loss_context(self.mesh["tp"]))
            contexts.enter_context(attention_context(self.attention))
            loss = self._micro_steps(inputs, targets) if self.schedule is None else self._pipeline(inputs, targets)
        settle_gradients(self.parameters())
        return loss

    def _micro_steps(self, inputs: Tensor, targets: Tensor) -> Tensor:
        model, zero = self.chunks[0], self.plan.layout.zero
        total = torch.zeros((), device=self.device)
        pieces = zip(inputs.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True)
        for i, (x, y) in enumerate(pieces):
            set_micro_step(model, zero=zero, last=i == self.micro_batches - 1)
            loss = self.loss(model(x), y) / self.micro_batches
            loss.backward()
            total += loss.detach()
        return total

    def _pipeline(self, inputs: Tensor, targets: Tensor, *, train: bool = True) -> Tensor:
        assert self.schedule is not None
        run = self.schedule.step if train else self.schedule.eval
        losses: list[Tensor] = []
        arguments = (inputs,) if self.holds_first else ()
        if self.holds_last:
            run(*arguments, target=targets, losses=losses, return_outputs=False)
            return torch.stack(losses).mean().detach()
        run(*arguments, return_outputs=False)
        return torch.zeros((), device=self.device)

    def update(self, step: int) -> Tensor:
        """Clip, take an optimizer step, drop the gradients; returns the gradient norm before clipping."""
        norm = clip_gradients(self.parameters(), self.mesh, self.recipe.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def validate(self, data: Batches, batches: int) -> float:
        """Mean loss over global batches 1 to `batches` of `data`; nothing is trained. The same on every rank."""
        total = torch.zeros((), device=self.device)
        for step in range(1, batches + 1):
            inputs, targets = self.batch(step, data)
            with loss_context(self.mesh["tp"]), attention_context(self.attention):
                total += self._evaluate(inputs, targets) / batches
        for chunk in self.chunks:
            reshard(chunk)
        return self.global_loss(total)

    def _evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.schedule is not None:
            return self._pipeline(inputs, targets, train=False)
        pieces = zip(inputs.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True)
        return torch.stack([self.loss(self.chunks[0](x), y) for x, y in pieces]).mean()

    def global_loss(self, loss: Tensor) -> float:
        """Mean loss over the global batch, the same on every rank, from what `forward_backward` returned on each."""
        counts_once = self.holds_last and self.mesh.get_local_rank("tp") == 0
        total = loss.clone() if counts_once else torch.zeros_like(loss)
        dist.all_reduce(total)
        return total.item() / self.plan.layout.dp


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(trainer: Trainer, recorder: RankRecorder, *, steps: int) -> None:
    """The loop."""
    validation = trainer.recipe.validation
    for step in range(1, steps + 1):
        record = run_step(trainer, step)
        if validation is not None and validation.due(step, steps=steps):
            record = replace(record, validation_loss=trainer.validate(validation.data, validation.batches))
        recorder.write(record)
    recipe = trainer.recipe
    if recipe.export is not None:
        from shardplan.executor import weights

        weights.save(
            trainer.chunks,
            trainer.plan,
            trainer.mesh,
            recipe.export,
            dtype=recipe.export_dtype,
            origin=recipe.initial,
        )


def run_step(trainer: Trainer, step: int) -> StepRecord:
    """Step `step` (from 1). Its time runs from its batch to the end of the optimizer step, the device idle at both ends."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    synchronize(trainer.device)
    started = time.perf_counter()
    loss = trainer.forward_backward(step)
    norm = trainer.update(step)
    synchronize(trainer.device)
    seconds = time.perf_counter() - started
    return StepRecord(
        step=step,
        loss=trainer.global_loss(loss),
        grad_norm=norm.item(),
        step_s=seconds,
        tokens_per_s=trainer.plan.job.tokens_per_step / seconds,
        learning_rate=trainer.recipe.learning_rate(step),
        data_s=trainer.data_s,
        **peak_memory(trainer.device),
    )


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes since the last reset (CUDA), or of the process so far (CPU), as fields of `StepRecord`."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        kinds = {"allocated_bytes": "allocated", "active_bytes": "active", "reserved_bytes": "reserved"}
        return {field: stats[f"{kind}_bytes.all.peak"] for field, kind in kinds.items()}
    return {"rss_bytes": host_peak_bytes()}


def start_process_group(device: str) -> torch.device:
    """Join the ranks that torchrun started; returns this rank's device."""
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", timeout=GROUP_TIMEOUT, device_id=chosen)
        return chosen
    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
    return torch.device("cpu")


def run_rank() -> None:
    """Everything a rank does, by its command line."""
    parser = argparse.ArgumentParser(description="one rank of a run; started by `shardplan run`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--job", type=Path, help="what to train with, as job_file.write_resolved leaves it")
    given = parser.parse_args()
    with RankRecorder(given.folder, rank=int(os.environ["RANK"])) as recorder:
        plan = Plan.read(given.folder / "plan.json")
        device = start_process_group(given.device)
        recipe = job_recipe(plan, read_resolved(given.job)) if given.job else None
        trainer = Trainer(plan, build_mesh(plan.layout, device.type), device, recipe)
        train(trainer, recorder, steps=given.steps)
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()


def main() -> NoReturn:
    """Entry point of a rank: run, then leave at once.

    Threads of the process groups may still want the interpreter while it is being torn down, which aborts the process
    ("terminate called without an active exception", about one gloo run in ten): so there is no tearing down.
    """
    code = 0
    try:
        run_rank()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
