"""What is said where nothing fits: the nearest layout, by how much, and which single changes do."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.no_degrees import fewer_gpus, why_forbidden, why_no_degrees
from shardplan.planner.nothing_fits import NONE_DOES, what_would_fit
from shardplan.planner.search import judge, search
from shardplan.planner.space import parse_wishes


def told(
    model: str, runtime: str, gpus: int, *, seq: int = 8192, fix: str = "", headroom: float = 0.05
) -> tuple[dict[str, Any], dict[str, Any]]:
    asked = {
        "model": load_model(model),
        "job": Job(seq=seq, global_batch=64, precision="bf16"),
        "cluster": load_cluster("h100-ib", gpus=gpus),
        "runtime": load_runtime(runtime),
        "headroom": headroom,
    }
    wishes = parse_wishes(fix)
    found = search(**asked, wishes=wishes)
    assert found.ranked is None
    return what_would_fit(found, **asked, wishes=wishes), asked


def test_the_closest_layout_has_its_knobs_turned() -> None:
    document, asked = told("llama-3-8b", "fsdp2", 1, seq=131072)
    assert document["closest"]["layout"]["offload_activations"] == "cpu"
    without = parse_layout("dp=1 zero=3 recompute=full offload_optimizer=cpu offload_params=cpu")
    other = judge(without, **asked)
    assert isinstance(other, dict)
    assert document["closest"]["memory"]["device_peak_bytes"] < other["memory"]["device_peak_bytes"]


def test_the_closest_layout_has_its_stages_cut() -> None:
    document, asked = told("llama-3-8b", "megatron", 8, fix="tp=1", headroom=0.9)
    layout = document["closest"]["layout"]
    assert layout["stage_layers"] is not None
    even = judge(parse_layout("pp=8 dp=1 tp=1 zero=1 recompute=full offload_optimizer=cpu"), **asked)
    assert isinstance(even, dict)
    assert document["closest"]["memory"]["device_peak_bytes"] < even["memory"]["device_peak_bytes"]


@pytest.mark.parametrize("headroom", [0.96, 0.98])
def test_less_headroom_is_the_first_knob_where_it_is_enough(headroom: float) -> None:
    document, asked = told("llama-3-8b", "megatron", 8, headroom=headroom)
    first = document["would_fit"][0]
    assert first.startswith("--headroom 0.")
    enough = float(first.split()[1])
    assert enough < headroom
    again = {**asked, "headroom": enough}
    assert search(**again).ranked is not None
    assert {short["rule"] for short in document["rejections"]} <= {"device-memory", "host-memory"}
    assert {short["remedy"] for short in document["rejections"]} == {
        f"no layout is nearer to fitting; first try {first}"
    }


def test_changes_that_are_told_do_fit() -> None:
    document, asked = told("llama-3-405b", "megatron", 32)
    changes = document["would_fit"]
    assert {"--grad-dtype bf16", "64 GPUs of the same kind (tried by doubling)", "--runtime fsdp2"} <= set(changes)
    assert (
        search(**{**asked, "job": Job(seq=8192, global_batch=64, precision="bf16", grad_dtype="bf16")}).ranked
        is not None
    )
    assert search(**{**asked, "runtime": "fsdp2"}).ranked is not None
    assert not any(change.startswith("--headroom") for change in changes)  # not even all of the memory is enough
    assert search(**{**asked, "headroom": 0.0}).ranked is None


def test_two_changes_are_told_where_no_single_one_does() -> None:
    asked = {
        "model": load_model("llama-3-70b"),
        "job": Job(seq=2048, global_batch=16, precision="bf16"),
        "cluster": load_cluster("4x3090"),
        "runtime": load_runtime("megatron"),
        "headroom": 0.05,
    }
    wishes = parse_wishes("")
    document = what_would_fit(search(**asked, wishes=wishes), **asked, wishes=wishes)
    assert document["would_fit"] == ["--runtime fsdp2 --method qlora, which trains adapters alone"]
    adapters = Job(seq=2048, global_batch=16, precision="bf16", method="qlora")
    assert search(**{**asked, "job": adapters, "runtime": "fsdp2"}).ranked is not None
    assert search(**{**asked, "runtime": "fsdp2"}).ranked is None


def test_what_no_rule_allows_says_what_to_change() -> None:
    document, _ = told("llama-3-8b", "megatron", 8, fix="micro_batch=128")
    (refused,) = document["rejections"]
    assert (refused["rule"], document["closest"]) == ("batch-divisible", None)
    assert refused["remedy"].startswith("use a global batch of")


def at_gpus(cluster: str, gpus: int, batch: int, runtime: str = "shardplan") -> Setting:
    return Setting(
        model=load_model("llama-3-8b"),
        job=Job(seq=8192, global_batch=batch, precision="bf16"),
        cluster=load_cluster(cluster, gpus=gpus),
        runtime=load_runtime(runtime),
    )


def test_degrees_that_no_number_divides_are_told_together_with_a_number_of_gpus_that_has_some() -> None:
    """4,480 = 2^7 * 35: 35 stages are more than 32 layers, and neither the batch nor the heads take a 5. 17 * 256 GPUs are 17 stages."""
    at = at_gpus("selene", 4480, 1024)
    why = why_no_degrees(at, parse_wishes())
    assert why is not None
    for part in (
        "4,480 (2^7*5*7)",
        "dp=5 does not divide global_batch=1024",
        "35*1 chunks, but only 32 layers",
        "tp=5 does",
    ):
        assert part in why.detail, why.detail
    assert why.remedy.startswith("use 4,352 GPUs")
    assert why_no_degrees(at_gpus("selene", 4352, 1024), parse_wishes()) is None
    assert search(model=at.model, job=at.job, cluster=at.cluster.with_gpus(4352), runtime=at.runtime).ranked is not None
    assert why_no_degrees(at_gpus("selene", 4480, 4480), parse_wishes()) is None


def test_a_number_below_is_searched_before_it_is_named() -> None:
    """24 GPUs of tp=8 without a pipeline are dp=3, which does not divide the batch; 16 are dp=2."""
    at, wishes = at_gpus("h100-ib", 24, 64), parse_wishes("tp=8 pp=1 cp=1")
    why = why_no_degrees(at, wishes)
    assert why is not None
    assert "dp=3 does not divide global_batch=64" in why.detail
    assert fewer_gpus(at, wishes) == 16
    assert why.remedy.startswith("use 16 GPUs")


def test_forbidden_words_that_leave_nothing_are_named() -> None:
    """They were laid to the batch. tp=16 is no use: llama-3-8b has 8 heads of keys."""
    at = at_gpus("h100-ib", 16, 64)
    why = why_no_degrees(at, parse_wishes(forbid=[f"tp={tp}" for tp in (1, 2, 4, 8, 16)]))
    assert why is not None
    assert "tp=1, tp=2, tp=4, tp=8 are forbidden" in why.detail
    assert "tp=16 does not divide kv_heads=8" in why.detail
    assert "batch" not in f"{why.detail} {why.remedy}"
    assert why.remedy == "drop one of --forbid tp=1, tp=2, tp=4, tp=8"
    assert why_no_degrees(at, parse_wishes(forbid=["tp=1", "tp=2", "tp=4"])) is None


def test_only_forbidden_words_that_matter_are_named() -> None:
    at = at_gpus("h100-ib", 16, 64)
    stages = [f"zero={stage}" for stage in range(4)]
    why = why_forbidden(at, parse_wishes(forbid=["tp=1", *stages, "offload"]))
    assert why is not None
    assert why.detail == "no layout of 16 GPUs is left: zero=0, zero=1, zero=2, zero=3 are forbidden"
    assert why_forbidden(at, parse_wishes(forbid=["zero=1"])) is None


def test_no_remedy_is_printed_twice() -> None:
    start = " ".join(NONE_DOES.split()[:6])
    for words, changes in (("llama-3-8b --cluster 8x4090 --gpus 1", True), ("mixtral-8x7b --cluster 4x3090", False)):
        asked = f"plan {words} --global-batch 16 --seq 2048 --runtime megatron"
        printed = CliRunner().invoke(app, asked.split())
        assert printed.exit_code == 1
        assert printed.output.count("no layout is nearer to fitting") == 1
        assert printed.output.count("what would fit instead") == changes
        assert printed.output.count(start) == (not changes)
