"""Training attention: FlashAttention-2/3-style forward and backward passes in Triton, as PyTorch operators.

    O_i = Σ_j P_ij·v_j,   P = softmax_j(cap(scale·q_i·k_j) - slope·|i + shift - j| + mask_ij),   LSE_i = ln Σ_j exp(score_ij)

Sources: 1. FlashAttention (Dao et al. 2022, arXiv 2205.14135), 2. FlashAttention-2 (Dao 2023, arXiv 2307.08691),
3. FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), 4. ALiBi (Press et al. 2022, arXiv 2108.12409), 5. Gemma 2 for
the soft cap (arXiv 2408.00118). Kernels: attention_forward, attention_key_gradient, attention_query_gradient.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from shardplan.kernels import attention_launch, attention_launch_backward
from shardplan.kernels.attention_reference import Shape, reference, reference_gradients
from shardplan.kernels.attention_trial import specialised_if_trusted
from shardplan.kernels.interpreter import takes_kernel
from shardplan.kernels.launch import autocasts, in_given_precision, on_device_of
from shardplan.kernels.operators import operator

LARGEST_HEAD_DIM = 256
UNLIMITED = 2**30
"""Keys on a side of a window, from where on a window is none: sums of it and places in a sequence stay below 2^31."""
MOST_HEADS_OR_SEQUENCES = 65_535
"""Of the axes of a grid of programs but the first (CUDA)."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    top_left: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    specialised: bool = False,
) -> Tensor:
    """Attention of every query head over its group's key head; differentiable, and the same bits every time.

    q is (B, S_q, H, D), k and v are (B, S_k, H_kv, D) with H a multiple of H_kv, D at most 256, any strides; the result
    is (B, S_q, H, D) in q's dtype. With `cu_seqlens_q` and `cu_seqlens_k` (int32, sequences + 1, from 0) they are packed:
    (T, H, D), and `max_seqlen_*` are the longest sequences (computed, which waits for the device, where 0). Rows of no sequence
    come out as 0 but must be finite, and a NaN may reach the sequence before its own: a tile reads past the end of a sequence
    and weighs what is there with 0.

    `causal` hides keys after the diagonal, which ends at the last query and key (or starts at the first with `top_left`,
    as torch's `is_causal` does); `window` = (left, right) keeps that many keys on its sides, -1 for all. `alibi_slopes`
    is fp32 (H) or (B, H), packed (sequences, H), and gets no gradient. `dropout` drops that share of probabilities, the
    same in both passes and for any tiling, by `seed` (one int64 on the device; drawn from torch's generator where None).
    `scale` defaults to 1/sqrt(D).
    `specialised` asks for the warp-specialised forward pass on Hopper; wherever it does not cover the call, does not
    compile or gives another result than the plain kernel (tried once a process and shape), the plain one runs.

    Raises ValueError naming the argument for shapes, dtypes or values it cannot take.
    """
    return attention_with_lse(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window=window,
        top_left=top_left,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout=dropout,
        seed=seed,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        specialised=specialised,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    top_left: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    specialised: bool = False,
) -> tuple[Tensor, Tensor]:
    """(O, LSE) of `attention`: LSE is fp32, natural log, (B, H, S_q) or packed (H, T), -inf where a row sees no key.

    Both are differentiable, so that partial results over parts of the keys can be merged (`merge`) and trained through.
    """
    if autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_tensors(q, k, v, packed)
    _check_options(scale, softcap, dropout, window)
    sequences = q.shape[0]
    if packed:
        sequences = _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        q, k, v = q[None], k[None], v[None]
    _check_slopes(q, alibi_slopes, sequences)
    _check_seed(q, seed)
    if packed and (not max_seqlen_q or not max_seqlen_k):
        assert cu_seqlens_q is not None and cu_seqlens_k is not None
        max_seqlen_q, max_seqlen_k = (int(c.diff().max()) if c.numel() > 1 else 0 for c in (cu_seqlens_q, cu_seqlens_k))
    if dropout and seed is None:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    left, right = (min(side, UNLIMITED) for side in window)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    out, lse = _FORWARD(
        q, k, v, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        1.0 / math.sqrt(q.shape[3]) if scale is None else scale, left, right, top_left,
        0.0 if softcap == math.inf else softcap, dropout, specialised,
    )  # fmt: skip
    return (out[0], lse[0]) if packed else (out, lse)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(O, LSE) over two disjoint sets of keys from the results over each: LSE = logaddexp, O = Σ exp(LSE_i - LSE)·O_i.

    O is (B, S, H, D), fp32 for a chain of merges, LSE (B, H, S); rows that see nothing on a side take the other's.
    Source: Ring Attention (Liu et al. 2023, arXiv 2310.01889).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(torch.isneginf(lse), 0.0, lse)
    weight_a = torch.exp(lse_a - safe).transpose(1, 2)[..., None]
    weight_b = torch.exp(lse_b - safe).transpose(1, 2)[..., None]
    return weight_a * out_a.float() + weight_b * out_b.float(), lse


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    """Raise ValueError for shapes, dtypes and devices that the kernels cannot take."""
    dims, layout = (3, "(tokens, heads, head_dim)") if packed else (4, "(batch, seq, heads, head_dim)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; attention takes {layout}{' with cu_seqlens' * packed}"
            )
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f"{name} is {x.dtype}, q is {q.dtype}; use one of float32, float16, bfloat16 for all three"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; move them to one device")
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if k.shape != v.shape or k.shape[-1] != head_dim:
        raise ValueError(
            f"k is {tuple(k.shape)}, v is {tuple(v.shape)}, q is {tuple(q.shape)}; k and v need one shape and q's head_dim"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} key heads; their number must be a multiple")
    if max(heads, q.shape[0] if not packed else 0) > MOST_HEADS_OR_SEQUENCES:
        raise ValueError(
            f"{heads} heads and batch {q.shape[0]}; more than {MOST_HEADS_OR_SEQUENCES} cannot be launched: split them"
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k has {k.shape[0]}; give them one batch")
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"head_dim {head_dim} is outside 1 to {LARGEST_HEAD_DIM}; use torch's scaled_dot_product_attention"
        )


