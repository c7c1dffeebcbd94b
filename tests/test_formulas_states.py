"""Model states and working sets of published conventions; each test names where its numbers are from."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.memory import stage_states, state_columns
from shardplan.costmodel.model import LayerKind, Model, layer_parameters, parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.operators import Shapes, layer_ops, logits_bytes
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.stage_cost import largest_matrix
from shardplan.hw_profiles.load import load_cluster

GIB, TIB = 2.0**30, 2.0**40


def bytes_per_parameter(runtime: str, zero: int, ranks: int, *, precision: str = "bf16") -> float:
    """All model-state bytes of one parameter on one rank."""
    job = Job(seq=1, global_batch=1, precision=precision)
    columns = state_columns(load_runtime(runtime), job, np.array([zero]), accumulates=np.array([False]))
    return sum(float(c.whole[0] + c.sharded[0] / ranks) for c in columns.values())


def states(
    runtime: str,
    words: str,
    parameters: float,
    *,
    layer: float = 0.0,
    root: float = 0.0,
    precision: str = "bf16",
    grad_dtype: str | None = None,
) -> dict[str, float]:
    """Bytes by part of a rank with `parameters` parameters, its largest layer `layer`, embedding and head `root`."""
    found = stage_states(
        load_runtime(runtime),
        Job(seq=1, global_batch=64, precision=precision, grad_dtype=grad_dtype),
        layout_table([parse_layout(words)]),
        accumulates=np.array([True]),
        stage_parameters=np.array([[float(parameters)]]),
        layer_parameters=np.array([[layer]]),
        root_parameters=np.array([[root]]),
    )
    return {part: float(values[0, 0]) for part, values in found.items()}


@pytest.mark.parametrize(
    ("runtime", "zero", "ranks", "precision", "expected"),
    [
        ("megatron-2021", 0, 1, "bf16", 18.0),  # Korthikanti's runs as calculon-ai/calculon models them: all replicated
        ("megatron", 1, 2, "bf16", 12.0),  # 6 + 12/d, a 7B of Megatron-Core's tests with dp 2
        ("megatron", 0, 1, "fp32", 4 * 4.0),  # accelerate estimate-memory: Adam is 4 times the fp32 model
        ("fsdp2", 3, 8, "bf16", 2.0),  # 16/N
        ("fsdp2+bf16_states", 3, 8, "bf16", 1.0),  # 8/N, torchtitan training.dtype=bfloat16
    ],
)
def test_bytes_per_parameter(runtime: str, zero: int, ranks: int, precision: str, expected: float) -> None:
    assert bytes_per_parameter(runtime, zero, ranks, precision=precision) == expected


def test_steady_state_of_a_7b_in_megatrons_tests() -> None:
    """GPT 7B, tp 4, dp 2: 20.63 to 20.66e9 bytes allocated after a step (golden values of NVIDIA/Megatron-LM@d98e8a64), of which
    1.68e9 parameters a rank at 12 bytes are 20.1."""
    kind = LayerKind(
        hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=16384, gated_mlp=False, norm="layernorm", mlp_bias=False
    )
    model = Model(name="7b", family="gpt2", layers=((kind, 32),), vocab=131_073, tied_embeddings=False)
    layout = parse_layout("dp=2 tp=4 zero=1 micro_batch=2 sequence_parallel=true")
    got = estimate(
        model=model,
        job=Job(seq=8192, global_batch=8),
        cluster=load_cluster("h100-ib", gpus=8),
        layouts=layout,
        runtime="megatron",
    )
    held = sum(float(got.stages[part][0, 0]) for part in ("parameters", "gradients", "optimizer"))
    assert held / 12 == pytest.approx(1.68e9, rel=0.01)
    assert held == pytest.approx(20.1e9, rel=0.01)


def test_fsdp_peaks_differ_by_12_bytes_a_parameter() -> None:
    """ATorch, Llama-2-7B on 8, 16, 32 and 64 GPUs: 39.6, 34.8, 32.4, 31.2 thousand MiB allocated at the peak
    (intelligent-machine-learning/dlrover@11bf2fb atorch/examples/llama2): 12 bytes times 6.74e9 parameters over N."""
    model, peaks = load_model("llama-2-7b"), []
    for ranks in (8, 16, 32, 64):
        got = estimate(
            model=model,
            job=Job(seq=4096, global_batch=4 * ranks),
            cluster=load_cluster("selene", gpus=ranks),
            layouts=parse_layout(f"dp={ranks} zero=3 micro_batch=4 recompute=full"),
            runtime="fsdp1+autocast",
        )
        peaks.append(float(got.stages["allocated"][0, 0]))
    saved = [more - less for more, less in pairwise(peaks)]
    total = parameter_counts(model)["total"]
    assert saved == pytest.approx([12 * total / n for n in (16, 32, 64)], rel=1e-9)
    assert [one / 2**20 / 1000 for one in saved] == pytest.approx([4.8, 2.4, 1.2], rel=0.01)


def test_fully_shard_holds_two_layers_and_the_root_in_16_bit() -> None:
    """16 P/N, 4 of it parameters, and the unit in use, the next one and the root gathered (torch fully_shard)."""
    counts = parameter_counts(load_model("llama-3-8b"))
    layer = sum(layer_parameters(load_model("llama-3-8b").layers[0][0]).values())
    root = counts["embedding"] + counts["head"] + counts["final_norm"]
    held = states("fsdp2", "dp=64 zero=3", counts["total"], layer=layer, root=root)
    assert held["parameters"] == pytest.approx(4 * counts["total"] / 64 + 2 * (2 * layer + root), rel=1e-12)


def test_gradients_of_no_sync_are_whole() -> None:
    """26e9 parameters in 16 bit on 16 GPUs: 3.25 GB of sharded gradients become 52 GB (meta-pytorch/tnt#1057). Inside a
    pipeline FSDP does not reduce before the last micro-batch; the estimate counts the shards, 1/N more, beside the whole."""
    job = {"precision": "bf16", "grad_dtype": "bf16"}
    assert states("fsdp2", "dp=16 zero=2", 26e9, **job)["gradients"] == 3.25e9
    assert states("fsdp2", "dp=16 pp=2 zero=2", 26e9, **job)["gradients"] - 3.25e9 == 52e9


@pytest.mark.parametrize("ranks", [1, 8])
def test_zero_offload(ranks: int) -> None:
    """ZeRO-Offload (arXiv 2101.06840): 2 P of fp16 parameters on the GPU, 2 P of gradients and 12 P of master and Adam on the
    host, over the ranks. DeepSpeed keeps fp32 gradients there too, 4 P."""
    psi = 10e9
    held = states("deepspeed", f"dp={ranks} zero=2 offload_optimizer=cpu", psi, precision="fp16")
    assert [held[part] for part in ("parameters", "gradients", "optimizer")] == [2 * psi, 0, 0]
    assert held["host"] - 4 * psi / ranks == 14 * psi / ranks


INFINITY = [  # layers, hidden; printed: model states TiB, working memory of states GiB, activation checkpoints TiB a node
    (100, 20480, 9.16, 6.25, 0.12),
    (128, 25600, 18.31, 9.77, 0.20),
    (195, 65536, 182.81, 64.00, 0.76),
    (315, 163840, 1845.70, 400.00, 3.08),
]


@pytest.mark.parametrize(("layers", "hidden", "held_tib", "working_gib", "checkpoints_tib"), INFINITY)
def test_figure_2a_of_zero_infinity(
    layers: int, hidden: int, held_tib: float, working_gib: float, checkpoints_tib: float
) -> None:
    """arXiv 2104.07857: 12 l h^2 parameters of 20 bytes; parameters and gradients of the h x 4h product, 4h 4h bytes; an fp16
    input a layer, 2 b s h l bytes, of 32 sequences of 1,024 tokens a node. (Its first row, 0.10T, prints 1.95 GiB where its
    formula gives 1.56.)"""
    kind = LayerKind(
        hidden=hidden,
        heads=hidden // 128,
        kv_heads=hidden // 128,
        head_dim=128,
        ffn=4 * hidden,
        gated_mlp=False,
        norm="layernorm",
    )
    parts = layer_parameters(kind)
    matrices = layers * (parts["attention"] + parts["mlp"])
    assert matrices == 12 * layers * hidden**2
    assert bytes_per_parameter("deepspeed", 0, 1) * matrices / TIB == pytest.approx(held_tib, rel=1e-3)
    assert 4 * largest_matrix(kind) / GIB == pytest.approx(working_gib, rel=1e-3)
    one = np.ones(1)
    shape = Shapes(micro_batch=32 * one, seq=1024 * one, tp=one, sp=one, flash=np.array([True]), element_bytes=2)
    (entering,) = [op for op in layer_ops(kind, shape, load_runtime("deepspeed")) if op.name == "input"]
    assert layers * float(np.sum(entering.kept_bytes)) / TIB == pytest.approx(checkpoints_tib, abs=0.005)


def test_a_fused_swish_keeps_one_tensor_less() -> None:
    """x sigmoid(x) as two kernels keeps x and the sigmoid, as one kernel only x: one ffn-wide tensor a layer."""
    ((kind, _),) = load_model("llama-3-8b").layers
    one = np.ones(1)
    shape = Shapes(micro_batch=one, seq=4096 * one, tp=one, sp=one, flash=np.array([True]), element_bytes=2)
    kept = [
        sum(float(np.sum(op.kept_bytes)) for op in layer_ops(kind, shape, load_runtime(runtime)))
        for runtime in ("fsdp2", "fsdp2+compile")
    ]
    assert kept[0] - kept[1] == 2 * 4096 * kind.ffn


def test_cross_entropy_in_place_halves_fp32_logits() -> None:
    """100,000 tokens of 32,000 words: logits and their gradient 23.84 GiB, in one buffer 11.92 (lyogavin/Anima)."""
    one, runtime = np.ones(1), load_runtime("megatron")
    shape = Shapes(micro_batch=one, seq=1e5 * one, tp=one, sp=one, flash=np.array([True]), element_bytes=2)
    apart, in_place = (
        float(logits_bytes(np.array([32_000.0]), shape, replace(runtime, activations=activations))[0]) / GIB
        for activations in (replace(runtime.activations, logit_bytes=size) for size in (8, 4))
    )
    assert (apart, in_place) == pytest.approx((23.84, 11.92), abs=0.005)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gpipe_with_recompute_keeps_the_inputs_of_all_micro_batches(schedule: str) -> None:
    """arXiv 1811.06965: m inputs and one rebuilt layer with GPipe; 1F1B on the first of 4 stages holds 4 of 32."""
    model, layers, tokens = load_model("llama-3-8b"), 8, 4096
    got = estimate(
        model=model,
        job=Job(seq=tokens, global_batch=32),
        cluster=load_cluster("h100-ib", gpus=4),
        layouts=parse_layout(f"pp=4 schedule={schedule} recompute=full stage_layers=8,8,8,8"),
        runtime="fsdp2",
    )
    held = 32 if schedule == "gpipe" else 4
    ((kind, _),) = model.layers
    one = np.ones(1)
    shape = Shapes(micro_batch=one, seq=tokens * one, tp=one, sp=one, flash=np.array([True]), element_bytes=2)
    whole = sum(float(np.sum(op.kept_bytes)) for op in layer_ops(kind, shape, load_runtime("fsdp2")))
    entering = 2.0 * tokens * kind.hidden
    expected = held * (layers * entering + 8 * tokens) + whole - entering  # 8 bytes a token id
    assert float(got.stages["activations"][0, 0]) == pytest.approx(expected, rel=1e-9)


def test_buckets_of_deepspeed() -> None:
    """reduce_bucket_size and allgather_bucket_size, 5e8 elements each by default, in 16 bit (DeepSpeed's ds_config)."""
    got = estimate(
        model=load_model("llama-2-7b"),
        job=Job(seq=2048, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=8),
        layouts=parse_layout("dp=8 zero=2 recompute=full"),
        runtime="deepspeed",
    )
    assert float(got.stages["buffers"][0, 0]) == 2 * 5e8 * 2
