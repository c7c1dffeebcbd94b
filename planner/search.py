"""Search: all layouts, one pure cost, a ranking; how many were looked at, how many refused and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.answer import answer
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.estimates import DEFAULT_HEADROOM, Estimates, joined
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.mixed import estimate_any, mixed_rejections
from shardplan.costmodel.model import Model
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.mixed_search import search_mixed
from shardplan.planner.partial_recompute import partly_recomputed
from shardplan.planner.ranking import OBJECTIVES, Objective, SearchResult, order_of
from shardplan.planner.refine import refined
from shardplan.planner.shortlist import distinct, memory_front
from shardplan.planner.sift import sift_space
from shardplan.planner.space import Wishes, join_tables


def search(
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime | str = "shardplan",
    wishes: Wishes | None = None,
    objective: Objective = "throughput",
    headroom: float = DEFAULT_HEADROOM,
) -> SearchResult:
    """Rank every layout of `model` on all GPUs of `cluster` (objectives `gpus` and `cost`: on the part of them that
    needs fewest GPUs, or least money)."""
    if not 0.0 <= headroom < 1.0:
        raise InputError(f"headroom={headroom:g} is not a fraction", place="--headroom", remedy="use 0 up to below 1")
    chosen = load_runtime(runtime) if isinstance(runtime, str) else runtime
    if objective == "cost" and not cluster.parts and cluster.node.usd_per_hour is None:
        raise InputError(
            f"cluster {cluster.name!r} has no price", place="--objective", remedy="set node.usd_per_hour in its profile"
        )
    if objective not in OBJECTIVES:
        raise InputError(
            f"objective={objective!r} is unknown", place="--objective", remedy=nearest(objective, OBJECTIVES)
        )

    if cluster.parts:
        whole = Setting(model=model, job=job, cluster=cluster, runtime=chosen)
        return search_mixed(whole, wishes or Wishes(), objective, headroom)

    def on(gpus: int) -> SearchResult:
        return _search_one(model, job, cluster.with_gpus(gpus), chosen, wishes, objective, headroom)

    if objective == "gpus":
        return _fewest(cluster, on)
    if objective == "cost":
        return _cheapest(cluster, on)
    return on(cluster.gpus)


def _fewest(cluster: Cluster, on: Callable[[int], SearchResult]) -> SearchResult:
    """On as few GPUs as something fits: doubling first, then every whole node between the last two sizes tried."""
    last, result = 0, None
    for gpus in gpu_counts(cluster):
        result = on(gpus)
        if result.ranked is not None:
            node = cluster.node.gpus
            between = range(last // node * node + node, gpus, node) if gpus > node else range(0)
            return next((one for size in between if (one := on(size)).ranked is not None), result)
        last = gpus
    assert result is not None
    return result


def _cheapest(cluster: Cluster, on: Callable[[int], SearchResult]) -> SearchResult:
    """On the size among `gpu_counts` whose best layout pays least per token; whole nodes are paid."""
    found = [on(gpus) for gpus in gpu_counts(cluster)]
    fitting = [one for one in found if one.ranked is not None]
    if not fitting:
        return found[-1]
    return min(fitting, key=lambda r: float(r.ranked.step_s[0]) * r.cluster.nodes if r.ranked is not None else np.inf)


def gpu_counts(cluster: Cluster) -> tuple[int, ...]:
    """Sizes to try, ascending: parts of a node that divide it, then doubling nodes, then the whole cluster."""
    node = cluster.node.gpus
    sizes = [g for g in range(1, node + 1) if node % g == 0 and g <= cluster.gpus]
    while sizes[-1] * 2 < cluster.gpus:
        sizes.append(sizes[-1] * 2)
    return tuple(dict.fromkeys((*sizes, cluster.gpus)))


def _search_one(
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime,
    wishes: Wishes | None,
    objective: Objective,
    headroom: float,
) -> SearchResult:
    start = time.perf_counter()
    setting = Setting(model=model, job=job, cluster=cluster, runtime=runtime)
    wanted = wishes or Wishes()
    looked_at, valid, refused = sift_space(setting, wanted)
    ranked = closest = None
    misfits, proved = 0, True
    if len(valid):
        estimates = estimate(model=model, job=job, cluster=cluster, layouts=valid, runtime=runtime)
        fits = estimates.fits(headroom)
        more, tried = partly_recomputed(setting, estimates, wanted, headroom)
        if more is not None and len(more):
            looked_at += tried
            misfits = tried - len(more)
            valid = join_tables([valid, more], wanted)
            estimates = estimate(model=model, job=job, cluster=cluster, layouts=valid, runtime=runtime)
            fits = estimates.fits(headroom)
        cut = refined(setting, estimates, wanted, headroom)
        looked_at, proved = looked_at + cut.looked_at, cut.proved
        if cut.found is not None:
            misfits += cut.looked_at - len(cut.found)
            valid = stacked([valid, cut.found.layouts])
            estimates = joined([estimates, cut.found], valid)
            fits = estimates.fits(headroom)
        misfits += int((~fits).sum())
        order = order_of(estimates, np.flatnonzero(fits), objective)
        if len(order):
            ranked = estimates.take(order)
        else:
            closest = estimates.take(np.asarray([int(estimates.device_peak_bytes.argmin())]))
    return SearchResult(
        cluster=cluster,
        ranked=ranked,
        closest=closest,
        looked_at=looked_at,
        refused=refused,
        does_not_fit=misfits,
        proved=proved,
        seconds=time.perf_counter() - start,
    )


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
        ranked = [
            {**row, "variants": int(count)}
            for row, count in zip(summary_rows(result.ranked, first[:top]), variants[:top], strict=True)
        ]
        front = summary_rows(result.ranked, memory_front(result.ranked))
    return {
        "looked_at": result.looked_at,
        "refused": {r.rule: {"count": r.count, "reason": r.example} for r in result.refused},
        "does_not_fit": result.does_not_fit,
        "proved": result.proved,
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
