"""Bounds that hold for every cut of the layers, factors of the space, chunks without layers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.data_parallel import one_exchange_s
from shardplan.costmodel.estimate import estimate, memory_alone, on_mean_stage
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import COLUMNS, Layout, LayoutTable, layout_table, parse_layout
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.pipeline import split_layers
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import RULES, broken_rules, rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.stage_trials import StageTrials
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.topology import tier_table
from shardplan.planner import stages
from shardplan.planner.cut_bounds import least_peak_s, over_mean_s, recomputing_mean_s
from shardplan.planner.machines import with_network_rate
from shardplan.planner.search import search
from shardplan.planner.sift import Sifted, outdone, sift, sift_space
from shardplan.planner.space import Wishes, layout_space, parse_wishes
from shardplan.planner.stage_options import Part
from shardplan.planner.stage_search import wanted_of
from shardplan.planner.watch import Watch


def setting(
    model: str = "llama-3-8b", gpus: int = 8, runtime: str = "megatron", layers: int = 32, seq: int = 2048
) -> Setting:
    shapes = load_model(model)
    return Setting(
        model=dataclasses.replace(shapes, layers=((shapes.layers[0][0], layers),)),
        job=Job(seq=seq, global_batch=32, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=gpus),
        runtime=load_runtime(runtime),
    )


@given(st.integers(1, 9), st.integers(2, 5), st.floats(0.1, 3.0), st.floats(0.0, 6.0), st.floats(0.0, 6.0))
def test_least_peak_is_that_of_the_best_sharing(layers: int, pp: int, layer: float, first: float, last: float) -> None:
    best = min(
        max(layer * counts[0] + first, layer * counts[-1] + last, *(layer * n for n in counts))
        for counts in itertools.product(range(layers + 1), repeat=pp)
        if sum(counts) == layers
    )
    one = np.asarray([layer]), np.asarray([first]), np.asarray([last])
    assert least_peak_s(layers, np.asarray([pp]), *one)[0] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("pp", [2, 4])
def test_no_cut_is_below_the_bounds(pp: int) -> None:
    """Whole layers and the recompute that memory asks for, against every cut with every number of recomputed layers."""
    at = setting(layers=6)
    plain = layout_table([parse_layout(f"dp={8 // pp} pp={pp} zero=1 micro_batch=2")])
    mean = on_mean_stage(at, plain)
    cuts = [np.diff((0, *ends, 6)).tolist() for ends in itertools.combinations(range(7), pp - 1)]
    words = [f"dp={8 // pp} pp={pp} zero=1 micro_batch=2 stage_layers={','.join(map(str, cut))}" for cut in cuts]
    words += [f"{word} recompute=full:{n}" for word in words for n in range(1, 7 // pp + 1)]
    layouts = [parse_layout(word) for word in words]
    tried = [one for one in layouts if not rejections(at, one)[1]]
    found = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=layout_table(tried), runtime=at.runtime)
    peak = float(mean.device_peak_bytes[0])
    batches = at.job.global_batch / (8 // pp) / 2
    assert float((found.step_s - mean.step_s[0]).min()) >= (batches - 1) * float(over_mean_s(at, plain)[0]) * 0.99
    for share in (0.9, 0.95, 0.99):
        fits = found.device_peak_bytes <= share * peak
        longer = float(recomputing_mean_s(at, plain, mean.device_peak_bytes, share * peak)[0])
        if fits.any():
            assert float((found.step_s[fits] - mean.step_s[0]).min()) >= (batches - 1) * longer * 0.99


@pytest.mark.parametrize("runtime", ["megatron", "deepspeed"])
def test_as_much_hides_in_the_bound_as_of_any_more_parameters(runtime: str) -> None:
    """One bucket more leaves a smaller last one: a fuller stage may wait less for its exchanges."""
    at = setting(runtime=runtime)
    held = np.linspace(1e7, 4e9, 400)
    rows = layout_table([parse_layout("dp=4 pp=2 zero=1 micro_batch=1")] * len(held))

    def exposed_s(*, at_least: bool) -> np.ndarray:
        one = one_exchange_s(
            tier_table(at.cluster),
            rows,
            at.runtime.communication,
            parameters=held,
            trained=held,
            units=np.full(len(held), 16.0),
            gradient_bytes=4,
            parameter_bytes=2,
            gpu=at.cluster.gpu,
            at_least=at_least,
        )
        return one.reduce_s * (1.0 - one.reduce_share) + one.gather_s * (1.0 - one.gather_share)

    plain, least = exposed_s(at_least=False), exposed_s(at_least=True)
    of_more = np.minimum.accumulate(plain[::-1])[::-1]
    assert (plain > of_more * 1.01).any()
    assert (least <= of_more * (1 + 1e-9)).all()
    assert (least >= 0.5 * of_more).all()


@pytest.mark.parametrize(
    ("model", "runtime", "fix", "forbid"),
    [
        ("llama-3-8b", "megatron", "", []),
        ("mixtral-8x7b", "megatron", "", ["offload", "zero=3"]),
        ("llama-3-8b", "deepspeed", "recompute=full", ["hsdp"]),
        ("llama-3-8b", "shardplan", "", ["recompute", "dp_shard=8", "zero=0"]),
    ],
)
def test_factors_are_sifted_like_layouts(model: str, runtime: str, fix: str, forbid: list[str]) -> None:
    at = setting(model, gpus=16, runtime=runtime)
    wishes, sifted = parse_wishes(fix, forbid), Sifted()
    sift_space(at, wishes, sifted, Watch())
    whole = layout_space(
        at.model,
        at.job,
        16,
        wishes,
        at.runtime.abilities.context_parallel,
        schedules=at.runtime.abilities.schedules,
        bare_ends=runtime == "megatron",
    )
    offered = at.runtime.abilities.offload_optimizer
    whole = whole.take(np.isin(whole.offload_optimizer, [("none", "cpu", "nvme").index(word) for word in offered]))
    good = whole.take(~np.any([np.zeros(len(whole), dtype=bool), *broken_rules(at, whole).values()], axis=0))
    good = good.take(~outdone(at, good, wishes))
    waiting = [sift(at, one.layouts(), sifted.refused, sifted.later) for one in sifted.waiting]
    assert all((one.cp > 1).all() for one in waiting)
    assert rows_of(stacked([sifted.valid(wishes), *waiting])) == rows_of(good)
    assert sum(one.count for one in sifted.account()) == sifted.looked_at - sifted.outdone - len(good)
    assert {one.rule for one in sifted.account()} <= {rule.id for rule in RULES}


@pytest.mark.parametrize("runtime", ["megatron", "shardplan", "fsdp2", "deepspeed", "fsdp1"])
@pytest.mark.parametrize(("model", "headroom"), [("llama-3-8b", 0.75), ("gpt2", 0.96)])
def test_what_states_alone_set_apart_fits_in_no_way(model: str, headroom: float, runtime: str) -> None:
    """With equal stages or however they are cut, every layer recomputed or none; all of it was looked at."""
    at, wishes = setting(model, gpus=16, runtime=runtime, seq=1024), parse_wishes()
    every, left = Sifted(), Sifted()
    sift_space(at, wishes, every, Watch())
    sift_space(at, wishes, left, Watch(), headroom=headroom)
    assert every.looked_at == left.looked_at
    written = [stacked([one.valid(wishes), *(ways.layouts() for ways in one.waiting)]) for one in (every, left)]
    whole, kept = written
    known = rows_of(kept)
    apart = [row for row, values in enumerate(zip(*whole.columns().values(), strict=True)) if values not in known]
    assert apart
    assert len(known) + len(apart) == len(whole)
    table = whole.take(np.asarray(apart))
    for one in (table, dataclasses.replace(table, recompute=np.full(len(table), RECOMPUTE.index("full")))):
        assert not memory_alone(at, one).fits_gpu(headroom).any()
        assert not memory_alone(at, one, stages="mean").fits_gpu(headroom).any()


def rows_of(table: LayoutTable) -> set[tuple[int, ...]]:
    return set(zip(*(getattr(table, name).tolist() for name in COLUMNS), strict=True))


def test_126_layers_fill_128_chunks_where_the_ends_may_be_bare() -> None:
    megatron, fsdp2 = load_runtime("megatron"), load_runtime("fsdp2")
    assert split_layers(126, 128, megatron.stages) == (0, *[1] * 126, 0)
    assert split_layers(126, 127, megatron.stages) == (*[1] * 126, 0)
    assert megatron.abilities.ends_without_layers
    assert not fsdp2.abilities.ends_without_layers
    words = "pp=4 dp=2 micro_batch=1 zero=1 stage_layers=0,3,3,0"
    assert not rejections(setting(layers=6), parse_layout(words))[0]
    assert "ends-without-layers" in {
        one.rule for one in rejections(setting(layers=6, runtime="fsdp2"), parse_layout(words))[0]
    }


def test_a_head_as_heavy_as_layers_gets_a_stage_of_its_own() -> None:
    at = setting(layers=3)
    wishes = parse_wishes("pp=4 tp=2 schedule=1f1b virtual_stages=1 sequence_parallel=true")
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    layers = found.ranked.layouts.row(0).stage_layers
    assert layers is not None
    assert (len(layers), sum(layers), layers[-1]) == (4, 3, 0)
    assert found.proved


def test_words_say_equal_stages_once() -> None:
    layout = parse_layout("pp=4 virtual_stages=2 schedule=interleaved stage_layers=1,2*5,3,3")
    assert layout.stage_layers == (1, 2, 2, 2, 2, 2, 3, 3)
    assert "stage_layers=1,2*5,3,3" in layout.words()
    assert parse_layout(layout.words()) == layout


def test_numbers_of_recomputed_layers_that_leave_layers_over_are_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few options of a stage fit, most numbers are told impossible before the chain is walked; the best is the same."""
    chain, cut = [0], stages.best_cut

    def counting(*of: Any, **words: Any) -> Any:
        chain[0] += 1
        return cut(*of, **words)

    def best() -> tuple[Layout, int]:
        chain[0] = 0
        found = search(
            model=load_model("llama-2-13b"),
            job=Job(seq=4096, global_batch=32, precision="bf16"),
            cluster=load_cluster("8x4090", gpus=8),
            runtime="megatron",
            wishes=parse_wishes("pp=4 micro_batch=1 schedule=interleaved offload_optimizer=cpu"),
        )
        assert found.ranked is not None
        return found.ranked.layouts.row(0), chain[0]

    monkeypatch.setattr(stages, "best_cut", counting)
    quick, few = best()
    monkeypatch.setattr(stages.Options, "holds_all", lambda options, chain, good: np.ones(len(good), dtype=bool))
    slow, many = best()
    assert quick == slow
    assert 0 < few < many / 2


