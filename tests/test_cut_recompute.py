"""Stage cuts chosen together with recompute, against every cut with every number of recomputed layers, on models of a few layers in
memory so short that layers of one stage, or of all, have to be recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import LayoutTable, parse_layout
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.recompute import BY_STAGE, RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules, rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner import stage_search
from shardplan.planner.machines import with_network_rate
from shardplan.planner.search import search
from shardplan.planner.space import Wishes, allowed, layout_space, parse_wishes
from shardplan.planner.stage_search import wanted_of

NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")
NOT_WRITTEN_OUT = (
    "order",
    "hsdp",
    "offload_ratio",
    "offload_optimizer",
    "offload_params",
    "recompute=selective",
    "hpz",
)
"""Forbidden: other tests compare these words with writing them out."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job on a few small GPUs; `forbid` beside NOT_WRITTEN_OUT."""

    runtime: str
    model: str
    layers: int
    cluster: str
    gpus: int
    gib: float
    batch: int
    fix: str
    seq: int = 1024
    gbps: float | None = None
    forbid: tuple[str, ...] = ()

    def setting(self) -> Setting:
        """With GPUs of `gib` GiB."""
        model, cluster = load_model(self.model), load_cluster(self.cluster, gpus=self.gpus)
        gpu = replace(cluster.node.gpu, memory_bytes=self.gib * 2**30)
        cluster = replace(cluster, node_runs=((replace(cluster.node, gpu=gpu), cluster.nodes),))
        return Setting(
            model=replace(model, layers=((model.layers[0][0], self.layers),)),
            job=Job(seq=self.seq, global_batch=self.batch, precision="bf16"),
            cluster=cluster if self.gbps is None else with_network_rate(cluster, self.gbps),
            runtime=load_runtime(self.runtime),
        )


def changed(table: LayoutTable, **columns: int) -> LayoutTable:
    return replace(table, **{name: np.full(len(table), value) for name, value in columns.items()})


def every_cut(layers: int, chunks: int, *, bare_ends: bool) -> list[tuple[int, ...]]:
    """Layers of each chunk; with `bare_ends` the first and the last may have none."""
    ends = combinations(range(1 - bare_ends, layers + bare_ends), chunks - 1)
    return [tuple(np.diff((0, *some, layers)).tolist()) for some in ends]


def written_out(at: Setting, wishes: Wishes) -> LayoutTable:
    """All cuts, numbers of recomputed layers (of all stages, or of each where the runtime can) and places of their inputs."""
    can, layers = at.runtime.abilities, at.model.layer_count
    bare = can.ends_without_layers
    space = layout_space(at.model, at.job, at.cluster.gpus, wishes, cp_kinds=(), bare_ends=bare)
    full = space.take(space.recompute == FULL)
    rows = [space]
    if can.partial_recompute:
        rows += [changed(full, recompute_layers=count) for count in range(1, layers + 1)]
    pieces = list(rows)
    for pp, chunks in sorted(set(zip(space.pp.tolist(), (space.pp * space.virtual_stages).tolist(), strict=True))):
        splits = (None, *every_cut(layers, chunks, bare_ends=bare))
        mine = [one.take((one.pp == pp) & (one.pp * one.virtual_stages == chunks)) for one in rows]
        pieces += [replace(changed(one, split=code), splits=splits) for one in mine for code in range(1, len(splits))]
        if can.recompute_by_stage and pp == chunks:
            pieces += by_stage(full.take((full.pp == pp) & (full.virtual_stages == 1)), splits)
    for tier in at.runtime.offload.activations[1:]:
        assert tier == "cpu"
        pieces += [changed(one.take(one.recompute == FULL), offload_activations=1) for one in list(pieces)]
    whole = stacked([one for one in pieces if len(one)])
    broken = np.any(list(broken_rules(at, whole).values()), axis=0)
    return whole.take(np.flatnonzero(~broken & allowed(whole, wishes.forbidden)))


def by_stage(full: LayoutTable, splits: tuple[tuple[int, ...] | None, ...]) -> Iterator[LayoutTable]:
    """The rows with every number of recomputed layers of each stage of every split."""
    for code, split in enumerate(splits):
        depths = tuple(depth for depth in product(*(range(held + 1) for held in split or ())) if any(depth))
        for index in range(len(depths)):
            rows = changed(full, split=code, recompute_layers=BY_STAGE - index)
            yield replace(rows, splits=splits, depths=depths)


