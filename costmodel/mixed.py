"""Estimates on mixed clusters, from those on clusters of each kind of node alone.

A layout is staged where every pipeline stage lies on nodes of one kind, stages in the order of the parts: each part times and weighs its
own stages, the slowest of all sets the pace, and the others fill and drain. Exchanges between the ranks of one stage stay inside a part.
What follows the pipeline (exchange of gradients, offload, update) is that of the part that is done last, counted from its own pace: a
part that waits for the slowest stage has that time for its exchanges. Any other layout has ranks of one stage on several kinds of
node, and takes as long as if all GPUs were of the kind on which it takes longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import widest
from shardplan.costmodel.estimate import estimate, on_stages, stage_times
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.keys import LazyColumns
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.pace import backward_split, bubble_s
from shardplan.costmodel.row_keys import row_keys
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.rule_parts import micro_batches
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.stage_cost import stage_rows
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.costmodel.sustained import prepared
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.mixed import as_all

FloatArray = NDArray[np.float64]
OF_THE_SLOWEST = ("compute_s", "recompute_s", "tp_exposed_s", "cp_exposed_s", "ep_exposed_s", "host_s")
"""Parts of the step that the slowest stage alone decides."""
AFTER_THE_PIPELINE = ("dp_exposed_s", "offload_exposed_s", "optimizer_s")
"""Parts that each part of the cluster has for itself."""


def part_settings(setting: Setting) -> tuple[Setting, ...]:
    """The setting with all nodes of one kind, for each part of a mixed cluster; else itself."""
    mixed = setting.cluster
    if not mixed.parts:
        return (setting,)
    return tuple(replace(setting, cluster=as_all(mixed, part)) for part in mixed.parts)


def stages_on_parts(cluster: Cluster, layout: Layout) -> tuple[int, ...] | None:
    """Pipeline stages on each part of a mixed cluster; None where a stage would lie on several, or none on some."""
    ranks = layout.dp * layout.tp * layout.cp
    apart = (
        layout.pp > 1 and int(layout_table([layout]).stride("pp")[0]) != ranks
    )  # stages do not lie one behind the other
    if apart or any(part.gpus % ranks for part in cluster.parts) or layout.gpus != cluster.gpus:
        return None
    return tuple(part.gpus // ranks for part in cluster.parts)


def mixed_rejections(setting: Setting, layout: Layout) -> tuple[list[Rejection], bool]:
    """`rules.rejections` on every part, each rule once."""
    found: dict[str, Rejection] = {}
    structural = False
    for part in part_settings(setting):
        broken, meaningless = rejections(part, layout)
        structural |= meaningless
        found = {**{one.rule: one for one in broken}, **found}
    return list(found.values()), structural


def estimate_any(setting: Setting, layout: Layout) -> Estimates:
    """Memory and time of one layout with all its stages, on a homogeneous or a mixed cluster."""
    if not setting.cluster.parts:
        return _plain(setting, layout)
    stages = stages_on_parts(setting.cluster, layout)
    return (
        estimate_spread(setting, layout) if stages is None else estimate_staged(setting, layout_table([layout]), stages)
    )


def _plain(setting: Setting, layouts: LayoutTable | Layout) -> Estimates:
    return estimate(
        model=setting.model, job=setting.job, cluster=setting.cluster, layouts=layouts, runtime=setting.runtime
    )


def estimate_spread(setting: Setting, layouts: LayoutTable | Layout) -> Estimates:
    """Estimates of layouts whose stages lie on every kind of node: each as on the kind on which it takes longest."""
    found = [_plain(part, layouts) for part in part_settings(setting)]
    slowest = np.asarray(np.stack([one.step_s for one in found]).argmax(axis=0), dtype=np.int64)
    least = min(found, key=lambda one: one.capacity_bytes - one.context_bytes)
    names = (*TIME_PARTS, "forward_s", "step_s")
    return replace(
        least,
        time={name: _chosen([one.time[name] for one in found], slowest) for name in names},
        hidden={axis: _chosen([one.hidden[axis] for one in found], slowest) for axis in least.hidden},
        peak_flop_per_s=_mean_peak(setting),
        bands=widest([one.bands for one in found]),
        host_capacity_bytes=min(one.host_capacity_bytes for one in found),
        nvme_capacity_bytes=min(one.nvme_capacity_bytes for one in found),
    )


def _chosen(columns: Sequence[FloatArray], which: NDArray[np.integer]) -> FloatArray:
    """Row n of column `which[n]`."""
    return np.stack(columns)[which, np.arange(len(which))]


def _mean_peak(setting: Setting) -> float:
    """Of all GPUs, in the precision of the job."""
    cluster = setting.cluster
    total = sum(part.gpus * part.gpu.peak_flop_per_s[setting.job.precision] for part in cluster.parts)
    return total / cluster.gpus


def estimate_staged(setting: Setting, layouts: LayoutTable, stages: Sequence[int]) -> Estimates:
    """Estimates of layouts that have the same number of `stages` on each part."""
    parts, ends = part_settings(setting), np.cumsum(stages)
    slices = [slice(int(end) - count, int(end)) for end, count in zip(ends, stages, strict=True)]
    found = [on_stages(part, layouts, some) for part, some in zip(parts, slices, strict=True)]
    keys = row_keys(layouts, setting.runtime.communication, setting.job.global_batch)
    pace = keys.pace
    each = [stage_times(part, pace) for part in parts]
    seconds = np.concatenate([one[0][:, some] for one, some in zip(each, slices, strict=True)], axis=1)
    recomputed = each[0][1].sum(axis=1) / setting.model.layer_count
    slowest = np.asarray(np.searchsorted(ends, seconds.argmax(axis=1), side="right"), dtype=np.int64).take(keys.pace_of)
    time = _times(found, slowest)
    batches = micro_batches(setting, pace)
    passes = backward_split(prepared(parts[0]), pace, recomputed, batches)
    chunks = stage_rows(setting.model, pace, setting.runtime, every_stage=True).chunks
    bubble = bubble_s(pace, batches, passes, chunks, seconds.sum(axis=1), seconds.max(axis=1))
    time["bubble_s"] = bubble.take(keys.pace_of)
    fullest = np.stack([one.peaks["device"] / one.capacity_bytes for one in found]).argmax(axis=0)
    lead = found[0]
    return replace(
        lead,
        time={
            **time,
            "forward_s": _chosen([one.time["forward_s"] for one in found], slowest),
            "step_s": np.sum(list(time.values()), axis=0),
        },
        hidden={axis: _chosen([one.hidden[axis] for one in found], slowest) for axis in lead.hidden},
        peaks={name: _chosen([one.peaks[name] for one in found], fullest) for name in lead.peaks},
        stages=_side_by_side([one.stages for one in found]),
        contents=_side_by_side([one.contents for one in found]),
        row_capacity_bytes=np.asarray([one.capacity_bytes for one in found])[fullest],
        stage_capacity_bytes=np.repeat([one.capacity_bytes for one in found], stages),
        host_bytes=np.max([one.host_bytes for one in found], axis=0),
        host_capacity_bytes=min(one.host_capacity_bytes for one in found),
        nvme_bytes=np.max([one.nvme_bytes for one in found], axis=0),
        nvme_capacity_bytes=min(one.nvme_capacity_bytes for one in found),
        peak_flop_per_s=_mean_peak(setting),
        bands=widest([one.bands for one in found]),
    )


def _times(found: Sequence[Estimates], slowest: NDArray[np.integer]) -> dict[str, FloatArray]:
    """Seconds by part, (N,), without the bubble: the pace of the slowest part, then what the part that is done last has left to do."""
    time = {part: _chosen([one.time[part] for one in found], slowest) for part in OF_THE_SLOWEST}
    time["pp_exposed_s"] = np.max([one.time["pp_exposed_s"] for one in found], axis=0)
    paced = [np.sum([one.time[part] for part in OF_THE_SLOWEST], axis=0) for one in found]
    after = [np.sum([one.time[part] for part in AFTER_THE_PIPELINE], axis=0) for one in found]
    done = np.asarray(paced) + np.asarray(after)
    last = done.argmax(axis=0)
    absorbed = _chosen(after, last) - (done.max(axis=0) - _chosen(paced, slowest))
    for part in AFTER_THE_PIPELINE:
        own = _chosen([one.time[part] for one in found], last)
        time[part] = np.maximum(own - absorbed, 0.0)
        absorbed = np.maximum(absorbed - own, 0.0)
    return {part: time.get(part, np.zeros(len(slowest))) for part in TIME_PARTS}


def _side_by_side(maps: Sequence[Mapping[str, NDArray[Any]]]) -> Mapping[str, NDArray[Any]]:
    """Columns by stage of all parts, (N, S), made when they are read."""

    def beside(name: str) -> NDArray[Any]:
        return np.concatenate([one[name] for one in maps], axis=1)

    return LazyColumns({name: partial(beside, name) for name in maps[0]})


def stage_seconds_on(setting: Setting, layout: Layout) -> tuple[FloatArray, FloatArray]:
    """(seconds of a micro-batch, layers under full recompute) of every stage of one layout, each (pp,): on its part, or on the slowest
    kind of node that it lies on."""
    table, parts = layout_table([layout]), part_settings(setting)
    each = [stage_times(part, table) for part in parts]
    recomputed = each[0][1][0]
    seconds = np.stack([one[0][0] for one in each])
    stages = stages_on_parts(setting.cluster, layout) if setting.cluster.parts else None
    if stages is None:
        return seconds.max(axis=0), recomputed
    return seconds[np.repeat(np.arange(len(stages)), stages), np.arange(layout.pp)], recomputed
