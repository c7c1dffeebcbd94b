"""What many thinkable stages of some layouts would take and need: seconds of a micro-batch and bytes on the device, from the formulas of
`estimate` on stages that no cut of the layers has chosen yet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import stage_memory
from shardplan.costmodel.keys import gathered
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.pace import stage_seconds
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import micro_batches
from shardplan.costmodel.stage_cost import BlockRows, StageRows, block_rows, mean_stage_rows, stage_parameters
from shardplan.costmodel.step_memory import (
    checkpoint_bytes,
    held_bytes,
    micro_batches_in_flight,
    stage_activations,
)
from shardplan.costmodel.sustained import prepared

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def states_alone_bytes(setting: Setting, layouts: LayoutTable) -> FloatArray:
    """Bytes on the device, (N,), of states and buffers on a stage that holds 1/pp of everything: below that no cut of the layers, no
    recompute and no micro-batch gets."""
    ready = prepared(setting)
    model, job, runtime, stages = ready.model, ready.job, ready.runtime, mean_stage_rows(ready.model, layouts)
    parameters = stage_parameters(model, job, layouts, runtime, stages, of_one_kind=True)
    held = held_bytes(job, ready.cluster.gpu, layouts, runtime, parameters, micro_batches(ready, layouts))
    states = held.parameters + held.gradients + held.optimizer + held.buffers
    return (1.0 + runtime.allocator_slack_fraction) * states[:, 0] + ready.cluster.gpu.context_bytes


@dataclass(frozen=True, kw_only=True)
class Trials:
    """S thinkable stages, each an array over them."""

    stage: IntArray
    """Position in the pipeline."""
    layers: IntArray
    """Layers by kind, (S, kinds)."""
    recomputed: IntArray
    """Of them under full recompute; (N, S) where layouts differ."""
    embedding: NDArray[np.bool_]
    head: NDArray[np.bool_]

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> Trials:
        """Those at `which`, a mask or indices."""
        return Trials(
            stage=self.stage[which],
            layers=self.layers[which],
            recomputed=self.recomputed[which],
            embedding=self.embedding[which],
            head=self.head[which],
        )


class StageTrials:
    """N layouts on a homogeneous cluster, of which stages can be tried."""

    def __init__(self, setting: Setting, layouts: LayoutTable, blocks: BlockRows) -> None:
        """`setting` as `estimate.prepared` returns it; `blocks` are those of the `layouts`."""
        self.setting, self.layouts, self._blocks = setting, layouts, blocks
        self._batches = micro_batches(setting, layouts)

    @staticmethod
    def of(setting: Setting, layouts: LayoutTable) -> StageTrials:
        """The trials of any layouts, in `setting` as it is."""
        ready = prepared(setting)
        return StageTrials(ready, layouts, block_rows(ready.model, ready.job, ready.cluster, layouts, ready.runtime))

    def take(self, rows: IntArray) -> StageTrials:
        """Those of the layouts at `rows`."""
        return StageTrials(self.setting, self.layouts.take(rows), self._blocks.take(rows))

    def seconds(self, trials: Trials) -> FloatArray:
        """Seconds of one micro-batch, (N, S)."""
        return self._seconds(self._rows(trials))

    def idle_seconds(self, trials: Trials) -> FloatArray:
        """Of `seconds`, those in which the GPU waits for launches: nothing on a CPU, where launches are work."""
        if self.setting.cluster.gpu.device == "cpu":
            return np.zeros((len(self.layouts), len(trials.stage)))
        return self._seconds(self._rows(trials), idle=True)

    def mean_seconds(self, recomputed_share: FloatArray | None = None) -> FloatArray:
        """The same of a stage that holds 1/pp of everything, (N,); of its layers the layout's own are recomputed, or this share, (N,)."""
        stages = mean_stage_rows(self.setting.model, self.layouts)
        if recomputed_share is not None:
            stages = replace(stages, recomputed=recomputed_share[:, None] * stages.layers.sum(axis=2))
        return self._seconds(stages)[:, 0]

    def mean_saving_bytes(self) -> FloatArray:
        """Bytes on the device, (N,), that recomputing every layer saves at most on such a stage, what it rebuilds not counted and its
        inputs wherever the layout keeps them."""
        ready, stages = self.setting, mean_stage_rows(self.setting.model, self.layouts)
        flying = micro_batches_in_flight(self.layouts, stages, self._batches)

        def activations(share: float) -> FloatArray:
            rows = replace(stages, recomputed=share * stages.layers.sum(axis=2))
            return stage_activations(ready.model, self._blocks, rows, self.layouts, flying, frees_loss=False)[:, 0]

        every = replace(stages, recomputed=stages.layers.sum(axis=2))
        inputs = (flying * checkpoint_bytes(ready.model, self._blocks, every))[:, 0]
        saved = 2.0 * (activations(0.5) - activations(1.0)) + np.where(
            self.layouts.offload_activations > 0, inputs, 0.0
        )
        return saved * (1.0 + ready.runtime.allocator_slack_fraction)

    def parameters(self, trials: Trials) -> FloatArray:
        """Parameters a rank holds, (N, S)."""
        ready = self.setting
        return stage_parameters(ready.model, ready.job, self.layouts, ready.runtime, self._rows(trials)).stage

    def needed_bytes(self, trials: Trials) -> FloatArray:
        """Bytes on the device, (N, S)."""
        ready, stages = self.setting, self._rows(trials)
        parameters = stage_parameters(ready.model, ready.job, self.layouts, ready.runtime, stages)
        each = np.arange(len(self.layouts))
        memory = stage_memory(
            ready, self.layouts, self.layouts, self._blocks, stages, parameters, states_of=each, work_of=each
        )
        return memory.parts()["device"]

    def _seconds(self, stages: StageRows, *, idle: bool = False) -> FloatArray:
        ready = self.setting
        its = (self.layouts, ready.runtime, self._blocks, stages, self._batches)
        return stage_seconds(ready.job, ready.cluster, *its, idle=idle)

    def _rows(self, trials: Trials) -> StageRows:
        rows, recomputed = np.zeros(len(self.layouts), dtype=np.int64), trials.recomputed.astype(np.float64)
        return StageRows(
            stage=gathered(trials.stage[None], rows),
            layers=gathered(trials.layers[None].astype(np.float64), rows),
            recomputed=gathered(recomputed[None], rows) if recomputed.ndim == 1 else recomputed,
            recomputed_total=np.zeros(len(self.layouts)),
            embedding=gathered(trials.embedding[None].astype(np.float64), rows),
            head=gathered(trials.head[None].astype(np.float64), rows),
        )