CASES = (
    # more recomputed layers than an equal stage has, on a rank that holds most of an interleaved pipeline
    Case(
        runtime="megatron",
        model="gpt2",
        layers=8,
        cluster="selene",
        gpus=2,
        gib=3.905,
        batch=32,
        fix="pp=2 micro_batch=2 zero=1 schedule=interleaved",
    ),
    # stages of several chunks recompute the same number of layers each, also where single chunks may differ
    Case(
        runtime="shardplan",
        model="gpt2",
        layers=9,
        cluster="h100-ib",
        gpus=4,
        gib=3.874,
        batch=4,
        seq=512,
        gbps=50.0,
        fix="pp=2 micro_batch=1 zero=1 tp=1",
    ),
    Case(
        runtime="shardplan",
        model="gpt2",
        layers=6,
        cluster="h100-ib",
        gpus=4,
        gib=4.025,
        batch=4,
        fix="pp=2 micro_batch=1 zero=1 schedule=interleaved",
    ),
    # inputs of a few recomputed layers in host memory
    Case(
        runtime="fsdp2",
        model="llama-2-7b",
        layers=5,
        cluster="h100-ib",
        gpus=4,
        gib=15.78,
        batch=32,
        seq=4096,
        gbps=50.0,
        fix="pp=2 micro_batch=1 zero=2 tp=1",
    ),
    Case(
        runtime="megatron-deepspeed",
        model="llama-2-7b",
        layers=6,
        cluster="h100-ib",
        gpus=4,
        gib=24.042,
        batch=8,
        seq=4096,
        fix="pp=4 micro_batch=1 zero=1 tp=1",
    ),
    # layouts that recompute nothing forbidden: one layer is enough
    Case(
        runtime="megatron-deepspeed",
        model="llama-2-7b",
        layers=7,
        cluster="h100-ib",
        gpus=2,
        gib=35.26,
        batch=4,
        fix="pp=2 micro_batch=2 zero=0 tp=1",
        forbid=("recompute=none",),
    ),
    Case(
        runtime="megatron",
        model="llama-3-8b",
        layers=8,
        cluster="h100-ib",
        gpus=4,
        gib=20.252,
        batch=8,
        fix="pp=2 micro_batch=4 zero=0",
        forbid=("recompute=none",),
    ),
    # the one layer costs least on another stage than the first
    Case(
        runtime="fsdp2",
        model="llama-2-7b",
        layers=5,
        cluster="h100-ib",
        gpus=2,
        gib=20.0,
        batch=8,
        seq=2048,
        fix="pp=2 micro_batch=1 zero=0 tp=1",
        forbid=("recompute=none",),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.runtime}-{case.model}-{case.layers}")
def test_no_cut_with_any_recompute_is_better(case: Case) -> None:
    at, wishes = case.setting(), parse_wishes(f"{case.fix} cp=1", [*NOT_WRITTEN_OUT, *case.forbid])
    layouts = written_out(at, wishes)
    every = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=layouts, runtime=at.runtime)
    fits = every.fits()
    assert fits.any()
    assert not fits.all()
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    best = int(np.flatnonzero(fits)[every.step_s[fits].argmin()])
    assert found.ranked is not None
    assert found.proved
    assert found.complete
    words = layouts.row(best).words(), found.ranked.layouts.row(0).words()
    assert float(found.ranked.step_s[0]) == pytest.approx(float(every.step_s[best]), rel=1e-6), words


