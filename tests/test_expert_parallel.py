"""Experts on several ranks: who holds what, what travels, what the busiest rank computes and keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.costmodel.collectives import all_to_all_s, collective_s, sent_once
from shardplan.costmodel.data_parallel import one_exchange_s
from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.expert_parallel import dispatched_ops, expert_load, expert_parameters
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import LayoutTable, layout_from_document, layout_table, parse_layout
from shardplan.costmodel.model import LayerKind, layer_parameters
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.op import Op, Shapes
from shardplan.costmodel.operators import layer_ops
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.topology import tier_table

MIXTRAL = load_model("mixtral-8x7b")
QWEN = load_model("qwen3-30b-a3b")
DEEPSEEK = load_model("deepseek-v3")
MEGATRON = load_runtime("megatron")


def table(*words: str) -> LayoutTable:
    return layout_table([parse_layout(one) for one in words])


def estimated(
    words: str, *, runtime: str = "megatron", gpus: int = 64, model: str = "qwen3-30b-a3b", **job: float
) -> Estimates:
    return estimate(
        model=load_model(model),
        job=Job(seq=4096, global_batch=512, **job),  # pyright: ignore[reportArgumentType]
        cluster=load_cluster("h100-ib", gpus=gpus),
        layouts=parse_layout(words),
        runtime=runtime,
    )


def one(value: float) -> np.ndarray:
    return np.array([value])


def shapes(**changed: object) -> Shapes:
    usual = {"micro_batch": one(1.0), "seq": one(4096.0), "tp": one(1.0), "sp": one(1.0), "flash": np.array([True])}
    return Shapes(**{**usual, "element_bytes": 2, **changed})  # pyright: ignore[reportArgumentType]


def spread_ops(model: str = "mixtral-8x7b", runtime: str = "megatron", **changed: object) -> dict[str, Op]:
    kind, at, software = load_model(model).layers[-1][0], shapes(**changed), load_runtime(runtime)
    return {op.name: op for op in dispatched_ops(layer_ops(kind, at, software), kind, at, software)}


# Who holds what


def test_words_say_how_experts_are_spread() -> None:
    rows = table("dp=8 tp=4", "dp=8 tp=4 ep=8", "dp=8 tp=4 ep=8 etp=2", "dp=8 tp=4 etp=1", "dp=8 tp=4 etp=4")
    assert rows.expert_tp.tolist() == [4, 1, 2, 1, 4]
    assert rows.dispatches.tolist() == [False, True, True, True, False]
    assert rows.expert_replicas.tolist() == [8, 4, 2, 32, 8]


def test_expert_groups_fill_dp_cp_tp() -> None:
    """Megatron-Core: expert data parallel size = world / (etp ep pp)."""
    (row,) = table("dp=4 cp=2 tp=4 pp=2 ep=8 etp=2 zero=1").expert_zero_ranks.tolist()
    assert row == 4 * 2 * 4 // (8 * 2)
    assert table("dp=32 ep=8 zero=1 dp_shard=16").expert_zero_ranks.tolist() == [
        2
    ]  # torchtitan: dp_shard * cp * tp / ep
    assert table("dp=32 ep=8 zero=0").expert_zero_ranks.tolist() == [1]


def test_a_rank_of_64_holds_four_of_256_experts() -> None:
    """DeepSeek-V3: 256 experts of 3 * 7168 * 2048 parameters, dense first layers without any."""
    held, instead = expert_parameters(DEEPSEEK, table("dp=64 ep=64", "dp=64"))
    assert held.tolist() == [[0.0, 4 * 3 * 7168 * 2048], [0.0, 0.0]]
    assert instead.tolist() == [[0.0, 256 * 3 * 7168 * 2048], [0.0, 0.0]]


def test_states_of_experts_are_sharded_over_those_that_hold_the_same() -> None:
    """Megatron's distributed optimizer, 6 + 12/d bytes, with d = 64 for dense parameters and 64/8 for experts."""
    stages = estimated("dp=64 ep=8 zero=1").stages
    experts = sum(count * layer_parameters(kind)["mlp"] for kind, count in QWEN.layers) / 8
    dense = stages["parameters"][0, 0] / 2 - experts
    assert stages["gradients"][0, 0] == pytest.approx(4 * (dense + experts))
    assert stages["optimizer"][0, 0] == pytest.approx(12 * (dense / 64 + experts / 8))


