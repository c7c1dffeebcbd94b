"""Layouts with context parallelism: the least time of a way to compute, and a search that leaves out what it excludes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.axis_order import ORDERS
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.estimates import DEFAULT_HEADROOM
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import RATIO_STEPS
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner import context_search
from shardplan.planner.context_search import Written, least_s_of, write_out
from shardplan.planner.factors import Factors
from shardplan.planner.knobs import RATIOS
from shardplan.planner.search import search
from shardplan.planner.sift import Sifted, sift_space
from shardplan.planner.space import parse_wishes
from shardplan.planner.watch import Watch


def setting(model: str, runtime: str, *, gpus: int = 16, seq: int = 4096, batch: int = 8) -> Setting:
    return Setting(
        model=load_model(model),
        job=Job(seq=seq, global_batch=batch),
        cluster=load_cluster("h100-ib", gpus=gpus),
        runtime=load_runtime(runtime),
    )


def waiting(at: Setting, fix: str = "") -> Sifted:
    sifted = Sifted()
    sift_space(at, parse_wishes(fix), sifted, Watch())
    assert sifted.waiting
    return sifted


CASES = [
    ("llama-3-8b", "shardplan"),
    ("llama-3-8b", "megatron"),
    ("llama-3-8b", "deepspeed"),
    ("mixtral-8x7b", "megatron"),
    ("llama-3-8b", "fsdp2"),
]


@pytest.mark.parametrize(("model", "runtime"), CASES)
def test_no_layout_of_a_way_to_compute_takes_less_than_its_least_time(model: str, runtime: str) -> None:
    """In random orders of axes and with random knobs; stages as they are."""
    at = setting(model, runtime)
    sifted = waiting(at)
    ways = Factors.joined(sifted.waiting)
    chosen = np.sort(np.random.default_rng(0).permutation(len(ways.partners()))[:300])
    ways = ways.with_rows(chosen)
    least_s = least_s_of(at, ways.computing, parse_wishes())
    layouts, of = ways.layouts(), np.repeat(np.arange(len(chosen)), ways.partners())
    random = np.random.default_rng(1)
    orders = [ORDERS.index(order) for order in at.runtime.abilities.orders]
    ratios = np.where(
        (layouts.offload_optimizer == 1) & (layouts.zero == 3), random.choice(RATIOS, len(of)), RATIO_STEPS
    )
    moved = replace(layouts, order=random.choice(orders, len(of)), offload_ratio=ratios)
    compared = 0
    for table in (layouts, moved):
        meant = ~np.any([np.zeros(len(of), dtype=bool), *broken_rules(at, table).values()], axis=0)
        found = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=table.take(meant), runtime=at.runtime)
        assert (found.step_s >= least_s[of[meant]] * (1.0 - 1e-9)).all()
        compared += int(meant.sum())
    assert compared > 300


@pytest.mark.parametrize(("model", "runtime"), CASES)
def test_what_is_left_out_is_slower_than_the_best(model: str, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at, wishes = setting(model, runtime), parse_wishes("", ["stage_layers"])
    question = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime, "wishes": wishes}
    found = search(**question)
    assert found.ranked is not None
    sifted = Sifted()
    sift_space(at, wishes, sifted, Watch(), headroom=DEFAULT_HEADROOM)
    assert found.slower > sifted.outdone
    monkeypatch.setattr(context_search, "NEAR_BEST", np.inf)
    whole = search(**question)
    assert whole.ranked is not None
    assert whole.slower == sifted.outdone
    assert float(found.ranked.step_s[0]) == float(whole.ranked.step_s[0])
    assert found.looked_at == whole.looked_at


def test_layouts_are_written_out_until_the_least_time_passes_the_best() -> None:
    at, wishes = setting("llama-3-8b", "megatron"), parse_wishes()
    sifted = waiting(at)
    partners = sum(int(one.partners().sum()) for one in sifted.waiting)
    none = Written(fastest=1e-6)
    assert not list(write_out(at, wishes, sifted, none, "throughput", 0.04))
    assert none.slower == partners
    every = Written(fastest=np.inf)
    batches = [batch for _, batch in write_out(at, wishes, sifted, every, "memory", 0.04)]
    assert every.slower == 0
    table = stacked([one.layouts for one in batches])
    assert (table.cp > 1).all()
    assert every.fastest == min(float(one.step_s[one.fits(0.04)].min()) for one in batches if one.fits(0.04).any())


def test_context_parallelism_of_short_sequences_is_found() -> None:
    """64 GPUs and 16 sequences: dp alone cannot use them."""
    at = setting("llama-3-8b", "shardplan", gpus=64, batch=16)
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime).ranked
    without = search(
        model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=parse_wishes("", ["context"])
    ).ranked
    assert found is not None
    assert without is not None
    assert int(found.layouts.cp[0]) > 1
    assert float(found.step_s[0]) < 0.7 * float(without.step_s[0])