@pytest.mark.parametrize(("model", "layers"), [("llama-3-8b", 10), ("gpt2", 10), ("llama-2-7b", 12)])
def test_chunks_more_unequal_than_need_be_prove_nothing(
    model: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the layers force them to be: what a step loses to them is not in what cuts are chosen by, so that another order of chunks
    may be quicker. Here it is a layer moved away."""
    words = "pp=4 micro_batch=1 zero=1 tp=1 schedule=interleaved virtual_stages=2"
    job = Case(
        runtime="shardplan", model=model, layers=layers, cluster="h100-ib", gpus=4, gib=80.0, batch=32, fix=words
    )
    at, wishes = job.setting(), parse_wishes(f"{words} cp=1", [*NOT_WRITTEN_OUT, "recompute=full"])
    layouts = written_out(at, wishes)
    every = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=layouts, runtime=at.runtime)
    least_s = float(every.step_s[every.fits()].min())
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    assert float(found.ranked.step_s[0]) == pytest.approx(least_s, rel=1e-9)
    assert not found.proved
    monkeypatch.setattr(stage_search, "nudged", lambda *_: ([], 0))
    chosen = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert chosen.ranked is not None
    assert 1.002 < float(chosen.ranked.step_s[0]) / least_s < 1.01
    assert not chosen.proved


V_CASES = (
    Case(
        runtime="fsdp2",
        model="llama-2-7b",
        layers=10,
        cluster="h100-ib",
        gpus=4,
        gib=23.25,
        batch=8,
        seq=512,
        fix="pp=4 micro_batch=1 zero=1 tp=1 schedule=zero_bubble_v",
    ),
    Case(
        runtime="shardplan",
        model="gpt2",
        layers=11,
        cluster="selene",
        gpus=8,
        gib=4.75,
        batch=64,
        seq=512,
        fix="pp=4 micro_batch=1 zero=1 tp=1 schedule=dualpipe_v",
    ),
    Case(
        runtime="fsdp2",
        model="mixtral-8x7b",
        layers=10,
        cluster="h100-ib",
        gpus=8,
        gib=80.0,
        batch=16,
        fix="pp=4 micro_batch=1 zero=1 tp=1 schedule=dualpipe_v",
    ),
)


@pytest.mark.parametrize("case", V_CASES, ids=lambda case: f"{case.runtime}-{case.model}-{case.layers}")
def test_no_order_of_the_chunks_of_a_v_is_better(case: Case) -> None:
    """Ranks of an odd number of layers have a longer chunk, on the way down or on the way up."""
    at, wishes = case.setting(), parse_wishes(f"{case.fix} cp=1", [*NOT_WRITTEN_OUT, "recompute=full"])
    layouts = written_out(at, wishes)
    every = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=layouts, runtime=at.runtime)
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    assert found.proved
    best = np.flatnonzero(every.fits())[every.step_s[every.fits()].argmin()]
    words = layouts.row(int(best)).words(), found.ranked.layouts.row(0).words()
    assert float(found.ranked.step_s[0]) == pytest.approx(float(every.step_s[best]), rel=1e-6), words


FEWER_PARAMETERS = (
    Case(
        runtime="megatron",
        model="llama-3-8b",
        layers=6,
        cluster="h100-ib",
        gpus=6,
        gib=80.0,
        batch=12,
        seq=512,
        fix="pp=3 micro_batch=2 zero=1 tp=1 schedule=1f1b",
    ),
    Case(
        runtime="shardplan",
        model="llama-3-8b",
        layers=10,
        cluster="h100-ib",
        gpus=3,
        gib=80.0,
        batch=6,
        seq=512,
        gbps=10.0,
        fix="pp=3 micro_batch=2 zero=2 schedule=1f1b",
    ),
)


@pytest.mark.parametrize("case", FEWER_PARAMETERS, ids=lambda case: f"{case.runtime}-{case.layers}")
def test_what_is_cut_off_the_list_of_cuts_is_not_proved(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best cut has a slower pipeline than the first of the list, and fewer parameters to exchange and update."""
    at, wishes = case.setting(), parse_wishes(f"{case.fix} cp=1", [*NOT_WRITTEN_OUT, "recompute=full"])
    layouts = written_out(at, wishes)
    every = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=layouts, runtime=at.runtime)
    least_s = float(every.step_s[every.fits()].min())
    whole = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert whole.ranked is not None
    assert float(whole.ranked.step_s[0]) == pytest.approx(least_s, rel=1e-6)
    assert whole.proved
    monkeypatch.setattr(stage_search, "nudged", lambda *_: ([], 0))
    monkeypatch.setattr(stage_search, "wanted_of", lambda *of: replace(wanted_of(*of), most_cuts=1))
    short = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert short.ranked is not None
    assert float(short.ranked.step_s[0]) > 1.01 * least_s
    assert not short.proved


def test_the_runtimes_own_uneven_stages_count_like_explicit_ones() -> None:
    at = replace(CASES[0], gpus=5, layers=12).setting()
    for words in ("pp=5", "pp=5 stage_layers=3,3,2,2,2"):
        known = {count: rejections(at, parse_layout(f"{words} recompute=full:{count}"))[0] for count in (3, 4)}
        assert [[one.rule for one in broken] for broken in known.values()] == [[], ["recompute-layers"]]


def test_as_many_layers_of_a_stage_may_be_recomputed_as_the_fullest_has() -> None:
    at = CASES[0].setting()
    words = "pp=2 micro_batch=2 zero=1 schedule=interleaved virtual_stages=2 stage_layers=0,1,6,1"
    known = {count: rejections(at, parse_layout(f"{words} recompute=full:{count}"))[0] for count in (5, 6, 7)}
    assert [[one.rule for one in broken] for broken in known.values()] == [[], [], ["recompute-layers"]]
