"""What recomputation repeats, counted in the executor's own matrix products and attention calls, is what the cost model adds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.pipeline import split_layers
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster

SEQ, BATCH, LAYERS = 16, 2, 4
LLAMA = LayerKind(hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, gated_mlp=True, norm="rmsnorm")
GPT = LayerKind(
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    ffn=64,
    gated_mlp=False,
    norm="layernorm",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    rotary=False,
)
PRODUCTS = {"llama": 7, "gpt": 6}
"""Of a layer: queries, keys, values, projection, and three or two of the MLP."""
LAYOUTS = [
    ("", 0, 0),
    ("recompute=selective", 0, LAYERS),
    ("recompute=full", LAYERS, LAYERS),
    ("recompute=full:1", 1, 1),
    ("recompute=full:3", 3, 3),
    ("pp=2 recompute=full:1", 2, 2),
    ("pp=2 recompute=full:2,1", 3, 3),
    ("pp=2 stage_layers=3,1 recompute=full:2", 3, 3),
    ("pp=2 schedule=interleaved virtual_stages=2 recompute=full:1", 2, 2),
    ("pp=2 schedule=looped_bfs virtual_stages=2 recompute=full", LAYERS, LAYERS),
]
"""Words, layers whose products run again, layers whose attention does."""


def model_of(name: str) -> Model:
    kind = LLAMA if name == "llama" else GPT
    positions = 0 if kind.rotary else SEQ
    return Model(
        name=name,
        family=name,
        layers=((kind, LAYERS),),
        vocab=256,
        tied_embeddings=False,
        learned_positions=positions,
    )


@dataclass
class Counts:
    """Of one forward and backward pass."""

    product_flop: int
    products: int
    attentions: int


@cache
def counted(name: str, words: str) -> Counts:
    """All chunks of a layout one after the other in this process, each with the recomputation of its rank."""
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    model, layout = model_of(name), parse_layout(words)
    from torch.utils._python_dispatch import TorchDispatchMode

    from shardplan.executor.pipeline import chunks_of_rank, layers_before, parts
    from shardplan.executor.recompute import apply_recompute
    from shardplan.executor.transformer import build_transformer

    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "bmm"):
                left, right = args[1:] if name == "addmm" else args[:2]
                calls["products"] += 1
                calls["flop"] += 2 * left.numel() * right.shape[-1]
            if name.startswith("_scaled_dot_product") and "backward" not in name:
                calls["attentions"] += 1
            return func(*args, **(kwargs or {}))

    split = layout.stage_layers or split_layers(
        LAYERS, layout.pp * layout.virtual_stages, load_runtime("shardplan").stages
    )
    chunks = {}
    for rank in range(layout.pp):
        for number, before in zip(chunks_of_rank(layout, rank), layers_before(layout, split, rank), strict=True):
            part = parts(split)[number]
            chunk = build_transformer(model, seq=SEQ, part=part, seed=0, device=torch.device("cpu"))
            apply_recompute(chunk, layout.recompute, rank, before=before)
            chunks[number] = chunk
    tokens = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % model.vocab
    with Counting():
        x = tokens
        for number in sorted(chunks):
            x = chunks[number](x)
        x.float().logsumexp(-1).mean().backward()
    return Counts(product_flop=calls["flop"], products=calls["products"], attentions=calls["attentions"])


@cache
def predicted_flop(name: str, words: str) -> float:
    """Of everything that a pass of one micro-batch through all stages computes, recomputation included."""
    layout = parse_layout(words)
    found = estimate(
        model=model_of(name),
        job=Job(seq=SEQ, global_batch=BATCH * layout.pp, precision="bf16"),  # fused attention, as here
        cluster=load_cluster("h100-ib", gpus=layout.pp),
        layouts=layout,
        runtime=load_runtime("shardplan"),
    )
    return float(found.hardware_flop_per_step[0]) / layout.pp


@pytest.mark.parametrize("name", ["llama", "gpt"])
@pytest.mark.parametrize(("words", "layers", "attended"), LAYOUTS)
def test_recomputation_repeats_what_the_cost_model_counts(name, words, layers, attended):
    plain, again = counted(name, ""), counted(name, words)
    assert again.products - plain.products == layers * (
        PRODUCTS[name] - 1
    )  # not the last one: nothing needs its output
    assert again.attentions - plain.attentions == attended

    kind = model_of(name).layers[0][0]
    attention_flop = 2 * 2 * BATCH * kind.heads * kind.head_dim * SEQ * SEQ  # the whole square, as model FLOP are told
    repeated = again.product_flop - plain.product_flop + attended * attention_flop
    added = predicted_flop(name, words) - predicted_flop(name, words.partition("recompute")[0])
    assert added == pytest.approx(repeated, rel=1e-9)
