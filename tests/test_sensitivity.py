"""What one change would do, and how much network a layout needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.mixed import estimate_any
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.explain import what_binds
from shardplan.planner.machines import network_gbps_per_gpu, with_network_rate
from shardplan.planner.ranking import Objective
from shardplan.planner.search import judge
from shardplan.planner.sensitivity import NEAR, RATES, Question, network_needed, one_change
from shardplan.planner.space import Wishes, parse_wishes

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "a100-h100.toml"


def question(
    gpus: int = 32,
    *,
    model: str = "llama-3-8b",
    wishes: Wishes | None = None,
    cluster: str | Path = "selene",
    objective: Objective = "throughput",
) -> Question:
    return Question(
        model=load_model(model),
        job=Job(seq=4096, global_batch=128, tokens=1e11),
        cluster=load_cluster(cluster, gpus=gpus),
        runtime=load_runtime("megatron"),
        wishes=wishes or Wishes(),
        headroom=0.05,
        objective=objective,
    )


def best(asked: Question) -> tuple[Layout, float]:
    found = asked.search().ranked
    assert found is not None
    return found.layouts.row(0), float(found.step_s[0])


def test_one_change_is_a_search_with_that_change() -> None:
    asked = question()
    rows = {row["change"]: row for row in one_change(asked)}
    assert set(RATES) < set(rows)
    assert {"twice the GPUs", "half the GPUs", "10 % more GPU memory", "twice the global batch"} < set(rows)
    layout, step_s = best(asked)
    for change, faster in RATES.items():
        after, after_s = best(dataclasses.replace(asked, cluster=faster(asked.cluster)))
        assert rows[change]["gain_fraction"] == pytest.approx(step_s / after_s - 1.0)
        assert rows[change]["layout"] == (None if after == layout else after.words())
    assert all(rows[change]["gain_fraction"] >= 0 for change in (*RATES, "10 % more GPU memory"))
    _, half_s = best(dataclasses.replace(asked, cluster=asked.cluster.with_gpus(16)))
    assert rows["half the GPUs"]["gain_fraction"] == pytest.approx(2.0 * step_s / half_s - 1.0)
    gains = [row["gain_fraction"] for row in one_change(asked)]
    assert gains == sorted(gains, reverse=True)


def test_one_change_keeps_what_was_fixed_and_answers_nothing_when_nothing_fits() -> None:
    rows = one_change(question(wishes=parse_wishes("tp=8")))
    assert all("tp=8" in row["layout"] for row in rows if row["layout"])
    assert one_change(question(1, model="gpt3-175b")) == []


@pytest.mark.parametrize("objective", ["cost", "deadline", "memory", "gpus"])
def test_the_change_is_told_of_what_the_plan_was_made_for(objective: Objective) -> None:
    asked = question(
        16, cluster="h100-ib", model="llama-2-7b" if objective != "gpus" else "llama-3-70b", objective=objective
    )
    rows = {row["change"]: row for row in one_change(asked)}
    halves, now = "sequences half as long", asked.search(objective if objective in ("memory", "gpus") else "throughput")
    assert now.ranked is not None
    if objective in (
        "cost",
        "deadline",
    ):  # on so many GPUs both go with the time of the step, money with the nodes beside
        twice = asked.search(cluster=asked.cluster.with_gpus(32)).ranked
        assert twice is not None
        ratio = float(twice.step_s[0] / now.ranked.step_s[0]) * (2.0 if objective == "cost" else 1.0)
        tolerance = 1e-6 if objective == "cost" else 0.01  # more GPUs fail more often
        assert rows["twice the GPUs"]["gain_fraction"] == pytest.approx(1.0 - ratio, abs=tolerance)
        assert {"one node more", "one node less", *RATES} <= set(rows)
    elif objective == "memory":
        after = asked.search("memory", job=dataclasses.replace(asked.job, seq=2048)).ranked
        assert after is not None
        ratio = float(after.device_peak_bytes[0] / now.ranked.device_peak_bytes[0])
        assert rows[halves]["gain_fraction"] == pytest.approx(1.0 - ratio)
        assert not set(RATES) & set(rows)
    else:
        fewer = asked.search("gpus", job=dataclasses.replace(asked.job, seq=2048))
        assert rows[halves]["becomes"] == str(fewer.cluster.gpus)
        assert rows[halves]["gain_fraction"] == 1.0 - fewer.cluster.gpus / now.cluster.gpus
        assert not set(RATES) & set(rows)
    gains = [row["gain_fraction"] for row in rows.values()]
    assert gains == sorted(gains, reverse=True)


def test_a_mixed_cluster_gets_both_too() -> None:
    asked = question(64, cluster=EXAMPLE)
    rows = {row["change"]: row for row in one_change(asked)}
    assert {*RATES, "10 % more GPU memory", "twice the global batch"} == set(rows)
    found = asked.search()
    assert found.ranked is not None
    layout, step_s = found.ranked.layouts.row(0), float(found.ranked.step_s[0])
    at = dataclasses.replace(asked, cluster=found.cluster)
    for change, faster in RATES.items():  # at least what the layout of today gains; whole searches may find more
        setting = Setting(model=asked.model, job=asked.job, cluster=faster(at.cluster), runtime=asked.runtime)
        gain = step_s / float(estimate_any(setting, layout).step_s[0]) - 1.0
        assert rows[change]["gain_fraction"] >= gain - 1e-9
        assert gain >= -1e-12
    need = network_needed(at, layout)
    assert need is not None
    assert need["now_gbps_per_gpu"] == network_gbps_per_gpu(at.cluster) == 200.0

    def slowed(gbps: float) -> float:
        slow = dataclasses.replace(at, cluster=with_network_rate(at.cluster, gbps))
        setting = Setting(model=slow.model, job=slow.job, cluster=slow.cluster, runtime=slow.runtime)
        return float(estimate_any(setting, layout).step_s[0]) / step_s

    assert slowed(need["gbps_per_gpu"]) <= NEAR < slowed(need["gbps_per_gpu"] / 1.03)


def test_one_node_has_no_network_to_change() -> None:
    asked = question(8)
    assert "10 % faster network between nodes" not in {row["change"] for row in one_change(asked)}
    assert network_needed(asked, best(asked)[0]) is None


def test_the_network_needed_is_the_least_that_keeps_the_step_time() -> None:
    asked = question()
    layout, step_s = best(asked)

    def slowed(gbps: float) -> float:
        cluster = with_network_rate(asked.cluster, gbps)
        found = estimate(model=asked.model, job=asked.job, cluster=cluster, layouts=layout, runtime=asked.runtime)
        return float(found.step_s[0]) / step_s

    need = network_needed(asked, layout)
    assert need is not None
    assert need["now_gbps_per_gpu"] == 200.0
    assert slowed(need["gbps_per_gpu"]) <= NEAR < slowed(need["gbps_per_gpu"] / 1.03)


def test_the_allocator_setting_is_named_where_slack_is_counted() -> None:
    for name, told in (("megatron", True), ("fsdp2", False)):
        model, job, runtime = load_model("llama-3-8b"), Job(seq=4096, global_batch=128), load_runtime(name)
        at = Setting(model=model, job=job, cluster=load_cluster("selene", gpus=32), runtime=runtime)
        answer = judge(Layout(dp=32, zero=1), model=model, job=job, cluster=at.cluster, runtime=runtime)
        assert isinstance(answer, dict)
        assert any("expandable_segments" in line for line in what_binds(answer, at)) is told
