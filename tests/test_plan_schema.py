"""The published JSON Schema of plan files accepts what `shardplan plan` writes and nothing that lacks a part."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shardplan.costmodel.job import Job
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import cluster_document, load_cluster
from shardplan.planner.choose import make_plan
from shardplan.planner.search import search
from shardplan.planner.space import parse_wishes


def written(model: str, cluster: str, gpus: int, runtime: str, fix: str, tokens: float | None) -> dict[str, Any]:
    shapes, job, software = load_model(model), Job(seq=2048, global_batch=64, tokens=tokens), load_runtime(runtime)
    found = search(
        model=shapes, job=job, cluster=load_cluster(cluster, gpus=gpus), runtime=software, wishes=parse_wishes(fix)
    )
    plan = make_plan(
        found,
        model=shapes,
        job=job,
        runtime=software,
        runtime_name=runtime,
        cluster_document=cluster_document(cluster),
        fix=fix,
        version="0",
    )
    return json.loads(json.dumps(plan.document()))


@pytest.fixture(scope="module")
def schema(root: Path) -> Draft202012Validator:
    document = json.loads((root / "planner" / "plan.schema.json").read_text())
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


@pytest.mark.parametrize(
    ("model", "cluster", "gpus", "runtime", "fix", "tokens"),
    [
        ("llama-3-8b", "h100-ib", 16, "megatron", "", 1e12),
        ("llama-3-8b", "h100-ib", 16, "fsdp2", "recompute=selective:core_attn+mlp", None),
        ("megatron-1.7b", "8x4090", 8, "deepspeed", "zero=2", None),
        ("llama-3-8b", "selene", 16, "megatron", "pp=4 stage_layers=7,8,9,8", None),
        ("llama-3-8b", "selene", 16, "shardplan", "pp=4 schedule=1f1b recompute=full:3,2,0,0", None),
        ("llama-3-8b", "docs/examples/a100-h100.toml", 64, "megatron", "tp=1 pp=2", None),
    ],
)
def test_written_plans_are_valid(
    schema: Draft202012Validator, model: str, cluster: str, gpus: int, runtime: str, fix: str, tokens: float | None
) -> None:
    document = written(model, cluster, gpus, runtime, fix, tokens)
    assert [error.message for error in schema.iter_errors(document)] == []


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return written("llama-3-8b", "h100-ib", 16, "megatron", "", None)


@pytest.mark.parametrize("place", ["layout", "prediction", "prediction.time", "prediction.memory", "job", "digests"])
def test_a_plan_that_lacks_a_part_is_not_valid(
    schema: Draft202012Validator, document: dict[str, Any], place: str
) -> None:
    part = document
    for name in place.split("."):
        part = part[name]
    required = [name for name in part if name not in {"result", "ideas"}]
    for name in required:
        broken = copy.deepcopy(document)
        inside = broken
        for word in place.split("."):
            inside = inside[word]
        del inside[name]
        assert not schema.is_valid(broken), f"{place}.{name}"


def test_a_newer_key_is_accepted_and_a_wrong_value_is_not(
    schema: Draft202012Validator, document: dict[str, Any]
) -> None:
    assert schema.is_valid({**document, "from_the_future": 1})
    for layout in ({"zero": 4}, {"schedule": "2f2b"}, {"recompute": "full:0"}, {"dp": 0}):
        assert not schema.is_valid({**document, "layout": {**document["layout"], **layout}}), layout