def test_gradients_of_experts_meet_among_fewer_ranks() -> None:
    tiers, rows = tier_table(load_cluster("h100-ib", gpus=64)), table("dp=64 ep=8 zero=1")
    sizes = {"units": one(48.0), "gradient_bytes": 4, "parameter_bytes": 2, "gpu": load_cluster("h100-ib").gpu}
    communication = replace(MEGATRON.communication, bucket_parameters=0.0)
    dense = one_exchange_s(tiers, rows, communication, parameters=one(1e9), trained=one(1e9), **sizes)
    both = one_exchange_s(tiers, rows, communication, parameters=one(2e9), trained=one(2e9), experts=one(1e9), **sizes)
    message = 4e9 / (48 * communication.reduce_messages)
    alone = 48 * communication.reduce_messages * collective_s(tiers, "reduce_scatter", message, 8, 8)
    assert both.reduce_s - dense.reduce_s == pytest.approx(alone)


# What travels


def test_tokens_sent_once() -> None:
    """Eight copies for eight ranks drawn at random reach 8 (1 - (7/8)^8) = 5.25 of them."""
    assert float(sent_once(np.asarray(8.0), 8)) == pytest.approx(5.2511 / 8, rel=1e-4)
    assert float(sent_once(np.asarray(1.0), 8)) == pytest.approx(1 / 8)
    assert float(sent_once(np.asarray(8.0), 1)) == 1.0


def test_copies_for_one_node_cross_the_network_once() -> None:
    """Four nodes: 4 (1 - (3/4)^8) / 8 = 0.45 of the copies are left."""
    tiers = tier_table(load_cluster("h100-ib", gpus=32))
    every, once = (all_to_all_s(tiers, 1e9, 32, 1, copies) - tiers.latency_s[1] for copies in (1.0, 8.0))
    shrunk = 0.45 * 0.75e9 * 8
    rates = [tiers.efficiency[1].at(size) for size in (0.75e9 * 8, shrunk)]
    assert float(once / every) == pytest.approx(0.45 * rates[0] / rates[1], rel=1e-3)


def test_a_rack_is_one_domain() -> None:
    """256 GPUs of a GB200 NVL72 cluster are four parts of 64; an exchange among 64 stays inside, on 64 H100 it leaves the node."""
    racks = load_cluster("gb200-nvl72", gpus=256)
    assert (racks.nodes, racks.node.gpus, racks.network.nics_per_node) == (4, 64, 64)
    assert load_cluster("gb200-nvl72", gpus=8).node.gpus == 8
    inside = all_to_all_s(tier_table(racks), 1e8, 64, 1)
    outside = all_to_all_s(tier_table(load_cluster("h100-ib", gpus=64)), 1e8, 64, 1)
    assert float(inside) < 0.2 * float(outside)


def test_each_copy_is_sent_there_and_back() -> None:
    """Two experts a token: 2 * 4096 tokens * 4096 wide * 2 bytes; under sequence parallelism a rank has 1/tp of the tokens."""
    ops = spread_ops(ep=one(8.0))
    assert [ops[name].experts for name in ("dispatch", "combine")] == [(2 * 4096 * 4096 * 2, 2.0)] * 2
    split = spread_ops(ep=one(8.0), tp=one(4.0), sp=one(4.0))["dispatch"].experts
    assert split is not None
    assert split[0] == 2 * 4096 * 4096 * 2 / 4


def test_overlap_hides_a_share_of_the_exchange() -> None:
    plain, overlapped = (estimated("dp=64 ep=8", runtime=f"megatron{word}") for word in ("", "+a2a_overlap"))
    whole = plain.time["ep_exposed_s"][0]
    assert plain.hidden["ep_s"][0] == 0.0
    assert overlapped.hidden["ep_s"][0] == pytest.approx(0.7 * whole)
    assert overlapped.time["ep_exposed_s"][0] == pytest.approx(0.3 * whole)


def test_full_recompute_exchanges_tokens_again() -> None:
    once, again = (estimated(f"dp=64 ep=8 recompute={word}").time["ep_exposed_s"][0] for word in ("none", "full"))
    assert again == pytest.approx(1.5 * once)


