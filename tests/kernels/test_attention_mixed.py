"""Features of attention together, forward and backward: never more than twice as far from fp64 as plain torch in the same precision."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardplan.kernels.attention import attention_with_lse
from shardplan.kernels.attention_reference import kept

SEED = 123456789012345


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call: heads, lengths of its sequences, what is asked for."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 32
    heads: int = 2
    kv_heads: int = 1
    queries: tuple[int, ...] = (50, 50)
    keys: tuple[int, ...] = (70, 70)
    packed: bool = False
    slopes: str = ""
    """Of ALiBi: none, `heads`, or `sequences` for one a sequence and head."""
    options: dict[str, Any] = field(default_factory=dict)


def plain(q: Tensor, k: Tensor, v: Tensor, sequence: int, slopes: Tensor | None, options: dict[str, Any]):
    """(O, LSE) of one sequence, (S, H, D) and (H, S), by the plainest torch in the precision of q."""
    queries, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * (options.get("scale") or 1 / math.sqrt(q.shape[2]))
    if options.get("softcap"):
        score = options["softcap"] * torch.tanh(score / options["softcap"])
    shift = 0 if options.get("top_left") else keys - queries
    distance = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None] - shift
    if slopes is not None:
        score = score - slopes[:, None, None].to(q.dtype) * distance.abs()
    left, right = options.get("window", (-1, -1))
    hidden = (distance > 0) if options.get("causal") else torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance > right) if right >= 0 else hidden
    hidden |= (distance < -left) if left >= 0 else hidden
    score = score.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(score, dim=-1) if keys else q.new_full((q.shape[1], queries), -math.inf)
    empty = torch.isneginf(lse)[..., None]
    weight = torch.softmax(score.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    share = options.get("dropout", 0.0)
    if share:
        keep = kept(SEED, sequence, 1, q.shape[1], queries, keys, share, q.device)[0]
        weight = torch.where(keep, weight / (1 - share), 0.0)
    return torch.einsum("hij,jhd->ihd", weight, v), lse


def ends(lengths: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def results(
    case: Case, leaves: list[Tensor], slopes: Tensor | None, sides: list[Tensor], *, ours: bool
) -> list[Tensor]:
    """(T, H, D) O, (H, T) LSE, and the gradients of q, k, v for `sides` as gradients of both; leaves are packed."""
    q_ends, k_ends = ends(case.queries), ends(case.keys)
    if ours:
        words = case.options | {"alibi_slopes": slopes}
        if case.options.get("dropout"):
            words["seed"] = torch.tensor([SEED], device=leaves[0].device)
        if case.packed:
            for name, cu in (("cu_seqlens_q", q_ends), ("cu_seqlens_k", k_ends)):
                words[name] = torch.tensor(cu, dtype=torch.int32, device=leaves[0].device)
            out, lse = attention_with_lse(*leaves, **words)
        else:
            rows = len(case.queries)
            out, lse = attention_with_lse(*(x.unflatten(0, (rows, -1)) for x in leaves), **words)
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    else:
        parts = []
        for index, (a, b, c, d) in enumerate(zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)):
            own = slopes[index] if slopes is not None and slopes.dim() == 2 else slopes
            q, k, v = leaves
            parts.append(plain(q[a:b], k[c:d], v[c:d], index, own, case.options))
        out, lse = torch.cat([o for o, _ in parts]), torch.cat([one for _, one in parts], dim=1)
    seen = torch.isfinite(lse)
    total = (out * sides[0].to(out.dtype)).sum() + (lse[seen] * sides[1][seen].to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def check(case: Case, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = sum(case.queries), sum(case.keys)
    shapes = [(queries, case.heads, case.head_dim), *[(keys, case.kv_heads, case.head_dim)] * 2]
    drawn = [torch.randn(shape, generator=generator).to(device, case.dtype) for shape in shapes]
    sides = [torch.randn(size, generator=generator).to(device, case.dtype) for size in (shapes[0], shapes[0][1::-1])]
    rows = {"": None, "heads": (case.heads,), "sequences": (len(case.queries), case.heads)}[case.slopes]
    slopes = None if rows is None else torch.rand(rows, generator=generator).to(device)
    found, same, exact = (
        results(case, [x.detach().to(dtype).requires_grad_() for x in drawn], slopes, sides, ours=ours)
        for dtype, ours in ((case.dtype, True), (case.dtype, False), (torch.float64, False))
    )
    step = torch.finfo(case.dtype).eps
    for name, own, theirs, true in zip(("O", "LSE", "dQ", "dK", "dV"), found, same, exact, strict=True):
        finite = torch.isfinite(true)
        assert torch.equal(torch.isfinite(own), finite), name
        own_error, their_error = ((x - true)[finite].abs().double() for x in (own, theirs))
        if own_error.numel():
            # half a spacing of the largest value: what plain torch happens to get exactly right is rounded here
            spared = max(step / 2, 8e-6) * max(1.0, true[finite].abs().max().item())
            assert own_error.max() <= 2 * their_error.max() + spared, (name, case)


HALF, BRAIN = torch.float16, torch.bfloat16
TOGETHER = [
    Case(
        packed=True,
        heads=4,
        kv_heads=2,
        queries=(40, 0, 33, 1),
        keys=(40, 6, 50, 0),
        options={"window": (20, 3), "softcap": 2.0, "dropout": 0.2},
    ),
    Case(packed=True, queries=(33, 64), keys=(40, 64), slopes="sequences", options={"causal": True, "dropout": 0.4}),
    Case(heads=6, kv_heads=2, queries=(37,), keys=(90,), slopes="heads", options={"causal": True}),
    Case(queries=(90,), keys=(37,), slopes="heads", options={"causal": True, "softcap": 5.0, "window": (12, -1)}),
    Case(slopes="sequences", options={"top_left": True, "window": (9, 2), "dropout": 0.3, "scale": 0.5}),
    Case(dtype=HALF, head_dim=80, packed=True, queries=(17, 70), keys=(17, 70), options={"causal": True}),
    Case(dtype=HALF, head_dim=96, heads=4, kv_heads=1, options={"causal": True, "softcap": 20.0, "dropout": 0.1}),
    Case(dtype=BRAIN, head_dim=192, queries=(40,), keys=(66,), options={"causal": True, "window": (30, 0)}),
    Case(dtype=BRAIN, head_dim=64, heads=8, kv_heads=2, packed=True, queries=(5, 60), keys=(70, 60), slopes="heads"),
    Case(dtype=BRAIN, head_dim=256, queries=(33,), keys=(33,), options={"causal": True, "dropout": 0.1}),
]


@pytest.mark.parametrize("case", TOGETHER, ids=lambda c: f"{c.dtype} D{c.head_dim} {c.options}"[6:])
def test_features_together(device: str, case: Case) -> None:
    check(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BRAIN])
@pytest.mark.parametrize("head_dim", [17, 33, 100])
def test_rows_that_no_descriptor_describes(device: str, head_dim: int, dtype: torch.dtype) -> None:
    # no multiple of 16 bytes: tiles are loaded by pointer, as on GPUs without TMA
    check(Case(dtype=dtype, head_dim=head_dim, heads=3, kv_heads=3, packed=True, options={"causal": True}), device)
    check(Case(dtype=dtype, head_dim=head_dim, heads=3, kv_heads=1, options={"window": (30, 10)}), device)


LENGTHS = st.integers(0, 70)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float32, HALF, BRAIN]),
    head_dim=st.sampled_from([16, 24, 40, 72, 128]),
    group=st.sampled_from([1, 2, 3]),
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=3).filter(lambda x: sum(sum(y) for y in x) > 0),
    slopes=st.sampled_from(["", "", "heads", "sequences"]),
    options=st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "window": st.tuples(st.sampled_from([-1, 3, 25]), st.sampled_from([-1, 3, 25])),
            "softcap": st.sampled_from([0.0, 0.0, 3.0]),
            "dropout": st.sampled_from([0.0, 0.0, 0.3]),
            "top_left": st.booleans(),
        }
    ),
)
def test_any_features_together(dtype, head_dim, group, lengths, slopes, options) -> None:
    queries, keys = zip(*lengths, strict=True)
    case = Case(
        dtype=dtype, head_dim=head_dim, heads=group, queries=queries, keys=keys, packed=True, slopes=slopes,
        options=options,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(case, device)
    if queries[0] and keys[0]:
        check(replace(case, packed=False, queries=queries[:1], keys=keys[:1], slopes="heads" if slopes else ""), device)
