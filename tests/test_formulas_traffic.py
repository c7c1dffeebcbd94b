"""Published numeric cases of communication and offload traffic; each test names where its numbers are from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.collectives import collective_s
from shardplan.costmodel.data_parallel import Exchange, exchange_s, one_exchange_s, released_share
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.memory import stage_states
from shardplan.costmodel.model import parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.operators import Shapes, layer_ops
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.load import load_cluster, load_gpu
from shardplan.hw_profiles.machine import EfficiencyCurve
from shardplan.hw_profiles.topology import TierTable, tier_table

GIB = 2.0**30
FLAT = EfficiencyCurve(sizes=(1.0, 2.0), fractions=(1.0, 1.0))


def wire(*, gpus: int = 4096, latency_s: float = 0.0) -> TierTable:
    """One node of `gpus` GPUs whose links move 1 byte a second: seconds are bytes on the wire."""
    return TierTable(
        names=("node",),
        gpus=np.array([gpus]),
        bandwidth_bytes_per_s=np.array([1.0]),
        latency_s=np.array([latency_s]),
        efficiency=(FLAT,),
        all_reduce_efficiency=(FLAT,),
        point_to_point_fraction=np.array([1.0]),
        is_switched=np.array([True]),
    )


def traffic(
    words: str, runtime: Runtime, *, parameters: float, units: float, micro_batches: int = 1, kept: float = 0.0
) -> tuple[float, float]:
    """(reduction, gathers) on the wire per rank and step, in elements of `parameters` parameters."""
    layouts = layout_table([parse_layout(words)])
    one = one_exchange_s(
        wire(),
        layouts,
        runtime.communication,
        parameters=np.array([parameters]),
        trained=np.array([parameters]),
        units=np.array([units]),
        gradient_bytes=1,
        parameter_bytes=1,
        gpu=load_gpu("v100-32gb"),
    )
    found = exchange_s(
        one, layouts, runtime.communication, micro_batches=np.array([float(micro_batches)]), kept_share=kept
    )
    return float(found.reduce_s[0]), float(found.gather_s[0])


@pytest.mark.parametrize("runtime", ["deepspeed", "fsdp2"])
@pytest.mark.parametrize(("zero", "volumes"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volumes_of_the_zero_paper(runtime: str, zero: int, volumes: int) -> None:
    """ZeRO (arXiv 1910.02054) section 7: 2 P a step for data parallelism and stages 1 and 2, 3 P for stage 3, times (n - 1)/n."""
    psi, n = 7.5e9, 64
    moved = sum(traffic(f"dp={n} zero={zero}", load_runtime(runtime), parameters=psi, units=48))
    assert moved == pytest.approx(volumes * psi * (n - 1) / n, rel=1e-12)


@pytest.mark.parametrize("hidden", [4096, 8192, 10240, 12288, 18432, 20480, 25600, 32768])
@pytest.mark.parametrize("distance", [1e9, 3e9])
def test_matrices_released_between_recompute_and_backward(hidden: int, distance: float) -> None:
    """DeepSpeed runtime/zero/partitioned_param_coordinator.py, replayed: after each module of the recomputation, the modules that follow
    are walked until they hold `distance` parameters; what occurs among them stays."""
    modules = [("qkv", 3), ("projection", 1), ("up", 4), ("down", 4)]
    order = [*modules, *modules[::-1]]
    released = 0
    for at, (name, size) in enumerate(modules):
        walked, kept = 0, False
        for other, other_size in order[at + 1 :]:
            if walked >= distance:
                break
            kept, walked = kept or other == name, walked + other_size * hidden**2
        released += 0 if kept else size
    assert float(released_share(12.0 * hidden**2, distance)) == pytest.approx(released / 12, abs=1e-12)


def test_what_is_released_is_gathered_once_more() -> None:
    layouts, deepspeed = layout_table([parse_layout("dp=64 zero=3 recompute=full")]), load_runtime("deepspeed")

    def gathers(unit: float) -> float:
        once = np.ones(1)
        one = Exchange(reduce_s=once, gather_s=once, reduce_share=once, gather_share=once)
        found = exchange_s(one, layouts, deepspeed.communication, micro_batches=once, unit_parameters=unit)
        return float(found.gather_s[0])

    assert [gathers(unit) for unit in (0.5e9, 1e9, 2e9)] == pytest.approx([2, 2 + 1 / 3, 2 + 2 / 3])


def test_gradients_of_a_70b() -> None:
    """All-reduce of the fp16 gradients of 70e9 parameters: 280 GB a rank for many ranks."""
    assert float(collective_s(wire(), "all_reduce", 2 * 70e9, 4096, 1)) == pytest.approx(280e9, rel=1e-3)


@pytest.mark.parametrize(
    ("zero", "gathers", "reductions"), [(1, (20, 20), (20, 20)), (2, (20, 20), (20, 40)), (3, (36, 72), (20, 40))]
)
def test_collectives_counted_on_fully_shard(zero: int, gathers: tuple[int, int], reductions: tuple[int, int]) -> None:
    """Four layers and the root, four steps of 1 and 2 micro-batches on 4 ranks, counted in torch 2.11 and 2.13: stage 3 gathers
    the layers twice, the root, which is not resharded after the forward, once."""
    groups, n = 5, 4
    runtime = load_runtime("fsdp2")
    assert runtime.working_set.root_stays_gathered
    for micro_batches, gathered, reduced in zip((1, 2), gathers, reductions, strict=True):
        moved = traffic(
            f"dp={n} zero={zero}",
            runtime,
            parameters=groups,
            units=groups,
            micro_batches=micro_batches,
            kept=1 / groups,
        )
        counts = [4 * seconds / ((n - 1) / n) for seconds in moved]
        assert counts == pytest.approx([reduced, gathered])


def test_the_estimate_gathers_what_stays_whole_once() -> None:
    """ZeRO-3 of a 70B: embedding, final norm and head, 3 % of the parameters, are gathered once, everything else twice."""
    counts = parameter_counts(load_model("llama-3-70b"))
    root = counts["embedding"] + counts["head"] + counts["final_norm"]
    whole, kept = (
        replace(
            load_runtime("fsdp2"), working_set=replace(load_runtime("fsdp2").working_set, root_stays_gathered=stays)
        )
        for stays in (False, True)
    )
    gathers = [_all_data_parallel_s(runtime) for runtime in (whole, kept)]
    assert gathers[1] / gathers[0] == pytest.approx(1 - root / counts["total"] / 3, abs=2e-4)


def _all_data_parallel_s(runtime: Runtime) -> float:
    """Two gathers and a reduction in bf16 of one micro-batch, nothing hidden."""
    exposed = replace(runtime.communication, gather_overlap=0.0, prefetch_overlap=0.0, reduce_overlap=0.0)
    got = estimate(
        model=load_model("llama-3-70b"),
        job=Job(seq=8192, global_batch=64, grad_dtype="bf16"),
        cluster=load_cluster("h100-ib", gpus=64),
        layouts=parse_layout("dp=64 zero=3 recompute=full"),
        runtime=replace(runtime, communication=exposed, name="unfitted"),
    )
    return float(got.time["dp_exposed_s"][0])


def layer_shapes(*, tp: int, sequence_parallel: bool, seq: int = 2048) -> Shapes:
    one = np.ones(1)
    return Shapes(
        micro_batch=one,
        seq=seq * one,
        tp=tp * one,
        sp=(tp if sequence_parallel else 1) * one,
        flash=np.array([True]),
        element_bytes=2,
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_volume_of_a_layer(sequence_parallel: bool) -> None:
    """Two all-reduces of b s h forward and two backward (arXiv 1909.08053); as many all-gathers and reduce-scatters with sequence
    parallelism, the same bytes (arXiv 2205.05198); with full recompute 12 s h b elements a block (ZeRO-R, arXiv 1910.02054)."""
    kind, tp = load_model("gpt3-175b").layers[0][0], 8
    runtime, shapes = load_runtime("megatron-2021"), layer_shapes(tp=tp, sequence_parallel=sequence_parallel)
    ops = layer_ops(kind, shapes, runtime)
    forward, backward = (
        sum(
            float(collective_s(wire(), name, size, tp, 1)[0])
            for op in ops
            for name, size in (op.forward if phase == "forward" else op.backward)
        )
        for phase in ("forward", "backward")
    )
    block = 2048 * kind.hidden * 2 * (tp - 1) / tp
    assert forward == backward == pytest.approx(4 * block, rel=1e-12)
    repeated = (
        runtime.communication.full_repeats_tensor_sp if sequence_parallel else runtime.communication.full_repeats_tensor
    )
    assert forward * (1 + repeated) + backward == pytest.approx(12 * block, rel=1e-12)


@pytest.mark.parametrize(("n", "all_reduce_steps"), [(2, 2), (4, 6), (8, 14)])
def test_ring_latency(n: int, all_reduce_steps: int) -> None:
    """Small buffers: 2 (n - 1) steps of a ring all-reduce, n - 1 of an all-gather or reduce-scatter."""
    tiers = wire(gpus=8, latency_s=1e-6)
    assert float(collective_s(tiers, "all_reduce", 1e-9, n, 1)) == pytest.approx(all_reduce_steps * 1e-6)
    for half in ("all_gather", "reduce_scatter"):
        assert float(collective_s(tiers, half, 1e-9, n, 1)) == pytest.approx(all_reduce_steps / 2 * 1e-6)


@pytest.mark.parametrize(("words", "split"), [("tp=8", 1), ("tp=8 sequence_parallel=true", 8)])
def test_boundary_tensor_of_a_pipeline(words: str, split: int) -> None:
    """b s h each way and micro-batch, over tp with sequence parallelism, v times as often interleaved (arXiv 2104.04473)."""
    cluster = load_cluster("h100-ib", gpus=64)
    free = replace(cluster.network, latency_s=0.0, spine_latency_s=0.0)
    cluster = replace(cluster, network=free)
    tiers = tier_table(cluster)
    runtime = load_runtime("fsdp2")
    assert not runtime.communication.pipeline_scatter
    assert runtime.communication.pipeline_overlap == 0
    for v, schedule in ((1, "1f1b"), (2, "interleaved")):
        got = estimate(
            model=load_model("llama-3-70b"),
            job=Job(seq=8192, global_batch=64),
            cluster=cluster,
            layouts=parse_layout(f"dp=2 pp=4 zero=1 schedule={schedule} virtual_stages={v} {words}"),
            runtime=runtime,
        )
        one = 2 * 8192 * 8192 / split / (tiers.bandwidth_bytes_per_s[-1] * tiers.point_to_point_fraction[-1])
        assert float(got.time["pp_exposed_s"][0]) == pytest.approx(2 * v * (32 + 3) * one, rel=1e-2)


@pytest.mark.parametrize(
    ("zero", "offload", "gpu_gib", "host_gib"), [(2, True, 5.31, None), (3, True, 0.78, 63.72), (3, False, 6.09, None)]
)
def test_deepspeed_estimator_with_offload(zero: int, offload: bool, gpu_gib: float, host_gib: float | None) -> None:
    """deepspeed.runtime.zero estimators 0.19, 2851e6 parameters, largest layer 32e6, 8 GPUs: stage 2 keeps 2 P, stage 3 with the
    optimizer offloaded 4 L + 2 P/N and 16 P in host memory times its buffer factor of 1.5."""
    psi, largest = 2851e6, 32e6
    layouts = layout_table([parse_layout(f"dp=8 zero={zero} offload_optimizer={'cpu' if offload else 'none'}")])
    states = stage_states(
        load_runtime("deepspeed"),
        Job(seq=2048, global_batch=8),
        layouts,
        accumulates=np.array([False]),
        stage_parameters=np.array([[psi]]),
        layer_parameters=np.array([[largest]]),
        root_parameters=np.array([[0.0]]),
    )
    device = sum(float(states[part][0, 0]) for part in ("parameters", "gradients", "optimizer"))
    waiting = (
        2 * largest if zero == 2 else 0.0
    )  # gradients of the layer being reduced, which the stage-2 estimator leaves out
    assert (device - waiting) / GIB == pytest.approx(gpu_gib, abs=0.01)
    if host_gib is not None:
        assert float(states["host"][0, 0]) * 8 * 1.5 / GIB == pytest.approx(host_gib, abs=0.01)
