"""What a pipeline takes at least, however its layers are cut: because stages hold whole layers, and because what does not fit has to be
recomputed. Cheap enough to be asked of every layout of a space; for models of one kind of layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.pace import LEAST_PEAK_WEIGHT
from shardplan.costmodel.recompute import ALL_LAYERS, RECOMPUTE
from shardplan.costmodel.row_keys import row_keys
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.stage_trials import StageTrials, Trials

FloatArray = NDArray[np.float64]
NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")
ROUNDING = 1e-9
"""Of a layer, below which it is there whole."""


def over_mean_s(setting: Setting, layouts: LayoutTable) -> FloatArray:
    """Seconds of a micro-batch, (N,), that the slowest stage of every cut of the layers takes longer at least than a stage that holds
    1/pp of everything, with the recompute that each layout says. Zero for models of several kinds of layer."""
    if len(setting.model.runs) > 1 or not len(layouts):
        return np.zeros(len(layouts))
    keys = row_keys(layouts, setting.runtime.communication, setting.job.global_batch)
    layer_s, embedding_s, head_s = _block_seconds(setting, keys.pace)
    pp, together = keys.pace.pp, keys.pace.v_placed
    mean_s = (setting.model.layer_count * layer_s + embedding_s + head_s) / pp
    slowest_s = least_peak_s(
        setting.model.layer_count,
        pp,
        layer_s,
        np.where(together, embedding_s + head_s, embedding_s),
        np.where(together, 0.0, head_s),
    )
    return np.maximum(slowest_s - mean_s, 0.0).take(keys.pace_of)


def recomputing_mean_s(
    setting: Setting, layouts: LayoutTable, peak_bytes: FloatArray, usable_bytes: float
) -> FloatArray:
    """Seconds of a micro-batch, (N,), that a stage with 1/pp of everything takes longer once as many layers are recomputed as make it fit,
    at least; infinite where it never does. `peak_bytes` are those of layouts that recompute nothing.

    The last stage keeps fewest micro-batches: where others keep more, they have more to save, but more to save for.
    """
    longer_s = np.zeros(len(layouts))
    at = np.flatnonzero((peak_bytes > usable_bytes) & (layouts.recompute == NONE))
    if len(setting.model.runs) > 1 or not len(at):
        return longer_s
    some = layouts.take(at)
    keys = row_keys(some, setting.runtime.communication, setting.job.global_batch)
    saved_bytes = StageTrials.of(setting, keys.work).mean_saving_bytes().take(keys.work_of)
    share = (peak_bytes[at] - usable_bytes) / np.maximum(saved_bytes, 1.0)
    longer_s[at[share > 1.0]] = np.inf
    at, some, share = at[share <= 1.0], some.take(share <= 1.0), share[share <= 1.0]
    if len(at):
        trials = StageTrials.of(setting, some)
        longer_s[at] = trials.mean_seconds(share) - trials.mean_seconds()
    return longer_s


def waiting(weight: FloatArray) -> FloatArray:
    """Seconds of pipeline that a step must be longer by a second for, (N,): while it waits, a little more of its exchanges hides.
    `weight` is its `peak_weight`."""
    return np.where(weight >= LEAST_PEAK_WEIGHT, weight / np.maximum(weight - 1.0, 1.0), 1.0)


def least_peak_s(
    layers: int, pp: NDArray[np.int64], layer_s: FloatArray, first_s: FloatArray, last_s: FloatArray
) -> FloatArray:
    """Seconds of the slowest of `pp` stages, (N,), where they share `layers` whole layers best and two of them hold `first_s` and `last_s`
    besides.

    What is sought is a number of layers of one of the stages. From the mean up, or from what holds most besides, one layer's time more
    is room for one more layer on every stage, which is enough: so it is the first such number of some stage, or that.
    """
    start = np.maximum((layers * layer_s + first_s + last_s) / pp, np.maximum(first_s, last_s))
    found = start + layer_s

    def room(within_s: FloatArray, besides_s: FloatArray | float) -> FloatArray:
        return np.floor((within_s - besides_s) / layer_s + ROUNDING)

    for besides_s in (np.zeros_like(layer_s), first_s, last_s):
        one = besides_s + np.ceil((start - besides_s) / layer_s - ROUNDING) * layer_s
        held = (pp - 2) * room(one, 0.0) + room(one, first_s) + room(one, last_s)
        found = np.where((held >= layers) & (one < found), one, found)
    return found


def _block_seconds(setting: Setting, layouts: LayoutTable) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds of a micro-batch, (N,), of a layer, of the embedding and of the head; layers recomputed where the layout recomputes all."""
    whole = (layouts.recompute == FULL) & (layouts.recompute_layers == ALL_LAYERS)
    trials = Trials(
        stage=np.zeros(3, dtype=np.int64),
        layers=np.ones((3, 1), dtype=np.int64),
        recomputed=np.repeat(whole[:, None].astype(np.int64), 3, axis=1),
        embedding=np.asarray([False, True, False]),
        head=np.asarray([False, False, True]),
    )
    seconds = StageTrials.of(setting, layouts).seconds(trials)
    return seconds[:, 0], seconds[:, 1] - seconds[:, 0], seconds[:, 2] - seconds[:, 0]
