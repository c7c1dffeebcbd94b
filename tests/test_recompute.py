"""Recompute by named parts of a layer: what each keeps and repeats, and who may run it."""

from __future__ import annotations

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import judge


def answer(recompute: str, model: str = "llama-3-70b", layout: str = "dp=2 tp=8 pp=4 attention=unfused") -> dict:
    verdict = judge(
        parse_layout(f"{layout} sequence_parallel=true recompute={recompute}"),
        model=load_model(model),
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


def test_megatron_recomputes_dense_mlps_and_the_activation_of_experts() -> None:
    """`--recompute-modules mlp` leaves layers with experts as they are, `moe_act` those without."""

    def deepseek(recompute: str) -> tuple[float, float]:
        got = answer(recompute, "deepseek-v3", "dp=4 tp=2 pp=8 ep=8")
        return got["time"]["recompute_s"], got["memory"]["stages"][1]["activations_bytes"]

    none, dense, experts = map(deepseek, ("none", "selective:mlp", "selective:act"))
    assert none[0] == dense[0] == 0.0  # the slowest stage has only layers with experts, and so has the second
    assert dense[1] == none[1]
    assert experts[0] > 0.0
    assert experts[1] < none[1]


@pytest.mark.parametrize(("model", "part", "others"), [("llama-3-70b", "act", "mlp"), ("mixtral-8x7b", "mlp", "act")])
def test_parts_that_no_layer_of_the_model_runs_again_are_refused(model: str, part: str, others: str) -> None:
    refused = {one["rule"]: one["remedy"] for one in answer(f"selective:{part}", model)["rejections"]}
    assert refused["recompute-part-of-no-layer"] == f"choose from core_attn+layernorm+{others}"
