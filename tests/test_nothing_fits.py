"""What is said where nothing fits: the nearest layout, by how much, and which single changes do."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
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


def test_no_remedy_is_printed_twice() -> None:
    start = " ".join(NONE_DOES.split()[:6])
    for words, changes in (("llama-3-8b --cluster 8x4090 --gpus 1", True), ("mixtral-8x7b --cluster 4x3090", False)):
        asked = f"plan {words} --global-batch 16 --seq 2048 --runtime megatron"
        printed = CliRunner().invoke(app, asked.split())
        assert printed.exit_code == 1
        assert printed.output.count("no layout is nearer to fitting") == 1
        assert printed.output.count("what would fit instead") == changes
        assert printed.output.count(start) == (not changes)
