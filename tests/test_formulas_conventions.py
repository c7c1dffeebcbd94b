"""Published conventions of model states, activations and FLOP, as formulas and as rates; each test names its source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.attention_time import flash_attention_flop
from shardplan.costmodel.estimate import Estimates, estimate, model_flop_per_token
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.memory import state_columns
from shardplan.costmodel.model import Model, layer_parameters, parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.operators import Shapes, layer_ops
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster

GIB = 2.0**30


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


@pytest.mark.parametrize(("psi", "largest", "expected"), [(2851e6, 32e6, 6.09), (6805e6, 131e6, 29.01)])
def test_deepspeed_estimator_of_stage_3(psi: float, largest: float, expected: float) -> None:
    """4 L + 18 P/N on 8 and on 4 GPUs, GiB."""
    ranks = 8 if expected < 10 else 4
    column = state_columns(
        load_runtime("deepspeed"), Job(seq=1, global_batch=1), np.array([3]), accumulates=np.array([False])
    )
    states = sum(float(part.sharded[0]) for part in column.values()) * psi / ranks
    assert (states + 4 * largest) / GIB == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("runtime", "zero", "ranks", "expected"),
    [
        (
            "deepspeed",
            0,
            1,
            20.0,
        ),  # 2 parameters, 2 gradients, 4 master, 4 master gradients, 8 Adam (DeepSpeed, ZeRO-Infinity)
        ("fsdp2+bf16_states", 0, 1, 8.0),  # all bf16 (torchtitan training.dtype=bfloat16, fsdp_qlora bf16)
        ("fsdp2", 3, 1, 16.0),  # fp32 parameters, gradients and Adam (torchtitan's default)
        (
            "megatron-deepspeed",
            1,
            8,
            2 + 2 + 4 + 12 / 8,
        ),  # BigScience BF16Optimizer: 4 bytes of fp32 gradients, not sharded
    ],
)
def test_bytes_per_parameter_of_other_conventions(runtime: str, zero: int, ranks: int, expected: float) -> None:
    columns = state_columns(
        load_runtime(runtime), Job(seq=1, global_batch=1), np.array([zero]), accumulates=np.array([False])
    )
    assert sum(float(c.whole[0] + c.sharded[0] / ranks) for c in columns.values()) == expected


def test_adam_states_of_a_1_5b() -> None:
    """DeepSpeed's ZeRO tutorial: 18 GB, on 8 ranks 2.25 GB; all states of mixed precision 24 GB (arXiv 1910.02054 section 3.1)."""
    columns = state_columns(
        load_runtime("megatron"),
        Job(seq=1, global_batch=1, grad_dtype="bf16"),
        np.array([0, 1]),
        accumulates=np.zeros(2, dtype=bool),
    )
    adam = columns["optimizer"]
    assert 1.5 * float(adam.whole[0]) == 18.0
    assert 1.5 * float(adam.sharded[1]) / 8 == 2.25
    assert 1.5 * sum(float(part.whole[0]) for part in columns.values()) == 24.0


def test_sharding_over_more_gpus_saves_16_bytes_a_parameter() -> None:
    """torchtitan, 8B on 8 against 128 GPUs: 16 B * 8.03e9 * (1/8 - 1/128) = 14.02 GiB (15.0 to 15.4 measured, reserved)."""
    slack = load_runtime("fsdp2").allocator_slack_fraction
    stages = [states_of(f"dp={n} zero=3 recompute=full", "llama-3-8b", "fsdp2", n).stages for n in (8, 128)]
    reserved = [float(one["allocated"][0, 0] + one["slack"][0, 0]) / (1 + slack) for one in stages]
    assert (reserved[0] - reserved[1]) / GIB == pytest.approx(14.02, rel=1e-3)


def test_gradients_of_fsdp_come_after_the_peak_of_activations() -> None:
    """ATorch's Llama-2 7B: 12, not 16, bytes a parameter over dp in its allocated peaks; accumulated gradients stay in them."""
    once, twice = (states_of("dp=8 zero=3 recompute=full", "llama-3-8b", "fsdp2", batch).stages for batch in (8, 16))
    sharded = 4 * parameter_counts(load_model("llama-3-8b"))["total"] / 8
    assert once["gradients"][0, 0] == 0
    assert twice["gradients"][0, 0] > sharded
    assert once["allocated"][0, 0] == pytest.approx(twice["allocated"][0, 0] - twice["gradients"][0, 0])
    assert once["device"][0, 0] == pytest.approx(twice["device"][0, 0], rel=1e-3), "the allocator keeps room for them"


def test_autocast_keeps_a_16_bit_copy_of_all_parameters() -> None:
    """torch.autocast's weight cache: 2 bytes a parameter on every rank, and gathers of fp32 parameters."""
    plain, cast = (
        states_of("dp=8 zero=3 recompute=full", "llama-3-8b", name, 8) for name in ("fsdp1", "fsdp1+autocast")
    )
    more = float(cast.stages["parameters"][0, 0] - plain.stages["parameters"][0, 0])
    parameters = parameter_counts(load_model("llama-3-8b"))["total"]
    assert 2 * parameters < more < 2.5 * parameters
    moved = [float((one.hidden["dp_s"] + one.time["dp_exposed_s"])[0]) for one in (plain, cast)]
    assert 1.2 < moved[1] / moved[0] < 1.7


def states_of(words: str, model: str | Model, runtime: str, batch: int, seq: int = 8192) -> Estimates:
    layout = parse_layout(words)
    return estimate(
        model=load_model(model) if isinstance(model, str) else model,
        job=Job(seq=seq, global_batch=batch),
        cluster=load_cluster("h100-ib", gpus=layout.gpus),
        layouts=layout,
        runtime=runtime,
    )


