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
    stride = layouts.stride("pp")
    fullest, held = each.max(axis=1), np.clip(gpus // stride, 1, layouts.pp)
    if stages is None or (held == 1).all():
        return fullest * gpus
    pp, rows = layouts.pp, np.arange(len(each))
    stage, layers = stages.stage[stages_of], stages.layers.sum(axis=2)[stages_of]
    is_last = stage == (pp - 1)[:, None]
    second, last, heaviest = (stage == 1).argmax(axis=1), is_last.argmax(axis=1), layers.argmax(axis=1)
    longest = np.where((stage == 0) | is_last, -1.0, layers).argmax(axis=1)
    known = layers[rows, heaviest] <= np.maximum(layers[rows, second], layers[rows, longest])
    between = np.where(known, np.maximum(each[rows, second], each[rows, longest]), each[rows, heaviest])
    both_ends = each[:, 0] + each[rows, last] + np.maximum(held - 2, 0) * between
    one_end = fullest + (held - 1) * between
    goes_round = (held == pp) | (stride * pp < layouts.gpus)  # the first stage may lie beside the last
    at_most = np.where(goes_round, np.maximum(both_ends, np.where(held == pp, 0.0, one_end)), one_end)
    times = np.maximum(gpus // (held * stride), 1)
    alike = np.minimum(times * stride, gpus // held)  # GPUs of each stage, then those of a stage that is there in part
    return alike * np.minimum(at_most, held * fullest) + (gpus - alike * held) * fullest
