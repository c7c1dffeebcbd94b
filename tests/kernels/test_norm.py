"""RMSNorm and LayerNorm: against fp64, never more than twice as wrong as torch in the same precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from shardplan.kernels.norm import WIDEST, add_layer_norm, add_rms_norm, layer_norm, rms_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, WIDTHS = (
    (517, (64, 1000, 4096, 8192, 12_288, 16_384, 20_000))
    if torch.cuda.is_available()
    else (
        5,
        (64, 1000, 9000),
    )
)


def check(ours, plain, exact):
    """At most twice torch's error in the same precision, plus a millionth of the largest value for sums in another order."""
    exact = exact.double()
    ours_error, plain_error = ((each.double() - exact).abs().max().item() for each in (ours, plain))
    assert ours_error <= 2 * plain_error + 1e-6 * exact.abs().max().item()


def tensors(rows, width, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    x, dy = (torch.randn(rows, width, device=device, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, device=device, generator=generator).to(dtype) for _ in range(2))
    return x * 3 + 1, dy, weight, bias


def results(function, inputs, dy):
    """What `function` returns, then the gradients of the inputs, for a gradient `dy` of the first result."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_and_its_gradients(kind, width, dtype, device):
    x, dy, weight, bias = tensors(ROWS, width, dtype, device)
    if kind == "rms":
        inputs, ours = (x, weight), rms_norm
        plain = lambda x, w: functional.rms_norm(x, (width,), w, 1e-5)  # noqa: E731
    else:
        inputs, ours = (x, weight, bias), layer_norm
        plain = lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-5)  # noqa: E731
    exact = results(plain, [each.double() for each in inputs], dy)
    for got, same, wanted in zip(results(ours, inputs, dy), results(plain, inputs, dy), exact, strict=True):
        assert got.dtype == dtype
        check(got, same, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [add_rms_norm, add_layer_norm])
def test_residual_is_added_in_the_same_pass(norm, dtype, device):
    width = 768
    x, dy, weight, bias = tensors(ROWS, width, dtype, device)
    residual, dtotal = (each[:, :width] for each in tensors(ROWS, width, dtype, device, seed=1)[:2])
    leaves = [each.clone().requires_grad_() for each in (x, residual, weight)]
    y, total = norm(*leaves, *([bias] if norm is add_layer_norm else []))
    check(total, x + residual, x.double() + residual.double())
    torch.autograd.backward((y, total), (dy, dtotal))

    def plain(value, weight, extra):
        if norm is add_rms_norm:
            return functional.rms_norm(value, (width,), weight, 1e-5) + 0 * extra.sum()
        return functional.layer_norm(value, (width,), weight, extra, 1e-5)

    # the statistics are those of the sum as it is returned
    value = total.detach()
    exact = results(plain, (value.double(), weight.double(), bias.double()), dy)
    same = results(plain, (value, weight, bias), dy)
    check(y, same[0], exact[0])
    check(leaves[0].grad, same[1] + dtotal, exact[1] + dtotal.double())
    check(leaves[2].grad, same[2], exact[2])
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@settings(max_examples=10)
@given(rows=st.integers(1, 40), width=st.integers(1, 300), centered=st.booleans())
def test_any_shape_matches_autograd_of_plain_torch(rows, width, centered):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, dy, weight, _ = tensors(rows, width, torch.float32, device, seed=rows * width)

    def plain(x, w):
        value = x - x.mean(-1, keepdim=True) if centered else x
        return value * (value.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * w

    ours = results(lambda x, w: (layer_norm if centered else rms_norm)(x, w, eps=1e-2), (x, weight), dy)
    for got, wanted in zip(ours, results(plain, (x.double(), weight.double()), dy), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_strides_do_not_matter(device):
    x, dy, weight, _ = tensors(12, 96, torch.float32, device)
    wanted = results(rms_norm, (x, weight), dy)
    wide = torch.stack((x, x), dim=1).flatten(1)[:, :96]  # rows twice as far apart
    turned = x.t().contiguous().t()  # last dim strided
    for view in (wide, turned, x.view(3, 4, 96)):
        leaf = view.detach().requires_grad_()
        y = rms_norm(leaf, weight)
        y.backward(dy.view(y.shape))
        torch.testing.assert_close(y.view(12, 96), wanted[0])
        torch.testing.assert_close(leaf.grad.reshape(12, 96), wanted[1])


def test_two_runs_give_the_same_bits(device):
    x, dy, weight, bias = tensors(ROWS, 1000, torch.float32, device)
    first, second = (results(layer_norm, (x, weight, bias), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_sum_is_differentiated(device):
    x, dy, weight, _ = tensors(4, 64, torch.float32, device)
    x, residual = x.requires_grad_(), torch.zeros_like(x).requires_grad_()
    add_rms_norm(x, residual, weight)[1].backward(dy)
    assert torch.equal(x.grad, dy)
    assert torch.equal(residual.grad, dy)


@pytest.mark.parametrize("centered", [False, True])
def test_fp64_takes_the_reference(centered):
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if centered:
        assert torch.autograd.gradcheck(add_layer_norm, (x, residual, weight, bias))
    else:
        assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, device):
    x, dy, weight, _ = tensors(rows, 64, torch.float32, device)
    y, dx, dw = results(rms_norm, (x, weight), dy)
    assert y.shape == dx.shape == (rows, 64)
    assert rows or not dw.any()


@pytest.mark.parametrize("centered", [False, True])
def test_the_operator_is_well_formed(centered, device):
    x, dy, weight, bias = tensors(6, 48, torch.float32, device)
    leaves = [each.requires_grad_() for each in (x, dy, weight)]
    torch.library.opcheck(
        torch.ops.shardplan.norm.default, (*leaves, bias.requires_grad_() if centered else None, 1e-5, centered)
    )


def test_compiles_into_one_graph(device):
    x, dy, weight, _ = tensors(6, 48, torch.float32, device)
    compiled = torch.compile(lambda x, w: add_rms_norm(x, x, w)[0], fullgraph=True, backend="aot_eager")
    plain = results(lambda x, w: add_rms_norm(x, x, w)[0], (x, weight), dy)
    for got, wanted in zip(results(compiled, (x, weight), dy), plain, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    x, dy, weight, _ = tensors(256, 4096, torch.bfloat16, "cuda")
    wanted = results(rms_norm, (x, weight), dy)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((y, *gradients), wanted, strict=True))


def test_wrong_shapes_are_named(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); x \(2, 8\) needs \(8,\)"):
        rms_norm(x, torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"residual is torch\.float16"):
        add_rms_norm(x, x.half(), torch.ones(8, device=device))
    with pytest.raises(ValueError, match=r"bias is torch\.float16"):
        layer_norm(x, torch.ones(8, device=device), torch.ones(8, device=device).half())
    with pytest.raises(ValueError, match=r"weight is None; give \(8,\), ones for none"):
        rms_norm(x, None)
    assert WIDEST >= 16_384
