"""Operators of layers beyond Llama's: latent attention, windows, shared experts, parallel blocks, prediction modules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.attention_ops import window_keys
from shardplan.costmodel.estimate import Estimates, estimate, model_flop_per_token
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import (
    LayerKind,
    Model,
    matrix_parameters,
    parameter_counts,
    split_parameters,
)
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.operators import Op, Shapes, layer_ops
from shardplan.costmodel.presets import all_presets
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster

MEGATRON = load_runtime("megatron")


def shapes(*, tokens: int = 4096, tp: int = 1, sp: bool = False) -> Shapes:
    """One micro-batch of one sequence in 16 bit with fused attention."""
    one = np.ones(1)
    return Shapes(
        micro_batch=one, seq=tokens * one, tp=tp * one, sp=(tp if sp else 1) * one, flash=one.astype(bool), element_bytes=2
    )  # fmt: skip


def ops_of(kind: LayerKind, **words: int) -> dict[str, Op]:
    return {op.name: op for op in layer_ops(kind, shapes(**words), MEGATRON)}


def product_flop(kind: LayerKind, **words: int) -> float:
    return float(sum(gemm.flop[0] for op in layer_ops(kind, shapes(**words), MEGATRON) for gemm in op.gemms))


def kinds(name: str) -> list[LayerKind]:
    return [kind for kind, _ in load_model(name).runs]


@pytest.mark.parametrize("name", all_presets())
def test_products_of_every_layer_are_two_flop_a_token_and_matrix_parameter(name: str) -> None:
    for kind in kinds(name):
        assert product_flop(kind) == pytest.approx(2 * 4096 * matrix_parameters(kind), rel=1e-12)


def test_tensor_parallel_ranks_share_all_products_but_the_latents() -> None:
    """Without sequence parallelism every rank makes the latents; with it, each of its part of the sequence."""
    kind = kinds("deepseek-v3")[1]
    latent = 2 * 4096 * 7168 * (1536 + 512 + 64)
    routed = 2 * 4096 * 7168 * 256
    whole = product_flop(kind) - latent - routed
    assert product_flop(kind, tp=4) == pytest.approx(whole / 4 + latent + routed)
    assert product_flop(kind, tp=4, sp=True) == pytest.approx(whole / 4 + latent / 4 + routed)
    divided, kept = split_parameters(kind)
    router = 7168 * 256 + 256  # and a bias that balances
    assert kept == router + 7168 * (1536 + 512 + 64) + 2 * 7168 + 1536 + 512
    assert (
        divided + kept
        == parameter_counts(replace(load_model("deepseek-v3"), layers=((kind, 1),), vocab=1))["total"] - 3 * 7168
    )


def test_latent_attention_keeps_latents_and_heads_by_hand() -> None:
    """arXiv 2405.04434, equations 37 to 47: latents 1536 + 512 + 64 before and, normed, after; queries and keys 192 wide, values 128."""
    ops = ops_of(kinds("deepseek-v3")[0])
    each = 2 * 4096  # bytes of one 16-bit value a token
    assert ops["latent"].kept_bytes[0] == each * (1536 + 512 + 64)
    assert ops["qkv"].kept_bytes[0] == each * 128 * (192 + 192 + 128)
    assert ops["attention_output"].kept_bytes[0] == each * 128 * 128
    core = ops["attention"]
    assert (
        float(np.asarray(core.flash_flop)[0]) == 2.0 * 4096 * 4096 * 128 * (192 + 128) / 2
    )  # halved by the causal mask


def test_a_window_counts_its_keys_and_costs_what_it_computes() -> None:
    """Of a window w, queries see w - w^2 / 2s keys on average: that much of a causal sequence, which shows s / 2, plus half a tile."""
    near, far = kinds("gemma-3-27b")
    assert (near.window, far.window) == (1024, 0)
    flop = [float(np.asarray(ops_of(kind, tokens=32768)["attention"].flash_flop)[0]) for kind in (near, far)]
    assert flop[0] / flop[1] == 1024 / 32768
    keys = np.array([512.0, 1024.0, 32768.0])
    seen = [np.mean([min(i + 1, 1024) for i in range(int(s))]) for s in keys]
    assert window_keys(1024, keys) / 2 == pytest.approx(seen, rel=0.08)
    assert list(window_keys(1024, keys)[:2]) == [512.0, 1024.0]


def test_shared_experts_run_beside_the_routed_ones() -> None:
    kind = kinds("deepseek-v2-lite")[1]
    alone = replace(kind, shared_ffn=0)
    assert product_flop(kind) - product_flop(alone) == 2 * 4096 * 3 * 2048 * (2 * 1408)


def test_parallel_blocks_keep_no_stream_between_attention_and_mlp() -> None:
    """PaLM's formulation (arXiv 2204.02311, section 2): MLP(LN(x)) + Attention(LN(x)) + x."""
    (kind,) = kinds("gpt-neox-20b")
    side_by_side, serial = ops_of(kind), ops_of(replace(kind, parallel=False))
    kept = [float(np.sum(ops["attention_residual"].kept_bytes)) for ops in (side_by_side, serial)]
    assert kept == [0.0, 2.0 * 4096 * 6144]
    assert "mlp_norm" not in ops_of(kinds("phi-2")[0])  # one norm feeds both


def answers(model: Model, words: str, *, gpus: int, seq: int = 4096, runtime: str = "megatron") -> Estimates:
    layout = parse_layout(words)
    return estimate(
        model=model,
        job=Job(seq=seq, global_batch=64, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=gpus),
        layouts=layout,
        runtime=runtime,
    )


