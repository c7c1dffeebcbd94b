"""The estimate as a whole: parts add up, one row equals many, physics points the right way, published step times are near."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.collectives import collective_s, members_per_node, point_to_point_s
from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, layout_table, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.runtime_document import runtime_names
from shardplan.costmodel.stage_cost import block_rows
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.topology import tier_table
from shardplan.planner.search import judge

STAGE_PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


def one(
    words: str,
    *,
    model: str = "llama-3-70b",
    cluster: str = "h100-ib",
    runtime: str = "megatron",
    seq: int = 8192,
    batch: int = 256,
) -> Estimates:
    layout = parse_layout(words)
    return estimate(
        model=load_model(model),
        job=Job(seq=seq, global_batch=batch),
        cluster=load_cluster(cluster, gpus=layout.gpus),
        layouts=layout,
        runtime=runtime,
    )


def answer(
    words: str,
    *,
    model: str = "llama-3-70b",
    cluster: str = "h100-ib",
    runtime: str = "megatron",
    seq: int = 8192,
    batch: int = 256,
) -> dict:
    layout = parse_layout(words)
    verdict = judge(
        layout,
        model=load_model(model),
        job=Job(seq=seq, global_batch=batch),
        cluster=load_cluster(cluster, gpus=layout.gpus),
        runtime=load_runtime(runtime),
    )
    assert isinstance(verdict, dict), verdict
    return verdict


@pytest.mark.parametrize("runtime", ["shardplan", "fsdp2", "megatron", "deepspeed", "megatron-2021"])
def test_parts_add_up(runtime: str) -> None:
    got = answer("dp=4 tp=4 pp=4 zero=1 recompute=full", runtime=runtime)
    assert sum(got["time"][part] for part in TIME_PARTS) == pytest.approx(got["time"]["step_s"], rel=1e-12)
    assert len(got["memory"]["stages"]) == 4
    for stage in got["memory"]["stages"]:
        parts = sum(stage[f"{part}_bytes"] for part in STAGE_PARTS)
        assert parts == pytest.approx(stage["allocated_bytes"], rel=1e-12)
        device = stage["allocated_bytes"] + stage["allocator_slack_bytes"] + stage["context_bytes"]
        assert device == pytest.approx(stage["device_bytes"], rel=1e-12)
    assert got["memory"]["device_peak_bytes"] == max(stage["device_bytes"] for stage in got["memory"]["stages"])
    assert sum(stage["layers"] for stage in got["memory"]["stages"]) == 80


def test_throughput_is_consistent() -> None:
    got = answer("dp=4 tp=8 pp=2 zero=1 recompute=full")
    rate, step = got["throughput"], got["time"]["step_s"]
    assert rate["tokens_per_s"] == pytest.approx(256 * 8192 / step)
    assert rate["tokens_per_s_per_gpu"] == pytest.approx(rate["tokens_per_s"] / 64)
    assert rate["mfu"] == pytest.approx(rate["model_flop_per_s_per_gpu"] / 989e12)
    assert rate["mfu"] < rate["hfu"] < rate["mfu"] * 4 / 3 + 1e-9


def test_hardware_flop_of_full_recompute_equals_sc21() -> None:
    """96 B s l h^2 (1 + s/6h + V/16lh) (arXiv 2104.04473, appendix); the head is not recomputed."""
    got = one(
        "dp=32 tp=8 pp=2 micro_batch=4 recompute=full",
        model="megatron-39b",
        cluster="selene",
        runtime="megatron-2021",
        seq=2048,
        batch=1536,
    )
    b, s, n, h, v = 1536, 2048, 48, 8192, 51200
    assert got.hardware_flop_per_step[0] == pytest.approx(
        96 * b * s * n * h * h * (1 + s / (6 * h) + v / (16 * n * h)), rel=1e-12
    )


LAYOUTS = [
    parse_layout(words)
    for words in (
        "dp=64",
        "dp=64 zero=3 recompute=full",
        "dp=64 zero=3 dp_shard=8 recompute=full:40",
        "dp=8 tp=8 zero=1 sequence_parallel=true micro_batch=2",
        "dp=2 tp=8 pp=4 zero=1 recompute=selective",
        "dp=2 tp=8 pp=4 schedule=interleaved virtual_stages=5 zero=1",
        "dp=4 tp=2 pp=8 stage_layers=8,10,11,11,11,11,10,8 recompute=full:2",
        "dp=8 pp=8 zero=2 attention=unfused recompute=full",
        "dp=64 zero=3 offload_optimizer=cpu recompute=full",
        "dp=2 tp=8 pp=4 zero=1 recompute=selective:core_attn+mlp",
    )
]


def test_many_rows_equal_each_alone() -> None:
    """One implementation: a row does not depend on its neighbours, whatever their order."""
    inputs = {
        "model": load_model("llama-3-70b"),
        "job": Job(seq=4096, global_batch=512),
        "cluster": load_cluster("h100-ib", gpus=64),
    }
    together = estimate(**inputs, layouts=layout_table(LAYOUTS), runtime="fsdp2")
    backwards = estimate(**inputs, layouts=layout_table(LAYOUTS[::-1]), runtime="fsdp2")
    for i, layout in enumerate(LAYOUTS):
        alone = estimate(**inputs, layouts=layout, runtime="fsdp2")
        for part in (*TIME_PARTS, "step_s"):
            assert together.time[part][i] == pytest.approx(alone.time[part][0], rel=1e-9, abs=1e-15), (
                layout.words(),
                part,
            )
            assert together.time[part][i] == backwards.time[part][len(LAYOUTS) - 1 - i]
        # the few stages that can be the worst contain the fullest one
        assert together.device_peak_bytes[i] == pytest.approx(alone.device_peak_bytes[0], rel=1e-12), layout.words()


def test_zero_stages_shard_more_and_more() -> None:
    peaks = [float(one(f"dp=64 zero={zero} recompute=full", runtime="fsdp2").device_peak_bytes[0]) for zero in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_hsdp_trades_memory_for_communication() -> None:
    """With a NIC per GPU the volumes are equal; at 1,024 ranks the ring latency of whole-cluster gathers decides."""
    whole = answer("dp=1024 zero=3 recompute=full", model="llama-3-8b", runtime="fsdp2", batch=1024)
    inside = answer("dp=1024 zero=3 dp_shard=32 recompute=full", model="llama-3-8b", runtime="fsdp2", batch=1024)
    assert inside["memory"]["device_peak_bytes"] > whole["memory"]["device_peak_bytes"]
    total = [got["time"]["dp_exposed_s"] + got["time"]["hidden"]["dp_s"] for got in (inside, whole)]
    assert total[0] < total[1]


def test_recompute_trades_time_for_memory() -> None:
    got = [answer(f"dp=2 tp=8 pp=4 recompute={word}", seq=4096) for word in ("none", "selective", "full:10", "full")]
    assert got[0]["time"]["recompute_s"] == 0 < got[2]["time"]["recompute_s"] < got[3]["time"]["recompute_s"]
    peaks = [g["memory"]["device_peak_bytes"] for g in got]
    assert peaks[0] >= peaks[1] > peaks[2] > peaks[3]


def test_uneven_stages_move_memory_and_time() -> None:
    even = answer("dp=8 tp=4 pp=4 zero=1 recompute=full")
    heavy_last = answer("dp=8 tp=4 pp=4 zero=1 recompute=full stage_layers=19,19,19,23")
    assert [stage["layers"] for stage in heavy_last["memory"]["stages"]] == [19, 19, 19, 23]
    assert heavy_last["time"]["step_s"] > even["time"]["step_s"]
    assert heavy_last["memory"]["stages"][3]["parameters_bytes"] > even["memory"]["stages"][3]["parameters_bytes"]


def test_bubble_shrinks_with_micro_batches_and_interleaving() -> None:
    def bubble(words: str, batch: int) -> float:
        time = answer(words, batch=batch)["time"]
        return time["bubble_s"] / time["step_s"]

    base = "dp=2 tp=8 pp=4 zero=1 recompute=full"
    assert bubble(base, 256) < bubble(base, 64)
    assert bubble(base + " schedule=interleaved virtual_stages=4", 64) == pytest.approx(bubble(base, 64) / 4, rel=0.25)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    kept = answer("dp=8 zero=2 recompute=full", model="llama-2-7b", runtime="deepspeed", seq=2048, batch=64)
    moved = answer(
        "dp=8 zero=2 recompute=full offload_optimizer=cpu", model="llama-2-7b", runtime="deepspeed", seq=2048, batch=64
    )
    assert kept["memory"]["host_bytes"] == 0.0 == kept["time"]["offload_exposed_s"]
    assert moved["time"]["optimizer_s"] == 0.0 < moved["time"]["offload_exposed_s"]
    assert moved["memory"]["stages"][0]["optimizer_bytes"] == 0.0
    # 2 bytes of gradients and 16 of fp32 gradient, master and moments per parameter live in host memory, over 8 ranks
    assert moved["memory"]["host_bytes"] == pytest.approx(18 * 6.738e9, rel=0.01)
    assert moved["time"]["step_s"] > kept["time"]["step_s"]


def test_flash_attention_saves_memory_and_time() -> None:
    flash, unfused = (answer(f"dp=4 tp=8 pp=2 recompute=none attention={a}", seq=8192) for a in ("flash", "unfused"))
    assert flash["memory"]["device_peak_bytes"] < unfused["memory"]["device_peak_bytes"]
    assert flash["time"]["compute_s"] < unfused["time"]["compute_s"]


def test_fp32_needs_more_than_bf16() -> None:
    runtime, cluster, model = load_runtime("fsdp2"), load_cluster("h100-ib", gpus=8), load_model("llama-3-8b")
    layout = parse_layout("dp=8 zero=3 recompute=full")
    both = [
        estimate(
            model=model,
            job=Job(seq=4096, global_batch=8, precision=p),
            cluster=cluster,
            layouts=layout,
            runtime=runtime,
        )
        for p in ("bf16", "fp32")
    ]
    assert both[0].step_s[0] < both[1].step_s[0]
    assert both[0].device_peak_bytes[0] < both[1].device_peak_bytes[0]


def test_mixture_of_experts_computes_only_the_chosen() -> None:
    got = answer("dp=8 tp=8 zero=1 recompute=full sequence_parallel=true", model="mixtral-8x7b", seq=4096)
    attention, look_up = 12 * 32 * 4096 * 4096, 32_000 * 4096
    active_flop = (6 * (12.88e9 - look_up) + attention) * 256 * 4096
    assert got["throughput"]["model_flop_per_s_per_gpu"] * got["time"]["step_s"] * 64 == pytest.approx(
        active_flop, rel=1e-3
    )


SC21 = [
    ("megatron-1.7b", "dp=32 micro_batch=16 recompute=full", 512, 3.528),
    ("megatron-3.6b", "dp=32 tp=2 micro_batch=16 recompute=full", 512, 3.697),
    ("megatron-39b", "dp=32 tp=8 pp=2 micro_batch=4 recompute=full", 1536, 14.424),
    (
        "megatron-76b",
        "dp=32 tp=8 pp=4 micro_batch=2 recompute=full schedule=interleaved virtual_stages=3",
        1792,
        16.009,
    ),
    ("megatron-530b", "dp=9 tp=8 pp=35 recompute=full schedule=interleaved virtual_stages=3", 2520, 54.159),
    ("megatron-1t", "dp=6 tp=8 pp=64 recompute=full", 3072, 102.372),
    ("gpt3-175b", "tp=8 pp=8 recompute=full schedule=interleaved virtual_stages=3", 64, 18.13),
    (
        "gpt3-175b",
        "tp=8 pp=8 recompute=selective sequence_parallel=true schedule=interleaved virtual_stages=3",
        64,
        13.75,
    ),
    ("megatron-530b", "tp=8 pp=35 recompute=full schedule=interleaved virtual_stages=3", 280, 49.05),
    (
        "megatron-530b",
        "tp=8 pp=35 recompute=selective sequence_parallel=true schedule=interleaved virtual_stages=3",
        280,
        37.83,
    ),
    ("megatron-1t", "tp=8 pp=64 recompute=full", 512, 94.42),
    ("megatron-1t", "tp=8 pp=64 recompute=selective sequence_parallel=true", 512, 71.49),
]


def test_published_megatron_step_times() -> None:
    """Six rows each of SC21 Table 1 (arXiv 2104.04473) and Korthikanti et al. Table 5 (arXiv 2205.05198): 10 % each, 6 % mean."""
    errors: list[float] = []
    for name, words, batch, measured in SC21:
        layout = parse_layout(words)
        got = estimate(
            model=load_model(name),
            job=Job(seq=2048, global_batch=batch, precision="fp16"),
            cluster=load_cluster("selene", gpus=layout.gpus),
            layouts=layout,
            runtime="megatron-2021",
        )
        error = float(got.step_s[0]) / measured - 1
        print(
            f"{name:14} {layout.gpus:5} GPUs  measured {measured:8.3f} s  estimated {got.step_s[0]:8.3f} s  {error:+.1%}"
        )
        errors.append(abs(error))
        assert errors[-1] < 0.10, (name, words, float(got.step_s[0]), measured)
    print(f"mean absolute error {np.mean(errors):.1%}")
    assert np.mean(errors) < 0.06


def test_collectives_follow_the_topology() -> None:
    tiers = tier_table(load_cluster("h100-ib"))
    inside = collective_s(tiers, "all_reduce", 1e9, 8, 1)
    across = collective_s(tiers, "all_reduce", 1e9, 8, 8)
    assert float(collective_s(tiers, "all_reduce", 1e9, 1, 1)) == 0.0
    assert across > 4 * inside
    assert float(members_per_node(tiers, 16, 4)) == 2
    # two members per node use two NICs
    assert float(collective_s(tiers, "all_gather", 1e9, 16, 4)) < 0.6 * float(
        collective_s(tiers, "all_gather", 1e9, 16, 8)
    )
    assert float(point_to_point_s(tiers, 1e8, 2, 8)) > float(point_to_point_s(tiers, 1e8, 2, 1))
    # a chain that leaves the node is as slow as the hop that does
    assert float(point_to_point_s(tiers, 1e8, 4, 4)) == float(point_to_point_s(tiers, 1e8, 2, 8))
    # three neighbours do not tile a node of eight: some group spans two nodes
    assert float(collective_s(tiers, "all_reduce", 1e8, 3, 1)) > 3 * float(collective_s(tiers, "all_reduce", 1e8, 4, 1))


words = st.builds(
    Layout,
    dp=st.sampled_from([1, 2, 8]),
    tp=st.sampled_from([1, 2, 8]),
    pp=st.sampled_from([1, 2, 4]),
    micro_batch=st.sampled_from([1, 2]),
    zero=st.integers(0, 3),
    sequence_parallel=st.booleans(),
    recompute=st.sampled_from(["none", "selective", "full", "full:3"]),
    attention=st.sampled_from(["auto", "flash", "unfused", "triton"]),
)


@settings(max_examples=60, deadline=None)
@given(words, st.sampled_from(runtime_names()))
def test_every_number_is_finite_and_positive(layout: Layout, runtime: str) -> None:
    got = estimate(
        model=load_model("llama-3-8b"),
        job=Job(seq=2048, global_batch=32),
        cluster=load_cluster("h100-ib", gpus=layout.gpus),
        layouts=layout,
        runtime=runtime,
    )
    assert np.isfinite(got.step_s).all()
    assert all((got.time[part] >= 0).all() for part in TIME_PARTS)
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in got.stages.values())
    assert 0 < got.mfu[0] <= got.hfu[0] < 1
    assert layout_table([layout]).row(0) == replace(layout, dp_shard=None)
    assert parse_layout(layout.words(every=True)) == layout


def test_selective_keeps_what_the_executor_keeps() -> None:
    """Bytes per token and layer beyond the input, tiny at tp = 2 in fp32: q, k, v 512, gate and up 1536, and the outputs of
    projection and MLP, whole on every rank, 512 each; measured on the executor with hooks on saved tensors."""
    model, cluster, runtime = load_model("tiny"), load_cluster("8x4090", gpus=2), load_runtime("shardplan")
    for words in ("tp=2", "tp=2 sequence_parallel=true"):
        table = layout_table([parse_layout(words + " recompute=selective")])
        job = Job(seq=256, global_batch=1, precision="fp32")
        (layer,) = block_rows(model, job, cluster, table, runtime).layers
        kept = layer["kept_bytes"] - layer["selective_bytes"] - layer["input_bytes"]
        assert float(kept[0]) / 256 == 3072


def test_layouts_without_meaning_are_refused() -> None:
    inputs = {
        "model": load_model("llama-3-8b"),
        "job": Job(seq=4096, global_batch=64),
        "cluster": load_cluster("h100-ib", gpus=64),
    }
    for words in (
        "dp=7 tp=3",
        "pp=64",
        "dp=64 micro_batch=17",
        "dp=32 pp=2 stage_layers=1,2",
        "dp=64 ep=2",
    ):
        with pytest.raises(InputError):
            estimate(**inputs, layouts=parse_layout(words))
    with pytest.raises(InputError, match="no layouts"):
        estimate(**inputs, layouts=layout_table([parse_layout("dp=64")]).take(np.zeros(0, dtype=np.int64)))


def test_zero_only_ever_saves_memory() -> None:
    for words in (
        "dp=64 micro_batch=2 recompute=full",
        "dp=64 micro_batch=4 recompute=full",
        "dp=8 pp=8 recompute=full",
    ):
        for runtime in ("shardplan", "fsdp2"):
            peaks = [
                float(one(f"{words} zero={zero}", runtime=runtime, batch=256).device_peak_bytes[0]) for zero in range(4)
            ]
            assert all(later <= earlier * 1.0001 for earlier, later in pairwise(peaks)), (
                words,
                peaks,
            )
