"""Memory of N layouts: states, activations in flight, logits and buffers put together per stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import Job
from shardplan.costmodel.keys import ROWS_IN_CACHE, LazyColumns
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import (
    activation_bytes,
    dequantised_bytes,
    frozen_bytes,
    frozen_element_bytes,
    stage_states,
)
from shardplan.costmodel.model import Model
from shardplan.costmodel.pipeline import in_flight
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import BlockRows, StageParameters, StageRows
from shardplan.hw_profiles.machine import Gpu

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def micro_batches_in_flight(layouts: LayoutTable, stages: StageRows, micro_batches: FloatArray) -> FloatArray:
    """Micro-batches whose activations each stage keeps at its peak, (N, S)."""
    flying = in_flight(
        layouts.schedule[:, None],
        layouts.pp[:, None],
        stages.stage,
        micro_batches[:, None],
        layouts.virtual_stages[:, None],
    )
    return np.where(layouts.pp[:, None] > 1, flying, 1.0)


def checkpoint_bytes(model: Model, blocks: BlockRows, stages: StageRows) -> FloatArray:
    """Bytes that one micro-batch keeps as inputs of recomputed layers, (N, S): what `offload_activations` moves."""
    total = stages.layers.sum(axis=2)
    kept = np.zeros_like(total)
    for index in range(len(model.runs)):
        share = np.divide(stages.layers[:, :, index], total, out=np.zeros_like(total), where=total > 0)
        kept += stages.recomputed * share * blocks.layers[index]["input_bytes"][:, None]
    return kept


CHECKPOINTS_ON_GPU = 2.0
"""Inputs of recomputed layers on the GPU at once when they are offloaded: of the layer that runs and of the one on its way."""


def parked_activations(
    model: Model, layouts: LayoutTable, blocks: BlockRows, stages: StageRows, flying: FloatArray
) -> FloatArray | None:
    """Bytes of activations in host memory or on flash, (N, S); None where no layout offloads them."""
    away = layouts.offload_activations > 0
    if not away.any():
        return None
    recomputed = stages.recomputed
    still = np.divide(CHECKPOINTS_ON_GPU, recomputed, out=np.ones_like(recomputed), where=recomputed > 0)
    kept = flying * checkpoint_bytes(model, blocks, stages)
    return np.where(away[:, None], np.maximum(1.0 - still / flying, 0.0) * kept, 0.0)


def stage_activations(
    model: Model,
    blocks: BlockRows,
    stages: StageRows,
    layouts: LayoutTable,
    flying: FloatArray,
    *,
    frees_loss: bool,
    of_one_kind: bool = False,
) -> FloatArray:
    """Bytes of activations, logits and loss, (N, S), at the peak of each stage: the backward of the oldest of the `flying`
    micro-batches. With `frees_loss` logits are gone when a layer is rebuilt; `of_one_kind`, that kind of layer alone is rebuilt which
    takes least."""
    total = stages.layers.sum(axis=2)
    activations, transient = np.zeros_like(total), np.zeros_like(total)
    passing: list[FloatArray] = []
    for index in range(len(model.runs)):
        block = blocks.layers[index]
        layers = stages.layers[:, :, index]
        share = np.divide(layers, total, out=np.zeros_like(layers), where=total > 0)
        stored, rebuilt = activation_bytes(
            recompute=layouts.recompute,
            full_layers=stages.recomputed * share,
            layers=layers,
            flying=flying,
            kept=block["kept_bytes"],
            selective=block["selective_bytes"],
            entering=block["input_bytes"],
        )
        activations += stored
        beside = block.get("context_transient_bytes", np.zeros(len(layouts)))[:, None]
        if of_one_kind:
            passing.append(rebuilt + beside)
            continue
        if frees_loss:
            transient = np.maximum(transient, rebuilt)
        else:
            activations += rebuilt
        if "context_transient_bytes" in block:
            activations += np.where(layers > 0, beside, 0.0)
    if of_one_kind:
        least = np.min(passing, axis=0)
        transient, activations = (least, activations) if frees_loss else (transient, activations + least)
    activations += flying * stages.embedding * blocks.embedding["kept_bytes"][:, None]
    activations += stages.head * flying * blocks.head["kept_bytes"][:, None]
    return activations + np.maximum(transient, stages.head * blocks.logits_bytes[:, None])


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes of a stage besides activations, on the K keys of the states, each (K, S)."""

    parameters: FloatArray
    gradients: FloatArray
    """All of them; see `freed`."""
    waiting: FloatArray
    """Of the gradients, whole ones of layers that await their reduction: live beside the activations of the layers before."""
    optimizer: FloatArray
    """Between steps; see `stepping`."""
    stepping: FloatArray | None
    """What the optimizer step, the last reduction or loading the model makes, when there are no activations: adds to the peak what it
    takes beyond them; negative where more is dropped by then; None where nothing."""
    reducing: FloatArray | None
    """Blocks that only reductions use; None where they share them."""
    buffers: FloatArray
    host: FloatArray
    """Bytes in host memory per GPU."""
    nvme: FloatArray | None
    """Bytes on flash per GPU; None where nothing is."""
    freed: NDArray[np.bool_] | None
    """Keys, (K,), whose gradients appear only while activations go: not live at the peak, yet in blocks of their own; None where
    there are none."""


