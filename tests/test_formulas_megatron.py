"""Megatron-LM's own estimate of memory (megatron/training/theoretical_memory_usage.py at NVIDIA/Megatron-LM@00caa53) beside ours.

It counts the first stage: weights, gradients and Adam, and under selective recompute and sequence parallelism what every layer
keeps. Ours is brought to its convention: nothing of the layer that runs backward is rebuilt (fused attention, recompute none),
logits are one fp32 tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.load import load_cluster

GIB = 2.0**30
STATES = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Arguments of the estimator."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual_stages: int = 1
    micro_batch: int = 1
    micro_batches: int = 1
    seq: int = 2048
    distributed_optimizer: bool = False

    def words(self) -> str:
        text = f"dp={self.dp} tp={self.tp} pp={self.pp} micro_batch={self.micro_batch} attention=flash"
        text += f" zero={int(self.distributed_optimizer)}" + (" sequence_parallel=true" if self.tp > 1 else "")
        return text + (f" schedule=interleaved virtual_stages={self.virtual_stages}" if self.virtual_stages > 1 else "")


def megatron_states(model: Model, run: Run) -> float:
    """Bytes of weights, gradients and optimizer on the first stage: 18, or 6 + 12/dp, a parameter."""
    ((kind, layers),) = model.layers
    h, norm = kind.hidden, 1 if kind.norm == "rmsnorm" else 2
    layer = 2 * h * (kind.ffn * (1.5 if kind.gated_mlp else 1.0) + norm) + 2 * h * h * (1 + kind.kv_heads / kind.heads)
    padded = -(-model.vocab // (128 * run.tp)) * 128 * run.tp
    tables = 2 if run.pp == 1 and not model.tied_embeddings else 1
    parameters = ((layer * layers + norm * h) / run.pp + tables * h * padded) / run.tp
    return parameters * (6 + 12 / run.dp if run.distributed_optimizer else 18)


def megatron_activations(model: Model, run: Run) -> float:
    """Bytes: s b h (18 + 4 ffn/h) a layer and s b (8 + h) of the embedding for each of pp micro-batches in flight, times
    1 + (pp - 1)/(pp v) interleaved, over tp; without a pipeline the head's input, norm and fp32 logits too."""
    ((kind, layers),) = model.layers
    tokens, h = run.seq * run.micro_batch, kind.hidden
    kept = tokens * (18 * h + 4 * kind.ffn) * layers + tokens * (8 + h) * run.pp
    if run.virtual_stages > 1:
        kept *= 1 + (run.pp - 1) / (run.pp * run.virtual_stages)
    else:
        kept *= min(1.0, run.micro_batches / run.pp)
    if run.pp == 1:
        kept += 4 * tokens * (h + -(-model.vocab // (128 * run.tp)) * 128 * run.tp)
    return kept / run.tp


def with_fp32_logits(runtime: Runtime) -> Runtime:
    return replace(runtime, activations=replace(runtime.activations, logit_bytes=4))


def first_stage(model: Model, run: Run, *, runtime: str = "megatron-2021", precision: str = "bf16") -> Estimates:
    layout = parse_layout(run.words())
    return estimate(
        model=model,
        job=Job(seq=run.seq, global_batch=run.micro_batches * run.micro_batch * run.dp, precision=precision),
        cluster=load_cluster("h100-ib", gpus=layout.gpus),
        layouts=layout,
        runtime=with_fp32_logits(load_runtime(runtime)),
    )


def state_bytes(got: Estimates) -> float:
    return sum(float(got.stages[part][0, 0]) for part in STATES)


def activation_bytes(got: Estimates) -> float:
    return float(got.stages["activations"][0, 0])


def gpt(hidden: int, heads: int, layers: int, *, ffn: int | None = None, vocab: int = 51200) -> Model:
    """A GPT without biases and position table, which the estimator does not count either."""
    kind = LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn or 4 * hidden,
        gated_mlp=False,
        norm="layernorm",
        rotary=False,
        dropout=True,
    )
    return Model(name="gpt", family="gpt2", layers=((kind, layers),), vocab=vocab, tied_embeddings=True)


RUNS = [
    (gpt(6144, 64, 48), Run(tp=8, micro_batch=4)),
    (gpt(6144, 64, 48), Run(tp=8, pp=4, virtual_stages=2, micro_batch=4, micro_batches=8)),
    (gpt(12288, 96, 96), Run(tp=8, pp=8, dp=8, virtual_stages=3, micro_batches=64, distributed_optimizer=True)),
    (gpt(12288, 96, 96), Run(tp=8, pp=8, dp=8, micro_batches=64)),
    (gpt(12288, 96, 96), Run(tp=8, pp=8, dp=8, micro_batches=4)),
    (gpt(20480, 128, 105), Run(tp=8, pp=35, virtual_stages=3, micro_batches=280)),
    (gpt(25600, 160, 128), Run(tp=8, pp=64, dp=6, micro_batches=512, distributed_optimizer=True)),
    (gpt(2048, 16, 24, vocab=50257), Run(dp=8, micro_batch=8, micro_batches=4, seq=1024, distributed_optimizer=True)),
]


@pytest.mark.parametrize(("model", "run"), RUNS)
def test_first_stage_of_gpts(model: Model, run: Run) -> None:
    """22B to 1T (arXiv 2205.05198) and a 1.3B: states within 0.1 % (norms are not split over tp), activations within 0.2 % (fused
    attention keeps 4 bytes a head and token, the estimator does not count them)."""
    got = first_stage(model, run)
    assert state_bytes(got) == pytest.approx(megatron_states(model, run), rel=1e-3)
    assert activation_bytes(got) == pytest.approx(megatron_activations(model, run), rel=2e-3)


EIGHT_B = gpt(4096, 32, 32, ffn=14336, vocab=32_000)
TP4_PP4 = Run(tp=4, pp=4, dp=4, micro_batches=16, seq=4096, distributed_optimizer=True)


def llama_8b(*, tied: bool = False) -> Model:
    return replace(load_model("llama-3-8b"), vocab=32_000, tied_embeddings=tied)


def test_an_8b_on_64_gpus() -> None:
    """The tool prints 3.93 GiB of weights and optimizer and 4.02 GiB of activations for Llama-3-8B with 32,000 words."""
    model = llama_8b()
    assert megatron_states(model, TP4_PP4) / GIB == pytest.approx(3.93, abs=0.005)
    assert megatron_activations(model, TP4_PP4) / GIB == pytest.approx(4.02, abs=0.005)
    assert state_bytes(first_stage(model, TP4_PP4, runtime="megatron")) / GIB == pytest.approx(3.93, abs=0.005)
    assert activation_bytes(first_stage(EIGHT_B, TP4_PP4)) / GIB == pytest.approx(4.02, rel=2e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "dp", "distributed"), [(1, 8, True), (2, 4, False)])
