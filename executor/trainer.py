"""One rank's share of training a plan: its model chunks, the optimizer over them, what it does in a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardplan.executor import compiling
from shardplan.executor.attention_kernel import (
    attention_backends,
    attention_context,
    capability_of,
    check_documents,
    runs_own_attention,
    use_own_attention,
)
from shardplan.executor.checkpoint import State, load, named_parameters, training_state
from shardplan.executor.checkpoint_files import Progress
from shardplan.executor.context_parallel import choose_blocks, join_context, spread_context
from shardplan.executor.expert_parallel import build_expert_groups, set_gradient_scale, settle_experts
from shardplan.executor.loss import loss_context, loss_function
from shardplan.executor.loss_scale import LossScale, overflows, scaled
from shardplan.executor.measure import host_peak_bytes
from shardplan.executor.memory_parts import gradient_bytes, local_bytes
from shardplan.executor.mesh import data_coordinate
from shardplan.executor.optimizer import build_optimizer, clip_gradients, settle_gradients
from shardplan.executor.parallelize import parallelize
from shardplan.executor.phases import StepClock, in_phase, watch_stages
from shardplan.executor.pipeline import (
    Schedule,
    build_schedule,
    chunk_layers,
    chunks_of_rank,
    forward_only,
    layers_before,
    parts,
)
from shardplan.executor.recipe import Batches, Recipe, plain_recipe
from shardplan.executor.tied import TiedEmbedding
from shardplan.executor.transformer import Part, Transformer, build_transformer
from shardplan.executor.zero import reshard, set_micro_step
from shardplan.planner.plan import Plan, model_digest


class Trainer:
    """One rank's share of training `plan`: the model chunks it holds, the optimizer over them, the loop body."""

    def __init__(
        self,
        plan: Plan,
        mesh: DeviceMesh,
        device: torch.device,
        recipe: Recipe | None = None,
        *,
        compile_backend: str = compiling.BACKEND,
    ) -> None:
        layout, job = plan.layout, plan.job
        self.plan, self.mesh, self.device = plan, mesh, device
        self.clock = StepClock(device)
        self.before_bytes = host_peak_bytes()
        self.gradients_bytes = 0.0
        self.recipe = recipe or plain_recipe(plan)
        self.sequences = job.global_batch // layout.dp
        self.micro_batches = self.sequences // layout.micro_batch
        self.experts = build_expert_groups(plan.model, layout, device.type)
        compiler = compile_backend if compiling.is_compiled(plan.runtime) else None
        split, stage = chunk_layers(layout, plan.model.layer_count, plan.prediction), mesh.get_local_rank("pp")
        held = zip(chunks_of_rank(layout, stage), layers_before(layout, split, stage), strict=True)
        self.chunks: list[Transformer] = [
            parallelize(
                self._build(parts(split)[number]),
                layout,
                job,
                mesh,
                self.experts,
                layers_before=before,
                compiler=compiler,
            )
            for number, before in held
        ]
        head_dim = max(kind.head_dim for kind, _ in plan.model.layers)
        self.attention = attention_backends(layout.attention, device_type=device.type, precision=job.precision)
        self.own_attention = runs_own_attention(
            layout.attention,
            precision=job.precision,
            head_dim=head_dim,
            capability=capability_of(device),
            apart=not self.recipe.attend_across_documents,
        )
        if not self.recipe.attend_across_documents:
            check_documents(layout.attention, device_type=device.type, precision=job.precision, own=self.own_attention)
        if self.own_attention:
            for chunk in self.chunks:
                use_own_attention(chunk)
        self.tied = TiedEmbedding(self.chunks, mesh)
        self.context = join_context(layout, job.seq)
        blocks = choose_blocks(device, word=layout.attention, precision=job.precision, head_dim=head_dim)
        for chunk in self.chunks:
            spread_context(chunk, self.context, blocks, compiled=compiler is not None)
        self.holds_first = self.chunks[0].embedding is not None
        self.holds_last = self.chunks[-1].head is not None
        self.loss_scale = LossScale(self.recipe.loss_scale) if job.precision == "fp16" else None
        self.loss = scaled(loss_function(mesh["tp"]), self.loss_scale)
        self.schedule: Schedule | None = None
        if layout.pp > 1:
            self.schedule = build_schedule(
                self.chunks,
                layout,
                mesh,
                device=device,
                micro_batches=self.micro_batches,
                loss=in_phase(self.loss, self.clock, "forward"),
            )
            watch_stages(self.schedule, self.clock)
        self.optimizer = build_optimizer(
            self.parameters(), rate=self.recipe.learning_rate(1), words=self.recipe.optimizer
        )
        self.gathered_bytes = 0.0
        self.watches = [chunk.register_forward_hook(self._see_gathered) for chunk in self.chunks]
        self.data_s = 0.0

    def _see_gathered(self, *_: object) -> None:
        """Behind every forward of the first step: chunks of a stage gather one after the other."""
        self.gathered_bytes = max(self.gathered_bytes, self.gathered())

    def gathered(self) -> float:
        """Bytes that whole copies of parameters take on this rank now, beside the shards."""
        shards = {id(parameter) for parameter in self.shards()}
        return float(sum(local_bytes(whole) for whole in self.parameters() if id(whole) not in shards))

    def _build(self, part: Part) -> Transformer:
        job, recipe = self.plan.job, self.recipe
        chunk = build_transformer(self.plan.model, seq=job.seq, part=part, seed=recipe.seed, device=self.device)
        if recipe.initial is not None:
            from shardplan.executor import weights  # needs safetensors

            weights.load(chunk, recipe.initial)
        else:
            constants = recipe.constants
            chunk.compute_with(rotary_base=constants.rotary_base, norm_epsilon=constants.norm_epsilon)
        return chunk

    @property
    def scale(self) -> float:
        """What the loss, and so gradients, are multiplied by."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    @property
    def groups(self) -> list[tuple[str, dist.ProcessGroup]]:
        """(axis, group) of this rank, those that are none of the mesh of states; ranks that hold the same experts are of axis dp, those
        whose routers see one micro-batch together of axis cp, or tp without it."""
        found = [] if self.context.group is None else [("cp", self.context.group)]
        experts, routers = self.experts.mesh, self.experts.tokens
        if routers is not None:
            found.append(("tp" if self.context.group is None else "cp", routers))
        if experts is not None:
            axes = (("dp", "expert_replicate"), ("dp", "expert_shard"), ("ep", "ep"))
            found += [(axis, experts.get_group(name)) for axis, name in axes if experts[name].size() > 1]
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter this rank holds a piece of: the shards, but for layers whose whole copies are gathered just now."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def shards(self) -> list[nn.Parameter]:
        """What the optimizer updates, also while whole copies stand in for it."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def batch(self, step: int, data: Batches | None = None) -> tuple[Tensor, ...]:
        """Inputs, targets and, where documents are kept apart, positions of this rank for `step`, each (sequences, seq / cp).

        `data_s` tells the seconds it took."""
        began = time.perf_counter()
        source, first = data or self.recipe.data, data_coordinate(self.plan.layout, dist.get_rank()) * self.sequences
        read = source.batch if self.recipe.attend_across_documents else source.packed
        arrays = read(step, first=first, count=self.sequences)
        found = tuple(self.context.own(torch.from_numpy(array.copy())).to(self.device) for array in arrays)
        self.data_s = time.perf_counter() - began
        return found

    def forward_backward(self, step: int) -> Tensor:
        """Gradients of the mean loss over the global batch; returns this rank's mean loss (0 where the head is not)."""
        batch = self.batch(step)
        # a pipeline divides gradients by the number of micro-batches at its end, `_micro_steps` the loss
        set_gradient_scale(self.chunks, self.scale if self.schedule is not None else self.scale / self.micro_batches)
        with ExitStack() as contexts:
            contexts.enter_context(loss_context(self.mesh["tp"]))
            contexts.enter_context(attention_context(self.attention))
            loss = self._micro_steps(*batch) if self.schedule is None else self._pipeline(*batch)
        with self.clock("backward"):
            settle_gradients(self.parameters())
            settle_experts(self.chunks, self.plan.layout)
            self.tied.sum_gradients()
        return loss / self.scale

    def _micro_steps(self, *batch: Tensor) -> Tensor:
        model, zero = self.chunks[0], self.plan.layout.zero
        total = torch.zeros((), device=self.device)
        for i, (x, y, *positions) in enumerate(self._pieces(batch)):
            set_micro_step(model, zero=zero, last=i == self.micro_batches - 1)
            with self.clock("forward"):
                loss = self.loss(model(x, *positions), y) / self.micro_batches
            with self.clock("backward"):
                loss.backward()
            total += loss.detach()
        return total

    def _pieces(self, batch: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(one.chunk(self.micro_batches) for one in batch), strict=True)

    def _pipeline(self, inputs: Tensor, targets: Tensor, *positions: Tensor, train: bool = True) -> Tensor:
        assert self.schedule is not None
        run = self.schedule.step if train else self.schedule.eval
        losses: list[Tensor] = []
        arguments = (inputs,) if self.holds_first else ()
        every_stage: dict[str, Any] = {"positions": positions[0]} if positions else {}
        with nullcontext() if train else forward_only(self.schedule):
            if self.holds_last:
                run(*arguments, target=targets, losses=losses, return_outputs=False, **every_stage)
                return torch.stack(losses).mean().detach()
            run(*arguments, return_outputs=False, **every_stage)
        return torch.zeros((), device=self.device)

    def optimizer_states(self) -> list[object]:
        """Whatever the optimizer holds."""
        return [value for states in self.optimizer.state.values() for value in states.values()]

    def update(self, step: int) -> Tensor:
        """Clip, take an optimizer step unless a gradient overflowed, drop the gradients; returns their norm before clipping."""
        most = self.recipe.optimizer.clip
        if not self.gradients_bytes:
            self.gradients_bytes = gradient_bytes(self.parameters())
        while self.watches:
            self.watches.pop().remove()
        with self.clock("optimizer"):
            norm = clip_gradients(self.parameters(), self.mesh, most, loss_scale=self.scale, copies=self.tied.copies)
            overflow = self.loss_scale is not None and overflows(norm)
            if not overflow:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.recipe.learning_rate(step)
                self.optimizer.step()
            self.optimizer.zero_grad()
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=overflow)
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
            loss_scale=self.loss_scale.state() if self.loss_scale is not None else None,
            rotary_base=self.recipe.constants.rotary_base,
            norm_epsilon=self.recipe.constants.norm_epsilon,
        )

    def resume(self, checkpoint: Path) -> int:
        """Take over a checkpoint of any layout, of the same data; returns the steps it has done. All ranks call it together."""
        saved = load(checkpoint, self.state())
        self.tied.follow(self.optimizer)
        self.recipe.data.restore(saved.data)
        if self.loss_scale is not None and saved.loss_scale is not None:
            self.loss_scale.restore(saved.loss_scale)
        return saved.step

    @torch.no_grad()
    def validate(self, data: Batches, batches: int, on_batch: Callable[[], None] = lambda: None) -> float:
        """Mean loss over global batches 1 to `batches` of `data`; nothing is trained. The same on every rank."""
        total = torch.zeros((), device=self.device)
        for step in range(1, batches + 1):
            on_batch()
            batch = self.batch(step, data)
            with loss_context(self.mesh["tp"]), attention_context(self.attention):
                total += self._evaluate(batch) / batches
        for chunk in self.chunks:
            reshard(chunk)
        return self.global_loss(total / self.scale)

    def _evaluate(self, batch: Sequence[Tensor]) -> Tensor:
        if self.schedule is not None:
            return self._pipeline(*batch, train=False)
        return torch.stack(
            [self.loss(self.chunks[0](x, *positions), y) for x, y, *positions in self._pieces(batch)]
        ).mean()

    def export(self, run: Path, on_tensor: Callable[[], None] = lambda: None) -> None:
        """Write the trained values where the recipe wants them, under Hugging Face's names; all ranks of the run of folder `run` call it
        together."""
        if self.recipe.export is not None:
            from shardplan.executor import weights  # needs safetensors

            weights.save(
                self.chunks,
                self.plan,
                self.mesh,
                self.recipe.export,
                run=run,
                dtype=self.recipe.export_dtype,
                origin=self.recipe.initial,
                on_tensor=on_tensor,
                constants=self.recipe.constants,
            )

    def global_loss(self, loss: Tensor) -> float:
        """Mean loss over the global batch, the same on every rank, from what `forward_backward` returned on each."""
        counts_once = self.holds_last and self.mesh.get_local_rank("tp") == 0
        total = loss.clone() if counts_once else torch.zeros_like(loss)
        dist.all_reduce(total)
        return total.item() / (self.plan.layout.dp * self.plan.layout.cp)

    def global_max_loss(self, loss: Tensor) -> float:
        """Largest of the losses that `forward_backward` returned on the ranks along dp and cp, the same on every rank."""
        counts = self.holds_last and self.mesh.get_local_rank("tp") == 0
        most = loss.clone() if counts else torch.full_like(loss, -torch.inf)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.item()
