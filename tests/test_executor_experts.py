"""Layers of experts on one rank, and where several ranks hold them; `test_executor_parity.py` compares what ranks compute together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.rank_groups import expert_groups

torch = pytest.importorskip("torch", reason="the executor needs torch")

from shardplan.executor import experts as layers  # noqa: E402
from shardplan.executor.expert_parallel import expert_mesh_ranks, shard_dim  # noqa: E402

KIND = LayerKind(
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    gated_mlp=True,
    norm="rmsnorm",
    experts=4,
    experts_per_token=2,
)


def make(kind: LayerKind = KIND, *, seed: int = 0) -> layers.MixtureOfExperts:
    built = layers.MixtureOfExperts(kind, routers=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return built


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_one_grouped_product_computes_what_a_product_for_each_expert_does(gated, dtype, tolerance):
    stack = make(replace(KIND, gated_mlp=gated)).experts.to(dtype)
    rows = torch.randn(20, KIND.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    counts = torch.tensor([7, 0, 12, 1])
    matrices = [parameter.detach() for parameter in stack.parameters()]
    found = stack._grouped(rows, counts.cumsum(0).to(torch.int32), *matrices)
    right = stack.compute(rows, counts)
    assert (found - right).abs().max() <= tolerance * right.abs().max()


def test_an_expert_without_tokens_still_has_a_gradient():
    stack = make().experts
    stack.compute(torch.ones(3, KIND.hidden), torch.tensor([0, 3, 0, 0])).sum().backward()
    assert stack.w1.grad is not None
    assert [bool(grad.any()) for grad in stack.w1.grad] == [False, True, False, False]


def test_all_tokens_may_go_to_the_same_experts():
    layer = make()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2:] = 1.0
    x = torch.rand(2, 5, KIND.hidden)  # positive: experts 2 and 3 win, with the same score
    w = layer.experts
    each = [(torch.nn.functional.silu(x @ w.w1[e].T) * (x @ w.w3[e].T)) @ w.w2[e].T / 2 for e in (2, 3)]
    assert torch.allclose(layer(x), each[0] + each[1], atol=1e-6)


def test_the_balance_loss_only_enters_gradients():
    x = torch.randn(1, 6, KIND.hidden, generator=torch.Generator().manual_seed(2))
    plain, weighed = make(replace(KIND, balance_weight=0.0)), make(replace(KIND, balance_weight=0.5))
    weighed.router.gradient_scale = 3.0
    for layer in (plain, weighed):
        layer(x).sum().backward()
    assert torch.equal(plain(x), weighed(x))
    assert torch.equal(plain.experts.w1.grad, weighed.experts.w1.grad)
    weight = weighed.router.weight.detach().requires_grad_()
    scores = (x[0] @ weight.T).softmax(-1)
    sent = torch.nn.functional.one_hot(scores.topk(2).indices, 4).sum((0, 1)) / 6
    (3.0 * 0.5 * 4 * (sent * scores.mean(0)).sum()).backward()
    assert torch.allclose(weighed.router.weight.grad - plain.router.weight.grad, weight.grad, atol=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        "dp=8 ep=4 zero=1",
        "dp=8 ep=2 zero=0",
        "dp=8 ep=2 dp_shard=4 zero=3 pp=2",
        "dp=4 tp=2 ep=2 zero=2 sequence_parallel=true",
        "dp=4 tp=2 ep=4 dp_shard=2 zero=2 pp=2 sequence_parallel=true",
        "dp=4 tp=2 pp=2 ep=4 zero=1 sequence_parallel=true order=dp-tp-cp-pp",
        "dp=4 pp=2 ep=4 zero=1 order=tp-cp-pp-dp",
    ],
)
def test_expert_groups_are_those_of_the_cost_model(words):
    layout = parse_layout(words)
    ranks = expert_mesh_ranks(layout).numpy()
    groups = expert_groups(layout_table([layout]))
    assert ranks.shape[1:] == (groups.replicas.size[0], groups.shards.size[0], layout.ep)
    assert sorted(ranks.flatten()) == list(range(layout.gpus))
    for axis, group in ((1, groups.replicas), (2, groups.shards)):
        assert set(np.diff(ranks, axis=axis).flatten()) <= {group.stride[0]}


@pytest.mark.parametrize(("experts", "shards", "dim"), [(8, 4, None), (3, 2, 1), (2, 64, None), (3, 16, 1)])
def test_few_experts_are_cut_inside_where_their_width_allows(experts, shards, dim):
    found = shard_dim(torch.empty(experts, 48, 32), shards)
    assert (None if found is None else found.dim) == dim
