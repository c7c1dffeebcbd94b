"""The front over time and memory: the fastest layout, then the fastest of those that need FRONT_SAVING less memory than it, and so on until
none fits.

Each is the answer of a search as whole as that for the fastest of all, on GPUs with that much less memory: knobs turned, axes placed,
stages cut. So no layout that needs as little memory is faster, but between two of them there may be a layout that lies between. On a
mixed cluster all GPUs have so much less of their memory, and what counts is the share of the GPU that is fullest. On one number of GPUs
money goes with time; `sweep.py` puts the fronts of several numbers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.mixed import estimate_any
from shardplan.costmodel.result import cost_document
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.machines import with_memory_times
from shardplan.planner.mixed_search import search_mixed
from shardplan.planner.one_size import State, look, memory_for, on_less_memory, settle
from shardplan.planner.space import Wishes
from shardplan.planner.watch import Watch

FRONT_SAVING = 0.1
"""Of device memory, from one point to the next."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One layout of the front."""

    found: Estimates
    """Of one layout."""
    cluster: Cluster
    """That it lies on; a mixed one with its parts in their order."""
    complete: bool
    """No layout that needs as little memory is faster: nothing that could be was left out to save time."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return float(self.found.step_s[0])

    @property
    def peak_bytes(self) -> float:
        """What nvidia-smi would show on the fullest GPU."""
        return float(self.found.device_peak_bytes[0])

    @property
    def share(self) -> float:
        """What that is of its memory."""
        return float(self.found.device_peak_bytes[0] / self.found.capacities[0])


def searched_front(
    setting: Setting, wishes: Wishes, headroom: float, watch: Watch
) -> tuple[list[dict[str, Any]], bool]:
    """(`front_row` of every point, fastest first; whether an interrupt ended it early, which leaves the points found by then)."""
    rows: list[dict[str, Any]] = []
    try:
        for point in memory_points(setting, wishes, headroom):
            rows.append(front_row(point, setting))
            watch.phase("front", 1.0 - point.share, 0)
    except KeyboardInterrupt:
        if not watch.keeps_best:
            raise
        return _undominated(rows), True
    return _undominated(rows), False


def _undominated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that are faster than all that need less memory: mixed searches that are not complete may find more with less of it."""
    return [row for at, row in enumerate(rows) if all(row["step_s"] < leaner["step_s"] for leaner in rows[at + 1 :])]


def memory_points(setting: Setting, wishes: Wishes, headroom: float) -> Iterator[Point]:
    """The fastest layout on all GPUs of the setting, then those that need less and less memory."""
    return (_mixed_points if setting.cluster.parts else _plain_points)(setting, wishes, headroom)


def _mixed_points(setting: Setting, wishes: Wishes, headroom: float) -> Iterator[Point]:
    times = 1.0
    while True:
        at = replace(setting, cluster=with_memory_times(setting.cluster, times))
        result = search_mixed(at, wishes, "throughput", headroom, Watch())
        if result.ranked is None:
            return
        order = with_memory_times(result.cluster, 1.0 / times)
        found = estimate_any(replace(setting, cluster=order), result.ranked.layouts.row(0))
        point = Point(found=found, cluster=order, complete=result.complete)
        yield point
        times = memory_for(setting, (1.0 - FRONT_SAVING) * point.share, headroom)


def _plain_points(setting: Setting, wishes: Wishes, headroom: float) -> Iterator[Point]:
    first = State()
    look(setting, wishes, headroom, first, Watch())
    known: Estimates | None = None
    memory_bytes = setting.cluster.gpu.memory_bytes
    while True:
        at, state = on_less_memory(setting, first, memory_bytes, headroom, known)
        settle(at, wishes, "throughput", headroom, state, Watch())
        known = state.ranked
        if known is None:
            return
        complete = state.complete and state.proved and (state.placement is None or state.placement.complete)
        found = replace(known.take(np.asarray([0])), capacity_bytes=setting.cluster.gpu.memory_bytes)
        point = Point(found=found, cluster=setting.cluster, complete=complete)
        yield point
        memory_bytes = memory_for(setting, (1.0 - FRONT_SAVING) * point.peak_bytes, headroom)


def front_row(point: Point, setting: Setting) -> dict[str, Any]:
    """A point as plain values for tables and plan files; None for a price that nobody gave."""
    found, step_s = point.found, point.step_s
    return {
        "layout": found.layouts.row(0).words(),
        "step_s": step_s,
        "tokens_per_s_per_gpu": float(found.tokens_per_s[0]) / setting.cluster.gpus,
        "mfu": float(found.mfu[0]),
        "device_peak_bytes": point.peak_bytes,
        "headroom_fraction": 1.0 - point.share,
        "usd_per_million_tokens": cost_document(setting.cluster, setting.job, step_s)["usd_per_million_tokens"],
        "complete": point.complete,
        **({"parts": [part.gpu.name for part in point.cluster.parts]} if point.cluster.parts else {}),
    }
