"""One rank's share of training a plan: its model chunks, the optimizer over them, what it does in a step."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

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
from shardplan.executor.checkpoint import State, load, named_parameters, training_state
from shardplan.executor.checkpoint_files import Progress
from shardplan.executor.loss import loss_context, loss_function
from shardplan.executor.mesh import data_rank
from shardplan.executor.optimizer import build_optimizer, clip_gradients, settle_gradients
from shardplan.executor.parallelize import parallelize
from shardplan.executor.pipeline import Schedule, build_schedule, chunk_layers, chunks_of_rank, parts
from shardplan.executor.recipe import Batches, Recipe, plain_recipe
from shardplan.executor.transformer import Part, Transformer, build_transformer
from shardplan.executor.zero import reshard, set_micro_step
from shardplan.planner.plan import Plan, model_digest


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
            from shardplan.executor import weights  # needs safetensors

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

    def state(self) -> State:
        """Parameters and optimizer states by name, the live tensors."""
        return training_state(named_parameters(self.chunks, tied=self.plan.model.tied_embeddings), self.optimizer)

    def progress(self, step: int) -> Progress:
        """What a checkpoint after `step` holds besides tensors."""
        return Progress(
            step=step,
            seed=self.recipe.seed,
            model=model_digest(self.plan.model),
            layout=self.plan.layout.words(),
            data=self.recipe.data.state(step),
        )

    def resume(self, checkpoint: Path) -> int:
        """Take over a checkpoint of any layout, of the same data; returns the steps it has done. All ranks call it together."""
        saved = load(checkpoint, self.state())
        self.recipe.data.restore(saved.data)
        return saved.step

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

    def export(self) -> None:
        """Write the trained values where the recipe wants them, under Hugging Face's names; all ranks call it together."""
        if self.recipe.export is not None:
            from shardplan.executor import weights  # needs safetensors

            weights.save(
                self.chunks,
                self.plan,
                self.mesh,
                self.recipe.export,
                dtype=self.recipe.export_dtype,
                origin=self.recipe.initial,
            )

    def global_loss(self, loss: Tensor) -> float:
        """Mean loss over the global batch, the same on every rank, from what `forward_backward` returned on each."""
        counts_once = self.holds_last and self.mesh.get_local_rank("tp") == 0
        total = loss.clone() if counts_once else torch.zeros_like(loss)
        dist.all_reduce(total)
        return total.item() / self.plan.layout.dp
