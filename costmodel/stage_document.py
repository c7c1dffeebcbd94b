"""What an answer says of each pipeline stage, and of a mixed cluster: which stages lie on which nodes, which runtimes can run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.mixed import mixed_rejections, stage_seconds_on, stages_on_parts
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.runtime_document import runtime_names


def stage_documents(setting: Setting, layout: Layout, estimates: Estimates, row: int) -> list[dict[str, Any]]:
    """One entry per stage: layers, recomputed layers, seconds of a micro-batch, bytes on the device and what it has, on which part."""
    seconds, recomputed = stage_seconds_on(setting, layout)
    on = stages_on_parts(setting.cluster, layout) if setting.cluster.parts else None
    names = (
        [part.name for part, count in zip(setting.cluster.parts, on, strict=True) for _ in range(count)] if on else []
    )
    device, own = estimates.stages["device"][row], estimates.stage_capacity_bytes
    capacity = float(estimates.capacities[row])
    return [
        {
            "stage": stage,
            "layers": int(estimates.stage_layer_counts[row, stage]),
            "recomputed_layers": int(recomputed[stage]),
            "micro_batch_s": float(seconds[stage]),
            "device_bytes": float(device[stage]),
            "capacity_bytes": capacity if own is None else float(own[stage]),
            "part": names[stage] if names else None,
        }
        for stage in range(layout.pp)
    ]


def mixed_document(setting: Setting, layout: Layout) -> dict[str, Any]:
    """`parts` and `runtimes` of an answer on a mixed cluster; nothing on another."""
    cluster = setting.cluster
    if not cluster.parts:
        return {}
    on, first, parts = stages_on_parts(cluster, layout), 0, list[dict[str, Any]]()
    for index, part in enumerate(cluster.parts):
        stages = list(range(first, first + on[index])) if on else None
        first += on[index] if on else 0
        parts.append(
            {"name": part.name, "gpu": part.gpu.name, "nodes": part.nodes, "gpus": part.gpus, "stages": stages}
        )
    return {"parts": parts, "runtimes": runtimes_that_run(setting, layout)}


def runtimes_that_run(setting: Setting, layout: Layout) -> list[str]:
    """Shipped runtimes in which the layout breaks no rule on any part."""
    return [
        name
        for name in runtime_names()
        if not mixed_rejections(replace(setting, runtime=load_runtime(name)), layout)[0]
    ]