def test_exchanges_among_more_ranks_take_longer_and_deepep_shortens_them() -> None:
    shares = [estimated(f"dp=64 ep={ep}").time["ep_exposed_s"][0] for ep in (1, 2, 8, 16, 64)]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert estimated("dp=64 ep=64", runtime="megatron+deepep").time["ep_exposed_s"][0] < 0.7 * shares[-1]


def test_shared_experts_exchange_their_own_buffers() -> None:
    kind, at = DEEPSEEK.layers[-1][0], shapes(ep=one(8.0), tp=one(4.0), sp=one(4.0))
    ops = dispatched_ops(layer_ops(kind, at, MEGATRON), kind, at, MEGATRON)
    names = [op.name for op in ops]
    first = names.index("up")
    assert names[first - 1 : first + 6] == ["dispatch", "up", "activation", "down", "up", "activation", "down"]
    stream = 2 * 4096 * 7168
    assert ops[first].forward == (("all_gather", stream),)
    assert ops[first + 2].forward[0] == ("reduce_scatter", stream)
    assert ops[first + 3].forward == ops[first + 5].forward == ()


# What is computed and kept


@pytest.mark.parametrize("ep", [1.0, 2.0, 8.0])
def test_spread_experts_compute_as_much_as_cut_ones(ep: float) -> None:
    """All ranks together compute k * tokens rows, whoever has the expert."""
    at = shapes()
    usual = {op.name: op for op in layer_ops(MIXTRAL.layers[0][0], at, MEGATRON)}
    ops = spread_ops(ep=one(ep))
    for name in ("up", "down"):
        assert ops[name].gemms[0].flop == pytest.approx(usual[name].gemms[0].flop)
        assert ops[name].gemms[0].count == pytest.approx(8 / ep)
        assert ops[name].gemms[0].m == pytest.approx(2 * 4096 * ep / 8)


def test_expert_tensor_parallelism_gathers_rows_and_cuts_widths() -> None:
    ops = spread_ops(ep=one(4.0), expert_tp=one(2.0))
    (up,) = ops["up"].gemms
    assert (float(up.m[0]), float(up.n[0]), float(up.count[0])) == (2 * 4096 * 2 * 4 / 8, 2 * 14336 / 2, 2.0)
    assert ops["dispatch"].kept_bytes == 2 * 2 * 4096 * 4096 * 2


def test_kept_bytes_of_experts() -> None:
    """Of a SwiGLU expert: its input, gate and up, and the product; the router keeps fp32 scores. Weights inside: no outputs."""
    copies = 2 * 4096 * 2
    ops = spread_ops(ep=one(8.0))
    assert ops["router"].kept_bytes == 4 * 4096 * 8
    assert ops["dispatch"].kept_bytes == copies * 4096
    assert ops["up"].kept_bytes == 2 * copies * 14336
    assert ops["activation"].kept_bytes == pytest.approx(copies * 14336)
    assert ops["down"].kept_bytes == 0
    assert spread_ops(runtime="fsdp2", ep=one(8.0))["down"].kept_bytes == copies * 4096


def test_ordering_reads_and_writes_copies() -> None:
    """Made from the tokens, sorted by local expert (read and written): h + k h + 2 k h; sent once: the copies, and what came."""
    stream, copies = 2 * 4096 * 4096, 2 * 2 * 4096 * 4096
    fused = spread_ops(runtime="megatron+permute_fusion", ep=one(2.0))
    assert fused["dispatch"].copied_bytes == fused["combine"].copied_bytes == stream + 3 * copies
    lone = spread_ops(runtime="megatron+permute_fusion", ep=one(8.0))["dispatch"]
    assert lone.copied_bytes == stream + copies  # one expert a rank: nothing to sort
    once = spread_ops(runtime="megatron+permute_fusion+deepep", ep=one(8.0))["dispatch"]
    assert once.copied_bytes == pytest.approx(copies * (1 + 8 * (1 - (7 / 8) ** 2) / 2))


