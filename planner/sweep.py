"""Sweep: the best plan at every point of a grid of clusters, sizes, batches, sequences and network rates; deadline and cheapest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from shardplan.costmodel.answer import GIB
from shardplan.costmodel.estimates import DEFAULT_HEADROOM, Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.model import Model
from shardplan.costmodel.remedies import LEAST_SAVING
from shardplan.costmodel.result import cost_document, result_document
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.front import memory_points
from shardplan.planner.machines import network_gbps_per_gpu, with_network_rate
from shardplan.planner.no_degrees import why_forbidden, why_no_degrees
from shardplan.planner.ranking import Objective
from shardplan.planner.search import SearchResult, search
from shardplan.planner.sizes import gpu_counts
from shardplan.planner.space import Wishes

POINT = ("cluster", "gpus", "network_gbps_per_gpu", "global_batch", "seq")
"""Columns that tell one point of a grid from another."""
COLUMNS = (
    "cluster",
    "gpu",
    "gpus",
    "network_gbps_per_gpu",
    "global_batch",
    "seq",
    "fits",
    "step_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "device_peak_gib",
    "usd_per_million_tokens",
    "joules_per_token",
    "days",
    "days_with_failures",
    "usd",
    "pareto",
    "layout",
    "reason",
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is varied; every combination is a point. An empty sequence leaves a cluster as its profile says."""

    machines: Sequence[tuple[Cluster, Job]]
    """Clusters, each with the job whose precision it takes."""
    global_batches: Sequence[int]
    seqs: Sequence[int]
    gpus: Sequence[int] = ()
    """Empty: parts of a node, doubling nodes, the whole cluster; a mixed cluster whole."""
    network_gbps_per_gpu: Sequence[float] = ()

    def lines(self) -> Iterator[tuple[Cluster, Job]]:
        """(cluster at its network rate, job) of all points that differ in nothing but the number of GPUs."""
        for (cluster, job), rate in itertools.product(self.machines, self.network_gbps_per_gpu or (None,)):
            machine = cluster if rate is None else with_network_rate(cluster, rate)
            for batch, seq in itertools.product(self.global_batches, self.seqs):
                yield machine, replace(job, global_batch=batch, seq=seq)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What stays the same at every point."""

    model: Model
    runtime: Runtime
    wishes: Wishes
    headroom: float = DEFAULT_HEADROOM
    front: bool = False
    """Also the fastest layouts that need less and less memory at every point (`front.py`)."""

    def rows(self, grid: Grid, days: float | None = None) -> Iterator[dict[str, Any]]:
        """One row of COLUMNS a point, with `front` more of them, made as it is asked for; what has no answer there is None, `reason` says
        why nothing fits.

        With a deadline of `days` for the jobs' token budget, the fewest GPUs that meet it come last, where they are no size of the grid.
        `mark_front` fills the column `pareto`.
        """
        for machine, job in grid.lines():
            tried: list[dict[str, Any]] = []
            for gpus in grid.gpus or ((machine.gpus,) if machine.parts else gpu_counts(machine)):
                tried.append(self.row(machine, gpus, job))
                yield tried[-1]
                if self.front and tried[-1]["fits"]:
                    yield from self._leaner(machine, gpus, job)
            if days is not None and not machine.parts:
                yield from self._fewest(machine, job, tried, days)

    def _fewest(
        self, machine: Cluster, job: Job, tried: Sequence[Mapping[str, Any]], days: float
    ) -> Iterator[dict[str, Any]]:
        """The row of the fewest GPUs that meet the deadline, where it is not among those tried."""
        found = self._search(machine, job, objective="deadline", days=days)
        if found.ranked is not None and found.cluster.gpus not in {row["gpus"] for row in tried}:
            yield self.row(machine, found.cluster.gpus, job)

    def row(self, cluster: Cluster, gpus: int, job: Job) -> dict[str, Any]:
        """The best plan of one point."""
        row = self._point(cluster, gpus, job)
        try:
            machine = cluster.with_gpus(gpus)
        except InputError as bad:
            return {**row, "reason": bad.problem}
        found = self._search(machine, job)
        if found.ranked is None:
            at = Setting(model=self.model, job=job, cluster=machine, runtime=self.runtime)
            return {**row, "reason": _why_nothing(found, at, self.wishes)}
        return {**row, **self._figures(machine, job, found.ranked)}

    def _search(
        self, machine: Cluster, job: Job, *, objective: Objective = "throughput", days: float | None = None
    ) -> SearchResult:
        return search(
            model=self.model,
            job=job,
            cluster=machine,
            runtime=self.runtime,
            wishes=self.wishes,
            objective=objective,
            headroom=self.headroom,
            days=days,
        )

    def _leaner(self, cluster: Cluster, gpus: int, job: Job) -> Iterator[dict[str, Any]]:
        """Rows of the layouts of a point's front behind the fastest."""
        machine = cluster.with_gpus(gpus)
        at = Setting(model=self.model, job=job, cluster=machine, runtime=self.runtime)
        for point in islice(memory_points(at, self.wishes, self.headroom), 1, None):
            yield {**self._point(cluster, gpus, job), **self._figures(machine, job, point.found)}

    def _point(self, cluster: Cluster, gpus: int, job: Job) -> dict[str, Any]:
        """What is known of a point before it is searched."""
        return {
            **dict.fromkeys(COLUMNS),
            "cluster": cluster.name,
            "gpu": " + ".join(dict.fromkeys(node.gpu.name for node, _ in cluster.node_runs)),
            "gpus": gpus,
            "fits": False,
            "global_batch": job.global_batch,
            "seq": job.seq,
            "network_gbps_per_gpu": network_gbps_per_gpu(cluster),
        }

    def _figures(self, machine: Cluster, job: Job, found: Estimates) -> dict[str, Any]:
        """Of the first layout of a ranking."""
        best, step_s = found.layouts.row(0), float(found.step_s[0])
        result = result_document(
            model=self.model, job=job, cluster=machine, runtime=self.runtime, layout=best, step_s=step_s
        )
        cost = cost_document(machine, job, step_s)
        return {
            "fits": True,
            "layout": best.words(),
            "step_s": step_s,
            "tokens_per_s": float(found.tokens_per_s[0]),
            "tokens_per_s_per_gpu": float(found.tokens_per_s[0]) / machine.gpus,
            "mfu": float(found.mfu[0]),
            "device_peak_gib": float(found.device_peak_bytes[0]) / GIB,
            "usd_per_million_tokens": cost["usd_per_million_tokens"],
            "joules_per_token": cost["joules_per_token"],
            **({name: result[name] for name in ("days", "days_with_failures", "usd")} if result else {}),
        }


