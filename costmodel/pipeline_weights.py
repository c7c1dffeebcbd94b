"""What the slowest stage and all stages count for in the seconds of a pipeline."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import FULL
from shardplan.costmodel.pace import backward_split, fill_weight
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import micro_batches
from shardplan.costmodel.sustained import prepared

FloatArray = NDArray[np.float64]


def pipeline_weights(setting: Setting, layouts: LayoutTable) -> tuple[FloatArray, FloatArray]:
    """(micro-batches of the slowest stage, and of all stages, whose sum is a step's pipeline), each (N,)."""
    return sustained_weights(prepared(setting), layouts)


def sustained_weights(ready: Setting, layouts: LayoutTable) -> tuple[FloatArray, FloatArray]:
    """The same in a setting at sustained rates (`sustained.prepared`)."""
    batches, full = micro_batches(ready, layouts), (layouts.recompute == FULL).astype(np.float64)
    fill = fill_weight(layouts, batches, backward_split(ready, layouts, full, batches))
    return np.maximum(batches - fill, 0.0), fill
