"""The speed of the cost model on a fixed, real space."""

from __future__ import annotations

import statistics
import time
from typing import Any

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import search
from shardplan.planner.space import layout_space


def estimate_rate(repeats: int) -> dict[str, Any]:
    """Layouts per second of `estimate` over the valid layouts of gpt3-175b on 1,024 A100 (Calculon's large case)."""
    import numpy as np

    model, runtime = load_model("gpt3-175b"), load_runtime("megatron")
    cluster = load_cluster("selene", gpus=1024)
    job = Job(seq=2048, global_batch=1536, precision="bf16")
    start = time.perf_counter()
    search(model=model, job=job, cluster=cluster, runtime=runtime)
    search_s = time.perf_counter() - start
    space = layout_space(model, job, cluster.gpus)
    broken = broken_rules(Setting(model=model, job=job, cluster=cluster, runtime=runtime), space)
    valid = space.take(~np.any(np.stack(list(broken.values())), axis=0))
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        estimate(model=model, job=job, cluster=cluster, layouts=valid, runtime=runtime)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "model": model.name,
        "gpus": cluster.gpus,
        "space": len(space),
        "layouts": len(valid),
        "seconds": median,
        "repeats": repeats,
        "layouts_per_s": len(valid) / median,
        "search_s": search_s,
    }
