"""What one rank does: build its part of the model, spread it, train it, write down what it measured.

Started by `launch.py` through torchrun: python -m shardplan.executor.train RUN_FOLDER --steps N --device cpu
After a failure torchrun starts all ranks again (--max-restarts); they go on from the newest checkpoint of the run folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

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
from shardplan.executor.checkpoint import Checkpoints, State, choose, load, named_parameters, training_state
from shardplan.executor.checkpoint_files import CHECKPOINTS_FOLDER, Progress, clear_parts
from shardplan.executor.data import batch, load_text
from shardplan.executor.loss import loss_context, loss_function
from shardplan.executor.measure import RankRecorder, StepRecord, append_event, host_peak_bytes
from shardplan.executor.memory_parts import device_parts, ran_out_of_memory, told_parts
from shardplan.executor.mesh import build_mesh, data_rank
from shardplan.executor.optimizer import build_optimizer, clip_gradients, learning_rate, settle_gradients
from shardplan.executor.parallelize import parallelize
from shardplan.executor.pipeline import Schedule, build_schedule, chunk_layers, chunks_of_rank, parts
from shardplan.executor.start import check_world_size, die_with_parent, restart_count, start_process_group
from shardplan.executor.transformer import Transformer, build_transformer
from shardplan.executor.zero import set_micro_step
from shardplan.planner.plan import Plan, model_digest


class Trainer:
    """One rank's share of training `plan`: the model chunks it holds, the optimizer over them, the loop body."""

    def __init__(self, plan: Plan, mesh: DeviceMesh, device: torch.device, *, seed: int = 0) -> None:
        layout, job = plan.layout, plan.job
        self.plan, self.mesh, self.device, self.seed = plan, mesh, device, seed
        self.text = load_text()
        self.sequences = job.global_batch // layout.dp
        self.micro_batches = self.sequences // layout.micro_batch
        every = parts(chunk_layers(layout, plan.model.layer_count, plan.prediction))
        self.chunks: list[Transformer] = [
            parallelize(
                build_transformer(plan.model, seq=job.seq, part=every[number], seed=seed, device=device),
                layout,
                job,
                mesh,
            )
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
        self.optimizer = build_optimizer(self.parameters(), hidden=plan.model.hidden)

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter this rank holds a piece of."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this data-parallel rank for `step`, each (sequences, seq)."""
        first = data_rank(self.mesh) * self.sequences
        arrays = batch(self.text, seq=self.plan.job.seq, seed=self.seed, step=step, first=first, count=self.sequences)
        inputs, targets = (torch.from_numpy(array.copy()).to(self.device) for array in arrays)
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

    def _pipeline(self, inputs: Tensor, targets: Tensor) -> Tensor:
        assert self.schedule is not None
        losses: list[Tensor] = []
        arguments = (inputs,) if self.holds_first else ()
        if self.holds_last:
            self.schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
            return torch.stack(losses).mean().detach()
        self.schedule.step(*arguments, return_outputs=False)
        return torch.zeros((), device=self.device)

    def update(self, step: int) -> Tensor:
        """Clip, take an optimizer step, drop the gradients; returns the gradient norm before clipping."""
        norm = clip_gradients(self.parameters(), self.mesh)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.plan.model.hidden)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> State:
        """Parameters and optimizer states by name, the live tensors."""
        return training_state(named_parameters(self.chunks, tied=self.plan.model.tied_embeddings), self.optimizer)

    def data_state(self) -> dict[str, Any]:
        """What the data needs besides seed and step to go on: JSON values, the same on every rank and in every layout."""
        return {}

    def load_data_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `data_state` gave."""

    def progress(self, step: int) -> Progress:
        """What a checkpoint after `step` holds besides tensors."""
        return Progress(
            step=step,
            seed=self.seed,
            model=model_digest(self.plan.model),
            layout=self.plan.layout.words(),
            data=self.data_state(),
        )

    def resume(self, checkpoint: Path) -> int:
        """Take over the state of a checkpoint of any layout; returns the steps it has done. All ranks call it together."""
        saved = load(checkpoint, self.state())
        self.seed = saved.seed
        self.load_data_state(saved.data)
        return saved.step

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


def train(
    trainer: Trainer, recorder: RankRecorder, *, steps: int, done: int = 0, checkpoints: Checkpoints | None = None
) -> None:
    """The loop, from step `done` + 1 to `steps`; returns when the last checkpoint is on disk."""
    for step in range(done + 1, steps + 1):
        recorder.write(run_step(trainer, step))
        if checkpoints is not None and checkpoints.due(step, steps):
            checkpoints.save(trainer.state(), trainer.progress(step))
    if checkpoints is not None:
        checkpoints.wait()


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
        **peak_memory(trainer.device),
    )


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes since the last reset (CUDA), or of the process so far (CPU), as fields of `StepRecord`."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        kinds = {"allocated_bytes": "allocated", "active_bytes": "active", "reserved_bytes": "reserved"}
        return {field: stats[f"{kind}_bytes.all.peak"] for field, kind in kinds.items()}
    return {"rss_bytes": host_peak_bytes()}


def resume_newest(trainer: Trainer, folder: Path, source: Path | None) -> int:
    """Go on from this run's newest whole checkpoint, else from `source`; returns the steps done. Tells what it did."""
    chosen, refused = source, list[str]()  # the launcher has verified it
    if restart_count():
        chosen, refused = choose([folder / CHECKPOINTS_FOLDER, *([source] if source else [])])
    dist.barrier()  # a save begins only when what killed saves left is gone
    done = trainer.resume(chosen) if chosen else 0
    if dist.get_rank() == 0 and (chosen or restart_count()):
        at = f"resumed from step {done}" if chosen else "started again from the beginning, there is no checkpoint"
        event = {"restart": restart_count(), "step": done, "checkpoint": str(chosen) if chosen else None}
        append_event(folder, {**event, "refused": refused, "told": at})
    return done