def test_cuts_that_do_not_fit_are_not_written_out_where_nothing_bounds_them() -> None:
    """Before anything fits the fastest step known is infinite: of two micro-batches all cuts are written out, those that fit."""
    asked = Setting(
        model=load_model("gpt2"),
        job=Job(seq=512, global_batch=2, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=2),
        runtime=load_runtime("shardplan"),
    )
    layouts = layout_table([parse_layout("pp=2 micro_batch=1")])
    part = Part(setting=asked, trials=StageTrials.of(asked, layouts), stages=2)
    ready = stages.Cuttable.of([part], wanted_of(asked, Wishes(), 0.05), np.array([np.inf]))
    assert ready is not None
    cuts = ready.cuts(0, np.inf)
    assert len(cuts.layouts) > 100
    assert np.isfinite(cuts.more_s).all()
    for layout in cuts.layouts:
        _, _, repeated = layout.recompute.partition(":")
        if "," in repeated and layout.stage_layers:
            assert all(int(n) <= held for n, held in zip(repeated.split(","), layout.stage_layers, strict=True))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved virtual_stages=4"])
def test_where_stages_recompute_alike_all_of_them_do(schedule: str) -> None:
    """Exchanges may hide behind the launches of recompute also where all fits without: every number is looked at, but none that is another
    on one stage than on the rest."""
    model = load_model("gpt2")
    asked = Setting(
        model=dataclasses.replace(model, layers=((model.layers[0][0], 10),)),
        job=Job(seq=512, global_batch=16, precision="bf16"),
        cluster=with_network_rate(load_cluster("h100-ib", gpus=4), 2.0),
        runtime=load_runtime("megatron"),
    )
    layouts = layout_table([parse_layout(f"dp=2 pp=2 micro_batch=2 zero=1 schedule={schedule}")])
    part = Part(setting=asked, trials=StageTrials.of(asked, layouts), stages=2)
    even = on_mean_stage(asked, layouts)
    waits_s = np.stack([even.time["dp_exposed_s"], even.time["behind_host_s"]], axis=1)
    ready = stages.Cuttable.of([part], wanted_of(asked, Wishes(), 0.05), even.step_s, waits_s)
    assert ready is not None
    assert (ready.options.fewest <= 0).all()
    words = {layout.recompute for layout in ready.cuts(0, float(even.step_s[0])).layouts}
    assert {"none", "full:1"} <= words
    assert not any("," in word for word in words)


def test_no_stages_are_cut_of_what_host_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """840 GB of optimizer states beside 128 GiB of RAM: no cut, and no number of recomputed layers, changes that."""

    def refused(*of: Any) -> Any:
        raise AssertionError("cut in vain")

    monkeypatch.setattr(stages.Cuttable, "cuts", refused)
    found = search(
        model=load_model("llama-3-70b"),
        job=Job(seq=1024, global_batch=96, precision="bf16"),
        cluster=load_cluster("8x4090", gpus=8),
        runtime="fsdp2",
        headroom=0.2,
    )
    assert found.ranked is None
    assert found.proved