def held_bytes(
    job: Job,
    gpu: Gpu,
    layouts: LayoutTable,
    runtime: Runtime,
    parameters: StageParameters,
    micro_batches: FloatArray,
) -> HeldBytes:
    """States and buffers of each key."""
    accumulates = micro_batches > 1
    trained = parameters if parameters.adapters is None else _adapters_alone(parameters, parameters.adapters)
    states = stage_states(
        runtime,
        job,
        layouts,
        accumulates=accumulates,
        stage_parameters=trained.stage,
        layer_parameters=trained.layer,
        root_parameters=trained.root,
        expert_parameters=trained.experts,
    )
    if parameters.adapters is not None:
        on_gpu, parked = frozen_bytes(
            runtime,
            job,
            layouts,
            stage_parameters=parameters.stage,
            layer_parameters=parameters.layer,
            root_parameters=parameters.root,
        )
        states["parameters"] = states["parameters"] + on_gpu + dequantised_bytes(job, parameters.matrix)
        states["host"] = states["host"] + parked
        if runtime.tuning.loads_whole:
            states["stepping"] = np.maximum(
                states["stepping"], loading_bytes(runtime, job, layouts, parameters, states)
            )
    on_gpu = gpu.device == "cuda"  # NCCL channels and GPU workspaces; gloo keeps next to nothing
    buffers = np.where((layouts.gpus > 1) & on_gpu, runtime.working_set.buffer_bytes, 0.0)[:, None]
    buffers = buffers + (runtime.working_set.workspace_bytes if on_gpu else 0.0)
    alone = "reducing" in states
    freed = ~accumulates & ((layouts.zero > 0) | (layouts.dp * layouts.cp == 1) | alone)
    return HeldBytes(
        parameters=states["parameters"],
        gradients=states["gradients"],
        waiting=states["waiting"],
        optimizer=states["optimizer"],
        stepping=states["stepping"] if states["stepping"].any() else None,
        reducing=states["reducing"] if alone else None,
        buffers=buffers + runtime.working_set.matrix_gradient_bytes * parameters.matrix,
        host=states["host"],
        nvme=states["nvme"] if states["nvme"].any() else None,
        freed=freed if runtime.working_set.gradients_freed and freed.any() else None,
    )


def loading_bytes(
    runtime: Runtime, job: Job, layouts: LayoutTable, parameters: StageParameters, states: Mapping[str, FloatArray]
) -> FloatArray:
    """Bytes beyond the states, (N, S), while a rank that made the whole model on its GPU shards it: the model and its shard."""
    of_layers, of_root = frozen_element_bytes(runtime, job)
    whole = of_layers * (parameters.stage - parameters.root) + of_root * parameters.root
    shards = layouts.zero_ranks.astype(np.float64)[:, None]
    made = np.where((layouts.zero == 3)[:, None] & (shards > 1), whole + whole / shards, 0.0)
    return np.maximum(made - states["parameters"] - states["gradients"] - states["optimizer"], 0.0)


def _adapters_alone(parameters: StageParameters, adapters: FloatArray) -> StageParameters:
    """What has gradients and optimizer states where everything else is frozen; no layer of it is worth gathering ahead."""
    none = np.zeros_like(adapters)
    return replace(parameters, stage=adapters, layer=none, root=none)