def run_rank() -> None:
    """Everything a rank does, by its command line."""
    parser = argparse.ArgumentParser(description="one rank of a run; started by `shardplan run`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that no collective may exceed")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0: never")
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="one checkpoint folder")
    given = parser.parse_args()
    die_with_parent()
    with RankRecorder(given.folder, rank=int(os.environ["RANK"])) as recorder:
        plan = Plan.read(given.folder / "plan.json")
        check_world_size(plan)
        device = start_process_group(given.device, timedelta(seconds=given.timeout))
        trainer: Trainer | None = None
        try:
            trainer = Trainer(plan, build_mesh(plan.layout, device.type), device, seed=given.seed)
            if dist.get_rank() == 0 and given.checkpoint_every:
                clear_parts(given.folder / CHECKPOINTS_FOLDER)
            done = resume_newest(trainer, given.folder, given.resume)
            checkpoints = None
            if given.checkpoint_every:
                root = given.folder / CHECKPOINTS_FOLDER
                checkpoints = Checkpoints(root, every=given.checkpoint_every, keep=given.keep)
            train(trainer, recorder, steps=given.steps, done=done, checkpoints=checkpoints)
        except Exception as error:
            if ran_out_of_memory(error):
                recorder.details = out_of_memory(plan, trainer, device)
            raise
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()


def out_of_memory(plan: Plan, trainer: Trainer | None, device: torch.device) -> list[str]:
    """Predicted and actual memory of this rank's stage by part, lines of a table, printed as well."""
    parameters = [] if trainer is None else trainer.parameters()
    states = [] if trainer is None else [v for s in trainer.optimizer.state.values() for v in s.values()]
    stage = 0 if trainer is None else trainer.mesh.get_local_rank("pp")
    lines = told_parts(plan.prediction, stage=stage, actual=device_parts(parameters, states, device))
    print("\n".join(lines), file=sys.stderr, flush=True)
    return lines


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
