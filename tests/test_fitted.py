"""Fitted constants of GPUs that runs were fitted on, and of others."""

from __future__ import annotations

from dataclasses import replace
from statistics import geometric_mean

import pytest

from shardplan.costmodel.error_band import ADAPTER_BAND, GUESS_BAND, OFFLOAD_BAND, UNFITTED_BAND
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.fitted import Fitted, fitted, is_fitted, sustained_shares
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import judge


def test_an_architecture_without_runs_takes_the_mean_of_the_others() -> None:
    gpu = load_cluster("h100-ib").gpu
    alien = replace(gpu, architecture="of-tomorrow")
    assert sustained_shares(gpu, fitted()) == fitted().architecture["hopper"]
    shares = sustained_shares(alien, fitted())
    for name in ("gemm", "memory", "attention", "link", "network"):
        known = [row[name] for row in fitted().architecture.values() if name in row]
        assert shares[name] == pytest.approx(geometric_mean(known))
        assert min(known) <= shares[name] <= max(known)
    assert is_fitted(gpu)
    assert not is_fitted(alien)
    assert not sustained_shares(alien, Fitted(architecture={}, runtime={}))
    assert not sustained_shares(replace(alien, device="cpu"), fitted())


def test_the_answer_says_so_and_its_band_is_wider() -> None:
    cluster = load_cluster("h100-ib", gpus=8)
    (node, count), *_ = cluster.node_runs
    alien = replace(cluster, node_runs=((replace(node, gpu=replace(node.gpu, architecture="of-tomorrow")), count),))
    model, job, runtime, layout = (
        load_model("llama-3-8b"),
        Job(seq=4096, global_batch=32),
        "fsdp2",
        parse_layout("dp=8 zero=3"),
    )
    bands, told = [], []
    for machine in (cluster, alien):
        at = Setting(model=model, job=job, cluster=machine, runtime=load_runtime(runtime))
        bands.append(estimate(model=model, job=job, cluster=machine, layouts=layout, runtime=runtime).band_of(0))
        answer = judge(layout, model=model, job=job, cluster=machine, runtime=at.runtime)
        assert isinstance(answer, dict)
        told.append([line for line in answer["assumptions"] if "of-tomorrow" in line])
    assert bands[1] == pytest.approx(bands[0] + UNFITTED_BAND)
    assert not told[0]
    (line,) = told[1]
    assert "the mean of other GPUs" in line


def test_offload_and_adapters_widen_the_band() -> None:
    model, cluster = load_model("llama-3-8b"), load_cluster("h100-ib", gpus=8)
    plain, offloaded = (parse_layout(f"dp=8 zero=3 recompute=full{more}") for more in ("", " offload_optimizer=cpu"))
    job = Job(seq=4096, global_batch=32)

    def half_width(job: Job, words: Layout) -> float:
        answer = judge(words, model=model, job=job, cluster=cluster, runtime=load_runtime("deepspeed"))
        assert isinstance(answer, dict)
        low, high = answer["error_band"]["step_s"]
        return float((high - low) / (high + low))

    assert half_width(job, offloaded) == pytest.approx(half_width(job, plain) + OFFLOAD_BAND + GUESS_BAND)
    assert half_width(replace(job, method="lora"), plain) == pytest.approx(half_width(job, plain) + ADAPTER_BAND)
