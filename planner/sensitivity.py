"""What one change would do for a plan by its objective: a little more of each rate, more memory, batch or GPUs; how much network a layout
needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.answer import GIB
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.mixed import estimate_any
from shardplan.costmodel.model import Model
from shardplan.costmodel.result import cost_document
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.at_setting import estimated
from shardplan.planner.deadline import days_needed
from shardplan.planner.machines import (
    network_gbps_per_gpu,
    with_gpus_changed,
    with_memory_times,
    with_network_rate,
    with_network_times,
    with_nodes,
)
from shardplan.planner.mixed_cuts import estimated_on_parts
from shardplan.planner.ranking import Objective, SearchResult
from shardplan.planner.search import search
from shardplan.planner.space import Wishes
from shardplan.planner.watch import StepWatch, Watch

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
    objective: Objective = "throughput"
    watch: Watch = field(default_factory=Watch)
    """Told how far answers to it are."""

    def search(self, objective: Objective = "throughput", **changed: Any) -> SearchResult:
        """The search of this question with parts of it changed."""
        parts = {
            name: getattr(self, name) for name in ("model", "job", "cluster", "runtime", "wishes", "headroom", "watch")
        }
        return search(**{**parts, **changed}, objective=objective)


RATES: dict[str, Callable[[Cluster], Cluster]] = {
    "10 % faster matrix products": lambda c: with_gpus_changed(
        c, lambda g: replace(g, peak_flop_per_s={word: MORE * rate for word, rate in g.peak_flop_per_s.items()})
    ),
    "10 % more memory bandwidth": lambda c: with_gpus_changed(
        c, lambda g: replace(g, memory_bandwidth_bytes_per_s=MORE * g.memory_bandwidth_bytes_per_s)
    ),
    "10 % faster links inside the node": lambda c: with_nodes(
        c,
        lambda n: replace(n, intra=replace(n.intra, bandwidth_bytes_per_s=MORE * n.intra.bandwidth_bytes_per_s)),
    ),
    "10 % faster network between nodes": lambda c: with_network_times(c, MORE),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What an objective makes good, of the best layout of a search."""

    words: str
    """Of what a gain is a gain."""
    value: Callable[[Question, SearchResult], float]
    told: Callable[[float], str]
    small: bool = False
    """It is good where it is small."""
    searched: Objective = "throughput"
    """What a changed question is searched for on its own number of GPUs."""

    def gain(self, before: float, after: float) -> float:
        """Part of the figure that is gained: more of it, or less where small is good."""
        return 1.0 - after / before if self.small else after / before - 1.0


def _ranked(found: SearchResult) -> Estimates:
    assert found.ranked is not None
    return found.ranked


def _usd(question: Question, found: SearchResult) -> float:
    usd = cost_document(found.cluster, question.job, float(_ranked(found).step_s[0]))["usd_per_million_tokens"]
    assert usd is not None, "a plan by cost has a price"
    return usd


FIGURES: dict[Objective, Figure] = {
    "throughput": Figure(
        words="tokens/s/GPU",
        value=lambda _, found: float(_ranked(found).tokens_per_s[0]) / found.cluster.gpus,
        told=lambda value: f"{value:,.0f}",
    ),
    "cost": Figure(words="USD per million tokens", value=_usd, told=lambda value: f"{value:.4g}", small=True),
    "memory": Figure(
        words="GiB of device memory",
        value=lambda _, found: float(_ranked(found).device_peak_bytes[0]) / GIB,
        told=lambda value: f"{value:.1f}",
        small=True,
        searched="memory",
    ),
    "gpus": Figure(
        words="GPUs",
        value=lambda _, found: float(found.cluster.gpus),
        told=lambda value: f"{value:,.0f}",
        small=True,
        searched="gpus",
    ),
    "deadline": Figure(
        words="days",
        value=lambda question, found: days_needed(found, question.model, question.job, question.runtime),
        told=lambda value: f"{value:.3g}",
        small=True,
    ),
}


def figure_of(question: Question) -> Figure:
    """That of the question's objective; a deadline needs a token budget, a cost a price."""
    objective = question.objective
    no_budget = objective == "deadline" and question.job.tokens is None
    no_price = objective == "cost" and cost_document(question.cluster, question.job, 1.0)["usd_per_step"] is None
    return FIGURES["throughput" if no_budget or no_price else objective]


