"""The front over time and memory: the fastest layout, then the fastest of those that need FRONT_SAVING less memory than it, and so on until
none fits.

Each is the answer of a search as whole as that for the fastest of all, on GPUs with that much less memory: knobs turned, axes placed,
stages cut. So no layout that needs as little memory is faster, but between two of them there may be a layout that lies between. On one
number of GPUs money goes with time; `sweep.py` puts the fronts of several numbers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.result import cost_document
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
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


def searched_front(
    setting: Setting, wishes: Wishes, headroom: float, watch: Watch
) -> tuple[list[dict[str, Any]], bool]:
    """(`front_row` of every point, fastest first; whether an interrupt ended it early, which leaves the points found by then)."""
    rows: list[dict[str, Any]] = []
    try:
        for point in memory_points(setting, wishes, headroom):
            rows.append(front_row(point, setting))
            watch.phase("front", 1.0 - point.peak_bytes / setting.cluster.gpu.memory_bytes, 0)
    except KeyboardInterrupt:
        if not watch.keeps_best:
            raise
        return rows, True
    return rows, False


def check_one_kind(cluster: Cluster) -> None:
    """InputError for a mixed cluster."""
    if cluster.parts:
        raise InputError(
            f"the front is searched on nodes of one kind, and {cluster.name!r} mixes them",
            place="--front",
            remedy="leave it out: the plan lists what was found with less memory",
        )


def memory_points(setting: Setting, wishes: Wishes, headroom: float) -> Iterator[Point]:
    """The fastest layout on all GPUs of the setting, then those that need less and less memory. InputError for a mixed cluster."""
    check_one_kind(setting.cluster)
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
        point = Point(found=known.take(np.asarray([0])), complete=complete)
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
        "headroom_fraction": 1.0 - point.peak_bytes / setting.cluster.gpu.memory_bytes,
        "usd_per_million_tokens": cost_document(setting.cluster, setting.job, step_s)["usd_per_million_tokens"],
        "complete": point.complete,
    }