def test_biases_of_experts_pass_memory_in_fp32() -> None:
    """gpt-oss: 34 bytes for each value that an expert returns, forward and backward; none in a fused kernel, none without biases."""
    kind, spread = load_model("gpt-oss-120b").layers[0][0], shapes(ep=one(8.0))
    returned = 4 * 4096 * 2880

    def bias_bytes(model_kind: LayerKind, runtime: str) -> float:
        how = load_runtime(runtime)
        ops = {op.name: op for op in dispatched_ops(layer_ops(model_kind, spread, how), model_kind, spread, how)}
        return float(np.max(ops["down"].copied_bytes))

    assert bias_bytes(kind, "megatron") == 34 * returned
    assert bias_bytes(kind, "megatron+fused_experts") == 0
    assert bias_bytes(replace(kind, mlp_bias=False), "megatron") == 0


@pytest.mark.parametrize(
    ("job", "ep", "load"),
    [
        ({}, 8, 1.0),
        ({"expert_imbalance": 1.5}, 8, 1.5),
        ({"expert_imbalance": 4.0}, 2, 2.0),
        ({"capacity_factor": 1.25}, 8, 1.25),
    ],
)
def test_the_busiest_rank_gets_all_tokens_at_most(job: dict[str, float], ep: int, load: float) -> None:
    asked = Job(seq=1, global_batch=64, **job)  # pyright: ignore[reportArgumentType]
    assert expert_load(asked, table(f"dp=64 ep={ep}")).tolist() == [load]


def test_the_busiest_rank_sets_pace_and_peak() -> None:
    """What experts keep and what travels grow with the load, attention does not."""
    even, uneven, padded = (
        estimated("dp=64 ep=8", **job) for job in ({}, {"expert_imbalance": 1.5}, {"capacity_factor": 1.5})
    )
    assert uneven.time["ep_exposed_s"][0] > 1.3 * even.time["ep_exposed_s"][0]
    assert 1.1 < uneven.time["compute_s"][0] / even.time["compute_s"][0] < 1.5
    grown = uneven.stages["activations"][0, 0] - even.stages["activations"][0, 0]
    copies = 8 * 4096 * 2
    assert grown == pytest.approx(48 * 0.5 * copies * (2048 + 3 * 768))
    assert padded.step_s[0] == uneven.step_s[0]


def test_separate_products_fill_waves_of_their_own() -> None:
    plain, fused = (
        estimated("dp=64 ep=8 micro_batch=4", runtime=f"megatron+cuda_graph{w}") for w in ("", "+fused_experts")
    )
    assert fused.time["compute_s"][0] < plain.time["compute_s"][0]


def test_launches_pace_small_micro_batches() -> None:
    """Qwen3-30B on 8 B200, one sequence a micro-batch: 28.2 s a step in release 25.11 (docs/performance-summary-archive.md
    at NVIDIA-NeMo/Megatron-Bridge@067f987d), 9.7 s with four in 26.04.01."""

    def found(micro_batch: int, runtime: str) -> Estimates:
        return estimate(
            model=QWEN,
            job=Job(seq=4096, global_batch=512, precision="fp8"),
            cluster=load_cluster("b200-ib", gpus=8),
            layouts=parse_layout(f"dp=8 ep=8 zero=1 micro_batch={micro_batch}"),
            runtime=f"megatron+bf16_gradients+permute_fusion{runtime}",
        )

    launched, graphed, larger = found(1, ""), found(1, "+cuda_graph"), found(4, "+deepep")
    assert launched.time["host_s"][0] > 0.5 * launched.step_s[0]
    assert graphed.time["host_s"][0] < 0.01 * launched.time["host_s"][0]
    assert launched.step_s[0] == pytest.approx(28.2, rel=0.06)
    assert larger.step_s[0] == pytest.approx(9.7, rel=0.12)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    words = (
        "dp=64 zero=1",
        "dp=64 ep=8 zero=1",
        "dp=16 tp=4 sequence_parallel=true ep=16 zero=1",
        "dp=8 pp=8 ep=8",
        "dp=64 zero=3",
    )
    arguments = {"model": QWEN, "job": Job(seq=4096, global_batch=512), "cluster": load_cluster("h100-ib", gpus=64)}
    together = estimate(**arguments, layouts=table(*words), runtime="megatron")
    for row, text in enumerate(words):
        alone = estimate(**arguments, layouts=parse_layout(text), runtime="megatron")
        assert together.step_s[row] == pytest.approx(alone.step_s[0], rel=1e-12)
        assert together.device_peak_bytes[row] == pytest.approx(alone.device_peak_bytes[0], rel=1e-12)


