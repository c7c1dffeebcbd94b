"""Pairs of layouts that users measured against each other: the one they found faster per GPU is predicted to be."""

from __future__ import annotations

import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.hw_profiles.load import load_cluster

SHARED = "zero=3 sequence_parallel=true recompute=full"
MOE = "pp=8 micro_batch=1 zero=1 sequence_parallel=true schedule=interleaved virtual_stages=4"
DEEP = (
    "dp=4 tp=2 ep=8 pp=32 micro_batch=1 zero=1 sequence_parallel=true schedule=interleaved virtual_stages=3 "
    "stage_layers=0,1*94,0 recompute=selective:layernorm+act"
)
PAIRS = {  # name: (model, cluster, precision, seq, runtime, (faster, slower) as (GPUs, batch, layout, runtime switches))
    "NVIDIA/Megatron-LM#1031": (
        ("llama-2-70b", "h100-ib", "bf16", 4096, "megatron"),
        (768, 1536, "dp=48 tp=8 pp=2 micro_batch=2 zero=1 sequence_parallel=true", ""),
        (128, 256, "dp=2 tp=8 pp=8 micro_batch=1 zero=1 sequence_parallel=true recompute=full", ""),
    ),
    "torchtitan docs/performance, interleaved against 1F1B": (
        ("llama-3-405b", "h100-96gb-500w", "fp8", 8192, "fsdp2+compile+async_tp"),
        (512, 256, f"dp=8 tp=8 pp=8 micro_batch=1 {SHARED} schedule=interleaved virtual_stages=8", ""),
        (512, 256, f"dp=8 tp=8 pp=8 micro_batch=1 {SHARED}", ""),
    ),
    "torchtitan docs/performance, async tensor parallelism": (
        ("llama-3-70b", "h100-96gb-500w", "fp8", 8192, "fsdp2+compile"),
        (256, 512, f"dp=32 tp=8 micro_batch=16 {SHARED}", "+async_tp"),
        (256, 512, f"dp=32 tp=8 micro_batch=16 {SHARED}", ""),
    ),
    "Megatron-MoE-ModelZoo, wide expert parallelism against tensor parallelism": (
        ("qwen3-235b-a22b", "h100-ib", "bf16", 4096, "megatron+permute_fusion+deepep"),
        (256, 2048, f"dp=16 tp=2 ep=32 {MOE} recompute=selective:layernorm", ""),
        (256, 2048, f"dp=8 tp=4 ep=8 {MOE}", ""),
    ),
    "Megatron-MoE-ModelZoo, wide expert parallelism against a deep pipeline": (
        ("qwen3-235b-a22b", "h100-ib", "bf16", 4096, "megatron+permute_fusion"),
        (256, 2048, f"dp=16 tp=2 ep=32 {MOE} recompute=selective:layernorm+act", "+deepep"),
        (256, 2048, DEEP, ""),
    ),
    "Megatron-MoE-ModelZoo, a deep pipeline against tensor parallelism": (
        ("qwen3-235b-a22b", "h100-ib", "bf16", 4096, "megatron+permute_fusion"),
        (256, 2048, DEEP, ""),
        (256, 2048, f"dp=8 tp=4 ep=8 {MOE}", "+deepep"),
    ),
    "NVIDIA/Megatron-LM#258, many micro-batches in one node": (  # BERT models of 8 to 10 B there
        ("megatron-7.5b", "selene", "fp16", 512, "megatron-2021"),
        (8, 512, "pp=8 micro_batch=4", ""),
        (8, 512, "tp=8 micro_batch=4", ""),
    ),
    "deepspeedai/DeepSpeed#5047, one gather a layer against one a matrix": (
        ("tinyllama-1.1b", "selene", "bf16", 2048, ""),
        (8, 32, "dp=8 zero=3 micro_batch=4", "fsdp1"),
        (8, 32, "dp=8 zero=3 micro_batch=4", "deepspeed"),
    ),
    "DeepSpeed autotuning, GPT-2 large": (
        ("gpt2-large", "dgx2-edr", "fp16", 1024, "deepspeed"),
        (16, 48, "dp=16 zero=1 micro_batch=3", ""),
        (16, 32, "dp=16 zero=1 micro_batch=2", ""),
    ),
}
RATIOS = {"NVIDIA/Megatron-LM#1031": 420.5 / 296.5, "torchtitan docs/performance, interleaved against 1F1B": 128 / 100}
"""Measured, where both runs are described well enough to hold a prediction to it."""


@pytest.mark.parametrize("name", PAIRS)
def test_the_faster_one_is_predicted_faster(name: str) -> None:
    (model, cluster, precision, seq, runtime), *pair = PAIRS[name]

    def tokens_per_s_per_gpu(gpus: int, batch: int, layout: str, switches: str) -> float:
        found = estimate(
            model=load_model(model),
            job=Job(seq=seq, global_batch=batch, precision=precision),
            cluster=load_cluster(cluster, gpus=gpus),
            layouts=parse_layout(layout),
            runtime=runtime + switches,
        )
        return float(found.tokens_per_s[0]) / gpus

    faster, slower = (tokens_per_s_per_gpu(*one) for one in pair)
    assert faster > slower * 1.02
    if name in RATIOS:
        assert faster / slower == pytest.approx(RATIOS[name], rel=0.15)
