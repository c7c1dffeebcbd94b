"""What one change would do: a little more of each rate, more memory, batch or GPUs; how much network a layout needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster, Gpu, Node
from shardplan.planner.machines import network_gbps_per_gpu, with_network_rate
from shardplan.planner.search import SearchResult, search
from shardplan.planner.space import Wishes

MORE = 1.1
ROWS_FOR_RATES = 5000
"""Fastest layouts among which the best is looked for when one rate changes: what fits stays the same then."""
NEAR = 1.05
"""Times the step time of today that a layout may take on less network."""
LEAST_GBPS = 0.1


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan was searched for."""

    model: Model
    job: Job
    cluster: Cluster
    runtime: Runtime
    wishes: Wishes
    headroom: float

    def search(self, **changed: Any) -> SearchResult:
        """The search of this question with parts of it changed."""
        parts = {name: getattr(self, name) for name in ("model", "job", "cluster", "runtime", "wishes", "headroom")}
        return search(**{**parts, **changed})


def _with_node(cluster: Cluster, **changed: Any) -> Cluster:
    return replace(cluster, node_runs=((replace(cluster.node, **changed), cluster.nodes),))


def _with_gpu(cluster: Cluster, change: Callable[[Gpu], Gpu]) -> Cluster:
    return _with_node(cluster, gpu=change(cluster.gpu))


def _faster_links(node: Node) -> dict[str, Any]:
    return {"intra": replace(node.intra, bandwidth_bytes_per_s=MORE * node.intra.bandwidth_bytes_per_s)}


RATES: dict[str, Callable[[Cluster], Cluster]] = {
    "10 % faster matrix products": lambda c: _with_gpu(
        c, lambda g: replace(g, peak_flop_per_s={word: MORE * rate for word, rate in g.peak_flop_per_s.items()})
    ),
    "10 % more memory bandwidth": lambda c: _with_gpu(
        c, lambda g: replace(g, memory_bandwidth_bytes_per_s=MORE * g.memory_bandwidth_bytes_per_s)
    ),
    "10 % faster links inside the node": lambda c: _with_node(c, **_faster_links(c.node)),
    "10 % faster network between nodes": lambda c: replace(
        c, network=c.network.at_rate(MORE * c.network.nic_bytes_per_s)
    ),
}


def one_change(question: Question) -> list[dict[str, Any]]:
    """Gain in tokens/s per GPU of the best layout by one change each, largest first: {change, gain_fraction, layout or None when it
    stays the same}. Empty when nothing fits."""
    today = question.search()
    if today.ranked is None:
        return []
    best, rate = today.ranked.layouts.row(0), float(today.ranked.tokens_per_s[0]) / question.cluster.gpus
    rows = [
        {
            "change": change,
            "gain_fraction": after / rate - 1.0,
            "layout": None if layout == best else layout.words(),
        }
        for change, after, layout in (*_by_rates(question, today), *_by_searches(question))
    ]
    return sorted(rows, key=lambda row: -float(row["gain_fraction"]))


def _by_rates(question: Question, today: SearchResult) -> Iterator[tuple[str, float, Layout]]:
    """(change, tokens/s per GPU, layout) with one rate of the machine higher."""
    assert today.ranked is not None
    fastest = today.ranked.layouts.take(np.arange(min(ROWS_FOR_RATES, len(today.ranked))))
    for change, faster in RATES.items():
        if "between nodes" in change and question.cluster.nodes == 1:
            continue
        found = estimate(
            model=question.model,
            job=question.job,
            cluster=faster(question.cluster),
            layouts=fastest,
            runtime=question.runtime,
        )
        at = int(found.step_s.argmin())
        yield change, float(found.tokens_per_s[at]) / question.cluster.gpus, fastest.row(at)


def _by_searches(question: Question) -> Iterator[tuple[str, float, Layout]]:
    """(change, tokens/s per GPU, layout) with more memory, another batch or other GPUs."""
    job, cluster = question.job, question.cluster
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "10 % more GPU memory": lambda: {
            "cluster": _with_gpu(cluster, lambda g: replace(g, memory_bytes=MORE * g.memory_bytes))
        },
        "twice the global batch": lambda: {"job": replace(job, global_batch=2 * job.global_batch)},
        "twice the GPUs": lambda: {"cluster": cluster.with_gpus(2 * cluster.gpus)},
        "half the GPUs": lambda: {"cluster": cluster.with_gpus(cluster.gpus // 2)},
    }
    for change, changed in changes.items():
        try:
            found = question.search(**changed())
        except InputError:  # not a size of this cluster
            continue
        if found.ranked is not None:
            yield change, float(found.ranked.tokens_per_s[0]) / found.cluster.gpus, found.ranked.layouts.row(0)


def network_needed(question: Question, layout: Layout) -> dict[str, float] | None:
    """Gbit/s between nodes per GPU that keep `layout` within NEAR of its step time: {gbps_per_gpu, now_gbps_per_gpu}.

    None on one node or without a network; the rate of today where even that is needed in full.
    """
    now = network_gbps_per_gpu(question.cluster)
    if now is None or question.cluster.nodes == 1:
        return None

    def step_s(gbps: float) -> float:
        return float(
            estimate(
                model=question.model,
                job=question.job,
                cluster=with_network_rate(question.cluster, gbps),
                layouts=layout,
                runtime=question.runtime,
            ).step_s[0]
        )

    most = NEAR * step_s(now)
    low, high = min(LEAST_GBPS, now), now
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if step_s(middle) <= most else (middle, high)
    return {"gbps_per_gpu": high, "now_gbps_per_gpu": now}