def _check_lengths(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, longest: tuple[int, int]) -> int:
    """The number of packed sequences; raise ValueError for cumulative lengths that do not describe any.

    What they say is only read where that does not make the host wait for a GPU: on a CPU, or where the longest are asked for anyway.
    """
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together; give both")
    for name, lengths in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if lengths.dtype != torch.int32 or lengths.dim() != 1 or lengths.numel() != cu_q.numel() or not lengths.numel():
            raise ValueError(
                f"{name} is {lengths.dtype} {tuple(lengths.shape)}; both need int32 and one entry more than sequences"
            )
        if lengths.device != q.device:
            raise ValueError(f"{name} is on {lengths.device}, q on {q.device}; move them to one device")
    count = cu_q.numel() - 1
    if count > MOST_HEADS_OR_SEQUENCES:
        raise ValueError(
            f"{count} packed sequences; more than {MOST_HEADS_OR_SEQUENCES} cannot be launched: split them"
        )
    if torch.compiler.is_compiling() or type(cu_q) is not Tensor or q.device.type == "meta":
        return count
    if q.device.type == "cpu" or not all(longest):
        for name, lengths, tokens, most in (("q", cu_q, q.shape[0], longest[0]), ("k", cu_k, k.shape[0], longest[1])):
            _check_ends(name, lengths.tolist(), tokens, most)
    return count


def _check_ends(name: str, ends: list[int], tokens: int, longest: int) -> None:
    """Raise ValueError for ends of sequences that do not lie in order among `tokens`, or one longer than what was said, 0 for nothing."""
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] > tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{name} goes from {ends[0]} to {ends[-1]}; it must ascend from 0 to at most {tokens} tokens"
        )
    if longest and max(lengths, default=0) > longest:
        raise ValueError(
            f"max_seqlen_{name} is {longest}, a sequence of cu_seqlens_{name} has {max(lengths)}; give the longest, or 0"
        )


