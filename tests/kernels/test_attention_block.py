"""Attention to a part of the keys: the kernels give what plain torch gives, and the gradients of parts add up to the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardplan.kernels import attention_block, attention_block_reference

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def draw(queries: int, keys: int, device: str, dtype: torch.dtype) -> Tensors:
    """q, k, v and the gradient of the output: 4 query heads over 2 key heads, as slices of longer tensors."""
    numbers = torch.Generator().manual_seed(0)
    sizes = [(queries, 4), (keys, 2), (keys, 2), (queries, 4)]
    drawn = [torch.randn(2, n + 8, heads, 16, generator=numbers).to(device, dtype)[:, 8:] for n, heads in sizes]
    return drawn[0], drawn[1], drawn[2], drawn[3]


def error(found: Tensor, right: Tensor) -> float:
    return ((found.float() - right.float()).norm() / right.float().norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(48, 48, True), (24, 72, True), (48, 24, False), (24, 48, False)]
)
def test_kernels_of_a_block_are_the_reference(
    device: str, queries: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    """With log-sum-exp and output over more keys than the block's, as a ring has them in the backward."""
    q, k, v, grad = draw(queries, keys, device, dtype)
    found, found_lse = attention_block.block_attention(q, k, v, causal=causal)
    right, right_lse = attention_block_reference.block_attention(q, k, v, causal=causal)
    assert error(found, right) < TOLERANCE[dtype]
    assert (found_lse - right_lse).abs().max() < 1e-4
    lse = torch.cat((right_lse, right_lse), dim=2)[:, :, queries:] + 0.7  # a slice, as of a rank's later chunk
    out = (0.5 * right + 0.1).to(dtype)
    mine = attention_block.block_gradients(grad, q, k, v, out, lse, causal=causal)
    theirs = attention_block_reference.block_gradients(grad, q, k, v, out, lse, causal=causal)
    assert max(error(*pair) for pair in zip(mine, theirs, strict=True)) < TOLERANCE[dtype]


def test_blocks_of_a_ring_add_up_to_whole_attention(device: str) -> None:
    """The second of two chunks against both: merged, and differentiated by the whole log-sum-exp."""
    q, k, v, grad = draw(32, 64, device, torch.float32)
    whole, whole_lse = attention_block.block_attention(q, k, v, causal=True)
    parts = [(k[:, :32], v[:, :32], False), (k[:, 32:], v[:, 32:], True)]
    lses = [attention_block.block_attention(q, a, b, causal=causal)[1] for a, b, causal in parts]
    assert torch.allclose(torch.logaddexp(*lses), whole_lse, atol=1e-5)
    right = attention_block.block_gradients(grad, q, k, v, whole, whole_lse, causal=True)
    found = [attention_block.block_gradients(grad, q, a, b, whole, whole_lse, causal=c) for a, b, c in parts]
    assert error(found[0][0] + found[1][0], right[0]) < 1e-5
    for index in (1, 2):
        assert error(torch.cat([one[index] for one in found], dim=1), right[index]) < 1e-5
