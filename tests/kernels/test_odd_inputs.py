"""Inputs that callers get wrong or that lie oddly in memory: the kernels agree with their references, or refuse in words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shardplan.kernels import attention_block
from shardplan.kernels.attention import attention
from shardplan.kernels.cross_entropy import cross_entropy
from shardplan.kernels.dequantize import dequantize
from shardplan.kernels.gated import gated, gated_halves
from shardplan.kernels.linear_cross_entropy import linear_cross_entropy
from shardplan.kernels.norm import rms_norm
from shardplan.kernels.normal_float import dequantize_nf4, quantize_nf4
from shardplan.kernels.packing import Packing
from shardplan.kernels.quantize import quantize
from shardplan.kernels.vocabulary_parallel import local_gradient

PACKING = Packing(kind="int8", block=64)


def strided(device: str) -> list[Tensor]:
    """Vectors whose flattening is a view with strides."""
    x = torch.arange(512.0, device=device).view(256, 2)
    return [x[:, 0], x[::2], x[:, 1:], torch.full((1,), 3.0, device=device).expand(200), x.t()]


@pytest.mark.parametrize("at", range(5))
def test_quantised_as_what_it_holds_and_not_as_it_lies(device: str, at: int) -> None:
    x = strided(device)[at]
    plain = x.clone(memory_format=torch.contiguous_format)
    assert torch.equal(quantize(x, PACKING), quantize(plain, PACKING))
    near = dequantize(quantize(x, PACKING), x.numel(), torch.float32, PACKING)
    assert (near - x.reshape(-1)).abs().max() <= x.max() / 127
    assert torch.equal(quantize_nf4(x, block=64), quantize_nf4(plain, block=64))
    assert dequantize_nf4(quantize_nf4(x, block=64), x.numel(), torch.float32, block=64).isfinite().all()


def draw(device: str, queries: int = 40, keys: int = 40, heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((1, queries, heads, 16), (1, keys, 1, 16), (1, keys, 1, 16))
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def with_gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out))]


@pytest.mark.parametrize("side", [2**30, 2**31 - 1, 2**40, 2**63 - 1])
@pytest.mark.parametrize("lengths", [(40, 40), (70, 33)])
def test_a_window_past_any_sequence_is_none(device: str, side: int, lengths: tuple[int, int]) -> None:
    leaves = draw(device, *lengths)
    for window, plain in (((side, side), {}), ((side, 0), {"causal": True})):
        ours = with_gradients(attention(*leaves, window=window), leaves)
        for a, b in zip(ours, with_gradients(attention(*leaves, **plain), leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("ends_q", "ends_k", "longest", "told"),
    [
        ([0, 60], [0, 40], 0, "cu_seqlens_q goes from 0 to 60; it must ascend from 0 to at most 40"),
        ([0, 40], [0, 4000], 0, "cu_seqlens_k goes from 0 to 4000"),
        ([-3, 40], [0, 40], 0, "cu_seqlens_q goes from -3"),
        ([0, 30, 20, 40], [0, 30, 20, 40], 0, "must ascend"),
        ([5, 40], [5, 40], 0, "cu_seqlens_q goes from 5"),
        ([0, 40], [0, 40], 8, "max_seqlen_q is 8, a sequence of cu_seqlens_q has 40"),
    ],
)
def test_lengths_that_describe_no_sequences(
    device: str, ends_q: list[int], ends_k: list[int], longest: int, told: str
) -> None:
    if longest and device != "cpu":
        pytest.skip("lengths on a GPU are not read where the longest is given")
    q, k, v = (x[0].detach() for x in draw(device))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (ends_q, ends_k))
    with pytest.raises(ValueError, match=told):
        attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest, max_seqlen_k=longest)


def test_results_lie_as_the_operators_say(device: str) -> None:
    """Where plain torch does the work (fp64) from transposed inputs too."""
    x = torch.randn(8, 4, dtype=torch.float64, device=device).t().detach().requires_grad_()
    torch.library.opcheck(torch.ops.shardplan.gated_halves.default, (x, "silu"))
    torch.library.opcheck(torch.ops.shardplan.gated.default, (x, x.detach().clone().t().clone().t(), "gelu"))
    weight = torch.ones(8, dtype=torch.float64, device=device, requires_grad=True)
    for residual in (None, x.detach().clone()):
        torch.library.opcheck(torch.ops.shardplan.norm.default, (x, residual, weight, None, 1e-5, False))
    halves = torch.compile(lambda y: gated_halves(y.t()).view(-1), backend="aot_eager", fullgraph=True)
    assert halves(x.detach().t()).shape == (16,)


def test_no_heads_no_gradient(device: str) -> None:
    q, k, v = (torch.randn(1, 4, heads, 16, device=device, requires_grad=True) for heads in (0, 2, 2))
    attention(q, k, v).sum().backward()
    assert k.grad is not None and v.grad is not None
    assert not k.grad.any() and not v.grad.any()


def test_statistics_and_outputs_of_any_strides(device: str) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 70, device=device), torch.randint(0, 70, (5,), device=device)
    lse, grad = logits.logsumexp(1), torch.ones(5, device=device)
    plain = local_gradient(logits, targets, lse, grad, start=0, vocabulary=70)
    for odd in (torch.stack([lse, lse * 0 + 9], 1)[:, 0], lse.double()):
        assert torch.allclose(local_gradient(logits, targets, odd, grad, start=0, vocabulary=70), plain, atol=1e-6)
    q, k, v = (x.detach() for x in draw(device, heads=1))
    out, lse = attention_block.block_attention(q, k, v, causal=True)
    given = torch.randn_like(out)
    odd_out, odd_lse = torch.stack([out, out + 1], -1)[..., 0], torch.stack([lse, lse + 1], -1)[..., 0]
    ours = attention_block.block_gradients(given, q, k, v, odd_out, odd_lse, causal=True)
    for a, b in zip(ours, attention_block.block_gradients(given, q, k, v, out, lse, causal=True), strict=True):
        assert torch.equal(a, b)


def off(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def test_the_gelu_gate_is_as_near_as_torchs(device: str) -> None:
    """1 - s of a sigmoid s near 1 would lose digits."""
    torch.manual_seed(0)
    gate, up, dy = (2 * torch.randn(16, 4096, device=device) for _ in range(3))
    gate.requires_grad_()
    exact = gate.detach().double().requires_grad_()
    wanted = torch.autograd.grad(functional.gelu(exact, approximate="tanh") * up.double(), exact, dy.double())[0]
    plain = torch.autograd.grad(functional.gelu(gate, approximate="tanh") * up, gate, dy)[0]
    ours = torch.autograd.grad(gated(gate, up, activation="gelu_tanh"), gate, dy)[0]
    assert off(ours, wanted) <= 2 * off(plain, wanted)


@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
def test_the_gradient_of_large_logits_is_as_near_as_torchs(device: str, size: float) -> None:
    """exp(x - lse) would lose as much as lse is large; its rest is kept beside it."""
    torch.manual_seed(0)
    logits, targets = size * torch.randn(16, 1000, device=device), torch.randint(0, 1000, (16,), device=device)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    wanted = torch.autograd.grad(functional.cross_entropy(exact, targets), exact)[0]
    plain = torch.autograd.grad(functional.cross_entropy(logits, targets), logits)[0]
    ours = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    assert off(ours, wanted) <= 2 * off(plain, wanted) + 1e-10


def test_an_infinite_cap_is_none(device: str) -> None:
    leaves = draw(device)
    ours, plain = attention(*leaves, softcap=math.inf), attention(*leaves)
    for a, b in zip(with_gradients(ours, leaves), with_gradients(plain, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "words",
    [
        {"scale": math.inf},
        {"scale": "1"},
        {"softcap": None},
        {"dropout": None},
        {"window": (None, 0)},
        {"window": (2.5, 1)},
        {"seed": 5, "dropout": 0.1},
        {"alibi_slopes": [0.1, 0.2]},
    ],
    ids=str,
)
def test_values_that_are_none(device: str, words: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(words))):
        attention(*draw(device), **words)


def test_other_values_that_are_none(device: str) -> None:
    some = torch.randint(0, 3, (4, 4), device=device)
    with pytest.raises(ValueError, match="floating-point"):
        gated(some, some)
    with pytest.raises(ValueError, match="scalar"):
        cross_entropy(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device))
    one = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="row a token"):
        linear_cross_entropy(torch.randn(8, device=device), torch.randn(3, 8, device=device), one[0])
    with pytest.raises(ValueError, match="no rows"):
        linear_cross_entropy(torch.randn(1, 8, device=device), torch.randn(0, 8, device=device), one)


def test_tensors_of_no_device() -> None:
    q, k, v = (torch.empty(1, 4, 2, 16, device="meta") for _ in range(3))
    assert attention(q, k, v).shape == q.shape
    weight = torch.empty(3, 16, device="meta")
    hidden, targets = torch.empty(5, 16, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    assert linear_cross_entropy(hidden, weight, targets).shape == ()


def test_forward_mode_is_refused(device: str) -> None:
    """It would come out as zero."""
    q, k, v = (x.detach() for x in draw(device))
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda x: attention(q, k, x), (v,), (v,))
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda x: rms_norm(x, torch.ones(16, device=device)), (q,), (q,))