def test_states_without_a_pipeline(tied: bool, tp: int, dp: int, distributed: bool) -> None:
    """A second embedding table only where it is not the head."""
    model, run = llama_8b(tied=tied), Run(tp=tp, dp=dp, micro_batches=2, distributed_optimizer=distributed)
    got = first_stage(model, run, runtime="megatron")
    assert state_bytes(got) == pytest.approx(megatron_states(model, run), rel=1e-3)


def test_what_its_activation_formula_leaves_out_of_a_llama() -> None:
    """It takes s b (18 h + 4 ffn) whatever the MLP. A Llama layer keeps gate, up and product (6 ffn), has no dropout masks (-2 h),
    narrower keys and values (-4 (h - kv_heads head_dim)), and its fused attention keeps 4 bytes a head."""
    model = llama_8b()
    ((kind, layers),) = model.layers
    h, narrower = kind.hidden, kind.hidden - kind.kv_heads * kind.head_dim
    layer = 18 * h + 6 * kind.ffn - 2 * h - 4 * narrower + 4 * kind.heads
    tokens, in_flight = TP4_PP4.seq, TP4_PP4.pp
    expected = tokens * (layer * layers / TP4_PP4.tp + 8 * in_flight)
    assert activation_bytes(first_stage(model, TP4_PP4, runtime="megatron")) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(1.06 * megatron_activations(model, TP4_PP4), rel=2e-3)


def test_interleaving_holds_more_than_one_f_one_b() -> None:
    """1 + (p - 1)/(p v) times as much: 39/32 for p = 8 and v = 4."""
    runs = [Run(tp=8, pp=8, virtual_stages=v, micro_batches=64) for v in (1, 4)]
    plain, looped = (activation_bytes(first_stage(gpt(12288, 96, 96), run)) for run in runs)
    assert looped / plain == pytest.approx(1 + 7 / 32, rel=1e-9)
