"""Recompute by named parts of a layer: what each keeps and repeats, and who may run it."""

from __future__ import annotations

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import judge


def answer(recompute: str) -> dict:
    layout = parse_layout(f"dp=2 tp=8 pp=4 attention=unfused sequence_parallel=true recompute={recompute}")
    verdict = judge(
        layout,
        model=load_model("llama-3-70b"),
        job=Job(seq=4096, global_batch=256),
        cluster=load_cluster("h100-ib", gpus=64),
        runtime=load_runtime("megatron"),
    )
    assert isinstance(verdict, dict), verdict
    return verdict


def test_each_part_more_keeps_less_and_takes_longer() -> None:
    """Megatron's own choice is core_attn by name; every set of parts stays below recomputing the layer."""
    own, core, both, most, full = map(
        answer,
        (
            "selective",
            "selective:core_attn",
            "selective:core_attn+layernorm",
            "selective:core_attn+layernorm+mlp",
            "full",
        ),
    )
    for part in ("memory", "time"):
        assert core[part] == own[part]
    seconds = [got["time"]["recompute_s"] for got in (core, both, most, full)]
    activations = [got["memory"]["stages"][0]["activations_bytes"] for got in (core, both, most, full)]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]
    assert activations[0] > activations[1] > activations[2] > activations[3]
    assert most["time"]["tp_exposed_s"] > both["time"]["tp_exposed_s"] == core["time"]["tp_exposed_s"]
    assert both["layout"]["recompute"] == "selective:core_attn+layernorm"


def test_parts_that_the_runtime_lacks_are_refused() -> None:
    refused = {rejection["rule"]: rejection["remedy"] for rejection in answer("selective:qkv+core_attn")["rejections"]}
    assert "core_attn+layernorm+act+mlp" in refused["runtime-recompute-parts"]