def days_of(row: Mapping[str, Any]) -> float | None:
    """Days to the token budget, with failures where goodput is known; None where nothing fits or no budget is given."""
    return row["days"] if row["days_with_failures"] is None else row["days_with_failures"]


def answers(rows: Sequence[Mapping[str, Any]], days: float | None) -> dict[str, Mapping[str, Any] | None]:
    """`fastest`, `cheapest` per token and, with a deadline, `fewest` GPUs and `cheapest` among those within `days`; None = no row."""
    fitting = [row for row in rows if row["fits"]]
    within = [row for row in fitting if days is None or (days_of(row) or 0.0) <= days]
    priced = [row for row in within if row["usd_per_million_tokens"] is not None]
    found: dict[str, Mapping[str, Any] | None] = {
        "fastest": max(fitting, key=lambda row: row["tokens_per_s"], default=None),
        "cheapest": min(priced, key=lambda row: row["usd_per_million_tokens"], default=None),
    }
    if days is not None:
        found["fewest"] = min(within, key=lambda row: (row["gpus"], row["step_s"]), default=None)
    return found


FRONT = ("gpus", "device_peak_gib", "usd_per_million_tokens")
"""Small is good, as is a high tokens_per_s; of memory a difference below LEAST_SAVING is none."""


def fastest_of_points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of every point, its fastest, without those that need less memory."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        point = tuple(row[name] for name in POINT)
        before = seen.setdefault(point, row)
        if row["fits"] and (not before["fits"] or row["tokens_per_s"] > before["tokens_per_s"]):
            seen[point] = row
    return list(seen.values())


def mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Fill the column `pareto`: whether no other point of the same batch and sequence is as good in speed, GPUs, memory per GPU and
    price (where both have one) and better in one of them."""
    for row in rows:
        row["pareto"] = None if not row["fits"] else not any(_ahead(other, row) for other in rows if other["fits"])


def _ahead(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    if (other["global_batch"], other["seq"]) != (row["global_batch"], row["seq"]):
        return False
    figures = [name for name in FRONT if None not in (other[name], row[name])]
    gains = [row[name] - other[name] for name in figures] + [other["tokens_per_s"] - row["tokens_per_s"]]
    lean = figures.index("device_peak_gib")
    if abs(gains[lean]) <= LEAST_SAVING * row["device_peak_gib"]:
        gains[lean] = 0.0
    return min(gains) >= 0 and max(gains) > 0


def _why_nothing(found: SearchResult, at: Setting, wishes: Wishes) -> str:
    """One line: the cause and, where rules leave nothing, the remedy."""
    if found.does_not_fit:
        return f"{found.does_not_fit:,} valid layouts, none fits in memory"
    cause = why_no_degrees(at, wishes) or (None if found.refused else why_forbidden(at, wishes))
    if cause is not None:
        return f"{cause.detail}; {cause.remedy}"
    if not found.refused:
        return "the GPUs have no factorisation that divides the batch"
    most = found.refused[0]
    return f"no layout keeps the rules, most break {most.rule}: {most.example}; {most.remedy}"
