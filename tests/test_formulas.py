"""Published numeric cases of memory, volume, bubble and FLOP formulas. Each test names where its numbers are printed."""

from __future__ import annotations

import numpy as np
import pytest

from shardplan.costmodel.collectives import wire_factor
from shardplan.costmodel.estimate import model_flop_per_token
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import SCHEDULES
from shardplan.costmodel.memory import state_columns
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.operators import Shapes, head_ops, layer_ops, logits_bytes
from shardplan.costmodel.pipeline import bubble_fraction, in_flight, split_layers
from shardplan.costmodel.runtime import StageRule, load_runtime

GIB = 2.0**30
JOB = Job(seq=2048, global_batch=1)


def state_bytes_per_parameter(
    runtime: str, zero: int, shards: int, *, precision: str = "bf16", grad_dtype: str | None = None
) -> float:
    """All model-state bytes of one parameter on one rank."""
    job = Job(seq=1, global_batch=1, precision=precision, grad_dtype=grad_dtype)
    columns = state_columns(load_runtime(runtime), job, np.array([zero]), accumulates=np.array([False]))
    return sum(float(c.whole[0] + c.sharded[0] / shards) for c in columns.values())


@pytest.mark.parametrize(
    ("shards", "printed"),
    [
        (4, (120.0, 52.5, 41.25, 30.0)),
        (16, (120.0, 35.62, 21.56, 7.5)),
        (64, (120.0, 31.40625, 16.640625, 1.875)),
        (256, (120.0, 30.35, 15.41, 0.47)),
        (1024, (120.0, 30.09, 15.10, 0.12)),
    ],
)
def test_zero_paper(shards: int, printed: tuple[float, ...]) -> None:
    """ZeRO (arXiv 1910.02054) Table 1, decimal GB of 7.5e9 parameters with stages 0 to 3: 2 bytes of parameters, 2 of gradients,
    12 of optimizer; (2 + 2 + 12) P, 4 P + 12 P/N, 2 P + 14 P/N, 16 P/N. Megatron with bf16 gradients holds just that."""
    formulas = (16.0, 4 + 12 / shards, 2 + 14 / shards, 16 / shards)
    for zero in range(4):
        held = state_bytes_per_parameter("megatron", zero, shards, grad_dtype="bf16")
        assert held == pytest.approx(formulas[zero], rel=1e-12)
        assert held * 7.5 == pytest.approx(printed[zero], abs=0.006)


def test_asymptotic_savings_of_zero() -> None:
    """4, 8 and N times (arXiv 1910.02054)."""
    whole = state_bytes_per_parameter("megatron", 0, 1, grad_dtype="bf16")
    saved = [whole / state_bytes_per_parameter("megatron", zero, 10**6, grad_dtype="bf16") for zero in (1, 2, 3)]
    assert saved == pytest.approx([4, 8, 10**6], rel=1e-4)


def test_deepspeed_estimator() -> None:
    """deepspeed.runtime.zero estimators 0.19: 2851e6 parameters on 8 GPUs, GiB: z2 11.28, z3 6.09 with the 4 L working set."""
    parameters, largest_layer = 2851e6, 32e6
    assert state_bytes_per_parameter("deepspeed", 2, 8) * parameters / GIB == pytest.approx(11.28, abs=0.005)
    states = state_bytes_per_parameter("deepspeed", 3, 8) * parameters
    assert (states + 4 * largest_layer) / GIB == pytest.approx(6.09, abs=0.005)
    work = load_runtime("deepspeed").working_set
    assert (work.gathered_layers + work.gradient_layers) * 2 == 4


@pytest.mark.parametrize(
    ("precision", "grad_dtype", "shards", "expected"),
    [
        ("fp16", "fp16", 8, 6.0),
        ("bf16", "fp32", 8, 7.5),
        ("fp32", "fp32", 8, 9.0),
        ("fp16", "fp16", 64, 4.25),
        ("bf16", "fp32", 64, 6.1875),
        ("fp32", "fp32", 64, 8.125),
    ],
)
def test_megatron_distributed_optimizer(precision: str, grad_dtype: str, shards: int, expected: float) -> None:
    """Megatron-LM docs, distributed optimizer: 4 + 16/d, 6 + 12/d, 8 + 8/d bytes per parameter."""
    assert state_bytes_per_parameter("megatron", 1, shards, precision=precision, grad_dtype=grad_dtype) == expected


