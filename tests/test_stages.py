"""Layers to stages: the dynamic programme against brute force over all cuts, the bound that lets the search stop, uneven plans."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

import shardplan
from shardplan.costmodel.estimate import estimate, lower_bounds
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table, parse_layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.chain import best_cut
from shardplan.planner.space import parse_wishes
from shardplan.planner.stage_options import Chain
from shardplan.planner.stage_search import search_stages

PIPELINE_PARTS = ("compute_s", "recompute_s", "tp_exposed_s", "host_s", "bubble_s")


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut `layers` layers into `stages` stages of one layer or more."""
    for ends in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(np.diff((0, *ends, layers)).tolist())


def small_model(*counts: int) -> Model:
    """A Llama of a few layers, every run twice as wide inside as the one before, with a head that weighs as much as some layers."""
    model = shardplan.load_model("llama-3-8b")
    kind = model.layers[0][0]
    runs = tuple((dataclasses.replace(kind, ffn=kind.ffn * 2**i // 2), count) for i, count in enumerate(counts))
    return dataclasses.replace(model, layers=runs)


def setting(model: Model, gpus: int, *, batch: int = 16, seq: int = 2048, runtime: str = "fsdp2") -> Setting:
    cluster = shardplan.load_cluster("h100-ib", gpus=gpus)
    job = shardplan.Job(seq=seq, global_batch=batch)
    return Setting(model=model, job=job, cluster=cluster, runtime=load_runtime(runtime))


def with_memory(cluster: Cluster, gib: float) -> Cluster:
    gpu = dataclasses.replace(cluster.gpu, memory_bytes=gib * 2**30)
    return dataclasses.replace(cluster, node_runs=((dataclasses.replace(cluster.node, gpu=gpu), cluster.nodes),))


def estimated(given: Setting, layouts: LayoutTable | Layout) -> Estimates:
    return estimate(
        model=given.model,
        job=given.job,
        cluster=given.cluster,
        layouts=layouts,
        runtime=given.runtime,
        every_stage=True,
    )


def pipeline_s(found: Estimates) -> np.ndarray:
    """What the cut is chosen by: the slowest stage, and filling and draining the others."""
    return sum(found.time[part] for part in PIPELINE_PARTS)


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_is_the_best_of_all_whatever_stages_cost(seed: int) -> None:
    random = np.random.default_rng(seed)
    stages, layers = int(random.integers(1, 5)), int(random.integers(5, 9))
    seconds = random.random((stages, layers + 1, layers + 1)) * 10
    seconds[random.random(seconds.shape) < 0.2] = np.inf  # does not fit
    peak_weight, sum_weight = random.random(2) * (5, 1)

    def worth(counts: tuple[int, ...]) -> float:
        ends = np.cumsum(counts)
        times = seconds[np.arange(stages), ends - counts, ends]
        return float(peak_weight * times.max() + sum_weight * times.sum())

    best = min(worth(counts) for counts in cuts(layers, stages))
    found = best_cut(
        np.where(np.tri(layers + 1, dtype=bool), np.inf, seconds), peak_weight=peak_weight, sum_weight=sum_weight
    )
    assert (found is None) == (not np.isfinite(best))
    if found is not None:
        assert worth(found) == pytest.approx(best, rel=1e-5)


def test_equal_layers_are_cut_evenly_where_nothing_else_decides() -> None:
    counts = np.arange(13)[None, :] - np.arange(13)[:, None]
    seconds = np.where((counts >= 1) & (counts <= 5), counts.astype(float), np.inf)
    assert best_cut(np.stack([seconds] * 4), peak_weight=8, sum_weight=1) == (3, 3, 3, 3)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((10,), "pp=4 micro_batch=1"),
        ((10,), "tp=2 pp=3 micro_batch=1 sequence_parallel=true"),
        ((4, 5), "pp=4 micro_batch=2"),  # the later layers take longer
        ((3, 3, 3), "dp=2 pp=3 micro_batch=1 zero=1"),
    ],
)
def test_the_search_cuts_as_brute_force_does(counts: tuple[int, ...], words: str) -> None:
    layout = parse_layout(words)
    given = setting(small_model(*counts), layout.gpus)
    every = layout_table([dataclasses.replace(layout, stage_layers=one) for one in cuts(sum(counts), layout.pp)])
    all_cuts = estimated(given, every)
    fixed = f"{layout.words(every=True)} recompute=none".replace("recompute=none ", "", 1)
    result = shardplan.search(
        model=given.model,
        job=given.job,
        cluster=given.cluster,
        runtime="fsdp2",
        wishes=parse_wishes(fixed),
    )
    assert result.ranked is not None and result.proved
    assert result.ranked.step_s[0] == pytest.approx(all_cuts.step_s.min(), rel=1e-6)


def test_few_recomputed_layers_on_the_first_stages_make_a_pipeline_fit() -> None:
    """1F1B keeps most micro-batches on the first stage: it recomputes most, or holds fewest layers."""
    model, words = small_model(12), "pp=4 micro_batch=2 dp=1 zero=0 tp=2 sequence_parallel=true virtual_stages=1"
    given = setting(model, 8, batch=32, seq=8192)
    for gib in range(80, 10, -4):
        small = dataclasses.replace(given, cluster=with_memory(given.cluster, gib))
        even = estimated(small, dataclasses.replace(parse_layout(words), recompute="none"))
        if not even.fits()[0]:
            break
    result = shardplan.search(
        model=model,
        job=small.job,
        cluster=small.cluster,
        runtime="fsdp2",
        wishes=parse_wishes(f"{words} schedule=1f1b"),
    )
    assert result.ranked is not None
    best, space = result.ranked.layouts.row(0), []
    for counts in cuts(12, 4):
        for depth in itertools.product(*(range(n + 1) for n in counts)) if max(counts) <= 4 else ():
            recompute = f"full:{','.join(map(str, depth))}" if any(depth) else "none"
            space.append(dataclasses.replace(parse_layout(words), stage_layers=counts, recompute=recompute))
    brute = estimated(small, layout_table(space))
    fitting = brute.fits()
    assert fitting.any()
    assert pipeline_s(estimated(small, best))[0] <= pipeline_s(brute)[fitting].min() * (1 + 1e-6)
    assert estimated(small, best).fits()[0]


def test_pipelines_that_fit_by_named_parts_alone_are_found_where_whole_layers_are_not_to_be_recomputed() -> None:
    model, cluster = shardplan.load_model("llama-3-8b"), shardplan.load_cluster("a100-40gb-ib", gpus=4)
    result = shardplan.search(
        model=model,
        job=shardplan.Job(seq=16384, global_batch=16),
        cluster=cluster,
        runtime="megatron",
        wishes=parse_wishes("tp=1", ["recompute=full"]),
    )
    assert result.ranked is not None
    known = "dp=1 tp=1 pp=4 micro_batch=1 zero=1 recompute=selective:layernorm+mlp stage_layers=7,9,9,7 offload_optimizer=cpu"
    given = Setting(
        model=model, job=shardplan.Job(seq=16384, global_batch=16), cluster=cluster, runtime=load_runtime("megatron")
    )
    found = estimated(given, parse_layout(known))
    assert found.fits()[0]
    assert result.ranked.step_s[0] <= found.step_s[0] * (1 + 1e-9)


@pytest.mark.parametrize("runtime", ["fsdp2", "megatron", "shardplan", "deepspeed"])
def test_no_cut_beats_the_bound(runtime: str) -> None:
    """Step time and memory of every cut of random layouts against `lower_bounds`."""
    random, model = np.random.default_rng(7), small_model(4, 4)
    given = setting(model, 16, batch=64, runtime=runtime)
    tried = 0
    words = itertools.product((1, 2), (2, 4), range(4), (1, 4), ("none", "full"), ("none", "cpu"))
    for tp, pp, zero, micro_batch, recompute, tier in words:
        layout = Layout(
            tp=tp,
            pp=pp,
            dp=16 // tp // pp,
            zero=zero,
            micro_batch=micro_batch,
            recompute=recompute,
            offload_optimizer=tier,
            offload_ratio=0.3 if tier == "cpu" and zero in given.runtime.offload.ratio_zero else 1.0,
        )
        if rejections(given, layout)[0]:
            continue
        some = list(cuts(8, pp))
        chosen = [some[i] for i in random.choice(len(some), size=min(len(some), 12), replace=False)]
        cut = layout_table([dataclasses.replace(layout, stage_layers=one) for one in chosen])
        seconds, needed = lower_bounds(
            model=model, job=given.job, cluster=given.cluster, layouts=layout_table([layout]), runtime=given.runtime
        )
        found = estimated(given, cut)
        assert (found.step_s >= seconds[0] * (1 - 1e-9)).all()
        assert (found.device_peak_bytes >= needed[0] * (1 - 1e-9)).all()
        tried += 1
    assert tried > 8


def test_a_runtime_with_equal_stages_gets_none_else() -> None:
    given = setting(small_model(9), 3, runtime="megatron-2021")
    table = layout_table([parse_layout("pp=3 dp=1 micro_batch=1")])
    assert search_stages(given, table, parse_wishes(), 0.05, fastest=float("inf")).found is None


def test_rejections_of_recompute_by_stage() -> None:
    model = small_model(12)
    words = parse_layout("pp=4 recompute=full:3,2,1")
    assert [r.rule for r in rejections(setting(model, 4), words)[0]] == ["recompute-by-stage"]
    words = parse_layout("pp=4 recompute=full:3,2,1,0")
    assert not rejections(setting(model, 4), words)[0]
    assert [r.rule for r in rejections(setting(model, 4, runtime="megatron"), words)[0]] == [
        "runtime-recompute-by-stage"
    ]


def test_the_same_search_twice_gives_the_same_ranking() -> None:
    given = setting(small_model(10), 8)
    inputs = {"model": given.model, "job": given.job, "cluster": given.cluster, "runtime": "fsdp2"}
    one, other = (shardplan.search(**inputs).ranked for _ in range(2))
    assert one is not None and other is not None
    assert [one.layouts.row(i) for i in range(len(one))] == [other.layouts.row(i) for i in range(len(other))]


@pytest.mark.parametrize("counts", [(7,), (3, 4), (1, 5, 2), (1,) * 70])
def test_what_consecutive_layers_hold_by_kind(counts: tuple[int, ...]) -> None:
    chain = Chain.of(setting(small_model(*counts), 8), parse_layout("pp=2"))
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    held = {
        (i, j): tuple(kinds[i:j].count(kind) for kind in range(len(counts)))
        for i, j in itertools.combinations(range(len(kinds) + 1), 2)
    }
    assert [tuple(row) for row in chain.contents.tolist()] == sorted(
        set(held.values()) - {counts}
    )  # a layer for the other
    some = chain.contents[1::2]
    segments = chain.segments(some)
    place = {tuple(row): at for at, row in enumerate(some.tolist())}
    assert {ends: int(segments[ends]) for ends in held} == {
        ends: place.get(content, -1) for ends, content in held.items()
    }
    assert (segments[np.tril_indices(len(segments))] == -1).all()
