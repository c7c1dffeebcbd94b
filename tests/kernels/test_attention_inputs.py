"""What attention takes and refuses: arguments out of range, any strides, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardplan.kernels import attention as attention_module
from shardplan.kernels.attention import attention

Tensors = tuple[Tensor, Tensor, Tensor]


def draw(device: str, sizes: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensors:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) from (B, S_q, S_k, H, H_kv, D), as leaves, the same every time."""
    batch, queries, keys, heads, kv_heads, width = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    return q, k, v


def gradients(out: Tensor, leaves: Tensors) -> list[Tensor]:
    """Of a random combination of the result."""
    side = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return list(torch.autograd.grad(out, leaves, side))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": (-2, 0)}, "window"),
        ({"dropout": 1.0}, "dropout"),
        ({"softcap": -1.0}, "softcap"),
        ({"scale": 0.0}, "scale"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes"),
        ({"alibi_slopes": torch.ones(3, 2)}, r"alibi_slopes .* \(2,\) or \(1, 2\)"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes requires a gradient"),
        ({"window": None}, "window is None"),
        ({"window": 5}, "window is 5"),
        ({"window": (1, 2, 3)}, "window is"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is torch.int64"),
        ({"seed": torch.zeros(1)}, "seed is torch.float32"),
        ({"cu_seqlens_q": torch.tensor([0, 8], dtype=torch.int32)}, "cu_seqlens"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_arguments_are_named(device: str, change: dict[str, object], words: str) -> None:
    q, k, v = draw(device, (1, 8, 8, 2, 2, 16))
    change = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **change)  # type: ignore[arg-type]


def test_bad_shapes_are_named(device: str) -> None:
    q, k, v = draw(device, (1, 8, 8, 3, 2, 16))
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="head_dim 300"):
        attention(*(torch.ones(1, 4, 1, 300, device=device) for _ in range(3)))
    with pytest.raises(ValueError, match="float64"):
        attention(*(x.double() for x in (q, k, v)))


def test_slopes_and_lengths_of_any_strides(device: str) -> None:
    q, k, v = draw(device, (2, 40, 40, 4, 2, 16))
    slopes = torch.rand(2, 4, device=device)
    for strided in (torch.stack([slopes, slopes], dim=2)[..., 0], slopes.t().contiguous().t()):
        assert not strided.is_contiguous()
        leaves = draw(device, (2, 40, 40, 4, 2, 16))
        out = attention(*leaves, alibi_slopes=strided)
        assert torch.equal(out, attention(q, k, v, alibi_slopes=slopes))
        wanted = gradients(attention(q, k, v, alibi_slopes=slopes), (q, k, v))
        for got, want in zip(gradients(out, leaves), wanted, strict=True):
            assert torch.equal(got, want)
    lengths = torch.tensor([0, 9, 31, 40], dtype=torch.int32, device=device)
    strided = torch.stack([lengths, lengths + 7], dim=1)[:, 0]
    packed = [x[0].detach() for x in (q, k, v)]
    wanted = attention(*packed, cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    assert torch.equal(attention(*packed, cu_seqlens_q=strided, cu_seqlens_k=strided), wanted)


def test_the_plain_path_keeps_its_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 inside, as without autocast; the inputs alone are cast."""
    monkeypatch.setattr(attention_module, "takes_kernel", lambda _: False)
    leaves = draw("cpu", (1, 40, 40, 2, 2, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = attention(*leaves, causal=True)
        mine = gradients(own, leaves)
    halves: Tensors = tuple(x.detach().bfloat16().requires_grad_() for x in leaves)  # type: ignore[assignment]
    wanted = attention(*halves, causal=True)
    assert torch.equal(own, wanted)
    for got, want in zip(mine, gradients(wanted, halves), strict=True):
        assert torch.equal(got, want.float())
