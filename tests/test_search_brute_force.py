"""The search against writing out every layout: all words multiplied, every number of recomputed layers, every order; no bounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from shardplan.costmodel.axis_order import ORDERS
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.recompute import ALL_LAYERS, BY_STAGE, PART_BITS, RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.closest import LEAST_STEP, closest_layout, needed_share
from shardplan.planner.front import FRONT_SAVING, memory_points
from shardplan.planner.knobs import RATIOS
from shardplan.planner.machines import with_network_rate
from shardplan.planner.ranking import Objective
from shardplan.planner.search import search
from shardplan.planner.space import Wishes, layout_space, parse_wishes

FloatArray = NDArray[np.float64]
NONE, SELECTIVE, FULL = range(len(RECOMPUTE))


@dataclass(frozen=True, kw_only=True)
class Everything:
    """What is known of every layout of a space, (N,) each."""

    step_s: FloatArray
    peak_bytes: FloatArray
    fits: NDArray[np.bool_]
    needed: FloatArray
    """Of what there is, at most (`closest.needed_share`)."""
    best: str
    """Words of the fastest that fits."""


def everything_of(at: Setting, tables: Iterable[LayoutTable]) -> Everything:
    """Table after table, so that memory holds one at a time."""
    columns = list[tuple[FloatArray, FloatArray, NDArray[np.bool_], FloatArray]]()
    best_s, best = np.inf, ""
    for table in tables:
        if not len(table):
            continue
        found = estimated(at, table)
        fits, needed = found.fits(), needed_share(found, 0.05)
        columns.append((np.array(found.step_s), np.array(found.device_peak_bytes), fits, needed))
        if fits.any() and float(found.step_s[fits].min()) < best_s:
            fastest = int(np.flatnonzero(fits)[found.step_s[fits].argmin()])
            best_s, best = float(found.step_s[fastest]), table.row(fastest).words()
    step_s, peak_bytes, fits, needed = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Everything(step_s=step_s, peak_bytes=peak_bytes, fits=fits, needed=needed, best=best)


def every_layout(at: Setting, wishes: Wishes | None = None) -> Iterator[LayoutTable]:
    """All words of the space, each as often as there are values of the others."""
    runtime = at.runtime
    table = layout_space(
        at.model,
        at.job,
        at.cluster.gpus,
        wishes,
        cp_kinds=runtime.abilities.context_parallel,
        schedules=runtime.abilities.schedules,
        bare_ends=runtime.abilities.ends_without_layers,
    )
    parts = runtime.abilities.recompute_parts
    sets = chain.from_iterable(combinations(parts, size) for size in range(1, len(parts) + 1))
    plain = table.take(table.recompute == NONE)
    pieces = [table]
    for layers in range(1, at.model.layer_count + 1) if runtime.abilities.partial_recompute else ():
        pieces.append(changed(plain, recompute=FULL, recompute_layers=layers))
    pieces += [changed(plain, recompute=SELECTIVE, recompute_parts=sum(PART_BITS[p] for p in some)) for some in sets]
    with_others = chain.from_iterable([one, *others(at, one)] for one in pieces)
    for one in chain.from_iterable(in_orders(one, runtime.abilities.orders) for one in with_others):
        yield valid(at, one)


def others(at: Setting, table: LayoutTable) -> list[LayoutTable]:
    """The same with activations in host memory, shares of the optimizer, a second copy of the parameters, and these together."""
    found = [table]
    if "cpu" in at.runtime.offload.activations:
        found.append(changed(table.take(table.recompute == FULL), offload_activations=1))
    if at.runtime.offload.ratio_zero:
        found += [changed(one, offload_ratio=ratio) for one in list(found) for ratio in RATIOS]
    if at.runtime.abilities.zeropp:
        found += [changed(one, hpz=hpz) for one in list(found) for hpz in (2, 4, 8)]
    return found[1:]


def in_orders(table: LayoutTable, orders: tuple[str, ...]) -> list[LayoutTable]:
    return [changed(table, order=ORDERS.index(order)) for order in orders]


def changed(table: LayoutTable, **columns: int) -> LayoutTable:
    return replace(table, **{name: np.full(len(table), value) for name, value in columns.items()})


def valid(at: Setting, table: LayoutTable) -> LayoutTable:
    return table.take(~np.any([np.zeros(len(table), dtype=bool), *broken_rules(at, table).values()], axis=0))


def joined(pieces: list[LayoutTable]) -> LayoutTable:
    columns = {name: np.concatenate([getattr(one, name) for one in pieces]) for name in pieces[0].columns()}
    return LayoutTable(**columns, splits=pieces[0].splits)


def estimated(at: Setting, table: LayoutTable) -> Estimates:
    return estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=table, runtime=at.runtime)


def short_of_memory(cluster: Cluster, gib: float) -> Cluster:
    """The cluster with smaller GPUs, so that knobs have something to do."""
    gpu = replace(cluster.node.gpu, memory_bytes=gib * 2**30)
    return replace(cluster, node_runs=((replace(cluster.node, gpu=gpu), cluster.nodes),))


ONE_KIND = ["cp_kind=ring", "cp_kind=ulysses", "schedule=gpipe"]
FEW_SCHEDULES = [*ONE_KIND, "schedule=interleaved", "schedule=looped_bfs", "schedule=zero_bubble"]
"""Forbidden, so that writing out the largest spaces stays affordable: a space in 24 orders has 65 million layouts left, in minutes."""
CASES = [  # model, cluster, GPUs, Gbit/s a GPU, GiB a GPU, runtime, seq, batch
    ("gpt2", "h100-ib", 8, None, 6.0, "megatron", 1024, 16),
    ("llama-3-8b", "h100-ib", 8, None, 24.0, "deepspeed", 2048, 16),
    ("llama-3-8b", "h100-ib", 16, 50.0, 30.0, "megatron", 4096, 32),
    ("llama-3-8b", "selene", 8, 25.0, 30.0, "shardplan", 2048, 16),
    pytest.param("llama-3-8b", "selene", 16, 25.0, 40.0, "shardplan", 2048, 32, marks=pytest.mark.slow),
    ("llama-2-7b", "h100-ib", 16, 10.0, 24.0, "deepspeed", 2048, 32),
    ("llama-2-7b", "selene", 8, None, 20.0, "fsdp2", 4096, 16),
    ("mixtral-8x7b", "h100-ib", 16, 100.0, 60.0, "megatron", 2048, 32),
    ("llama-3-8b", "h100-ib", 8, None, 40.0, "megatron", 8192, 16),
]


def small(
    model: str, cluster: str, gpus: int, gbps: float | None, gib: float, runtime: str, seq: int, batch: int
) -> Setting:
    """The setting of a case."""
    machine = short_of_memory(load_cluster(cluster, gpus=gpus), gib)
    return Setting(
        model=load_model(model),
        job=Job(seq=seq, global_batch=batch, precision="bf16"),
        cluster=machine if gbps is None else with_network_rate(machine, gbps),
        runtime=load_runtime(runtime),
    )


@pytest.mark.parametrize(("model", "cluster", "gpus", "gbps", "gib", "runtime", "seq", "batch"), CASES)
def test_nothing_better_exists(
    model: str, cluster: str, gpus: int, gbps: float | None, gib: float, runtime: str, seq: int, batch: int
) -> None:
    at = small(model, cluster, gpus, gbps, gib, runtime, seq, batch)
    forbidden = FEW_SCHEDULES if runtime == "shardplan" else ONE_KIND if model == "mixtral-8x7b" else []
    everything = everything_of(at, every_layout(at, parse_wishes(forbid=forbidden)))
    fits = everything.fits
    assert fits.any()
    assert not fits.all()
    objectives: tuple[tuple[Objective, float], ...] = (
        ("throughput", float(everything.step_s[fits].min())),
        ("memory", float(everything.peak_bytes[fits].min())),
    )
    for objective, least in objectives:
        asked = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
        found = search(**asked, objective=objective, wishes=parse_wishes(forbid=["stage_layers", *forbidden]))
        assert found.ranked is not None
        assert found.complete
        figure = found.ranked.step_s if objective == "throughput" else found.ranked.device_peak_bytes
        assert float(figure[0]) == pytest.approx(least, rel=1e-9), (
            everything.best,
            found.ranked.layouts.row(0).words(),
        )
        assert found.ranked.fits().all()
        free = search(**asked, objective=objective, wishes=parse_wishes(forbid=forbidden))
        assert free.ranked is not None
        assert free.proved or objective == "memory"
        best_s = found.ranked.step_s[0] if objective == "throughput" else found.ranked.device_peak_bytes[0]
        its = free.ranked.step_s[0] if objective == "throughput" else free.ranked.device_peak_bytes[0]
        assert its <= best_s * (1.0 + 1e-12)


FRONT_CASES = [CASES[1], CASES[4], CASES[8]]


@pytest.mark.parametrize(("model", "cluster", "gpus", "gbps", "gib", "runtime", "seq", "batch"), FRONT_CASES)
def test_nothing_on_the_front_is_slower_than_it_need_be(
    model: str, cluster: str, gpus: int, gbps: float | None, gib: float, runtime: str, seq: int, batch: int
) -> None:
    at = small(model, cluster, gpus, gbps, gib, runtime, seq, batch)
    forbidden = FEW_SCHEDULES if runtime == "shardplan" else []
    everything = everything_of(at, every_layout(at, parse_wishes(forbid=forbidden)))
    fits, peak = everything.fits, everything.peak_bytes
    points = list(memory_points(at, parse_wishes(forbid=["stage_layers", *forbidden]), 0.05))
    most = np.inf
    for point in points:
        under = fits & (peak <= most)
        assert point.complete
        assert point.peak_bytes <= most * (1.0 + 1e-12)
        assert point.step_s == pytest.approx(float(everything.step_s[under].min()), rel=1e-9)
        most = (1.0 - FRONT_SAVING) * point.peak_bytes
    assert len(points) > 3
    assert not (fits & (peak <= most)).any()  # nothing is leaner than the last


@pytest.mark.parametrize(("model", "cluster", "gpus", "gbps", "gib", "runtime", "seq", "batch"), [CASES[1], CASES[6]])
def test_where_nothing_fits_nothing_is_nearer_than_the_closest(
    model: str, cluster: str, gpus: int, gbps: float | None, gib: float, runtime: str, seq: int, batch: int
) -> None:
    at = small(model, cluster, gpus, None, 0.1 * gib, runtime, seq, batch)
    asked = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
    even = parse_wishes(forbid=["stage_layers"])
    found = search(**asked, wishes=even)
    assert found.ranked is None
    assert found.closest is not None
    least = float(everything_of(at, every_layout(at)).needed.min())
    assert least > 1.0
    nearest = float(needed_share(closest_layout(at, even, 0.05, found.closest), 0.05)[0])
    assert least <= nearest * (1.0 + 1e-9)
    assert nearest * (1.0 - LEAST_STEP) <= least
    free = float(needed_share(closest_layout(at, Wishes(), 0.05, found.closest), 0.05)[0])  # stages cut otherwise too
    assert free * (1.0 - LEAST_STEP) <= nearest


def all_cuts(layers: int, stages: int, *, bare_ends: bool) -> list[tuple[int, ...]]:
    """With `bare_ends` also those whose first stage has the embedding alone, or whose last has the head alone."""
    ends = combinations(range(1 - bare_ends, layers + bare_ends), stages - 1)
    return [tuple(np.diff((0, *some, layers)).tolist()) for some in ends]


def cut_every_way(at: Setting, table: LayoutTable) -> LayoutTable:
    """Pipelines of the table with every cut of the layers, and with every number of recomputed layers of each stage."""
    layers, found = at.model.layer_count, list[LayoutTable]()
    for stages in sorted(set(table.pp.tolist()) - {1}):
        splits = (None, *all_cuts(layers, stages, bare_ends=at.runtime.abilities.ends_without_layers))
        rows = table.take(table.pp == stages)
        found += [replace(changed(rows, split=code), splits=splits) for code in range(1, len(splits))]
        if not at.runtime.abilities.recompute_by_stage:
            continue
        plain = rows.take(rows.recompute == NONE)
        for code, cut in enumerate(splits):
            depths = tuple(depth for depth in product(*(range(n + 1) for n in cut)) if any(depth)) if cut else ()
            for index in range(len(depths)):
                one = changed(plain, split=code, recompute=FULL, recompute_layers=BY_STAGE - index)
                found.append(replace(one, splits=splits, depths=depths))
    return stacked([table, *found])


CUT_CASES = [  # runtime, layers, GPUs, Gbit/s a GPU, GiB a GPU, fixed words
    ("megatron", 5, 16, 10.0, 12.0, "schedule=1f1b virtual_stages=1 micro_batch=1 zero=1"),
    ("megatron", 6, 16, 50.0, 7.0, "schedule=1f1b virtual_stages=1 micro_batch=1 zero=1 tp=2"),
    ("megatron", 7, 8, None, 16.0, "schedule=1f1b virtual_stages=1 micro_batch=1 pp=4"),
    ("shardplan", 5, 16, 25.0, 16.0, "schedule=1f1b virtual_stages=1 micro_batch=1 zero=1 pp=4 tp=2"),
    ("shardplan", 5, 16, 10.0, 8.0, "schedule=1f1b virtual_stages=1 micro_batch=1 zero=1 pp=2"),
    ("fsdp2", 6, 8, None, 22.0, "schedule=1f1b virtual_stages=1 micro_batch=2 zero=1 pp=4"),
]


@pytest.mark.parametrize(("runtime", "layers", "gpus", "gbps", "gib", "fixed"), CUT_CASES)
def test_no_cut_with_whatever_words_is_better(
    runtime: str, layers: int, gpus: int, gbps: float | None, gib: float, fixed: str
) -> None:
    """Every cut of the layers, times every recompute, knob and order."""
    model, wishes = load_model("llama-3-8b"), parse_wishes(fixed)
    machine = short_of_memory(load_cluster("h100-ib", gpus=gpus), gib)
    at = Setting(
        model=replace(model, layers=((model.layers[0][0], layers),)),
        job=Job(seq=2048, global_batch=16, precision="bf16"),
        cluster=machine if gbps is None else with_network_rate(machine, gbps),
        runtime=load_runtime(runtime),
    )
    even = joined(list(every_layout(at, wishes)))
    everything = estimated(at, valid(at, cut_every_way(at, even)))
    fits = everything.fits()
    assert fits.any()
    least_s = float(everything.step_s[fits].min())
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    assert found.proved
    assert found.complete
    best = everything.layouts.row(int(np.flatnonzero(fits)[everything.step_s[fits].argmin()])).words()
    assert float(found.ranked.step_s[0]) == pytest.approx(least_s, rel=1e-6), (
        best,
        found.ranked.layouts.row(0).words(),
    )


def test_what_changes_results_is_only_looked_at_when_allowed() -> None:
    machine = with_network_rate(load_cluster("h100-ib", gpus=32), 5.0)
    asked = {"model": load_model("llama-3-8b"), "job": Job(seq=2048, global_batch=64, precision="bf16")}
    plain = search(**asked, cluster=machine, runtime="deepspeed", wishes=parse_wishes("zero=3 micro_batch=1"))
    allowed = parse_wishes("zero=3 micro_batch=1", allow=("qwz", "qgz"))
    quantised = search(**asked, cluster=machine, runtime="deepspeed", wishes=allowed)
    assert plain.ranked is not None
    assert quantised.ranked is not None
    assert not plain.ranked.layouts.qgz.any()
    assert quantised.ranked.layouts.row(0).qgz
    assert quantised.ranked.step_s[0] < plain.ranked.step_s[0]
    assert (plain.ranked.layouts.recompute_layers == ALL_LAYERS).all()
