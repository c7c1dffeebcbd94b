"""Rotary embedding: both pairings, whole and part of a head, against fp64; the backward turns back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.kernels.interpreter import takes_kernel
from shardplan.kernels.rotary import rotary, rotate
from shardplan.kernels.rotary_reference import rotary_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BATCH, SEQ, HEADS, KV_HEADS = (2, 333, 32, 8) if torch.cuda.is_available() else (2, 5, 6, 2)


def table(rows, half, device):
    """cos and sin of position · frequency, (rows, half), fp32; base 10,000."""
    frequencies = 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(rows, device=device, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def heads(count, dim, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(BATCH, SEQ, count, dim, device=device, generator=generator).to(dtype)


def check(ours, plain, exact):
    """At most twice torch's error in the same precision, plus a millionth of the largest value for sums in another order."""
    ours_error, plain_error = ((each.double() - exact).abs().max().item() for each in (ours, plain))
    assert ours_error <= 2 * plain_error + 1e-6 * exact.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (128, 64), (96, 48), (80, 16)])
def test_rotary_and_its_gradients(dim, half, interleaved, dtype, device):
    q, k = heads(HEADS, dim, dtype, device), heads(KV_HEADS, dim, dtype, device, seed=1)
    cos, sin = table(SEQ + 3, half, device)
    leaves = [each.clone().requires_grad_() for each in (q, k)]
    turned = rotary(*leaves, cos, sin, offset=3, interleaved=interleaved)
    torch.autograd.backward(turned, (q, k))
    for x, leaf, got in zip((q, k), leaves, turned, strict=True):
        assert got.is_contiguous() and got.dtype == dtype
        for result, inverse in ((got, False), (leaf.grad, True)):
            how = (cos, sin, None, 3, interleaved, inverse)
            check(result, rotary_reference(x, *how), rotary_reference(x.double(), *how))


def test_agrees_with_complex_multiplication(device):
    # RoFormer, equation 34: element pairs as complex numbers, times e^(i p f)
    x = heads(HEADS, 64, torch.float32, device)
    cos, sin = table(SEQ, 32, device)
    phase = torch.complex(cos, sin)[:, None, :]
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (32, 2))) * phase).flatten(-2)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved=True), wanted)
    halves = torch.complex(*x.chunk(2, dim=-1)) * phase
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((halves.real, halves.imag), dim=-1))


@settings(max_examples=10)
@given(half=st.integers(1, 20), tail=st.integers(0, 9), count=st.integers(1, 5), interleaved=st.booleans())
def test_the_backward_inverts_the_forward(half, tail, count, interleaved):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = heads(count, 2 * half + tail, torch.float32, device).requires_grad_()
    turned = rotate(x, *table(SEQ, half, device), interleaved=interleaved)
    turned.backward(turned.detach())
    torch.testing.assert_close(x.grad, x.detach())
    torch.testing.assert_close(turned.norm(), x.norm())
    assert torch.equal(turned[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_a_split_sequence(dtype, device):
    x = heads(HEADS, 64, torch.float32, device)
    cos, sin = table(2 * SEQ, 32, device)
    whole = torch.cat((x, x.flip(1)), dim=1)
    positions = torch.randperm(2 * SEQ)[:SEQ].to(device)
    wanted = rotate(whole, cos, sin)[:, positions]
    assert torch.equal(rotate(whole[:, positions], cos, sin, positions=positions.to(dtype)), wanted)
    each = positions.to(dtype).expand(BATCH, SEQ)
    assert torch.equal(rotate(whole[:, positions], cos, sin, positions=each), wanted)


def test_strides_do_not_matter(device):
    q, k = heads(HEADS, 64, torch.float32, device), heads(KV_HEADS, 64, torch.float32, device)
    cos, sin = table(SEQ, 32, device)
    wanted = rotary(q, k, cos, sin)
    fused = torch.cat((q, k), dim=2)  # views of one projection
    views = [
        fused.split((HEADS, KV_HEADS), dim=2),
        [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k)],
    ]
    views.append([each.transpose(2, 3).contiguous().transpose(2, 3) for each in (q, k)])
    complex_table = torch.complex(cos, sin)
    for pair in views:
        got = rotary(*pair, complex_table.real, complex_table.imag)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_position_outside_the_table_is_seen(device):
    x = heads(1, 8, torch.float32, device)
    positions = torch.zeros(SEQ, dtype=torch.int64, device=device)
    positions[1] = SEQ + 99
    if not takes_kernel(x):
        with pytest.raises(IndexError):
            rotate(x, *table(SEQ, 4, device), positions=positions)
        return
    turned = rotate(x, *table(SEQ, 4, device), positions=positions)
    assert turned[:, 1].isnan().all()
    assert turned[:, 2:].isfinite().all()


def test_a_position_below_0_is_an_error_of_the_plain_path():
    """torch would count it from the end of the table."""
    table = torch.ones(8, 8, dtype=torch.float64)
    x = torch.ones(1, 2, 1, 16, dtype=torch.float64)
    with pytest.raises(IndexError, match="position -1 is below 0"):
        rotate(x, table, table, positions=torch.tensor([-1, 0]))


def test_no_query_heads(device):
    k = torch.randn(1, 4, 2, 16, device=device)
    angles = torch.arange(4.0, device=device)[:, None] * torch.ones(1, 8, device=device)
    none, turned = rotary(k[:, :, :0], k, angles.cos(), angles.sin())
    assert none.shape == (1, 4, 0, 16)
    assert torch.equal(turned, rotate(k, angles.cos(), angles.sin()))


def test_fp64_takes_the_reference():
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = table(3, 2, "cpu")
    assert torch.autograd.gradcheck(lambda x: rotary(x, x, cos, sin, interleaved=True), (x,))


@pytest.mark.parametrize("has_k", [False, True])
def test_the_operator_is_well_formed(has_k, device):
    q, k = (heads(count, 16, torch.float32, device).requires_grad_() for count in (4, 2))
    cos, sin = table(SEQ, 8, device)
    positions = torch.arange(SEQ, device=device)
    operator = torch.ops.shardplan.rotary.default
    torch.library.opcheck(operator, (q, k if has_k else None, cos, sin, positions, 0, False, False))


def test_compiles_into_one_graph(device):
    q, k = (heads(count, 16, torch.float32, device).requires_grad_() for count in (4, 2))
    tables = table(SEQ, 8, device)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(q, k, *tables), rotary(q, k, *tables)
    gradients = [torch.autograd.grad(each, (q, k), (q, k)) for each in (got, wanted)]
    for a, b in zip((*got, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    q, k = heads(32, 128, torch.bfloat16, "cuda"), heads(8, 128, torch.bfloat16, "cuda")
    tables = table(SEQ, 64, "cuda")
    wanted = rotary(q, k, *tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rotary(q, k, *tables)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_wrong_shapes_are_named(device):
    x = heads(2, 8, torch.float32, device)
    cos, sin = table(SEQ, 4, device)
    with pytest.raises(ValueError, match=r"positions 1 to \d+ lie outside the table of \d+ rows"):
        rotate(x, cos, sin, offset=1)
    with pytest.raises(ValueError, match=r"R <= D = 8"):
        rotate(x, *table(SEQ, 5, device))
    with pytest.raises(ValueError, match="may differ in the heads"):
        rotary(x, x[:1], cos, sin)
    with pytest.raises(ValueError, match="give integers"):
        rotate(x, cos, sin, positions=torch.zeros(SEQ + 1, dtype=torch.int64, device=device))
