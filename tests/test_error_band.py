"""Bands of an estimate: wider by what is guessed and used, by what nothing was fitted on, and by nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

import shardplan
from shardplan.costmodel.error_band import (
    CAPACITY_BAND,
    FP8_BAND,
    GUESS_BAND,
    MEMORY_BAND,
    OFFLOAD_BAND,
    TIME_BAND,
    UNFITTED_BAND,
    Bands,
    error_bands,
    memory_band,
    widest,
)
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import Cluster, Source

MODEL = shardplan.load_model("llama-3-8b")


def bands(cluster: Cluster | str, runtime: str = "megatron", precision: str = "bf16") -> Bands:
    machine = load_cluster(cluster) if isinstance(cluster, str) else cluster
    job = Job(seq=4096, global_batch=1024, precision=precision)
    return error_bands(Setting(model=MODEL, job=job, cluster=machine, runtime=load_runtime(runtime)))


def half_width(
    cluster: Cluster | str, runtime: str = "megatron", precision: str = "bf16", words: str = "dp=8"
) -> float:
    return bands(cluster, runtime, precision).of(parse_layout(words))


def sourced(cluster: Cluster, kinds: Mapping[str, str]) -> Cluster:
    """All figures published but these."""
    given = {path: Source(kind=kinds.get(path, "published"), text="a test") for path in cluster.provenance}  # pyright: ignore[reportArgumentType]
    return replace(cluster, provenance=given)


def test_machines_that_are_known_less_have_wider_bands() -> None:
    known, borrowed, unknown = (
        ("selene", "h100-ib", "eos"),
        ("b200-ib", "gb200-nvl72"),
        ("8x4090", "4x3090", "frontier"),
    )
    widths = [[half_width(name) for name in names] for names in (known, borrowed, unknown)]
    assert widths[0] == [pytest.approx(TIME_BAND)] * 3
    assert max(widths[0]) < min(widths[1]) <= max(widths[1]) < min(widths[2])


def test_each_kind_of_guess_counts_once_and_only_where_it_is_used() -> None:
    cluster = load_cluster("h100-ib", gpus=16)
    for paths, kinds in (
        ({}, 0),
        ({"gpu.gemm_efficiency.default"}, 1),
        ({"gpu.gemm_efficiency.default", "gpu.memory_efficiency", "gpu.peak_tflops.bf16"}, 1),
        ({"gpu.peak_tflops.fp16", "gpu.gemm_efficiency.fp32", "gpu.l2_mib"}, 0),
        ({"gpu.memory_efficiency", "network.latency_us", "gpu.attention_efficiency.cudnn"}, 3),
        ({"network.nics_per_node"}, 1),
        ({"network.spine_latency_us", "network.leaf_nodes"}, 0),
        ({"network.oversubscription"}, 1),
    ):
        machine = sourced(cluster, dict.fromkeys(paths, "guess"))
        assert half_width(machine) == pytest.approx(TIME_BAND + GUESS_BAND * kinds), paths
    guessed = sourced(cluster, {"network.latency_us": "guess"})
    assert half_width(guessed.with_gpus(8)) == pytest.approx(TIME_BAND), "one node has no network"
    guessed = sourced(cluster, {"network.leaf_nodes": "guess"})
    thin = replace(guessed, network=replace(cluster.network, oversubscription=4.0))
    assert half_width(thin) == pytest.approx(TIME_BAND + GUESS_BAND)


def test_only_the_attention_that_runs_counts() -> None:
    cluster = sourced(load_cluster("h100-ib"), {"gpu.attention_efficiency.triton": "guess"})
    assert half_width(cluster, "megatron") == pytest.approx(TIME_BAND)
    cluster = sourced(load_cluster("h100-ib"), {"gpu.attention_efficiency.flash2": "guess"})
    assert half_width(cluster, "fsdp2") == pytest.approx(TIME_BAND + GUESS_BAND)
    assert half_width(cluster, "fsdp2", words="dp=8 attention=unfused") == pytest.approx(TIME_BAND)
    assert half_width(cluster, "megatron-2021") == pytest.approx(TIME_BAND), "unfused unless asked"
    assert half_width(cluster, "megatron-2021", words="dp=8 attention=flash") == pytest.approx(TIME_BAND + GUESS_BAND)


def test_hosts_count_where_something_is_offloaded_and_fp8_where_it_runs() -> None:
    cluster = sourced(load_cluster("selene"), {})
    guessed = sourced(cluster, {"node.host.pcie_gb_per_s": "guess"})
    words = "dp=8 zero=3 offload_optimizer=cpu"
    assert half_width(guessed) == half_width(cluster) == pytest.approx(TIME_BAND)
    assert half_width(cluster, words=words) == pytest.approx(TIME_BAND + OFFLOAD_BAND)
    assert half_width(guessed, words=words) == pytest.approx(TIME_BAND + OFFLOAD_BAND + GUESS_BAND)
    flash = sourced(cluster, {"node.nvme.read_gb_per_s": "guess"})
    assert half_width(flash, words=words) == pytest.approx(TIME_BAND + OFFLOAD_BAND)
    assert half_width(flash, words="dp=8 zero=3 offload_params=nvme") == pytest.approx(
        TIME_BAND + OFFLOAD_BAND + GUESS_BAND
    )
    hopper = sourced(load_cluster("h100-ib"), {})
    assert half_width(hopper, precision="fp8") == pytest.approx(TIME_BAND + FP8_BAND)


def test_an_architecture_without_runs_is_wider_than_one_with() -> None:
    known, (node, count) = sourced(load_cluster("h100-ib"), {}), load_cluster("h100-ib").node_runs[0]
    alien = replace(known, node_runs=((replace(node, gpu=replace(node.gpu, architecture="of-tomorrow")), count),))
    assert half_width(alien) == pytest.approx(half_width(known) + UNFITTED_BAND)


def test_a_guessed_capacity_widens_the_memory_band_and_decides_what_fits() -> None:
    known = sourced(load_cluster("h100-ib", gpus=8), {})
    guessed = sourced(known, {"gpu.memory_mib": "guess"})
    assert (memory_band(known), memory_band(guessed)) == (MEMORY_BAND, MEMORY_BAND + CAPACITY_BAND)
    inputs = {
        "model": MODEL,
        "job": Job(seq=4096, global_batch=8),
        "layouts": parse_layout("dp=8 zero=3 recompute=full"),
    }
    sure, unsure = (estimate(cluster=one, runtime="fsdp2", **inputs) for one in (known, guessed))
    assert float(sure.device_peak_bytes[0]) == float(unsure.device_peak_bytes[0])
    between = 1.0 - float(sure.device_peak_bytes[0]) * (1.0 + MEMORY_BAND + CAPACITY_BAND / 2) / sure.capacity_bytes
    assert (bool(sure.fits(between)[0]), bool(unsure.fits(between)[0])) == (True, False)


def test_of_several_parts_whichever_may_be_off_most() -> None:
    one, other = bands("selene"), bands("8x4090")
    both = widest([one, other])
    assert (both.time, both.memory) == (other.time, other.memory)
    assert both.of(parse_layout("dp=8")) == other.of(parse_layout("dp=8"))
