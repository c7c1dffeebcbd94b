"""The speed of the cost model on a fixed, real space."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import search
from shardplan.planner.space import layout_space

CALCULON_PER_S = (115.0, 170.0)
"""Layouts per second of Calculon (commit caa4b11) in one process on a server core: 8,112 layouts of Turing-530B on 5,128 GPUs in
71 s of wall clock, and a random sample of its space of GPT-175B on 1,024 GPUs at 167 per CPU second. Its space of the latter has
11.7 M layouts."""


def estimate_rate(repeats: int, streamed: int) -> dict[str, Any]:
    """Layouts per second of `estimate` over the valid layouts of gpt3-175b on 1,024 A100 (Calculon's large case).

    Timed is all of it: the check that the layouts have a meaning, every table of kernels, collectives and stages (each time anew: a copy
    of the cluster shares no costs kept from the time before), and reading each
    time part, the step time and the allocated, reserved and device bytes of the fullest stage of every layout. Then `streamed`
    layouts the same way, the same over and over, of which step time and device bytes are kept, with the process's peak memory.
    """
    model, runtime = load_model("gpt3-175b"), load_runtime("megatron")
    cluster = load_cluster("selene", gpus=1024)
    job = Job(seq=2048, global_batch=1536, precision="bf16")
    start = time.perf_counter()
    found = search(model=model, job=job, cluster=cluster, runtime=runtime)
    search_s = time.perf_counter() - start
    space = layout_space(model, job, cluster.gpus, schedules=runtime.abilities.schedules)
    broken = broken_rules(Setting(model=model, job=job, cluster=cluster, runtime=runtime), space)
    valid = space.take(~np.any(np.stack(list(broken.values())), axis=0))
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        read_all(estimate(model=model, job=job, cluster=replace(cluster), layouts=valid, runtime=runtime))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    step_s, peak_bytes = np.empty(streamed), np.empty(streamed)
    start = time.perf_counter()
    for at in range(0, streamed, len(valid)):
        rows = valid.slice(0, streamed - at)
        got = estimate(model=model, job=job, cluster=replace(cluster), layouts=rows, runtime=runtime)
        step_s[at : at + len(rows)], peak_bytes[at : at + len(rows)] = read_all(got)
    streamed_s = time.perf_counter() - start
    return {
        "model": model.name,
        "gpus": cluster.gpus,
        "space": found.looked_at,
        "layouts": len(valid),
        "seconds": median,
        "repeats": repeats,
        "layouts_per_s": len(valid) / median,
        "calculon_layouts_per_s": CALCULON_PER_S,
        "search_s": search_s,
        "streamed": streamed,
        "streamed_s": streamed_s,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def read_all(estimates: Estimates) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(step time, device bytes), (N,), after reading every time part and every peak: columns gathered when they are read are made."""
    time_parts = {part: estimates.time[part] for part in (*TIME_PARTS, "step_s")}
    peaks = {name: estimates.peaks[name] for name in ("allocated", "reserved", "device")}
    return time_parts["step_s"], peaks["device"]
