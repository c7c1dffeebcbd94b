"""The attention model against published kernel rates (reports/published/attention_kernels.csv), and properties it must have."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.attention_time import (
    AttentionShape,
    fused_attention_s,
    misaligned_slowdown,
    tiled_head_dim,
    unfused_attention_s,
)
from shardplan.hw_profiles.load import list_parts, load_gpu
from shardplan.hw_profiles.machine import Gpu

DATA = Path(__file__).parent.parent / "reports" / "published" / "attention_kernels.csv"
CATALOG = {"a100-80gb-sxm": "a100-80gb", "h100-80gb-sxm": "h100-sxm"}
KERNEL = {
    **{"FlashAttention-1": "flash1", "FlashAttention-2": "flash2", "FlashAttention-3": "flash3"},
    **{"FA Triton": "triton", "cuDNN": "cudnn", "xformers": "memory_efficient"},
    **{"PyTorch": "unfused", "Standard": "unfused"},
}
COPY_SLOWDOWN = 1.5
"""The published PyTorch code rearranges queries, keys, values and outputs with strided copies, slower than streaming by this;
training codes do without. Fitted."""
GPUS = [name for name in list_parts("gpus") if name != "cpu"]


@dataclass(frozen=True)
class Row:
    gpu: str
    kernel: str
    way: Literal["fwd", "bwd", "fwd+bwd"]
    head_dim: int
    causal: bool
    batch: int
    seq: int
    hidden: int
    tflops: float


def published_rows() -> list[Row]:
    with DATA.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["citation"] for row in rows)
    return [
        Row(
            gpu=CATALOG[row["gpu"]],
            kernel=KERNEL[row["kernel"]],
            way=row["pass"],
            head_dim=int(row["head_dim"]),
            causal=row["causal"] == "true",
            batch=int(row["batch"]),
            seq=int(row["seq"]),
            hidden=int(row["hidden_total"]),
            tflops=float(row["tflops"]),
        )
        for row in rows
    ]


def shape(seq: float, head_dim: float, *, pairs: float = 64, causal: bool = True) -> AttentionShape:
    length = np.asarray(float(seq))
    return AttentionShape(
        pairs=np.asarray(float(pairs)), seq=length, keys=length, head_dim=float(head_dim), causal=causal
    )


def half(gpu: Gpu) -> str:
    """The 16-bit format of a GPU: fp16, or bf16 where it has no other (Gaudi 2)."""
    return "fp16" if "fp16" in gpu.peak_flop_per_s else "bf16"


def fused(gpu: Gpu, kernel: str, one: AttentionShape) -> tuple[float, float]:
    forward, backward = fused_attention_s(gpu, half(gpu), gpu.attention_efficiency[kernel], one)
    return float(forward), float(backward)


def unfused(gpu: Gpu, one: AttentionShape, *, copies: bool = False) -> tuple[float, float]:
    """Softmax reads and writes 2-byte scores; the published code also reads and writes four tensors of each head once."""
    copied = 4 * 4.0 * one.pairs * one.seq * one.head_dim * COPY_SLOWDOWN / gpu.memory_bandwidth_bytes_per_s
    forward, backward = unfused_attention_s(gpu, half(gpu), 2, one, 4.0 * one.scores)
    return float(forward + copies * copied), float(backward + copies * 2.0 * copied)


def predicted_tflops(row: Row) -> float:
    gpu = load_gpu(row.gpu)
    pairs = row.batch * row.hidden / row.head_dim
    one = shape(row.seq, row.head_dim, pairs=pairs, causal=row.causal)
    forward, backward = unfused(gpu, one, copies=True) if row.kernel == "unfused" else fused(gpu, row.kernel, one)
    flop = float(4.0 * one.scores * row.head_dim) * (0.5 if row.causal else 1.0)
    work, seconds = {"fwd": (1.0, forward), "bwd": (2.5, backward), "fwd+bwd": (3.5, forward + backward)}[row.way]
    return work * flop / seconds / 1e12


def mape(rows: Iterable[Row]) -> float:
    """Mean absolute percentage error of the rate."""
    return float(np.mean([abs(100.0 * (predicted_tflops(row) / row.tflops - 1.0)) for row in rows]))


# gpu, kernel, pass, causal, rows, allowed percent; beside each what was reached. PyTorch's causal rows are left out: they add a
# mask tensor to the scores in one more pass, which training codes do inside the softmax kernel.
FAMILIES = [
    ("a100-80gb", "flash2", "fwd+bwd", False, 11, 2.0),  # 1.3
    ("a100-80gb", "flash2", "fwd+bwd", True, 12, 2.0),  # 1.3
    ("a100-80gb", "flash1", "fwd+bwd", False, 12, 6.0),  # 4.7
    ("a100-80gb", "flash1", "fwd+bwd", True, 12, 5.5),  # 4.2
    ("a100-80gb", "triton", "fwd+bwd", False, 12, 3.0),  # 2.2
    ("a100-80gb", "triton", "fwd+bwd", True, 12, 5.0),  # 3.8
    ("a100-80gb", "memory_efficient", "fwd+bwd", False, 12, 3.0),  # 2.1
    ("a100-80gb", "memory_efficient", "fwd+bwd", True, 12, 4.5),  # 3.2
    ("a100-80gb", "unfused", "fwd+bwd", False, 10, 5.0),  # 3.6
    ("h100-sxm", "flash1", "fwd+bwd", False, 12, 4.0),  # 3.1
    ("h100-sxm", "flash1", "fwd+bwd", True, 12, 5.0),  # 4.0
    ("h100-sxm", "flash2", "fwd", False, 18, 3.0),  # 2.2
    ("h100-sxm", "flash2", "fwd", True, 18, 5.0),  # 3.6
    ("h100-sxm", "flash2", "bwd", False, 12, 2.0),  # 1.1
    ("h100-sxm", "flash2", "fwd+bwd", False, 12, 2.0),  # 1.4
    ("h100-sxm", "flash2", "fwd+bwd", True, 12, 2.5),  # 1.6
    ("h100-sxm", "flash3", "fwd", False, 17, 4.0),  # 2.9
    ("h100-sxm", "flash3", "fwd", True, 18, 4.5),  # 3.5
    ("h100-sxm", "flash3", "bwd", False, 12, 2.5),  # 1.6
    ("h100-sxm", "cudnn", "fwd", False, 17, 4.5),  # 3.4
    ("h100-sxm", "cudnn", "fwd", True, 18, 4.0),  # 3.1
    ("h100-sxm", "cudnn", "bwd", False, 12, 2.5),  # 1.8
    ("h100-sxm", "unfused", "fwd", False, 10, 5.5),  # 4.1
    ("h100-sxm", "unfused", "fwd+bwd", False, 10, 7.5),  # 5.8
]


@pytest.mark.parametrize(("gpu", "kernel", "way", "causal", "count", "allowed"), FAMILIES)
def test_published_rates(gpu, kernel, way, causal, count, allowed):
    rows = [row for row in published_rows() if (row.gpu, row.kernel, row.way, row.causal) == (gpu, kernel, way, causal)]
    assert len(rows) == count
    assert mape(rows) <= allowed


def test_every_published_row_belongs_to_a_family():
    families = {(gpu, kernel, way, causal) for gpu, kernel, way, causal, _, _ in FAMILIES}
    left = {row for row in published_rows() if (row.gpu, row.kernel, row.way, row.causal) not in families}
    assert {(row.kernel, row.causal) for row in left} == {("unfused", True)}


def test_a_b200_reaches_the_published_rate_of_both_passes():
    """834 TFLOP/s at 8192 tokens, head dim 128 (stas00/ml-engineering@744d01e, Llama-3.1-8B)."""
    one = shape(8192, 128, pairs=32)
    flop = float(2.0 * one.scores * one.head_dim)
    assert 3.5 * flop / sum(fused(load_gpu("b200"), "cudnn", one)) / 1e12 == pytest.approx(834, rel=0.01)


kernels = st.sampled_from([(name, kernel) for name in GPUS for kernel in load_gpu(name).attention_efficiency])
head_dims = st.integers(8, 320)


@given(kernel=kernels, head_dim=head_dims, tiles=st.integers(1, 511), causal=st.booleans())
def test_longer_sequences_are_never_less_efficient(kernel, head_dim, tiles, causal):
    """Whole tiles of 128 tokens; fused and unfused seconds per score do not grow."""
    gpu = load_gpu(kernel[0])
    short, long = (shape(128 * count, head_dim, causal=causal) for count in (tiles, tiles + 1))
    for way in (0, 1):
        for seconds in (lambda one: fused(gpu, kernel[1], one), lambda one: unfused(gpu, one)):
            per_score = [seconds(one)[way] / float(one.scores) for one in (short, long)]
            assert per_score[1] <= per_score[0] * (1 + 1e-9)


@given(kernel=kernels, head_dim=head_dims, seq=st.integers(1, 65536))
def test_more_tokens_never_take_less_time(kernel, head_dim, seq):
    """Of a fused kernel; unfused, the measured GEMM curve decides, which is steeper than its size where products are tiny."""
    gpu = load_gpu(kernel[0])
    shorter, longer = (fused(gpu, kernel[1], shape(tokens, head_dim)) for tokens in (seq, seq + 1))
    assert longer[0] >= shorter[0]
    assert longer[1] >= shorter[1]


@given(kernel=kernels, eighths=st.integers(1, 40), more=st.integers(1, 7), seq=st.integers(16, 16384))
def test_an_aligned_head_dim_is_never_slower_than_the_misaligned_ones_above(kernel, eighths, more, seq):
    gpu = load_gpu(kernel[0])
    aligned, odd = shape(seq, 8 * eighths), shape(seq, 8 * eighths + more)
    for way in (0, 1):
        assert fused(gpu, kernel[1], aligned)[way] <= fused(gpu, kernel[1], odd)[way] * (1 + 1e-9)
        assert unfused(gpu, aligned)[way] < unfused(gpu, odd)[way]


@given(kernel=kernels, head_dim=head_dims, seq=st.integers(1, 65536), causal=st.booleans())
def test_backward_is_slower_than_forward(kernel, head_dim, seq, causal):
    gpu, one = load_gpu(kernel[0]), shape(seq, head_dim, causal=causal)
    for forward, backward in (fused(gpu, kernel[1], one), unfused(gpu, one)):
        assert backward > 1.5 * forward


@pytest.mark.parametrize(("head_dim", "widest"), [(128, 16), (104, 16), (108, 8), (150, 4), (75, 2)])
def test_misaligned_head_dims_of_unfused_attention_are_several_times_slower(head_dim, widest):
    """Whole products, memory included, against the next aligned head dim: 3 to 9 times in 16 bit; fp32 pairs need less."""
    gpu = load_gpu("a100-80gb")
    one, next_aligned = (
        float(unfused_attention_s(gpu, "fp16", 2, shape(2048, d), 0.0)[0]) for d in (head_dim, -(-head_dim // 8) * 8)
    )
    assert (one / next_aligned == 1.0) if widest == 16 else (3.0 < one / next_aligned < 9.0)
    assert float(misaligned_slowdown(head_dim, 2)) >= float(misaligned_slowdown(head_dim, 4)) >= 1.0


def test_fused_kernels_pad_the_head_dim():
    assert tiled_head_dim([16, 32, 40, 64, 65, 80, 128, 130, 192, 200, 256, 257]).tolist() == (
        [32, 32, 64, 64, 96, 96, 128, 160, 192, 256, 256, 320]
    )


def test_a_runtime_takes_the_first_kernel_it_prefers():
    h100, v100 = load_gpu("h100-sxm"), load_gpu("v100-32gb")
    assert h100.attention_curve(["flash3", "flash2"]) is h100.attention_efficiency["flash3"]
    assert load_gpu("a100-80gb").attention_curve(["cudnn", "flash2"]).head_dims == (64, 128)
    assert v100.attention_curve(["flash2"]) is v100.attention_efficiency["memory_efficient"]


def test_arrays_broadcast():
    gpu, seq = load_gpu("a100-80gb"), np.array([1024.0, 2048.0, 4096.0])
    many = AttentionShape(pairs=np.array(64.0), seq=seq, keys=seq, head_dim=128.0)
    curve = gpu.attention_efficiency["flash2"]
    together = fused_attention_s(gpu, "bf16", curve, many), unfused_attention_s(gpu, "bf16", 2, many, 4 * many.scores)
    for index, tokens in enumerate(seq):
        one = shape(tokens, 128)
        assert together[0][0][index] == pytest.approx(fused(gpu, "flash2", one)[0])
        assert together[1][1][index] == pytest.approx(unfused(gpu, one)[1])
