"""States and activations outside the GPU: volumes, published latencies of the update, what hides behind what, limits, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.model import parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.offload import StepWindows, exposed_tiers_s, node_rates, tier_times
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.runtime_offload import Offloading
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import Node

PINNED = Offloading()


def alone(node: Node, *, processors: int = 1) -> Node:
    """The node's memory and cores, or one part in `processors` of them, for one GPU."""
    host = node.host
    host = replace(
        host,
        memory_bandwidth_bytes_per_s=host.memory_bandwidth_bytes_per_s / processors,
        cores=max(host.cores // processors, 1),
    )
    return replace(node, gpus=1, host=host)


def times(node: Node, words: str, parameters: float, offload: Offloading = PINNED) -> dict[str, float]:
    found = tier_times(
        node, offload, layout_table([parse_layout(words)]), [parameters], gradient_bytes=2, parameter_bytes=2
    )
    return {name: float(getattr(found, name)[0]) for name in ("down_s", "update_s", "up_s", "fetch_s")}


def exposed(words: str, node: Node, *, compute_s: float = 0.0, waiting_s: float = 0.0, **behaviour: object) -> float:
    offload = replace(PINNED, **behaviour)
    layouts = layout_table([parse_layout(words)])
    found = tier_times(node, offload, layouts, [1e9], gradient_bytes=2, parameter_bytes=2)
    windows = StepWindows(
        reductions=np.ones(1),
        gathers=2 * np.ones(1),
        backward_s=np.array([compute_s * 2 / 3]),
        compute_s=np.array([compute_s]),
        waiting_s=np.array([waiting_s]),
        on_gpu_s=np.zeros(1),
    )
    left, hidden = exposed_tiers_s(found, windows, offload, gradient_overlap=1.0)
    assert (hidden >= 0).all()
    return float(left[0])


def test_traffic_of_zero_offload() -> None:
    """ZeRO-Offload (arXiv 2101.06840): 2 P bytes of gradients down and 2 P of parameters up, 1/N on each of N ranks."""
    node, psi, ranks = load_cluster("h100-ib").node, 10e9, 8
    found = times(node, f"dp={ranks} zero=2 offload_optimizer=cpu", psi / ranks)
    rate = node_rates(node, PINNED).link_bytes_per_s
    assert found["down_s"] * rate * ranks == pytest.approx(2 * psi)
    assert found["up_s"] * rate * ranks == pytest.approx(2 * psi)
    assert found["fetch_s"] == 0
    assert 28 <= node.host.adam_bytes_per_parameter <= 30


def test_bandwidth_centric_partitioning_of_zero_infinity() -> None:
    """ZeRO-Infinity (arXiv 2104.07857) figure 2b: 16 GPUs of a DGX-2 copy at 3 GB/s each from host memory, 1.6 GB/s from flash; every
    rank fetches its 1/N."""
    node = load_cluster("dgx2-edr").node
    for where, rate in (("cpu", 3e9), ("nvme", 1.6e9)):
        words = f"dp=16 zero=3 offload_optimizer=nvme offload_params={where}"
        assert times(node, words, 1e9)["fetch_s"] == pytest.approx(2e9 / rate)
    assert node_rates(replace(node, gpus=1), PINNED).link_bytes_per_s == pytest.approx(12e9)


def test_adam_on_the_host_is_as_fast_as_its_memory() -> None:
    """11.6e9 parameters in 8.2 s (deepspeedai/DeepSpeed#735), 1.41e9 a second: 42 GB/s at 30 bytes a parameter."""
    node = alone(load_cluster("h100-ib").node)
    slow = replace(node.host, memory_bandwidth_bytes_per_s=42.4e9, memory_efficiency=1.0, adam_bytes_per_parameter=30.0)
    found = times(replace(node, host=slow), "zero=2 offload_optimizer=cpu", 11.6e9)
    assert found["update_s"] == pytest.approx(8.2, rel=0.01)


def test_adam_with_few_cores_is_as_fast_as_they_are() -> None:
    """0.30e9 parameters a second on two threads (ISEEKYAN/mbridge#188)."""
    node = alone(load_cluster("h100-ib").node)
    found = times(replace(node, host=replace(node.host, cores=2)), "zero=2 offload_optimizer=cpu", 0.3e9)
    assert found["update_s"] == pytest.approx(1.0)


CPU_ADAM = {1: 0.22, 2: 0.51, 4: 1.03, 8: 2.41, 10: 2.57}
"""Seconds by 1e9 parameters on the two Xeon 8168 of a DGX-2: arXiv 2101.06840 table 4."""
GRACE_ADAM = {1: 0.098, 2: 0.198, 4: 0.393, 8: 0.769}
"""CPU-Adam on one Grace: deepspeedai/DeepSpeed@edaa722 blogs/deepspeed-superoffload, figure 5."""


@pytest.mark.parametrize(
    ("cluster", "processors", "measured"), [("dgx2-edr", 1, CPU_ADAM), ("gb200-nvl72", 36, GRACE_ADAM)]
)
def test_published_latencies_of_cpu_adam(cluster: str, processors: int, measured: dict[int, float]) -> None:
    node = alone(load_cluster(cluster).node, processors=processors)
    ratios = [
        times(node, "zero=2 offload_optimizer=cpu", billions * 1e9)["update_s"] / seconds
        for billions, seconds in measured.items()
    ]
    assert np.abs(np.array(ratios) - 1).mean() <= 0.08
    assert max(ratios) <= 1.17
    assert min(ratios) >= 0.84


def test_update_and_copy_of_the_zero_offload_tutorial() -> None:
    """GPT-2 10B on one V100: 6.22 to 6.48 s of `optimizer_step`, CPU Adam and the copy of the parameters to the GPU
    (deepspeedai/DeepSpeed@edaa722 docs/_tutorials/zero-offload.md)."""
    node, parameters = alone(load_cluster("dgx2-edr").node), 50 * 12 * 4096**2 + 50257 * 4096
    found = times(node, "zero=2 offload_optimizer=cpu", parameters, load_runtime("deepspeed").offload)
    assert found["update_s"] + found["up_s"] == pytest.approx(6.35, rel=0.15)


def test_what_hides_behind_what() -> None:
    """Gradients go down behind the backward, then behind what the step waits for; the update never hides unless it is delayed."""
    node = alone(load_cluster("h100-ib").node)
    plain = times(node, "zero=2 offload_optimizer=cpu", 1e9)
    after = plain["update_s"] + plain["up_s"]
    words = "zero=2 offload_optimizer=cpu"
    assert exposed(words, node) == pytest.approx(plain["down_s"] + after)
    assert exposed(words, node, compute_s=100.0) == pytest.approx(after)
    assert exposed(words, node, waiting_s=100.0) == pytest.approx(after)
    assert exposed(words, node, compute_s=100.0, delayed_update=True) == pytest.approx(0.0)
    half = "zero=2 offload_optimizer=cpu offload_ratio=0.5"
    assert exposed(half, node, compute_s=100.0) == pytest.approx(after / 2)


def test_a_faster_gpu_never_makes_an_offloaded_step_slower() -> None:
    node = load_cluster("dgx2-edr").node
    words = "dp=16 zero=3 offload_optimizer=nvme offload_params=cpu"
    compute = np.linspace(0.0, 30.0, 200)
    steps = [
        seconds + waiting + exposed(words, node, compute_s=seconds, waiting_s=waiting)
        for seconds in compute
        for waiting in (max(2.0 - seconds, 0.0),)
    ]
    assert (np.diff(steps) >= -1e-9).all()


def estimated(words: str, *, cluster: str = "dgx2-edr", gpus: int = 16, runtime: str = "deepspeed") -> Estimates:
    return estimate(
        model=load_model("llama-2-13b"),
        job=Job(seq=2048, global_batch=64, precision="fp16"),
        cluster=load_cluster(cluster, gpus=gpus),
        layouts=parse_layout(words),
        runtime=load_runtime(runtime),
    )


def test_what_is_offloaded_leaves_the_gpu_and_fills_host_memory_and_flash() -> None:
    """16 bytes of optimizer states and gradients per parameter in host memory, 2 more of fp16 parameters: DeepSpeed's
    estimate_zero3_model_states_mem_needs without and with offloaded parameters."""
    psi = parameter_counts(load_model("llama-2-13b"))["total"]
    base = "dp=16 zero=3 recompute=full"
    plain = estimated(base)
    on_cpu = estimated(f"{base} offload_optimizer=cpu")
    assert float(plain.host_bytes[0]) == 0
    assert float(on_cpu.host_bytes[0]) == pytest.approx(16 * psi, rel=0.01)
    both = estimated(f"{base} offload_optimizer=cpu offload_params=cpu")
    assert float(both.host_bytes[0]) == pytest.approx(18 * psi, rel=0.01)
    flash = estimated(f"{base} offload_optimizer=nvme offload_params=nvme")
    assert float(flash.nvme_bytes[0]) == pytest.approx(18 * psi, rel=0.01)
    assert float(flash.host_bytes[0]) < 18 * psi
    half = estimated(f"{base} offload_optimizer=cpu offload_ratio=0.5")
    assert float(half.host_bytes[0]) == pytest.approx(8 * psi, rel=0.01)
    peaks = [float(found.device_peak_bytes[0]) for found in (plain, half, on_cpu, both)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


@pytest.mark.parametrize(
    ("words", "gpus", "runtime"),
    [
        ("dp=2 pp=4 zero=1", 8, "megatron"),  # all stages on one node
        ("dp=2 pp=4 zero=1 stage_layers=7,9,9,7", 8, "megatron"),
        ("dp=1 pp=8 zero=1", 8, "megatron"),
        ("dp=2 pp=16 zero=1", 32, "megatron"),  # four of sixteen on a node
        ("dp=2 pp=16 zero=1 stage_layers=1,2,2,2,2,2,2,2,2,2,2,2,3,2,2,2", 32, "megatron"),
        ("dp=16 pp=2 zero=1", 32, "megatron"),  # one
        ("dp=4 tp=2 pp=3 zero=1 order=tp-pp-cp-dp", 24, "deepspeed"),  # three and one in part
        ("dp=4 pp=6 zero=1 order=tp-cp-pp-dp", 24, "deepspeed"),  # the last beside the first
        ("dp=4 tp=2 pp=6 zero=1 order=tp-pp-cp-dp", 48, "deepspeed"),
        ("dp=6 pp=4 zero=1", 24, "megatron"),  # nodes that begin in the middle of a stage
    ],
)
def test_a_node_holds_what_the_stages_on_it_keep(words: str, gpus: int, runtime: str) -> None:
    """Not so many times the fullest stage; that of the fullest node is between the sum of any node's stages and the fullest of all."""
    layout = parse_layout(words + " recompute=full offload_optimizer=cpu")
    given = {"model": load_model("llama-3-8b"), "job": Job(seq=2048, global_batch=192), "runtime": runtime}
    found = estimate(**given, cluster=load_cluster("selene", gpus=gpus), layouts=layout, every_stage=True)
    worst = estimate(**given, cluster=load_cluster("selene", gpus=gpus), layouts=layout)
    each = found.stages["host"][0]
    stage_of = np.arange(gpus) // int(layout_table([layout]).stride("pp")[0]) % layout.pp
    on_nodes = each[stage_of].reshape(-1, 8).sum(axis=1)
    assert float(found.host_bytes[0]) == pytest.approx(float(worst.host_bytes[0]), rel=1e-12)
    assert on_nodes.max() <= float(found.host_bytes[0]) * (1 + 1e-12)
    most = 1.0 + 1e-9 if gpus == 8 else 1.2  # a node with all stages is counted to the byte
    assert float(found.host_bytes[0]) <= on_nodes.max() * most


def test_checkpoints_in_host_memory() -> None:
    """The inputs of 40 layers, 2 s b h bytes each, wait in host memory but for two of them."""
    kept = "dp=16 zero=3 micro_batch=4 recompute=full"
    on_gpu, away = estimated(kept), estimated(f"{kept} offload_activations=cpu")
    moved = 16 * 38 * 2 * 2048 * 4 * 5120
    assert float(away.host_bytes[0] - on_gpu.host_bytes[0]) == pytest.approx(moved, rel=1e-6)
    freed = float(on_gpu.peaks["allocated"][0] - away.peaks["allocated"][0])
    assert freed == pytest.approx(moved / 16, rel=1e-6)
    assert float(away.step_s[0]) > float(on_gpu.step_s[0])


def test_checkpoints_on_flash() -> None:
    """The same bytes leave the GPU for flash; a DGX-2 writes at 12 GB/s for 16 GPUs what host memory takes at 3 GB/s from each. No shipped
    runtime does that; one of a user's own may say that it does."""
    kept = "dp=16 zero=3 micro_batch=4 recompute=full"
    flash, host = estimated(f"{kept} offload_activations=nvme"), estimated(f"{kept} offload_activations=cpu")
    assert float(flash.nvme_bytes[0]) == pytest.approx(16 * 38 * 2 * 2048 * 4 * 5120, rel=1e-6)
    assert float(host.host_bytes[0] - flash.host_bytes[0]) == pytest.approx(float(flash.nvme_bytes[0]), rel=1e-6)
    assert float(host.nvme_bytes[0]) == 0.0
    assert flash.peaks["allocated"][0] == host.peaks["allocated"][0]
    assert float(flash.step_s[0]) > float(host.step_s[0])
    both = estimated(f"{kept} offload_activations=nvme offload_optimizer=nvme")
    states = estimated(f"{kept} offload_optimizer=nvme")
    assert float(both.nvme_bytes[0]) == pytest.approx(float(flash.nvme_bytes[0] + states.nvme_bytes[0]))


def test_host_memory_and_flash_are_limits() -> None:
    words = "dp=16 zero=3 recompute=full offload_optimizer=cpu"
    cluster = load_cluster("dgx2-edr", gpus=16)

    def fits(cluster_changed: object, layout: str) -> bool:
        found = estimate(
            model=load_model("llama-2-13b"),
            job=Job(seq=2048, global_batch=64, precision="fp16"),
            cluster=cluster_changed,  # type: ignore[arg-type]
            layouts=parse_layout(layout),
            runtime=load_runtime("deepspeed"),
        )
        return bool(found.fits()[0])

    def with_node(**changed: object) -> object:
        return replace(cluster, node_runs=((replace(cluster.node, **changed), cluster.nodes),))

    assert fits(cluster, words)
    assert not fits(with_node(host=replace(cluster.node.host, ram_bytes=100e9)), words)
    flash = words.replace("cpu", "nvme") + " offload_params=nvme"
    assert cluster.node.nvme is not None
    assert fits(cluster, flash)
    assert not fits(with_node(nvme=replace(cluster.node.nvme, capacity_bytes=100e9)), flash)


@pytest.mark.parametrize(
    ("words", "runtime", "cluster", "rule", "remedy"),
    [
        ("dp=16 zero=2 offload_optimizer=nvme", "deepspeed", "dgx2-edr", "offload-flash-zero", "use zero=3"),
        (
            "dp=16 zero=2 offload_optimizer=cpu offload_params=cpu",
            "deepspeed",
            "dgx2-edr",
            "offload-params-zero",
            "zero=3",
        ),
        (
            "dp=16 zero=3 offload_params=cpu",
            "deepspeed",
            "dgx2-edr",
            "offload-params-optimizer",
            "offload_optimizer=cpu",
        ),
        ("dp=16 zero=1 offload_params=cpu", "megatron", "dgx2-edr", "runtime-offload-params", "none"),
        (
            "dp=16 zero=3 offload_activations=cpu",
            "deepspeed",
            "dgx2-edr",
            "offload-activations-recompute",
            "recompute=full",
        ),
        (
            "dp=16 zero=2 offload_optimizer=cpu offload_ratio=0.5",
            "deepspeed",
            "dgx2-edr",
            "offload-ratio-zero",
            "zero=3",
        ),
        ("dp=16 zero=3 offload_ratio=0.5", "deepspeed", "dgx2-edr", "offload-ratio-optimizer", "offload_optimizer=cpu"),
        ("dp=8 zero=3 offload_optimizer=nvme", "deepspeed", "8x4090", "offload-needs-flash", "use cpu"),
        (
            "dp=8 zero=3 recompute=full offload_activations=nvme",
            "deepspeed",
            "8x4090",
            "offload-activations-need-flash",
            "use cpu",
        ),
        (
            "dp=16 zero=3 recompute=full offload_activations=nvme",
            "deepspeed",
            "dgx2-edr",
            "runtime-offload-activations",
            "none, cpu",
        ),
        ("dp=16 hpz=8", "deepspeed", "dgx2-edr", "zeropp-zero", "use zero=3, or drop hpz=8"),
        ("dp=16 zero=3 hpz=3", "deepspeed", "dgx2-edr", "hpz-divides", "divisor"),
        ("dp=16 zero=3 qwz=true", "fsdp2", "dgx2-edr", "runtime-zeropp", "--runtime"),
        ("dp=16 zero=3 qwz=true", "shardplan", "dgx2-edr", "runtime-zeropp", "--runtime"),
        ("dp=8 tp=2 zero=3 hpz=2", "shardplan", "dgx2-edr", "hpz-tensor-parallel", "tp=1"),
        ("dp=8 pp=2 zero=3 hpz=2", "shardplan", "dgx2-edr", "hpz-pipeline", "pp=1"),
        (
            "dp=16 zero=3 hpz=8 offload_optimizer=cpu offload_params=cpu",
            "deepspeed",
            "dgx2-edr",
            "zeropp-offload",
            "drop hpz=8",
        ),
    ],
)
def test_what_goes_together(words: str, runtime: str, cluster: str, rule: str, remedy: str) -> None:
    layout = parse_layout(words)
    setting = Setting(
        model=load_model("llama-2-13b"),
        job=Job(seq=2048, global_batch=64, precision="fp16"),
        cluster=load_cluster(cluster, gpus=layout.gpus),
        runtime=load_runtime(runtime),
    )
    told = {one.rule: one.remedy for one in rejections(setting, layout)[0]}
    assert rule in told
    assert remedy in told[rule]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("offload_ratio=0", "offload_ratio=0.0 is not a share"),
        ("offload_ratio=2", "is not a share"),
        ("offload_ratio=0.33333", "finer than steps"),
        ("offload_ratio=x", "use a share such as 0.4"),
        ("offload_params=disk", "offload_params='disk' is unknown"),
        ("qwz=maybe", "use true or false"),
        ("hpz=0", "hpz=0 is not a positive whole number"),
    ],
)
def test_bad_words(words: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_layout(words)
    assert told in str(caught.value)
