"""From a search result to a plan: the winner with its full prediction, the account of the search, digests of all inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.costmodel.estimates import DEFAULT_HEADROOM
from shardplan.costmodel.job import Job
from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import model_digest
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.mixed import document_in_order
from shardplan.planner.placement import placement_document
from shardplan.planner.plan import Plan, digest, part_digests
from shardplan.planner.rank_map import rank_map
from shardplan.planner.search import SearchResult, judge, search_document


def make_plan(
    result: SearchResult,
    *,
    model: Model,
    job: Job,
    runtime: Runtime,
    runtime_name: str,
    cluster_document: Mapping[str, Any],
    top: int = 10,
    headroom: float = DEFAULT_HEADROOM,
    fix: str = "",
    forbid: Sequence[str] = (),
    allow: Sequence[str] = (),
    objective: str = "throughput",
    forms: Sequence[Mapping[str, Any]] = (),
    version: str,
) -> Plan:
    """The best layout of a search that found one, as a plan; `runtime_name` is what loads the runtime again, `fix`, `forbid`, `allow`
    and `objective` are the words that the search was asked with, `forms` what other forms of the question found (`variants.py`)."""
    if result.ranked is None:
        raise ValueError("the search found no layout that fits")
    layout = result.ranked.layouts.row(0)
    prediction = judge(layout, model=model, job=job, cluster=result.cluster, runtime=runtime, headroom=headroom)
    setting = Setting(model=model, job=job, cluster=result.cluster, runtime=runtime)
    if not isinstance(prediction, dict):
        raise AssertionError(f"a ranked layout is refused: {prediction}")
    lies = placement_document(setting, layout)
    document = document_in_order(dict(cluster_document), result.cluster)
    made = Plan(
        model=model,
        job=job,
        cluster=document,
        gpus=result.cluster.gpus,
        runtime=runtime_name,
        layout=layout,
        prediction=prediction,
        search={
            **(account := search_document(result, top)),
            "placement": {**(account["placement"] or {}), **lies} if lies else None,
            "headroom": headroom,
            "fix": fix,
            "forbid": list(forbid),
            "allow": list(allow),
            "objective": objective,
            "forms": [dict(one) for one in forms],
        },
        digests={
            "model": model_digest(model),
            "cluster": digest(document),
            "runtime": digest(dataclasses.asdict(runtime)),
        },
        shardplan_version=version,
        rank_map=rank_map(layout, result.cluster),
    )
    return dataclasses.replace(made, digests={**made.digests, **part_digests(made.document())})
