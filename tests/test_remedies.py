"""Remedies for too little memory: what they name fits by estimate, and breaks no rule."""

from __future__ import annotations

import re

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.remedies import LEAST_SAVING, first_knob, memory_remedy, memory_savings
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import judge

CASES = [
    ("llama-3-8b", 8, "fsdp2", "dp=8 micro_batch=2 zero=3", {"recompute=full"}),
    ("llama-3-8b", 1, "deepspeed", "zero=3", {"offload_optimizer=cpu", "offload_params=cpu"}),
    ("llama-3-70b", 64, "megatron", "dp=16 tp=4 micro_batch=2", set[str]()),
    ("llama-3-70b", 64, "deepspeed", "dp=2 tp=8 pp=4", {"recompute=full"}),
    ("mixtral-8x7b", 16, "megatron", "dp=16 ep=8 zero=1", set[str]()),
]


def setting(model: str, gpus: int, runtime: str) -> Setting:
    return Setting(
        model=load_model(model),
        job=Job(seq=8192, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=gpus),
        runtime=load_runtime(runtime),
    )


@pytest.mark.parametrize(("model", "gpus", "runtime", "words", "named"), CASES)
def test_what_a_remedy_names_fits(model: str, gpus: int, runtime: str, words: str, named: set[str]) -> None:
    at = setting(model, gpus, runtime)
    told = memory_remedy(at, parse_layout(words), 1.0, 0.05)
    assert told.startswith("it fits with "), told
    change = told.removeprefix("it fits with ").split(" (")[0]
    assert named <= set(change.split()), told
    given = {word.split("=")[0]: word for word in words.split()}
    given |= {word.split("=")[0]: word for word in change.split()}
    layout = parse_layout(" ".join(given.values()))
    assert layout.gpus == gpus
    answer = judge(layout, model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime)
    assert isinstance(answer, dict)
    assert answer["fits"], (told, answer["rejections"])
    assert float(re.findall(r"\((\S+) GiB", told)[0]) == pytest.approx(
        answer["memory"]["device_peak_bytes"] / 2**30, abs=0.051
    )


def test_savings_break_no_rule_and_save() -> None:
    at, layout = setting("llama-3-8b", 8, "megatron"), Layout(dp=8, zero=1, micro_batch=2)
    before = judge(layout, model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime)
    assert isinstance(before, dict)
    found = memory_savings(at, layout, 0.05)
    assert len(found) > 5
    for one in found:
        assert rejections(at, one.layout) == ([], False), one.words
        assert one.device_bytes <= (1.0 - LEAST_SAVING) * before["memory"]["device_peak_bytes"]
    fitting = [one.step_s for one in found if one.fits]
    assert fitting == sorted(fitting)
    assert found == sorted(found, key=lambda one: not one.fits)


def test_the_first_knob_of_a_layout_that_fits_is_the_quickest() -> None:
    at = setting("llama-3-8b", 8, "fsdp2")
    told = first_knob(at, parse_layout("dp=8 zero=3"), 4.0, 0.05)
    assert "GiB, step" in told
    nothing = setting("gpt2", 1, "shardplan")
    assert "no change of one word" in first_knob(nothing, Layout(recompute="full"), 1.0, 0.05)


def test_too_large_for_any_change() -> None:
    at = setting("llama-3-405b", 8, "fsdp2")
    assert memory_remedy(at, parse_layout("dp=8 zero=3"), 1.0, 0.05).startswith("no 4 changes")