def one_change(question: Question) -> list[dict[str, Any]]:
    """What one change each does to the figure of the objective, the best first: {change, gain_fraction, becomes, layout or None when it
    stays the same}. Empty when nothing fits.

    A plan by cost or for a deadline is looked at on its number of GPUs, and on one node more and less."""
    figure = figure_of(question)
    steps = 1 + len(_searched_changes(question, figure))
    today = question.search(figure.searched, watch=StepWatch(question.watch, "as it is", 0.0, 1.0 / steps))
    if today.ranked is None:
        return []
    best, before = today.ranked.layouts.row(0), figure.value(question, today)
    changed = [
        *(_by_rates(question, today) if figure.searched == "throughput" else ()),
        *_by_searches(question, figure),
    ]
    rows: list[dict[str, Any]] = []
    for change, asked, found in changed:
        after, layout = figure.value(asked, found), _ranked(found).layouts.row(0)
        rows.append(
            {
                "change": change,
                "gain_fraction": figure.gain(before, after),
                "becomes": figure.told(after),
                "layout": None if layout == best else layout.words(),
            }
        )
    return sorted(rows, key=lambda row: -float(row["gain_fraction"]))


def _by_rates(question: Question, today: SearchResult) -> Iterator[tuple[str, Question, SearchResult]]:
    """(change, question, what it finds) with one rate of the machine higher."""
    fastest = _ranked(today).layouts.take(np.arange(min(ROWS_FOR_RATES, len(_ranked(today)))))
    for change, cluster in faster_machines(today.cluster):
        at = Setting(model=question.model, job=question.job, cluster=cluster, runtime=question.runtime)
        found = estimated_on_parts(at, fastest) if cluster.parts else estimated(at, fastest)
        first: NDArray[np.intp] = np.asarray([int(found.step_s.argmin())])
        yield change, question, replace(today, cluster=cluster, ranked=found.take(first))


def faster_machines(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    """(change, the cluster with it) of each of RATES that it has: no network on one node, no links on one GPU."""
    absent = {
        "10 % faster network between nodes": cluster.nodes == 1,
        "10 % faster links inside the node": cluster.gpus == 1,
    }
    for change, faster in RATES.items():
        if not absent.get(change, False):
            yield change, faster(cluster)


def _by_searches(question: Question, figure: Figure) -> Iterator[tuple[str, Question, SearchResult]]:
    """(change, question, what it finds) with more memory, another batch or other GPUs."""
    changes = _searched_changes(question, figure)
    for at, change in enumerate(changes, start=1):
        watch = StepWatch(question.watch, change, at / (1 + len(changes)), (at + 1) / (1 + len(changes)))
        try:
            parts = CHANGES[change](question)
            found = question.search(figure.searched, **parts, watch=watch)
        except InputError:  # not a size of this cluster, no half of the batch
            continue
        if found.ranked is not None:
            yield change, replace(question, **parts), found


CHANGES: dict[str, Callable[[Question], dict[str, Any]]] = {
    "10 % more GPU memory": lambda q: {"cluster": with_memory_times(q.cluster, MORE)},
    "twice the global batch": lambda q: {"job": replace(q.job, global_batch=2 * q.job.global_batch)},
    "half the global batch": lambda q: {"job": replace(q.job, global_batch=q.job.global_batch // 2)},
    "sequences half as long": lambda q: {"job": replace(q.job, seq=q.job.seq // 2)},
    "twice the GPUs": lambda q: {"cluster": q.cluster.with_gpus(2 * q.cluster.gpus)},
    "half the GPUs": lambda q: {"cluster": q.cluster.with_gpus(q.cluster.gpus // 2)},
    "one node more": lambda q: {"cluster": q.cluster.with_gpus(q.cluster.gpus + q.cluster.node.gpus)},
    "one node less": lambda q: {"cluster": q.cluster.with_gpus(q.cluster.gpus - q.cluster.node.gpus)},
}
"""What has to be searched again."""


def _searched_changes(question: Question, figure: Figure) -> list[str]:
    """Those of CHANGES that can move the figure: rates and a larger batch save no memory, more of it needs no less."""
    sizes = ["twice the GPUs", "half the GPUs"]
    if figure.searched == "gpus":
        return ["10 % more GPU memory", "half the global batch", "sequences half as long"]
    if figure.searched == "memory":
        return ["half the global batch", "sequences half as long", *sizes]
    by_size = figure.small and not question.cluster.parts and question.cluster.nodes > 1
    nodes = ["one node more", "one node less"] if by_size else []
    return ["10 % more GPU memory", "twice the global batch", *sizes, *nodes]


def network_needed(question: Question, layout: Layout) -> dict[str, float] | None:
    """Gbit/s between nodes per GPU that keep `layout` within NEAR of its step time: {gbps_per_gpu, now_gbps_per_gpu}.

    None on one node or without a network; the rate of today where even that is needed in full.
    """
    now = network_gbps_per_gpu(question.cluster)
    if now is None or question.cluster.nodes == 1:
        return None

    def step_s(gbps: float) -> float:
        cluster = with_network_rate(question.cluster, gbps)
        at = Setting(model=question.model, job=question.job, cluster=cluster, runtime=question.runtime)
        return float(estimate_any(at, layout).step_s[0])

    most = NEAR * step_s(now)
    low, high = min(LEAST_GBPS, now), now
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if step_s(middle) <= most else (middle, high)
    return {"gbps_per_gpu": high, "now_gbps_per_gpu": now}
