"""Pipelines whose stages all take as long: what cuts into whole layers are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.pipeline_weights import pipeline_weights
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.stage_trials import StageTrials
from shardplan.planner.stage_options import Part

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Even:
    """N pipelines whose stages all take as long, each array (N,)."""

    peak: FloatArray
    """Micro-batches of the slowest stage in a step's pipeline, beyond those of `fill`."""
    fill: FloatArray
    """Micro-batches of all stages together."""
    least_s: FloatArray
    """Seconds of a micro-batch on a stage that holds 1/pp of everything, on the fastest kind of node."""
    mean_s: FloatArray
    """The same of every stage if each holds as much as makes all stages equally long."""

    @staticmethod
    def of(parts: Sequence[Part]) -> Even:
        """Of layouts that agree in the stages on each part."""
        peak, fill = pipeline_weights(parts[0].setting, parts[0].trials.layouts)
        least_s, mean_s = mean_stage_seconds(parts)
        return Even(peak=peak, fill=fill, least_s=least_s, mean_s=mean_s)

    @staticmethod
    def alone(setting: Setting, trials: StageTrials) -> Even:
        """Of any layouts on one kind of node."""
        peak, fill = pipeline_weights(setting, trials.layouts)
        seconds = trials.mean_seconds()
        return Even(peak=peak, fill=fill, least_s=seconds, mean_s=seconds)

    def take(self, rows: IntArray) -> Even:
        """Those of the layouts at `rows`."""
        return Even(peak=self.peak[rows], fill=self.fill[rows], least_s=self.least_s[rows], mean_s=self.mean_s[rows])


def mean_stage_seconds(parts: Sequence[Part]) -> tuple[FloatArray, FloatArray]:
    """Seconds of a micro-batch, each (N,), on a stage that holds 1/pp of everything: on the fastest kind of node, and of every stage if
    each holds as much as makes all stages of the `parts` equally long."""
    each = np.stack([part.trials.mean_seconds() for part in parts])
    stages = np.asarray([part.stages for part in parts], dtype=np.float64)
    return each.min(axis=0), stages.sum() / (stages[:, None] / each).sum(axis=0)