def test_megatron_unsharded_states() -> None:
    """Megatron-LM docs: 20 (fp16), 18 (bf16 with fp32 gradients), 16 (fp32) bytes per parameter without sharding."""
    assert [state_bytes_per_parameter("megatron", 0, 1, precision=p) for p in ("fp16", "bf16", "fp32")] == [20, 18, 16]


def test_fsdp2_full_shard_is_16_bytes() -> None:
    """torchtitan's default: fp32 parameters, gradients and Adam, all sharded."""
    assert state_bytes_per_parameter("fsdp2", 3, 1) == 16.0
    assert state_bytes_per_parameter("fsdp2", 3, 64) == 0.25


def gpt_layer(hidden: int, heads: int) -> LayerKind:
    return LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rotary=False,
        dropout=True,
    )


def shapes(*, tp: int = 1, sequence_parallel: bool = False, flash: bool = False, seq: int = 2048) -> Shapes:
    one = np.ones(1)
    return Shapes(
        micro_batch=one,
        seq=seq * one,
        tp=tp * one,
        sp=(tp if sequence_parallel else 1) * one,
        flash=np.array([flash]),
        element_bytes=2,
    )


def kept(kind: LayerKind, shape: Shapes, *, without: tuple[str, ...] = ()) -> float:
    ops = layer_ops(kind, shape, load_runtime("megatron-2021"))
    return sum(float(np.broadcast_to(op.kept_bytes, 1)[0]) for op in ops if op.name not in without)


@pytest.mark.parametrize(("hidden", "heads"), [(6144, 64), (12288, 96), (20480, 128)])
@pytest.mark.parametrize("tp", [1, 8])
def test_activation_formulas_of_korthikanti(hidden: int, heads: int, tp: int) -> None:
    """arXiv 2205.05198 eqs. 1-4: s b h (10 + 24/t + 5as/ht); with sequence parallelism s b h (34 + 5as/h)/t; selective 34 s b h/t."""
    kind, s = gpt_layer(hidden, heads), 2048
    scores = 5 * heads * s / hidden
    unit = s * hidden
    assert kept(kind, shapes(tp=tp)) == pytest.approx(unit * (10 + 24 / tp + scores / tp), rel=1e-12)
    assert kept(kind, shapes(tp=tp, sequence_parallel=True)) == pytest.approx(unit * (34 + scores) / tp, rel=1e-12)
    selective = kept(kind, shapes(tp=tp, sequence_parallel=True), without=("attention",))
    assert selective == pytest.approx(unit * 34 / tp, rel=1e-12)


@pytest.mark.parametrize(
    ("hidden", "heads", "sp_only", "selective_only", "both", "full"),
    [
        (6144, 64, 66.84, 49.42, 16.18, 7.64),
        (12288, 96, 62.04, 56.53, 18.49, 8.71),
        (20480, 128, 58.31, 62.04, 20.27, 9.42),
        (25600, 160, 58.31, 62.04, 20.27, 9.42),
    ],
)
def test_figure_7_of_korthikanti(
    hidden: int, heads: int, sp_only: float, selective_only: float, both: float, full: float
) -> None:
    """Percent of the tensor-parallel baseline as printed, within 0.2 points."""
    kind = gpt_layer(hidden, heads)
    base = kept(kind, shapes(tp=8))
    percent = {
        sp_only: kept(kind, shapes(tp=8, sequence_parallel=True)),
        selective_only: kept(kind, shapes(tp=8), without=("attention",)),
        both: kept(kind, shapes(tp=8, sequence_parallel=True), without=("attention",)),
        full: 2.0 * 2048 * hidden,
    }
    for printed, size in percent.items():
        assert 100 * size / base == pytest.approx(printed, abs=0.2)


def test_full_recompute_keeps_only_the_input() -> None:
    kind = gpt_layer(6144, 64)
    (entering,) = [op for op in layer_ops(kind, shapes(tp=8), load_runtime("megatron-2021")) if op.name == "input"]
    assert float(np.broadcast_to(entering.kept_bytes, 1)[0]) == 2.0 * 2048 * 6144


def test_score_matrix_and_logits_at_100k_tokens() -> None:
    """One layer of 32 heads at 100,000 tokens: 596.05 GiB of scores; fp32 logits over 32,000 words 11.92 GiB (Anima notes)."""
    kind = LayerKind(
        hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, gated_mlp=True, norm="rmsnorm", dropout=False
    )
    (attention,) = [
        op for op in layer_ops(kind, shapes(seq=100_000), load_runtime("megatron")) if op.name == "attention"
    ]
    assert float(np.broadcast_to(attention.kept_bytes, 1)[0]) / GIB == pytest.approx(596.05, abs=0.01)
    runtime = load_runtime("megatron")
    logits = logits_bytes(np.array([32_000.0]), shapes(seq=100_000), runtime) / runtime.activations.logit_bytes * 4
    assert logits[0] / GIB == pytest.approx(11.92, abs=0.005)


