"""Attention to a part of the keys by this project's Triton kernels; parts merge by their log-sum-exp (context parallelism).

Formulas and meaning of the arguments: `attention_block_reference`, which runs where the kernels cannot. The backward kernels take O
and LSE as given, so those over all keys make the gradients of a part add up with those of the other parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardplan.kernels import attention as _operators  # noqa: F401  (registers the operators)
from shardplan.kernels import attention_block_reference
from shardplan.kernels.interpreter import takes_kernel

NOTHING_ELSE = (None, None, None, None, 0, 0)
"""No slopes, no dropout seed, no packed sequences."""


def block_attention(q_BSND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(O (B, S, N, D) in q's dtype, LSE (B, N, S) in fp32); `causal` ends at the last query and key."""
    if not takes_kernel(q_BSND):
        return attention_block_reference.block_attention(q_BSND, k_BTKD, v_BTKD, causal=causal)
    return torch.ops.shardplan.attention_forward(q_BSND, k_BTKD, v_BTKD, *NOTHING_ELSE, *_shape(q_BSND, causal=causal))


def block_gradients(
    grad_BSND: Tensor,
    q_BSND: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    out_BSND: Tensor,
    lse_BNS: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) of this part in the dtypes of q, k and v; `out` and `lse` are over all keys."""
    if not takes_kernel(q_BSND):
        return attention_block_reference.block_gradients(
            grad_BSND, q_BSND, k_BTKD, v_BTKD, out_BSND, lse_BNS, causal=causal
        )
    return torch.ops.shardplan.attention_backward(
        grad_BSND, None, q_BSND, k_BTKD, v_BTKD, out_BSND, lse_BNS.contiguous(), *NOTHING_ELSE,
        *_shape(q_BSND, causal=causal),
    )  # fmt: skip


def _shape(q_BSND: Tensor, *, causal: bool) -> tuple[float, int, int, bool, float, float, bool]:
    """scale, keys seen left and right, diagonal from the top left, soft cap, dropout, warp-specialised."""
    return q_BSND.shape[3] ** -0.5, -1, 0 if causal else -1, False, 0.0, 0.0, False
