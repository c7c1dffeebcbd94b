"""What the GPUs of one node keep in its host memory and on its flash together: those of all stages that lie on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.stage_cost import StageRows
from shardplan.hw_profiles.machine import Cluster

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def node_bytes(
    each: FloatArray | None, stages: StageRows | None, stages_of: IntArray, layouts: LayoutTable, cluster: Cluster
) -> FloatArray:
    """Bytes of the fullest node, (N,), where a GPU of each of S stages keeps `each`, (N, S) or None for nothing.

    `stages`, of which row n has row `stages_of[n]`, are those that can be the fullest (`pipeline.stage_table`) or all of them: stages
    between the first and the last are taken to keep what the second does, or the longest where that has more layers. Without them, or
    where a node holds one stage, every GPU of it keeps as much as one of the fullest.
    """
    gpus = min(cluster.node.gpus, cluster.gpus)
    if each is None:
        return np.zeros(len(layouts))
    fullest, held = each.max(axis=1), np.clip(gpus // layouts.stride("pp"), 1, layouts.pp)
    if stages is None or (held == 1).all():
        return fullest * gpus
    pp, rows = layouts.pp, np.arange(len(each))
    stage, layers = stages.stage[stages_of], stages.layers.sum(axis=2)[stages_of]
    is_last = stage == (pp - 1)[:, None]
    second, last, heaviest = (stage == 1).argmax(axis=1), is_last.argmax(axis=1), layers.argmax(axis=1)
    longest = np.where((stage == 0) | is_last, -1.0, layers).argmax(axis=1)
    known = layers[rows, heaviest] <= np.maximum(layers[rows, second], layers[rows, longest])
    between = np.where(known, np.maximum(each[rows, second], each[rows, longest]), each[rows, heaviest])
    whole = each[:, 0] + each[rows, last] + np.maximum(pp - 2, 0) * between
    some = fullest + (held - 1) * between
    return gpus / held * np.minimum(np.where(held == pp, whole, some), held * fullest)