def _check_seed(q: Tensor, seed: Tensor | None) -> None:
    """Raise ValueError for a seed that is not one int64 beside q."""
    if seed is not None and not isinstance(seed, Tensor):
        raise ValueError(f"seed is {seed!r}; give a tensor of one int64 on {q.device}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device):
        raise ValueError(f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; give one int64 on {q.device}")


def _check_slopes(q: Tensor, slopes: Tensor | None, sequences: int) -> None:
    """Raise ValueError for ALiBi slopes that do not go with q (B, S, H, D) or with that many packed `sequences`."""
    if slopes is None:
        return
    if not isinstance(slopes, Tensor):
        raise ValueError(f"alibi_slopes is {slopes!r}; give a float32 tensor")
    heads = q.shape[2]
    if slopes.dtype != torch.float32 or slopes.shape not in ((heads,), (sequences, heads)):
        raise ValueError(
            f"alibi_slopes is {slopes.dtype} {tuple(slopes.shape)}; it must be float32 ({heads},) or ({sequences}, {heads})"
        )
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes is on {slopes.device}, q on {q.device}; move them to one device")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes requires a gradient, which is not computed; give it detached")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt)


def _check_options(scale: float | None, softcap: float, dropout: float, window: tuple[int, int]) -> None:
    """Raise ValueError for numbers out of range."""
    if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    if not (_is_number(softcap) and softcap >= 0):
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    sides: object = window
    whole = isinstance(sides, tuple | list) and all(isinstance(side, int | torch.SymInt) for side in window)
    if not whole or len(window) != 2 or min(window) < -1:
        raise ValueError(f"window is {window}; give (left, right), each a number of keys, or -1 for all")


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    scale: float,
    left: int,
    right: int,
    top_left: bool,
    softcap: float,
    dropout: float,
    specialised: bool,
) -> tuple[Tensor, Tensor]:
    shape = Shape(scale=scale, left=left, right=right, top_left=top_left, softcap=softcap, dropout=dropout)
    if not takes_kernel(q):
        with in_given_precision(q):
            out, lse = reference(q, k, v, shape, slopes=slopes, seed=seed, cu_q=cu_q, cu_k=cu_k)
        return out.contiguous(), lse.contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    slopes, cu_q, cu_k = (None if x is None else x.contiguous() for x in (slopes, cu_q, cu_k))
    sequences = attention_launch.Sequences(q, k, cu_q, cu_k, (longest_q, longest_k))
    with on_device_of(q):
        if specialised and attention_launch.specialisable(q, k, v, shape, sequences, slopes):
            found = specialised_if_trusted(q, k, v, shape)
            if found is not None:
                return found
        return attention_launch.forward(q, k, v, shape, sequences, slopes, seed)


def _fake_forward(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32
    )


def _attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    scale: float,
    left: int,
    right: int,
    top_left: bool,
    softcap: float,
    dropout: float,
    specialised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape(scale=scale, left=left, right=right, top_left=top_left, softcap=softcap, dropout=dropout)
    if not takes_kernel(q):
        with in_given_precision(q):
            return reference_gradients(grad, grad_lse, q, k, v, shape, slopes=slopes, seed=seed, cu_q=cu_q, cu_k=cu_k)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    slopes, cu_q, cu_k = (None if x is None else x.contiguous() for x in (slopes, cu_q, cu_k))
    sequences = attention_launch.Sequences(q, k, cu_q, cu_k, (longest_q, longest_k))
    with on_device_of(q):
        return attention_launch_backward.backward(grad, grad_lse, q, k, v, out, lse, shape, sequences, slopes, seed)


def _fake_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, slopes, seed, cu_q, cu_k, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, slopes, seed, cu_q, cu_k)  # pyright: ignore[reportAttributeAccessIssue]
    ctx.rest = rest  # pyright: ignore[reportAttributeAccessIssue]
    ctx.set_materialize_grads(False)  # pyright: ignore[reportAttributeAccessIssue]


def _gradient(ctx: object, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, slopes, seed, cu_q, cu_k = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    nothing = (None,) * 13
    if grad is None and grad_lse is None:
        return (None, None, None, *nothing)
    if grad is None:
        grad = torch.zeros_like(out)
    rest = ctx.rest  # pyright: ignore[reportAttributeAccessIssue]
    gradients = _BACKWARD(grad, grad_lse, q, k, v, out, lse, slopes, seed, cu_q, cu_k, *rest)
    return (*gradients, *nothing)


_BACKWARD = operator(_attention_backward, _fake_backward)
_FORWARD = operator(_attention_forward, _fake_forward, _gradient, _setup)