@pytest.mark.parametrize(
    ("p", "m", "v", "of_ideal", "of_total"),
    [
        (8, 8, 1, 0.875, 0.4667),
        (8, 32, 1, 0.21875, 0.1795),
        (8, 64, 1, 0.1094, 0.0986),
        (4, 16, 1, 0.1875, 0.1579),
        (8, 64, 4, 0.0273, 0.0266),
    ],
)
def test_bubble(p: int, m: int, v: int, of_ideal: float, of_total: float) -> None:
    """(p - 1)/(m v) of the ideal time, (p - 1)/(m v + p - 1) of the total (arXiv 2104.04473)."""
    bubble = float(bubble_fraction(p, m, v))
    assert bubble == pytest.approx(of_ideal, abs=6e-5)
    assert bubble / (1 + bubble) == pytest.approx(of_total, abs=6e-5)


def test_micro_batches_in_flight() -> None:
    """GPipe m; 1F1B min(m, p - i); interleaved p (1 + (p - 1)/(p v)) on stage 0 (Megatron-LM estimator)."""
    gpipe, one_f_one_b, interleaved = (SCHEDULES.index(s) for s in ("gpipe", "1f1b", "interleaved"))
    assert in_flight(gpipe, 4, [0, 3], 16, 1).tolist() == [16, 16]
    assert in_flight(one_f_one_b, 4, [0, 1, 2, 3], 16, 1).tolist() == [4, 3, 2, 1]
    assert in_flight(one_f_one_b, 4, 0, 2, 1) == 2
    assert in_flight(interleaved, 8, 0, 64, 4) == pytest.approx(8 * (1 + 7 / (8 * 4)))


@pytest.mark.parametrize(("n", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5), (8, 1.75), (64, 1.96875)])
def test_ring_factors(n: int, factor: float) -> None:
    """nccl-tests doc/PERFORMANCE.md: all-reduce 2 (n - 1)/n, all-gather and reduce-scatter half of it."""
    assert float(wire_factor("all_reduce", n)) == factor
    assert float(wire_factor("all_gather", n)) == factor / 2 == float(wire_factor("reduce_scatter", n))


def test_torchtitan_flop_per_token() -> None:
    """Llama-3.1-8B at 8,192 tokens: 57.91 GFLOP a token; 5,762 tokens/s is 33.7 % of 989 TFLOP/s (pytorch/torchtitan)."""
    flop = model_flop_per_token(load_model("llama-3-8b"), 8192)
    assert flop / 1e9 == pytest.approx(57.91, abs=0.01)
    assert flop * 5762 / 989e12 == pytest.approx(0.337, abs=5e-4)


@pytest.mark.parametrize("name", ["megatron-1.7b", "megatron-39b", "megatron-145b", "megatron-1t"])
def test_model_flop_equals_korthikanti_formula(name: str) -> None:
    """72 B s l h^2 (1 + s/6h + V/12lh) per step (arXiv 2205.05198)."""
    model, s = load_model(name), 2048
    h, n, v = model.hidden, model.layer_count, model.vocab
    assert model_flop_per_token(model, s) == pytest.approx(
        72 * n * h * h * (1 + s / (6 * h) + v / (12 * n * h)), rel=1e-12
    )


def test_even_stage_split_weighs_embedding_and_head() -> None:
    plain = StageRule(embedding_weight=0, head_weight=0)
    assert split_layers(80, 8, plain) == (10,) * 8
    assert split_layers(10, 4, plain) == (3, 3, 2, 2)
    assert split_layers(4, 4, StageRule(embedding_weight=1, head_weight=1)) == (1, 1, 1, 1)
    weighed = split_layers(30, 4, StageRule(embedding_weight=1, head_weight=1))
    assert weighed == (7, 8, 8, 7)
    assert sum(split_layers(126, 16, StageRule(embedding_weight=1, head_weight=1))) == 126


def test_head_products_use_the_padded_vocabulary() -> None:
    (head,) = [
        o
        for o in head_ops(4096, "rmsnorm", np.array([128_512.0]), shapes(tp=4), load_runtime("megatron"))
        if o.name == "head"
    ]
    assert head.gemms[0].n.tolist() == [128_512 / 4]
