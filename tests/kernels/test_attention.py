"""Attention equals its reference in every feature, and has the properties that training relies on."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from shardplan.kernels import attention as attention_module
from shardplan.kernels import attention_trial
from shardplan.kernels.attention import attention, attention_with_lse, merge
from shardplan.kernels.attention_reference import Shape, kept, reference

TINY = 1e-5
Tensors = tuple[Tensor, Tensor, Tensor]


def draw(device: str, sizes: tuple[int, ...], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) from (B, S_q, S_k, H, H_kv, D), as leaves."""
    batch, queries, keys, heads, kv_heads, width = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return drawn[0], drawn[1], drawn[2]


def gradients(outputs: list[Tensor], leaves: Tensors, *, seed: int = 1) -> list[Tensor]:
    """Gradients of a random combination of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, sides))


def error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def check(sizes: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, **options: object) -> None:
    """Outputs and gradients are at most twice as far from fp32 as the reference in the same precision is."""
    leaves = draw(device, sizes, dtype=dtype)
    wide: Tensors = tuple(x.detach().float().requires_grad_() for x in leaves)  # type: ignore[assignment]
    words = dict(options)
    causal = bool(words.pop("causal", False))
    left, right = words.pop("window", (-1, -1))  # type: ignore[misc]
    shape = Shape(
        scale=words.pop("scale", None) or 1 / math.sqrt(sizes[5]),  # type: ignore[arg-type]
        left=left,
        right=(0 if right < 0 else min(right, 0)) if causal else right,
        top_left=bool(words.pop("top_left", False)),
        softcap=float(words.pop("softcap", 0.0)),  # type: ignore[arg-type]
        dropout=float(words.pop("dropout", 0.0)),  # type: ignore[arg-type]
    )
    slopes, seed = words.pop("alibi_slopes", None), words.pop("seed", None)
    out, lse = attention_with_lse(*leaves, **options)  # type: ignore[arg-type]
    exact, exact_lse = reference(*wide, shape, slopes=slopes, seed=seed)  # type: ignore[arg-type]
    torch_result, _ = reference(*(x.detach() for x in leaves), shape, slopes=slopes, seed=seed)  # type: ignore[arg-type]
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    slack = TINY if dtype == torch.float32 else {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert error(out, exact) <= 2 * error(torch_result, exact) + slack
    seen = ~torch.isneginf(exact_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert error(lse[seen], exact_lse[seen]) <= (1e-4 if dtype == torch.float32 else 2e-2)
    mine, theirs = gradients([out], leaves), gradients([exact], wide)
    for own, want in zip(mine, theirs, strict=True):
        assert error(own, want) <= (1e-4 if dtype == torch.float32 else 0.02 * max(1.0, want.abs().max().item()))


LENGTHS = [(64, 64), (1, 70), (50, 97), (97, 50), (130, 130)]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_any_lengths(device: str, queries: int, keys: int, causal: bool) -> None:
    check((1, queries, keys, 2, 2, 32), device, causal=causal)


@pytest.mark.parametrize("width", [16, 24, 40, 64, 80, 96, 128, 192, 256])
def test_any_head_dimension(device: str, width: int) -> None:
    check((1, 40, 40, 1, 1, width), device, causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(device: str, dtype: torch.dtype, causal: bool) -> None:
    check((2, 70, 70, 2, 1, 64), device, dtype, causal=causal)


@pytest.mark.parametrize("window", [(10, -1), (-1, 7), (12, 5), (0, 0), (40, 0)])
@pytest.mark.parametrize(("queries", "keys"), [(80, 80), (40, 90)])
def test_sliding_window(device: str, window: tuple[int, int], queries: int, keys: int) -> None:
    check((1, queries, keys, 2, 1, 32), device, window=window)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softcap": 1.0, "causal": True, "scale": 0.4},
        {"causal": True, "top_left": True},
        {"dropout": 0.3, "causal": True},
        {"dropout": 0.5, "softcap": 3.0, "window": (20, 4)},
    ],
    ids=str,
)
def test_features(device: str, options: dict[str, object]) -> None:
    seeded = options | ({"seed": torch.tensor([123456789012345], device=device)} if "dropout" in options else {})
    check((2, 50, 70, 2, 1, 32), device, **seeded)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_alibi(device: str, per_sequence: bool) -> None:
    slopes = torch.tensor([0.5, 0.125], device=device)
    if per_sequence:
        slopes = torch.stack([slopes, slopes * 2])
    check((2, 40, 66, 2, 2, 32), device, causal=True, alibi_slopes=slopes)


def test_strides_are_free(device: str) -> None:
    joint = torch.randn(2, 48, 3, 2, 32, device=device)
    q, k, v = (joint[:, :, i] for i in range(3))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attention(q, k, v, causal=True), attention(*heads_first, causal=True))
    last_strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(attention(q, k, v, causal=True), attention(*last_strided, causal=True))


def test_grouped_heads_equal_repeated_heads(device: str) -> None:
    q, k, v = draw(device, (1, 60, 60, 4, 2, 32))
    repeated = attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), causal=True)
    assert torch.equal(attention(q, k, v, causal=True), repeated)


def test_a_window_as_long_as_the_sequence_changes_nothing(device: str) -> None:
    q, k, v = draw(device, (1, 70, 70, 2, 2, 32))
    assert error(attention(q, k, v, window=(70, 70)), attention(q, k, v)) <= TINY
    assert error(attention(q, k, v, window=(70, -1), causal=True), attention(q, k, v, causal=True)) <= TINY


def test_packed_sequences_equal_a_loop(device: str) -> None:
    lengths_q, lengths_k = [33, 0, 1, 64], [40, 5, 0, 64]
    cu_q = torch.tensor([0, *itertools.accumulate(lengths_q)], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, *itertools.accumulate(lengths_k)], dtype=torch.int32, device=device)
    q, k, v = draw(device, (1, sum(lengths_q), sum(lengths_k), 2, 1, 32))
    packed, lse = attention_with_lse(q[0], k[0], v[0], causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    mine = gradients([packed], (q, k, v))
    loop = []
    for index in range(len(lengths_q)):
        own_q, own_k = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        loop.append(attention(q[:, own_q], k[:, own_k], v[:, own_k], causal=True)[0])
    assert error(packed, torch.cat(loop)) <= TINY
    assert torch.isneginf(lse[:, 33]).all()  # the third sequence has a query and no key
    for own, want in zip(mine, gradients([torch.cat(loop)], (q, k, v)), strict=True):
        assert error(own, want) <= 1e-4


def test_merging_parts_of_the_keys_equals_the_whole_and_any_order(device: str) -> None:
    leaves = draw(device, (1, 40, 96, 2, 2, 32))
    q, k, v = leaves
    whole, whole_lse = attention_with_lse(q, k, v)
    parts = [attention_with_lse(q, k[:, i : i + 32], v[:, i : i + 32]) for i in (0, 32, 64)]
    left = merge(*merge(*parts[0], *parts[1]), *parts[2])
    right = merge(*parts[0], *merge(*parts[1], *parts[2]))
    assert error(left[0], whole) <= TINY
    assert error(left[1], whole_lse) <= TINY
    assert error(left[0], right[0]) <= TINY
    # through the merge, which needs the gradient of each part's LSE
    for own, want in zip(gradients([left[0]], leaves), gradients([whole], leaves), strict=True):
        assert error(own, want) <= 1e-4


def test_the_gradient_of_the_lse(device: str) -> None:
    leaves = draw(device, (1, 40, 40, 1, 1, 32))
    _, lse = attention_with_lse(*leaves, causal=True)
    mine = torch.autograd.grad(lse.sum(), leaves[:2])
    _, exact = reference(*leaves, Shape(scale=1 / math.sqrt(32), right=0))
    for own, want in zip(mine, torch.autograd.grad(exact.sum(), leaves[:2]), strict=True):
        assert error(own, want) <= 1e-4


def test_the_same_bits_twice(device: str) -> None:
    leaves = draw(device, (2, 70, 70, 2, 1, 32), dtype=torch.float16)
    once, twice = (gradients([attention(*leaves, causal=True)], leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_dropout_drops_its_share_and_follows_its_seed(device: str) -> None:
    keep = kept(7, 0, 2, 2, 64, 64, 0.25, torch.device(device))
    assert keep.float().mean().item() == pytest.approx(0.75, abs=0.02)
    q, k, v = draw(device, (1, 48, 48, 1, 1, 32))
    seeds = [torch.tensor([s], device=device) for s in (1, 1, 2)]
    first, again, other = (attention(q, k, v, dropout=0.2, seed=s) for s in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    drawn = attention(q, k, v, dropout=0.2)
    torch.manual_seed(3)
    assert torch.equal(drawn, attention(q, k, v, dropout=0.2))


def test_operators_are_registered_as_torch_asks(device: str) -> None:
    leaves = draw(device, (1, 33, 40, 2, 1, 16))
    arguments = (*leaves, None, None, None, None, 0, 0, 0.25, -1, 0, False, 0.0, 0.0, False)
    torch.library.opcheck(torch.ops.shardplan.attention_forward.default, arguments)


def test_compiles_whole_and_recomputes_under_checkpointing(device: str) -> None:
    leaves = draw(device, (1, 40, 40, 2, 1, 32))
    plain = attention(*leaves, causal=True)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True) * 2, fullgraph=True, backend="aot_eager")
    assert error(compiled(*leaves), plain * 2) <= TINY
    again = torch.utils.checkpoint.checkpoint(lambda *x: attention(*x, causal=True), *leaves, use_reentrant=False)
    for a, b in zip(gradients([again], leaves), gradients([plain], leaves), strict=True):
        assert torch.equal(a, b)


def test_selective_checkpointing_meets_the_operator_and_keeps_its_result(device: str) -> None:
    leaves = draw(device, (1, 40, 40, 2, 1, 32))
    operator, met = torch.ops.shardplan.attention_forward.default, list[bool]()

    def policy(context: Any, function: object, *_: object, **__: object) -> CheckpointPolicy:
        if function is not operator:
            return CheckpointPolicy.PREFER_RECOMPUTE
        met.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k.sin(), v.sin(), causal=True).sin()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    again = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    for a, b in zip(gradients([again], leaves), gradients([layer(*leaves)], leaves), strict=True):
        assert torch.equal(a, b)
    assert met.count(False) == 1  # some versions of torch ask again when they take what was kept


def test_the_registered_derivative_is_the_one_that_eager_calls_take(device: str) -> None:
    leaves = draw(device, (1, 33, 40, 2, 1, 16))
    arguments = (*leaves, None, None, None, None, 0, 0, 0.25, -1, 0, False, 0.0, 0.0, False)
    registered = torch.ops.shardplan.attention_forward.default(*arguments)
    eager = attention_with_lse(*leaves, scale=0.25, window=(-1, 0))
    for a, b in zip(gradients(list(registered), leaves), gradients(list(eager), leaves), strict=True):
        assert torch.equal(a, b)


def test_autocast_takes_its_precision(device: str) -> None:
    q, k, v = draw(device, (1, 32, 32, 1, 1, 16))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"softcap": 2.0, "window": (9, 3)},
        {"dropout": 0.4, "causal": True},
        {"top_left": True, "causal": True},
    ],
    ids=str,
)
def test_the_plain_path_has_the_gradients_of_autograd(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "takes_kernel", lambda _: False)
    seeded = options | ({"seed": torch.tensor([9])} if "dropout" in options else {})
    check((2, 30, 44, 4, 2, 16), "cpu", **seeded)
    check((2, 30, 44, 4, 2, 16), "cpu", alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]), **seeded)


def test_the_plain_path_takes_packed_sequences_and_the_gradient_of_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "takes_kernel", lambda _: False)
    test_packed_sequences_equal_a_loop("cpu")
    test_the_gradient_of_the_lse("cpu")
    test_merging_parts_of_the_keys_equals_the_whole_and_any_order("cpu")


def test_empty_inputs(device: str) -> None:
    q, k, v = draw(device, (1, 8, 0, 1, 1, 16))
    out, lse = attention_with_lse(q, k, v)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("cap", [1.0, 30.0, 1000.0])
def test_a_soft_cap_loses_no_precision(device: str, cap: float) -> None:
    """Far below the cap tanh is nearly its argument: 1 - 2 / (1 + exp 2x) would cancel there."""
    check((1, 40, 50, 2, 1, 32), device, softcap=cap)
    q, k, v = draw(device, (1, 40, 50, 2, 1, 32))
    shape = Shape(scale=32**-0.5, softcap=cap)
    exact, _ = reference(q.double(), k.double(), v.double(), shape)
    assert error(attention(q, k, v, softcap=cap), exact) <= 2e-6
    assert (
        error(attention(8 * q, 8 * k, v, softcap=cap), reference(8 * q.double(), 8 * k.double(), v.double(), shape)[0])
        < 3e-5
    )


@pytest.mark.parametrize("causal", [False, True])
def test_the_specialised_pass_agrees_or_is_not_used(device: str, causal: bool) -> None:
    q, k, v = draw(device, (1, 70, 90, 2, 1, 64), dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not used here is allowed
        own = attention(q, k, v, causal=causal, specialised=True)
    assert error(own, attention(q, k, v, causal=causal)) <= 5e-3


@pytest.mark.parametrize("fault", ["raises", "wrong", "raises later"])
def test_a_broken_specialised_pass_gives_way(device: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention_trial.forward

    def broken(q: Tensor, k: Tensor, v: Tensor, shape: Shape, tile: object = None) -> tuple[Tensor, Tensor]:
        if fault == "raises later" and q.shape[1] != 40:  # the trial's own
            return plain(q, k, v, shape, attention_trial.Sequences(q, k, None, None, (0, 0)), None, None)
        if fault != "wrong":
            raise RuntimeError("PassManager::run failed")
        return torch.ones_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=q.device)

    monkeypatch.setattr(attention_trial, "specialised_forward", broken)
    monkeypatch.setattr(attention_trial, "_verdicts", {})
    q, k, v = draw(device, (1, 40, 40, 1, 1, 64), dtype=torch.float16)
    with pytest.warns(UserWarning, match="is not used"):
        own = attention(q, k, v, specialised=True)
    assert torch.equal(own, attention(q, k, v))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_and_replayed_on_new_values(device: str) -> None:
    leaves = draw(device, (2, 256, 256, 4, 2, 64), dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compile, and let autograd set up, outside the capture
        gradients([attention(*leaves, causal=True, dropout=0.1)], leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*leaves, causal=True)
        grads = torch.autograd.grad(out.sum(), leaves)
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    again = attention(*leaves, causal=True)
    assert torch.equal(out, again)
    for a, b in zip(grads, torch.autograd.grad(again.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_compiles_with_inductor(device: str) -> None:
    leaves = draw(device, (2, 200, 200, 4, 2, 64), dtype=torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True) * 2, fullgraph=True)
    assert torch.equal(compiled(*leaves), attention(*leaves, causal=True) * 2)


@pytest.mark.gpu
def test_long_sequences_and_large_tensors(device: str) -> None:
    # more than 2^31 elements: offsets must not wrap
    q = torch.randn(1, 70_000, 256, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 128, 1, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = attention(q, k, v)
    tail, _ = reference(q[:, -64:, -2:], k, v, Shape(scale=128**-0.5))
    assert error(out[:, -64:, -2:], tail) <= 2e-2