@pytest.mark.parametrize(("tp", "expected"), [(1, 34.0), (2, 22.0), (8, 13.0)])
def test_selective_recompute_without_sequence_parallelism(tp: int, expected: float) -> None:
    """s b h (10 + 24/t) (Megatron-LM's estimator, arXiv 2205.05198)."""
    kind, shapes = load_model("gpt3-175b").layers[0][0], layer_shapes(tp=tp, sequence_parallel=False)
    ops = layer_ops(kind, shapes, load_runtime("megatron-2021"))
    kept = sum(float(np.broadcast_to(op.kept_bytes, 1)[0]) for op in ops if op.name != "attention")
    assert kept / (2048 * kind.hidden) == pytest.approx(expected, rel=1e-12)


def test_attention_output_at_100k_tokens() -> None:
    """32 heads of 128 in 16 bit: 781.25 MiB instead of 596 GiB of scores (Anima notes)."""
    kind = load_model("llama-2-7b").layers[0][0]
    ops = layer_ops(kind, layer_shapes(tp=1, sequence_parallel=False, seq=100_000), load_runtime("megatron"))
    (output,) = [op for op in ops if op.name == "attention_output"]
    assert float(np.broadcast_to(output.kept_bytes, 1)[0]) / 2**20 == pytest.approx(781.25)


def test_one_layer_of_a_70b() -> None:
    """Llama-2-70B: 1.711e9 bytes a layer in 16 bit, 137.95 GB in all."""
    model = load_model("llama-2-70b")
    assert 2 * sum(layer_parameters(model.layers[0][0]).values()) == pytest.approx(1.711e9, rel=1e-3)
    assert 2 * parameter_counts(model)["total"] == pytest.approx(137.95e9, rel=1e-4)


@pytest.mark.parametrize(("tied", "expected"), [(True, 36_124_672), (False, 46_943_744)])
def test_baby_llama_with_a_small_vocabulary(tied: bool, expected: int) -> None:
    """512 wide, 8 layers, 21,131 words: counts of the checkpoint."""
    model = load_model("baby-llama2-92m")
    assert parameter_counts(replace(model, vocab=21_131, tied_embeddings=tied))["total"] == expected


def hardware_flop(model: Model | str, words: str, batch: int) -> float:
    """FLOP a step with full recompute, as SC21 counts them."""
    got = states_of(f"{words} recompute=full", model, "megatron-2021", batch, 2048)
    return float(got.hardware_flop_per_step[0])


def test_published_rates_of_megatron_deepspeed() -> None:
    """MT-NLG 530B (arXiv 2201.11990): 60.1, 50.2 and 44.4 s at 280, 350 and 420 nodes of 8, batch 1920: 126, 121, 113 TFLOP/s.
    BLOOM 176B: 104.7 s on 384 GPUs, batch 2048: 149.8 TFLOP/s (bigscience-workshop/bigscience chronicles)."""
    flop = hardware_flop("megatron-530b", "dp=8 tp=8 pp=35", 1920)
    rates = [flop / seconds / gpus / 1e12 for seconds, gpus in ((60.1, 2240), (50.2, 2800), (44.4, 3360))]
    assert rates == pytest.approx([126, 121, 113], rel=0.01)
    kind = replace(load_model("gpt3-175b").layers[0][0], hidden=14336, heads=112, kv_heads=112, head_dim=128, ffn=57344)
    bloom = replace(load_model("gpt3-175b"), layers=((kind, 70),), vocab=250_880, learned_positions=0)
    assert hardware_flop(bloom, "dp=16 tp=4 pp=14", 2048) / 104.7 / 384 / 1e12 == pytest.approx(149.8, rel=0.01)


def test_selective_recompute_repeats_the_attention_core() -> None:
    """Hardware FLOP of selective recompute: scores and weighted sum once more, 4 B s^2 h = 24 B s h^2 (s / 6h) a layer."""
    model, b, s = load_model("gpt3-175b"), 64, 2048
    got = states_of("tp=8 pp=8 sequence_parallel=true recompute=selective", model, "megatron-2021", b, s)
    added = 24 * b * s * model.layer_count * model.hidden**2 * s / (6 * model.hidden)
    assert float(got.hardware_flop_per_step[0]) - got.model_flop_per_step == pytest.approx(added, rel=1e-6)


def test_causal_and_full_attention_of_a_70b() -> None:
    """NeMo, 70B at 8,192 tokens and 1,621 tokens/s: 780 TFLOP/s with full attention, 728 with causal (half of 12 l s h)."""
    model = load_model("llama-3-70b")
    full = model_flop_per_token(model, 8192)
    causal = full - 6 * model.layer_count * 8192 * model.hidden
    assert [flop * 1621 / 1e12 for flop in (full, causal)] == pytest.approx([780, 728], rel=2e-3)


@pytest.mark.parametrize("name", ["megatron-7.5b", "megatron-39b", "megatron-1t"])
def test_palm_and_mosaicml_flop(name: str) -> None:
    """6 P + 12 l h s a token with the tied embedding counted once: here without norms, biases and positions, below 1 %."""
    model = load_model(name)
    counted = 6 * parameter_counts(model)["total"] + 12 * model.layer_count * model.hidden * 2048
    assert model_flop_per_token(model, 2048) == pytest.approx(counted, rel=0.01)


def test_flop_of_flash_attention() -> None:
    """4 s^2 H D forward, halved for causal (FlashAttention)."""
    assert float(flash_attention_flop(4096, 4096, 32, 128)) == 4 * 4096**2 * 32 * 128 / 2