def test_time_parts_add_up() -> None:
    found = estimated("dp=16 pp=4 ep=16 micro_batch=2 schedule=interleaved virtual_stages=3")
    assert sum(found.time[name][0] for name in TIME_PARTS) == pytest.approx(found.step_s[0])


# What is refused


@pytest.mark.parametrize(
    ("rule", "words", "runtime", "told"),
    [
        ("ep-divides-experts", "dp=64 ep=16", "megatron", "ep=16 does not divide experts=8; use 1, 2, 4, 8"),
        (
            "ep-divides-ranks",
            "dp=4 pp=16 ep=8",
            "megatron",
            "ep*etp = 8 does not divide dp*cp*tp = 4*1*1 ranks of a stage",
        ),
        ("ep-divides-shards", "dp=64 ep=8 zero=1 dp_shard=4", "megatron", "8 does not divide dp_shard*cp*tp = 4*1*1"),
        ("etp-divides-ffn", "dp=64 ep=2 etp=3", "megatron", "etp=3 does not divide the experts' ffn=14336"),
        ("ep-needs-sequence-parallel", "dp=32 tp=2 ep=8", "megatron", "add sequence_parallel=true or use tp=1"),
        ("runtime-expert-parallel", "dp=64 ep=8", "fsdp1", "has no expert parallelism"),
        (
            "runtime-expert-parallel-zero",
            "dp=64 ep=8 zero=3",
            "deepspeed",
            "zero=3 with ep=8; 'deepspeed' can do: 0, 1, 2",
        ),
        ("runtime-expert-tensor-parallel", "dp=32 tp=2 ep=4 etp=2 sequence_parallel=true", "fsdp2", "(etp)"),
        ("mla-up-proj-needs-latents", "dp=64 recompute=selective:mla_up_proj", "megatron", "has no latent attention"),
    ],
)
def test_rules_name_values_and_remedy(rule: str, words: str, runtime: str, told: str) -> None:
    at = Setting(
        model=MIXTRAL,
        job=Job(seq=4096, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=64),
        runtime=load_runtime(runtime),
    )
    (found,) = [broken for broken in rejections(at, parse_layout(words))[0] if broken.rule == rule]
    assert told in str(found)


def test_dense_models_have_no_experts_to_spread() -> None:
    with pytest.raises(InputError, match="llama-3-8b has layers without experts only; drop ep and etp"):
        estimated("dp=64 ep=8", model="llama-3-8b")


# Words


def test_etp_is_written_and_read() -> None:
    layout = parse_layout("dp=8 tp=4 ep=8 etp=2")
    document = layout.document()
    assert document["etp"] == 2
    assert layout_from_document(document) == layout
    assert table("dp=8 tp=4 ep=8 etp=2").row(0) == layout
    assert layout_from_document({name: value for name, value in document.items() if name != "etp"}).etp is None
    with pytest.raises(InputError, match="etp=0"):
        parse_layout("dp=8 etp=0")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"expert_imbalance": 0.5}, "expert_imbalance=0.5 is not a number of 1 or more"),
        ({"capacity_factor": 0.0}, "capacity_factor=0"),
    ],
)
def test_impossible_loads_are_refused(changed: dict[str, float], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Job(seq=1, global_batch=1, **changed)  # pyright: ignore[reportArgumentType]


def test_the_command_line_takes_loads_and_says_what_they_mean() -> None:
    words = ["qwen3-30b-a3b", "--cluster", "h100-ib", "--gpus", "64", "--global-batch", "512", "--seq", "4096"]
    words += ["--runtime", "megatron", "--layout", "dp=64 ep=8 zero=1", "--json"]
    even = json.loads(CliRunner().invoke(app, ["estimate", *words]).stdout)
    uneven = json.loads(CliRunner().invoke(app, ["estimate", *words, "--expert-imbalance", "1.3"]).stdout)
    assert even["time"]["ep_exposed_s"] > 0
    assert even["layout"]["ep"] == 8
    assert any("equal shares" in line for line in even["assumptions"])
    assert any("1.3 times the mean" in line for line in uneven["assumptions"])
    assert uneven["memory"]["device_peak_bytes"] > even["memory"]["device_peak_bytes"]
