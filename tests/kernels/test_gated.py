"""SwiGLU and GeGLU: a pair and the halves of one tensor, against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from shardplan.kernels.gated import ACTIVATIONS, gated, gated_halves, gated_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, WIDTHS = (301, (1000, 11_008, 14_336)) if torch.cuda.is_available() else (3, (1000, 4096))


def plain(gate, up, activation):
    """As eager torch computes it, with a tensor between the two steps."""
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def results(function, inputs, dy):
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def tensors(shape, dtype, device, count=3):
    generator = torch.Generator(device).manual_seed(0)
    return [(3 * torch.randn(shape, device=device, generator=generator)).to(dtype) for _ in range(count)]


def check(ours, same, exact):
    """At most twice torch's error in the same precision, plus a millionth of the largest value for sums in another order."""
    ours_error, plain_error = ((each.double() - exact).abs().max().item() for each in (ours, same))
    assert ours_error <= 2 * plain_error + 1e-6 * exact.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_and_its_gradients(activation, width, dtype, device):
    gate, up, dy = tensors((ROWS, width), dtype, device)
    exact = results(lambda g, u: plain(g, u, activation), (gate.double(), up.double()), dy)
    same = results(lambda g, u: plain(g, u, activation), (gate, up), dy)
    ours = results(lambda g, u: gated(g, u, activation=activation), (gate, up), dy)
    for got, wanted, true in zip(ours, same, exact, strict=True):
        assert got.dtype == dtype
        check(got, wanted, true)

    y, dx = results(lambda x: gated_halves(x, activation=activation), (torch.cat((gate, up), dim=-1),), dy)
    torch.testing.assert_close(y, ours[0])
    torch.testing.assert_close(dx, torch.cat(ours[1:], dim=-1))


@settings(max_examples=15)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_shape_and_size(rows, width, size, activation):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, up, dy = tensors((rows, width), torch.float32, device)
    gate = gate * size
    ours = results(lambda g, u: gated(g, u, activation=activation), (gate, up), dy)
    exact = results(lambda g, u: plain(g, u, activation), (gate.double(), up.double()), dy)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)


def test_strides_do_not_matter(device):
    gate, up, dy = tensors((2, 6, 64), torch.float32, device)
    wanted = results(gated, (gate, up), dy)
    pair = torch.cat((gate, up), dim=-1).requires_grad_()  # a fused projection, split
    y = gated(*pair.chunk(2, dim=-1))
    y.backward(dy.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(y, wanted[0])
    assert torch.equal(pair.grad, torch.cat(wanted[1:], dim=-1))
    turned = [each.transpose(0, 2).contiguous().transpose(0, 2) for each in (gate, up)]
    assert torch.equal(gated(*turned), wanted[0])
    assert torch.equal(gated(gate[:, ::2], up[:, ::2]), wanted[0][:, ::2])


def test_no_elements(device):
    empty = torch.zeros(0, 8, device=device, requires_grad=True)
    gated(empty, empty).sum().backward()
    assert empty.grad.shape == (0, 8)


def test_fp64_takes_the_reference():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda g, u, a=activation: gated(g, u, activation=a), (gate, up))
    assert torch.autograd.gradcheck(gated_halves, (gate,))


def test_the_operators_are_well_formed(device):
    gate, up = (each.requires_grad_() for each in tensors((3, 20), torch.float32, device, count=2))
    torch.library.opcheck(torch.ops.shardplan.gated.default, (gate, up, "gelu"))
    torch.library.opcheck(torch.ops.shardplan.gated_halves.default, (gate, "silu"))


def test_compiles_into_one_graph(device):
    gate, up, dy = tensors((3, 20), torch.float32, device)
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(results(compiled, (gate, up), dy), results(gated, (gate, up), dy), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    gate, up, _ = tensors((512, 4096), torch.bfloat16, "cuda")
    wanted = gated(gate, up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated(gate, up)
    graph.replay()
    assert torch.equal(y, wanted)
    check(y, gated_reference(gate, up, "silu"), gated_reference(gate.double(), up.double(), "silu"))


def test_wrong_inputs_are_named(device):
    x = torch.zeros(2, 7, device=device)
    with pytest.raises(ValueError, match=r"activation='relu' is unknown; use one of silu, gelu_tanh, gelu"):
        gated(x, x, activation="relu")
    with pytest.raises(ValueError, match="make them alike"):
        gated(x, x.half())
    with pytest.raises(ValueError, match=r"\(2, 7\); give \(\.\.\., 2F\)"):
        gated_halves(x)
    with pytest.raises(ValueError, match="make it floating-point"):
        gated_halves(torch.ones((2, 4), dtype=torch.int64, device=device))
