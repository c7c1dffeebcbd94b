"""What runtimes do with adapters and frozen weights: which tensors are kept, 4-bit constants, loading, paged moments, loss scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.adapters import ADAPTER_OPS, adapter_parameters, matrices, trainable_parameters, with_adapters
from shardplan.costmodel.estimate import estimate, job_flop_per_token, model_flop_per_token
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.job import LORA_TARGETS, Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.memory import unscaling_bytes, update_traffic_bytes
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.op import Op, Shapes
from shardplan.costmodel.operators import layer_ops
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster

LLAMA_7B = load_model("llama-2-7b")
SEVEN = LLAMA_7B.layers[0][0]
PARAMETERS = 6_738_415_616


def job(**words: Any) -> Job:
    return Job(**{"seq": 2048, "global_batch": 8, **words})


def of_gpt(layers: int, hidden: int, heads: int) -> Model:
    kind = LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        gated_mlp=False,
        norm="layernorm",
    )
    return Model(name="gpt", family="gpt2", layers=((kind, layers),), vocab=50257, tied_embeddings=True)


def estimated(layout: str, runtime: str = "fsdp2+bf16_states", **words: Any) -> Estimates:
    wanted = parse_layout(layout)
    return estimate(
        model=LLAMA_7B,
        job=job(**words),
        cluster=load_cluster("h100-ib", gpus=wanted.gpus),
        layouts=wanted,
        runtime=runtime,
    )


def part(found: Estimates, name: str) -> float:
    return float(found.stages[name][0, 0])


@pytest.mark.parametrize(
    ("model", "rank", "targets", "published"),
    [
        (load_model("llama-2-13b"), 8, "qv", 6_553_600),  # litgpt tutorials/resource-tables.md: trainable parameters
        (of_gpt(24, 2048, 32), 8, "q+v", 1_572_864),  # phi-1.5, the same table
        (of_gpt(96, 12288, 96), 8, "q+v", 37_748_736),  # GPT-3, arXiv 2106.09685 table 4: 37.7M
        (of_gpt(96, 12288, 96), 1, "qv", 4_718_592),  # the same: 4.7M
    ],
)
def test_trained_parameters_are_those_published(model: Model, rank: int, targets: str, published: int) -> None:
    assert trainable_parameters(model, job(method="lora", lora_rank=rank, lora_targets=targets)) == published


def test_flop_are_those_of_frozen_products() -> None:
    """Megatron-Bridge prints 735 model TFLOP/s for LoRA of Llama-3 70B at 2,643 tokens/s a GPU."""
    model, words = load_model("llama-3-70b"), {"method": "lora", "lora_rank": 1, "lora_targets": "k"}
    attention = model_flop_per_token(model, 4096) - model_flop_per_token(model, 0)
    counted = job_flop_per_token(model, Job(seq=4096, global_batch=8, **words)) - attention
    assert counted == pytest.approx(735e12 / 2643, rel=0.002)


def ops_of(kind: LayerKind, given: Job, runtime: str, *, tp: float = 1.0, flash: bool = True) -> dict[str, Op]:
    one, software = np.ones(1), load_runtime(runtime)
    shapes = Shapes(micro_batch=one, seq=2048 * one, tp=tp * one, sp=one, flash=np.full(1, flash), element_bytes=2)
    ops = layer_ops(kind, shapes, software)
    if given.adapters is not None:
        norm_bytes = software.activations.norm_bytes
        ops = with_adapters(ops, kind, shapes, given.adapters, software.tuning, norm_bytes)
    return {op.name: op for op in ops}


def kept_bytes(ops: dict[str, Op]) -> float:
    return float(sum(np.sum(op.kept_bytes) for op in ops.values()))


def test_only_inputs_of_adapters_are_kept() -> None:
    """Of a Llama layer in 16 bit with fused attention: two inputs of norms, q, k, v, the output of attention and its log-sum-exp, gate,
    up and silu(gate); with adapters the input of the products they stand beside, and x A."""
    h, f, tokens = SEVEN.hidden, SEVEN.ffn, 2048
    frozen = 2 * tokens * (2 * h + 4 * h + 3 * f) + 4 * tokens * SEVEN.heads
    plain = ops_of(SEVEN, job(method="lora", lora_rank=8, lora_targets="qv"), "fsdp2")
    assert kept_bytes(plain) == frozen + 2 * tokens * (h + 2 * 8)
    every = ops_of(SEVEN, job(method="lora", lora_rank=8), "fsdp2")
    assert kept_bytes(every) == frozen + 2 * tokens * (2 * h + f + 7 * 8)
    assert kept_bytes(ops_of(SEVEN, job(), "fsdp2")) == frozen + 2 * tokens * (2 * h + f)


def test_4_bit_products_may_keep_their_inputs_and_dropout_keeps_copies() -> None:
    words = {"lora_rank": 8, "lora_targets": "qv"}
    lora, qlora = (ops_of(SEVEN, job(method=method, **words), "fsdp1") for method in ("lora", "qlora"))
    assert kept_bytes(qlora) - kept_bytes(lora) == 2 * 2048 * (SEVEN.hidden + SEVEN.ffn)  # of gate and up, and of down
    one, each = (
        ops_of(SEVEN, job(method="lora", **words), f"fsdp1+{switch}")
        for switch in ("shared_dropout", "adapter_dropout")
    )
    assert kept_bytes(one) - kept_bytes(lora) == 2048 * SEVEN.hidden  # a mask of a byte; the copy replaces the input
    assert kept_bytes(each) - kept_bytes(one) == 3 * 2048 * SEVEN.hidden


def test_the_fp32_copy_of_a_norms_input_stays() -> None:
    words = {"method": "lora", "lora_rank": 8, "lora_targets": "o"}
    plain, copied = (ops_of(SEVEN, job(**words), runtime) for runtime in ("fsdp1", "fsdp1+fp32_norm"))
    assert kept_bytes(copied) - kept_bytes(plain) == pytest.approx(2 * 4 * 2048 * SEVEN.hidden)


def test_unfused_attention_keeps_its_output_for_an_adapter_only() -> None:
    with_it, without = (
        ops_of(SEVEN, job(method="lora", lora_targets=targets), "fsdp2", flash=False) for targets in ("o", "qv")
    )
    assert float(np.sum(with_it["attention_output"].kept_bytes)) == 2 * 2048 * SEVEN.hidden
    assert float(np.sum(without["attention_output"].kept_bytes)) == 0


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("targets", ["all", "attention", "q+k+v+up+down"])
def test_products_of_adapters_hold_their_parameters(tp: int, targets: str) -> None:
    given = job(method="lora", lora_rank=8, lora_targets=targets)
    ops = ops_of(SEVEN, given, "fsdp2", tp=tp)
    held = sum(float((g.k * g.n * g.count).sum()) for name in ADAPTER_OPS if name in ops for g in ops[name].gemms)
    assert given.adapters is not None
    assert held == float(adapter_parameters(SEVEN, given.adapters, tp * np.ones(1))[0])


def test_constants_of_4_bit_blocks() -> None:
    """arXiv 2305.14314, section 3: double quantisation takes the constants from 0.5 to 0.127 bits a parameter. bitsandbytes under FSDP
    keeps them on every rank."""
    assert 8 * load_runtime("fsdp2").tuning.scale_bytes == pytest.approx(0.127, abs=5e-4)
    assert 8 * load_runtime("fsdp1+single_quantised").tuning.scale_bytes == 0.5
    linear = 32 * sum(rows * columns for products in matrices(SEVEN).values() for rows, columns, _ in products)
    peaks = [
        part(estimated("dp=8 zero=3 recompute=full", runtime, method="qlora"), "parameters")
        for runtime in ("fsdp1+bf16_states", "fsdp1+bf16_states+single_quantised")
    ]
    assert peaks[1] - peaks[0] == pytest.approx((0.5 - 0.127) / 8 * linear, rel=2e-3)


def test_loading_the_whole_model_is_a_peak() -> None:
    """litgpt on two A100 prints 22.18 to 23.39 GB for 1 to 4 sequences of 1,304 tokens: the whole 13.48 GB model and its shard."""
    layout, words = "dp=2 zero=3 recompute=full", {"method": "lora", "lora_rank": 8, "lora_targets": "qv", "seq": 1304}
    plain = estimated(layout, "fsdp1+bf16_states", **words)
    loaded = estimated(layout, "fsdp1+bf16_states+loads_whole", **words)
    assert float(plain.peaks["allocated"][0]) < 13.48e9
    assert float(loaded.peaks["allocated"][0]) == pytest.approx(1.5 * 13.48e9, rel=0.03)


def test_paged_moments_may_lie_in_host_memory() -> None:
    near, paged = (estimated("dp=1 recompute=full", optimizer=word) for word in ("adamw8bit", "paged_adamw8bit"))
    assert part(near, "optimizer") - part(paged, "optimizer") == pytest.approx(2 * PARAMETERS)
    assert float(paged.host_bytes[0]) == pytest.approx(2 * PARAMETERS)
    assert paged.time["optimizer_s"][0] > near.time["optimizer_s"][0]


def test_an_8_bit_optimizer_of_megatron_keeps_its_master_copy() -> None:
    found = estimated("dp=8 zero=1 recompute=full", "megatron", optimizer="adamw8bit")
    assert part(found, "optimizer") == pytest.approx((4 + 2) * PARAMETERS / 8, rel=0.01)
    assert part(estimated("dp=1 recompute=full", "fsdp2", optimizer="adafactor"), "optimizer") == 0


def test_loss_scaling_reads_and_writes_every_gradient() -> None:
    """arXiv 1710.03740, section 3.2: gradients are unscaled before the update; no memory is added."""
    fsdp = load_runtime("fsdp1")
    assert [unscaling_bytes(fsdp, job(precision=word)) for word in ("fp16", "bf16")] == [2 * 4, 0]
    in_fp16, in_bf16 = (estimated("dp=8", "fsdp1", precision=word) for word in ("fp16", "bf16"))
    assert in_fp16.peaks["allocated"][0] == in_bf16.peaks["allocated"][0]
    moved = update_traffic_bytes(fsdp, job(precision="bf16"))
    assert in_fp16.time["optimizer_s"][0] / in_bf16.time["optimizer_s"][0] == pytest.approx(1 + 8 / moved, rel=0.01)


@pytest.mark.parametrize(
    ("runtime", "layout", "words", "rule"),
    [
        ("fsdp1", "dp=8 zero=3", {"method": "lora"}, "lora-one-dtype"),
        ("fsdp1", "dp=8 zero=3", {"method": "qlora"}, "lora-one-dtype"),
        ("fsdp2", "dp=8 zero=3", {"optimizer": "paged_adamw"}, "optimizer-zero"),
        ("fsdp1", "dp=8 zero=3", {"optimizer": "adamw8bit"}, "optimizer-zero"),
        ("megatron", "dp=8", {"optimizer": "adamw16bit"}, "optimizer-zero"),
    ],
)
def test_what_a_runtime_cannot_tune_is_refused_by_name(
    runtime: str, layout: str, words: dict[str, Any], rule: str
) -> None:
    cluster, software = load_cluster("h100-ib", gpus=8), load_runtime(runtime)

    def told(given: Job, words: str, name: str) -> list[str]:
        setting = Setting(model=LLAMA_7B, job=given, cluster=cluster, runtime=load_runtime(name))
        return [one.rule for one in rejections(setting, parse_layout(words))[0]]

    assert software.name == runtime
    assert rule in told(job(**words), layout, runtime)
    assert rule not in told(job(**words), "dp=8 zero=1" if runtime == "megatron" else "dp=8 zero=0", runtime)
    assert "lora-one-dtype" not in told(job(method="lora"), "dp=8 zero=3", "fsdp1+bf16_states")


def test_products_with_adapters_by_name() -> None:
    for word, same in (("q+v", "qv"), ("q+k+v+o", "attention"), ("q+k+v+o+up+down", "all")):
        assert job(method="lora", lora_targets=word).adapters == job(method="lora", lora_targets=same).adapters
    with pytest.raises(InputError, match="lora_targets='w' is unknown"):
        job(method="lora", lora_targets="q+w")


@settings(max_examples=20, deadline=None)
@given(
    rank=st.sampled_from([1, 8, 64]),
    products=st.lists(st.sampled_from(LORA_TARGETS["all"]), min_size=1, unique=True),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(["none", "full"]),
)
def test_the_less_is_trained_the_less_it_takes(rank: int, products: list[str], zero: int, recompute: str) -> None:
    words = {"lora_targets": "+".join(products), "lora_rank": rank}
    full, lora, qlora = (
        estimated(f"dp=4 zero={zero} recompute={recompute}", method=method, **words)
        for method in ("full", "lora", "qlora")
    )
    assert qlora.peaks["device"][0] < lora.peaks["device"][0] < full.peaks["device"][0]
    for got in (full, lora, qlora):
        parts = [part(got, name) for name in ("parameters", "gradients", "optimizer", "activations", "buffers")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(part(got, "allocated"))
