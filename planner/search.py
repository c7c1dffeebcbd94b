"""Search: all layouts, one pure cost, a ranking; how many were looked at, how many refused and why."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.answer import answer
from shardplan.costmodel.estimates import DEFAULT_HEADROOM, Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.mixed import estimate_any, mixed_rejections
from shardplan.costmodel.model import Model
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.mixed_search import search_mixed
from shardplan.planner.ranking import OBJECTIVES, Objective, SearchResult
from shardplan.planner.shortlist import distinct, memory_front, worth_telling
from shardplan.planner.sift import Refusal
from shardplan.planner.sizes import Sizes, gpu_counts
from shardplan.planner.space import Wishes
from shardplan.planner.watch import Watch

__all__ = ["OBJECTIVES", "Objective", "Refusal", "SearchResult", "gpu_counts", "judge", "search", "search_document"]


def search(
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime | str = "shardplan",
    wishes: Wishes | None = None,
    objective: Objective = "throughput",
    headroom: float = DEFAULT_HEADROOM,
    days: float | None = None,
    watch: Watch | None = None,
) -> SearchResult:
    """Rank every layout of `model` on all GPUs of `cluster` (objectives `gpus`, `cost` and `deadline`: on the part of them that
    needs fewest GPUs, least money, or is the smallest that trains the job's tokens in `days`)."""
    if not 0.0 <= headroom < 1.0:
        raise InputError(f"headroom={headroom:g} is not a fraction", place="--headroom", remedy="use 0 up to below 1")
    chosen = load_runtime(runtime) if isinstance(runtime, str) else runtime
    _check_objective(objective, job, cluster, days)
    watching = watch or Watch()
    if cluster.parts:
        whole = Setting(model=model, job=job, cluster=cluster, runtime=chosen)
        return search_mixed(whole, wishes or Wishes(), objective, headroom, watching)

    sizes = Sizes(
        setting=Setting(model=model, job=job, cluster=cluster, runtime=chosen),
        wishes=wishes or Wishes(),
        headroom=headroom,
        watch=watching,
    )
    if objective == "gpus":
        return sizes.fewest()
    if objective == "cost":
        return sizes.cheapest()
    if objective == "deadline" and days is not None:
        return sizes.within(days)
    return sizes.search(cluster.gpus, objective)


def _check_objective(objective: Objective, job: Job, cluster: Cluster, days: float | None) -> None:
    """InputError for an objective that is unknown or lacks what it is measured by."""
    if objective not in OBJECTIVES:
        raise InputError(
            f"objective={objective!r} is unknown", place="--objective", remedy=nearest(objective, OBJECTIVES)
        )
    if objective == "cost" and not cluster.parts and cluster.node.usd_per_hour is None:
        raise InputError(
            f"cluster {cluster.name!r} has no price",
            place="--objective",
            remedy="give --price, or set node.usd_per_hour in its profile",
        )
    if (objective == "deadline") != (days is not None):
        raise InputError(
            "a deadline has days", place="--objective", remedy="give --objective deadline and --days together"
        )
    if days is not None and not 0.0 < days < float("inf"):
        raise InputError(f"{days:g} days are no deadline", place="--days", remedy="give more than 0")
    if days is not None and job.tokens is None:
        raise InputError("a deadline is for a number of tokens", place="--days", remedy="give --tokens too")


def summary_rows(estimates: Estimates, rows: NDArray[np.intp]) -> list[dict[str, Any]]:
    """The ranked layouts at `rows` as plain values for tables and plan files; `rank` counts all layouts."""
    gpus = estimates.layouts.gpus
    return [
        {
            "rank": int(i) + 1,
            "layout": estimates.layouts.row(int(i)).words(),
            "step_s": float(estimates.step_s[i]),
            "tokens_per_s_per_gpu": float(estimates.tokens_per_s[i] / gpus[i]),
            "mfu": float(estimates.mfu[i]),
            "device_peak_bytes": float(estimates.device_peak_bytes[i]),
            "headroom_fraction": float(1.0 - estimates.device_peak_bytes[i] / estimates.capacities[i]),
        }
        for i in rows
    ]


def search_document(result: SearchResult, top: int) -> dict[str, Any]:
    """The account of a search as plain JSON values: the best layout of each of the `top` best ideas, and the front of time and memory."""
    ranked: list[dict[str, Any]] = []
    front: list[dict[str, Any]] = []
    ideas = 0
    if result.ranked is not None and top:
        first, variants = distinct(result.ranked.layouts)
        ideas = len(first)
        told = np.flatnonzero(worth_telling(result.ranked, first))[:top]
        ranked = [
            {**row, "variants": int(count)}
            for row, count in zip(summary_rows(result.ranked, first[told]), variants[told], strict=True)
        ]
        front = summary_rows(result.ranked, memory_front(result.ranked))
    return {
        "looked_at": result.looked_at,
        "refused": {r.rule: {"count": r.count, "reason": r.example} for r in result.refused},
        "slower": result.slower,
        "does_not_fit": result.does_not_fit,
        "refined": result.refined,
        "proved": result.proved,
        "complete": result.complete,
        "partial": result.partial,
        "placement": result.placement.document() if result.placement else None,
        "seconds": result.seconds,
        "ideas": ideas,
        "ranked": ranked,
        "memory_front": front,
    }


def judge(
    layout: Layout,
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime,
    headroom: float = DEFAULT_HEADROOM,
) -> dict[str, Any] | list[Rejection]:
    """The answer of `shardplan estimate --json` for one layout, or only its rejections when it has no meaning here."""
    setting = Setting(model=model, job=job, cluster=cluster, runtime=runtime)
    broken, structural = mixed_rejections(setting, layout)
    if structural:
        return broken
    one = estimate_any(setting, layout)
    return answer(one, 0, model=model, job=job, cluster=cluster, runtime=runtime, rejections=broken, headroom=headroom)
