"""Which attention kernel runs: the one that the cost model was told of, not whichever torch prefers.

Left alone, torch picks by version and GPU (on Hopper FlashAttention-2 or cuDNN's kernel, whose rates differ by half).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardplan.costmodel.attention_time import takes_own_kernel
from shardplan.executor.transformer import Attention, Transformer
from shardplan.hw_profiles.errors import InputError

HOPPER = 9
"""Major compute capability of the GPUs on which this project's kernel beats torch's FlashAttention-2, as timed on an H200."""


def attention_backends(word: str, *, device_type: str, precision: str) -> tuple[SDPBackend, ...]:
    """Backends that the layout's word allows; empty = torch's own choice.

    `auto`, where this project's kernel does not run (`runs_own_attention`), is FlashAttention on a GPU, as `flash` always is. A GPU's
    flash kernel takes 16-bit numbers only; fp32 runs the memory-efficient one, for which grouped keys are repeated
    (`transformer.takes_grouped`).
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
    if tuple(backends) == (SDPBackend.MATH,):
        return _products_as_they_come()
    return sdpa_kernel(list(backends)) if backends else nullcontext()


@contextmanager
def _products_as_they_come() -> Iterator[None]:
    """Unfused attention in the precision of its inputs; left alone, torch multiplies 16-bit ones in fp32 (on an H200 a step of 219 ms took
    369)."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def runs_own_attention(
    word: str, *, precision: str, head_dim: int, capability: tuple[int, int] | None, apart: bool = False
) -> bool:
    """Whether this project's kernel runs on a device of `capability` (None: none of NVIDIA) under the layout's word.

    `auto` takes it where the cost model does: on the GPUs whose catalog entry has its rates, in 16 bits, if Triton is installed; on
    any in 16 bits where documents are to be kept `apart`.
    """
    if word == "triton":
        return True
    usual = capability is not None and (apart or capability[0] == HOPPER) and takes_own_kernel(precision, head_dim)
    return word == "auto" and usual and triton_is_installed()


def triton_is_installed() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("triton") is not None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None of a CPU, or of a GPU that is not NVIDIA's."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def own_attention(q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, bounds: Tensor | None = None) -> Tensor:
    """Causal attention by this project's kernels (`kernels/attention.py`), on a GPU in 16 bits; `bounds`: `document_bounds`."""
    from shardplan.kernels.attention import attention

    if bounds is None:
        return attention(q_BSND, k_BSKD, v_BSKD, causal=True)
    seq = q_BSND.shape[1]
    out = attention(
        q_BSND.flatten(0, 1),
        k_BSKD.flatten(0, 1),
        v_BSKD.flatten(0, 1),
        causal=True,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=seq,
        max_seqlen_k=seq,
    )
    return out.view_as(q_BSND)


def document_bounds(positions_BS: Tensor) -> Tensor:
    """Where documents begin in the B * S tokens put one behind the other, and where the last one ends: int32 (documents + 1)."""
    starts = (positions_BS.flatten() == 0).nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=positions_BS.numel()).int()


def use_own_attention(model: nn.Module) -> None:
    """Let every attention layer of `model` run this project's kernels."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = own_attention
        if isinstance(module, Transformer):
            module.tell_apart = document_bounds


def check_documents(word: str, *, device_type: str, precision: str, own: bool) -> None:
    """InputError where the kernel that would run cannot keep documents apart: FlashAttention of a GPU takes no mask."""
    if own or device_type == "cpu" or word == "unfused" or precision == "fp32":
        return
    raise InputError(
        f"attention={word} cannot keep documents apart on this GPU",
        place="data.attend_across_documents",
        remedy="plan with attention=triton, which needs triton, or set it to true",
    )