def test_a_prediction_module_is_one_more_layer_and_head_on_the_last_stage() -> None:
    """arXiv 2412.19437, section 2.2: projection, layer and norms of its own; embedding and head are the model's. 6 FLOP a parameter."""
    main, more = load_model("deepseek-v3"), load_model("deepseek-v3-mtp")
    module = more.runs[-1][0]
    extra = matrix_parameters(module) + 129280 * 7168
    assert matrix_parameters(module) == matrix_parameters(main.layers[1][0]) + 2 * 7168 * 7168
    attention = 12 * 4096 * 128 * 160
    assert model_flop_per_token(more, 4096) - model_flop_per_token(main, 4096) == pytest.approx(6 * extra + attention)
    words = "dp=4 tp=8 pp=8 micro_batch=1 zero=1 recompute=full"
    without, having = (answers(model, words, gpus=256) for model in (main, more))
    added = having.stages["parameters"] - without.stages["parameters"]
    last = int(np.argmax(having.stage_index[0]))
    assert list(np.delete(added[0], last)) == [0.0] * (added.shape[1] - 1)
    divided, kept = split_parameters(module)
    copy = 130048 * 7168 / 8  # of the embedding, padded to 128 * 8, beside the head
    assert added[0, last] == pytest.approx(2 * (divided / 8 + kept + copy))
    assert having.stage_layer_counts[0, last] == without.stage_layer_counts[0, last] + 1
    assert having.step_s[0] > without.step_s[0]
    assert having.hardware_flop_per_step[0] > having.model_flop_per_step


def test_windows_shorten_long_sequences_alone() -> None:
    near = load_model("mistral-7b")
    far = replace(near, layers=tuple((replace(kind, window=0), count) for kind, count in near.layers))
    words = "dp=8 tp=8 micro_batch=1 zero=1"
    for seq, shorter in ((4096, False), (32768, True)):
        times = [answers(model, words, gpus=64, seq=seq).step_s[0] for model in (near, far)]
        assert bool(times[0] < times[1]) is shorter


@pytest.mark.parametrize(
    ("model", "runtime", "reason"),
    [
        ("qwen3-8b", "shardplan", "norms of queries and keys"),
        ("gemma-2b", "shardplan", "GELU-gated MLPs"),
        ("mistral-7b", "shardplan", "sliding windows"),
        ("phi-2", "megatron", "attention and MLP side by side"),
        ("deepseek-v3-mtp", "nanotron", "latent attention and no expert biases and no multi-token prediction"),
    ],
)
def test_a_runtime_refuses_by_name_what_it_lacks(model: str, runtime: str, reason: str) -> None:
    setting = Setting(
        model=load_model(model),
        job=Job(seq=8192, global_batch=64, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=8),
        runtime=load_runtime(runtime),
    )
    broken, _ = rejections(setting, parse_layout("dp=8"))
    found = {rejection.rule: rejection.detail for rejection in broken}
    assert f"has no {reason} ({model})" in found["runtime-layer-parts"]


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    setting = Setting(
        model=load_model("mistral-7b"),
        job=Job(seq=4096, global_batch=64, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=8),
        runtime=load_runtime("shardplan"),
    )
    broken, _ = rejections(setting, parse_layout("dp=8"))
    assert "runtime-layer-parts" not in {rejection.rule for rejection in broken}


@pytest.mark.parametrize(("preset", "measured_gib"), [("deepseek-v2", 45.63), ("deepseek-v3", 104.3)])
def test_peaks_of_deepseek_layers_as_megatron_measured_them(preset: str, measured_gib: float) -> None:
    """MooreThreads/SimuMax@4dcaae51, docs/b200/b200_release_v1.2_summary.json: DeepSeek-V2 and -V3 cut to one dense layer and three with
    experts, Megatron-LM, 8 GPUs, dp = ep = 8, micro-batch 1, 4,096 tokens, peak allocated."""
    model = load_model(preset)
    (dense_kind, _), (sparse_kind, _) = model.layers
    cut = replace(model, layers=((dense_kind, 1), (sparse_kind, 3)))
    found = answers(cut, "dp=8 ep=8 micro_batch=1 zero=1", gpus=8).stages["allocated"][0].max()
    assert found / 2**30 == pytest.approx(measured_gib, rel=0.01)


@pytest.mark.parametrize("runtime", ["megatron", "fsdp2", "deepspeed"])
def test_experts_cost_their_order_and_launches_also_where_a_rank_has_them_all(runtime: str) -> None:
    """Fewer ranks that share the experts: more products of fewer rows each and as many copies of tokens to order and kernels to launch
    (with one grouped kernel, only the second ordering, by local expert, falls away)."""
    model, cluster = load_model("qwen3-30b-a3b"), load_cluster("b300-ib", gpus=8)
    job = Job(seq=4096, global_batch=64, precision="bf16")
    found = [
        estimate(
            model=model,
            job=job,
            cluster=cluster,
            layouts=parse_layout(f"dp=8 ep={ep} zero=2 micro_batch=1"),
            runtime=runtime,
        )
        for ep in (1, 2, 8)
    ]
    alone, shared, spread = (each.time["compute_s"][0] + each.time["host_s"][0] for each in found)
    assert alone > (0.85 * shared if runtime == "fsdp2" else shared)
    assert shared > spread
    kept = [each.stages["activations"][0].max() for each in found]
    assert kept == pytest.approx([kept[0]] * 3, rel=0.05)
