"""Which kernel of `scaled_dot_product_attention` runs: the one that the cost model was told of, not whichever torch prefers.

Left alone, torch picks by version and GPU (on Hopper FlashAttention-2 or cuDNN's kernel, whose rates differ by half).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardplan.executor.transformer import Attention


def attention_backends(word: str, *, device_type: str, precision: str) -> tuple[SDPBackend, ...]:
    """Backends that the layout's word allows; empty = torch's own choice.

    `auto` is this runtime's own: FlashAttention on a GPU (`attention_kernels` in costmodel/runtimes/shardplan.toml). A GPU's
    flash kernel takes 16-bit numbers only, and the memory-efficient one no grouped queries: fp32 falls back to what there is.
    """
    if word == "unfused":
        return (SDPBackend.MATH,)
    if device_type == "cpu":
        return (SDPBackend.FLASH_ATTENTION,) if word == "flash" else ()
    if precision == "fp32":
        return (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return (SDPBackend.FLASH_ATTENTION,)


def attention_context(backends: Sequence[SDPBackend]) -> AbstractContextManager[object]:
    """Must surround forward and backward, which recomputes: only `backends` may run within it, any if there are none."""
    return sdpa_kernel(list(backends)) if backends else nullcontext()


def own_attention(q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
    """Causal attention by this project's kernels (`kernels/attention.py`), on a GPU in 16 bits."""
    from shardplan.kernels.attention import attention

    return attention(q_BSND, k_BSKD, v_BSKD, causal=True)


def use_own_attention(model: nn.Module) -> None:
    """Let every attention layer of `model` run this project's kernels."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = own_attention
