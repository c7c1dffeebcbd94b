"""The space of layouts: degrees of experts and tiers of memory."""

from __future__ import annotations

from typing import Any

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import OFFLOAD
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import search
from shardplan.planner.space import layout_space, parse_wishes, runtime_tiers


def test_the_space_of_a_model_with_experts_has_every_expert_degree() -> None:
    model, job = load_model("mixtral-8x7b"), Job(seq=4096, global_batch=64)
    space = layout_space(model, job, 16)
    for dp, tp, pp in {(16, 1, 1), (8, 2, 1), (2, 2, 4), (1, 1, 16)}:
        rows = (space.dp == dp) & (space.tp == tp) & (space.pp == pp)
        assert set(space.ep[rows].tolist()) == {ep for ep in (1, 2, 4, 8) if dp * tp % ep == 0}
    assert set(layout_space(load_model("llama-3-8b"), job, 16).ep.tolist()) == {1}
    assert set(layout_space(model, job, 16, parse_wishes("", ["experts"])).ep.tolist()) == {1}
    found = search(model=model, job=job, cluster=load_cluster("h100-ib", gpus=32), runtime="megatron")
    assert found.ranked is not None
    assert found.ranked.layouts.row(0).ep > 1


@pytest.mark.parametrize(
    ("runtime", "tiers"),
    [
        (
            "deepspeed",
            {("none", "none"), *((state, its) for state in ("cpu", "nvme") for its in ("none", "cpu", "nvme"))},
        ),
        ("fsdp2", {("none", "none"), ("cpu", "cpu")}),
        ("megatron", {("none", "none"), ("cpu", "none")}),
        ("nanotron", {("none", "none")}),
    ],
)
def test_tiers_of_a_runtime(runtime: str, tiers: set[tuple[str, str]]) -> None:
    found = {(OFFLOAD[state], OFFLOAD[parameters]) for state, parameters in runtime_tiers(load_runtime(runtime))}
    assert found == tiers


@pytest.mark.parametrize(("runtime", "fix"), [("deepspeed", ""), ("fsdp2", ""), ("megatron", "tp=1 pp=1")])
def test_one_gpu_offloads(runtime: str, fix: str) -> None:
    """Runtimes offload what a ZeRO stage owns, also where it owns everything: 8B with Adam needs 128 GB."""
    found = search(
        model=load_model("llama-3-8b"),
        job=Job(seq=2048, global_batch=8),
        cluster=load_cluster("h100-ib", gpus=1),
        runtime=runtime,
        wishes=parse_wishes(fix),
    )
    assert found.ranked is not None
    best = found.ranked.layouts.row(0)
    assert best.offload_optimizer != "none"
    assert best.zero > 0


@pytest.mark.parametrize(
    ("forbid", "gone", "kept"),
    [
        ("recompute=full", lambda x: "full" in x.recompute, lambda x: x.recompute.startswith("selective:")),
        ("recompute=selective", lambda x: "selective" in x.recompute, lambda x: x.recompute.startswith("full:")),
        ("offload_ratio=0.5", lambda x: x.offload_ratio == 0.5, lambda x: 0.0 < x.offload_ratio < 1.0),
    ],
)
def test_forbidding_one_value_keeps_its_knob(forbid: str, gone: Any, kept: Any) -> None:
    """Other values of a word are still tried."""
    found = search(
        model=load_model("llama-3-70b"),
        job=Job(seq=4096, global_batch=256),
        cluster=load_cluster("selene", gpus=64),
        runtime="megatron",
        wishes=parse_wishes("pp=4", [forbid]),
    ).ranked
    assert found is not None
    rows = [found.layouts.row(at) for at in range(len(found))]
    assert not any(gone(row) for row in rows)
    assert any(kept(row) for row in rows)


@pytest.mark.parametrize(
    ("fix", "forbid"),
    [("tp=8", "tp"), ("tp=2", "tp=2"), ("offload_optimizer=cpu", "offload"), ("recompute=full", "recompute=full")],
)
def test_what_is_fixed_and_forbidden_is_said_to_be(fix: str, forbid: str) -> None:
    with pytest.raises(InputError, match=rf"is forbidden, but --fix asks for {fix}"):
        parse_wishes(fix, [forbid])
    parse_wishes("tp=1", ["tp"])
    parse_wishes("tp=2", ["tp=4"])