MEMORY_PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "buffers",
    "host",
    "allocated",
    "slack",
    "device",
)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of N layouts on their keys: row n has `held` bytes at `states_of[n]` and `activations` at `work_of[n]`."""

    held: HeldBytes
    activations: FloatArray
    """On the GPU, (W, S)."""
    parked: FloatArray | None
    """Activations off the GPU, (W, S); None where none are."""
    parked_on_flash: NDArray[np.bool_]
    """Whether they are on flash and not in host memory, (W,)."""
    states_of: IntArray
    work_of: IntArray
    slack_fraction: float
    """Reserved beyond allocated, relative to allocated."""
    context_bytes: float
    """On the device beside the framework's allocator."""

    def parts(self) -> Mapping[str, FloatArray]:
        """Bytes by part, (N, S): the first five of MEMORY_PARTS add up to `allocated`, with `slack` and the context to `device`."""
        return LazyColumns({part: partial(self._part, part) for part in MEMORY_PARTS})

    def _part(self, part: str) -> FloatArray:
        held, of = self.held, self.states_of
        if part == "activations":
            return self.activations[self.work_of]
        if part in ("parameters", "gradients", "optimizer", "buffers", "host"):
            found: FloatArray = getattr(held, part)[of]
            return found + self._besides(part)
        if part == "nvme":
            return (np.zeros_like(held.host) if held.nvme is None else held.nvme)[of] + self._besides(part)
        allocated = sum((self._part(name) for name in MEMORY_PARTS[1:5]), self._part(MEMORY_PARTS[0]))
        if part == "allocated":
            return allocated
        slack = (1.0 + self.slack_fraction) * (allocated + self._idle()) - allocated
        return slack if part == "slack" else allocated + slack + self.context_bytes

    def _besides(self, part: str) -> FloatArray | float:
        """What the activations add to a part of the states or take from it, (N, S)."""
        if part == "gradients" and self.held.freed is not None:
            return self._freed(np.minimum(self._late(), 0.0))
        if part == "optimizer" and self.held.stepping is not None:
            beyond = np.maximum(self.held.stepping[self.states_of] - self.activations[self.work_of], 0.0)
            if self.held.freed is None:
                return beyond
            freed = self.held.freed[self.states_of][:, None]
            return np.where(freed, np.maximum(self._late(), 0.0), beyond)
        if part in ("host", "nvme") and self.parked is not None:
            there = self.parked_on_flash == (part == "nvme")
            return np.where(there[:, None], self.parked, 0.0)[self.work_of]
        return 0.0

    def _late(self) -> FloatArray:
        """Beyond activations and gradients, (N, S): what is there when the activations are gone, less than nothing where those are more;
        the gradients that are reduced by then at the least."""
        held, of = self.held, self.states_of
        live = self.activations[self.work_of]
        stepping = 0.0 if held.stepping is None else held.stepping[of]
        return np.maximum(stepping - live, held.waiting[of] - held.gradients[of])

    def _freed(self, amount: FloatArray) -> FloatArray:
        """`amount` in the rows whose gradients are freed, else 0."""
        assert self.held.freed is not None
        return np.where(self.held.freed[self.states_of][:, None], amount, 0.0)

    def _idle(self) -> FloatArray | float:
        """Bytes in blocks that are not in use at the peak, (N, S)."""
        held, of = self.held, self.states_of
        idle: FloatArray | float = 0.0
        if held.freed is not None:
            stepping = 0.0 if held.stepping is None else np.maximum(held.stepping[of], 0.0)
            live = self.activations[self.work_of]
            every = held.gradients[of] + np.maximum(live, stepping)
            idle = idle + self._freed(every - (live + held.gradients[of] + self._late()))
        return idle if held.reducing is None else idle + held.reducing[of]

    def peaks(self) -> dict[str, FloatArray]:
        """`allocated`, `reserved` and `device` bytes of the fullest stage, (N,).

        What gradients free for activations stays in blocks of its own, so a stage reserves (1 + slack) (states + buffers + the
        larger of activations and what the optimizer step makes + what only reductions use), whether they are freed or not.
        """
        held, rows = self.held, len(self.states_of)
        every = held.parameters + held.gradients + held.optimizer + held.buffers
        lasting = np.ascontiguousarray((every if held.reducing is None else every + held.reducing).T)
        passing = np.ascontiguousarray(self.activations.T)
        stepping = None if held.stepping is None else np.ascontiguousarray(held.stepping.T)
        fullest = np.empty(rows)
        apart = held.freed is not None or held.reducing is not None
        allocated = np.empty(rows) if apart else fullest
        for start in range(0, rows, ROWS_IN_CACHE):
            some = slice(start, start + ROWS_IN_CACHE)
            of, at = self.states_of[some], self.work_of[some]
            most, stage = np.zeros(len(of)), np.zeros(len(of), dtype=np.int64)
            for index in range(len(lasting)):
                live = passing[index].take(at)
                if stepping is not None:
                    np.maximum(live, stepping[index].take(of), out=live)
                live += lasting[index].take(of)
                if apart:
                    stage[live > most] = index
                np.maximum(most, live, out=most)
            fullest[some] = most
            if apart:
                allocated[some] = self._allocated(of, at, stage)
        reserved = (1.0 + self.slack_fraction) * fullest
        return {"allocated": allocated, "reserved": reserved, "device": reserved + self.context_bytes}

    def _allocated(self, of: IntArray, at: IntArray, stage: IntArray) -> FloatArray:
        """Bytes in use at the peak of `stage` of each row."""
        held = self.held
        gradients, live = held.gradients[of, stage], self.activations[at, stage]
        states = held.parameters[of, stage] + held.optimizer[of, stage] + held.buffers[of, stage]
        late = 0.0 if held.stepping is None else held.stepping[of, stage]
        kept = gradients + np.maximum(live, late)
        if held.freed is not None:
            waiting = held.waiting[of, stage]
            kept = np.where(held.freed.take(of), np.maximum(live + waiting, gradients + late), kept)
        return states + kept

    def off_gpu(self, part: Literal["host", "nvme"]) -> FloatArray | None:
        """Bytes in host memory, or on flash, for each GPU of a stage, (N, S); None where there are none."""
        held = self.held.host if part == "host" else self.held.nvme
        parked = self.parked is not None and (part == "host" or bool(self.parked_on_flash.any()))
        return self._part(part) if parked or (held is not None and held.any()) else None
