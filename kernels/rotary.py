"""Rotary position embedding of q and k in one launch, forward and backward.

    pair (a, b) of position p and frequency i:   a' = a · cos θ − b · sin θ,   b' = b · cos θ + a · sin θ,   θ = p · f_i

Pairs are (i, i + R/2) in "half" order (Llama as in Hugging Face, GPT-NeoX) and (2i, 2i + 1) when interleaved (RoFormer,
GPT-J, Llama as in Meta's code), for the first R of D elements of a head; the other D − R are copied. The backward turns by −θ
and is the same kernel; nothing is saved but the tables. Arithmetic is fp32. torch has no fused one.

Sources: [1] Su et al., RoFormer, arXiv 2104.09864, equation 34. [2] Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2
(rotary in Triton; prior art, in place there, out of place here so that q and k may be views others still read).

Shapes: B sequences, S positions, N query heads, K key heads, D head size, R rotated elements of it, T rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardplan.kernels.interpreter import as_output
from shardplan.kernels.launch import KERNEL_DTYPES, TRITON_TYPES, next_power_of_two, on_device_of, uses_kernel
from shardplan.kernels.layer_tiles import ROTARY, HeadTiles, head_launch
from shardplan.kernels.operators import operator
from shardplan.kernels.rotary_reference import rotary_reference
from shardplan.kernels.shipped import Shipped


@triton.jit
def _turn_heads(
    x: tl.tensor,
    out: tl.tensor,
    first_head: tl.tensor,
    heads: tl.tensor,
    stride: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Turn HEADS heads of one token; x and out point at the token, whose heads are contiguous in out."""
    head = first_head + tl.arange(0, HEADS)
    live = (head < heads)[:, None]
    at = x + head[:, None].to(tl.int64) * stride
    to = out + head[:, None] * DIM
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        mask = live & (both < 2 * HALF)
        pairs = tl.reshape(tl.load(at + both, mask=mask, other=0.0).to(tl.float32), (HEADS, PAIRS, 2))
        a, b = tl.split(pairs)
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(to + both, as_output(tl.reshape(turned, (HEADS, 2 * PAIRS)), out), mask=mask)
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = live & (pair < HALF)
        a = tl.load(at + pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + HALF + pair, mask=mask, other=0.0).to(tl.float32)
        tl.store(to + pair, as_output(a * cos - b * sin, out), mask=mask)
        tl.store(to + HALF + pair, as_output(b * cos + a * sin, out), mask=mask)
    if TAIL > 0:
        rest = 2 * HALF + tl.arange(0, TAIL)[None, :]
        mask = live & (rest < DIM)
        tl.store(to + rest, tl.load(at + rest, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def rotary_kernel(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    offset: tl.tensor,
    table_rows: tl.tensor,
    seq: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    q_batch_stride: tl.tensor,
    q_seq_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_batch_stride: tl.tensor,
    k_seq_stride: tl.tensor,
    k_head_stride: tl.tensor,
    positions_batch_stride: tl.tensor,
    positions_seq_stride: tl.tensor,
    HAS_POSITIONS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """A program a block of heads: q's of a token, k's, then the next token's; cos and sin (T, R/2) contiguous, fp32."""
    q_blocks = tl.cdiv(q_heads, HEADS)
    blocks = q_blocks + tl.cdiv(k_heads, HEADS)
    token = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch = (token // seq).to(tl.int64)
    index = (token % seq).to(tl.int64)
    if HAS_POSITIONS:
        position = tl.load(positions + batch * positions_batch_stride + index * positions_seq_stride).to(tl.int64)
    else:
        position = index + offset
    pair = tl.arange(0, PAIRS)[None, :]
    # a position outside the table must be seen, not read from somewhere: it turns its token into NaN
    known = (pair < HALF) & (position >= 0) & (position < table_rows)
    cosine = tl.load(cos + position * HALF + pair, mask=known, other=float("nan"))
    sine = tl.load(sin + position * HALF + pair, mask=known, other=float("nan"))
    if INVERSE:
        sine = -sine
    if block < q_blocks:
        at = q + batch * q_batch_stride + index * q_seq_stride
        to = q_out + token.to(tl.int64) * q_heads * DIM
        _turn_heads(
            at, to, block * HEADS, q_heads, q_head_stride, cosine, sine, HALF, DIM, INTERLEAVED, HEADS, PAIRS, TAIL
        )
    else:
        at = k + batch * k_batch_stride + index * k_seq_stride
        to = k_out + token.to(tl.int64) * k_heads * DIM
        first = (block - q_blocks) * HEADS
        _turn_heads(at, to, first, k_heads, k_head_stride, cosine, sine, HALF, DIM, INTERLEAVED, HEADS, PAIRS, TAIL)


def launch(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    tiles: HeadTiles = ROTARY,
) -> None:
    """q and k (B, S, heads, D), not empty, with a contiguous last dim; q_out and k_out are written."""
    batch, seq, q_heads, head_dim = q.shape
    half = cos.shape[1]
    k_heads = 0 if k is None else k.shape[2]
    heads, pairs, warps = head_launch(q_heads, k_heads, half, tiles)
    blocks = triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)
    strides = (0, 0) if positions is None else (0, *positions.stride())[-2:]
    with on_device_of(q):
        rotary_kernel[(batch * seq * blocks,)](
            q,
            q if k is None else k,
            q_out,
            q_out if k is None else k_out,
            cos,
            sin,
            q if positions is None else positions,
            offset,
            cos.shape[0],
            seq,
            q_heads,
            k_heads,
            *q.stride()[:3],
            *(q if k is None else k).stride()[:3],
            *strides,
            HAS_POSITIONS=positions is not None,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            HALF=half,
            DIM=head_dim,
            HEADS=heads,
            PAIRS=pairs,
            TAIL=tail_of(head_dim, half),
            num_warps=warps,
            num_stages=1,
        )


def tail_of(head_dim: int, half: int) -> int:
    """Lanes for the elements of a head that do not turn."""
    return next_power_of_two(head_dim - 2 * half) if head_dim > 2 * half else 0


def _rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(q turned, k turned), contiguous; the second is empty without k."""
    if not uses_kernel(q) or (k is not None and not uses_kernel(k)):
        turned = [
            rotary_reference(x, cos, sin, positions, offset, interleaved, inverse) for x in (q, k) if x is not None
        ]
        return turned[0], turned[1] if k is not None else q.new_empty(0)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = q.new_empty(0) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if not (q.numel() or k_out.numel()):
        return q_out, k_out
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k is None or k.stride(-1) == 1 else k.contiguous()
    cos, sin = (table.to(torch.float32).contiguous() for table in (cos, sin))
    launch(q, k, q_out, k_out, cos, sin, positions, offset, interleaved, inverse)
    return q_out, k_out


def _fake_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return q_out, q.new_empty(0) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _q, k, cos, sin, positions, *ctx.how = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.has_k = k is not None


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    cos, sin, positions = ctx.saved_tensors
    offset, interleaved, inverse = ctx.how
    given = grad_k if ctx.has_k else None
    dq, dk = _ROTARY(grad_q, given, cos, sin, positions, offset, interleaved, not inverse)
    return dq, dk if ctx.has_k else None, *[None] * 6


_ROTARY = operator(_rotary, _fake_rotary, _differentiate, _save)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`q` (B, S, N, D) and `k` (B, S, K, D) turned by their positions; both contiguous, in the inputs' dtype.

    `cos` and `sin` (T, R/2) hold cos and sin of position · frequency; R ≤ D elements of a head turn. The position of
    index s is offset + s, or `positions` ((S,) or (B, S), integers) when given, as under context parallelism, where a rank
    holds parts of a sequence. A position outside the table gives NaN (IndexError on a CPU). q and k may have any strides; a
    last dim that is not contiguous costs a copy. Differentiable in q and k. ValueError on shapes that do not agree. Sources
    [1], [2] above.
    """
    _check(q, cos, sin, positions, offset)
    _check(k, cos, sin, positions, offset)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} may differ in the heads (dim 2) only"
        )
    return _ROTARY(q, k, cos, sin, positions, offset, interleaved, False)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """`x` (B, S, N, D) turned by its positions: `rotary` of one tensor."""
    _check(x, cos, sin, positions, offset)
    return _ROTARY(x, None, cos, sin, positions, offset, interleaved, False)[0]


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"q or k has shape {tuple(x.shape)}; give (B, S, heads, D)")
    if cos.dim() != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= x.shape[3]:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be (positions, R/2) with R <= D = {x.shape[3]}"
        )
    if positions is None:
        if offset < 0 or offset + x.shape[1] > cos.shape[0]:
            raise ValueError(
                f"positions {offset} to {offset + x.shape[1] - 1} lie outside the table of {cos.shape[0]} rows; make it longer"
            )
    elif positions.shape not in (x.shape[1:2], x.shape[:2]) or positions.is_floating_point():
        raise ValueError(
            f"positions are {positions.dtype} {tuple(positions.shape)}; give integers ({x.shape[1]},) or {tuple(x.shape[:2])}"
        )


def shipped() -> list[Shipped]:
    """Both pairings, whole and partial rotation, in every dtype, for 32 query heads; forward and, for whole heads of 128, backward."""
    entries: list[Shipped] = []
    for dtype in KERNEL_DTYPES:
        for head_dim, half in ((64, 32), (128, 64), (128, 16), (256, 128)):
            entries += [_shipped(dtype, head_dim, half, interleaved) for interleaved in (False, True)]
        entries += [_shipped(dtype, 128, 64, interleaved, inverse=True) for interleaved in (False, True)]
    return entries


def _shipped(dtype: torch.dtype, head_dim: int, half: int, interleaved: bool, *, inverse: bool = False) -> Shipped:
    heads, pairs, warps = head_launch(32, 8, half)
    name = TRITON_TYPES[dtype]
    strides = [f"{x}_{dim}_stride" for x in ("q", "k") for dim in ("batch", "seq", "head")]
    small = ("offset", "table_rows", "seq", "q_heads", "k_heads", "positions_batch_stride", "positions_seq_stride")
    return Shipped(
        name=f"rotary D{head_dim} R{2 * half} {'interleaved' if interleaved else 'half'} {name}{' backward' if inverse else ''}",
        kernel=rotary_kernel,
        signature=dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{name}")
        | {"cos": "*fp32", "sin": "*fp32", "positions": "*i64"}
        | dict.fromkeys((*small, *strides), "i32"),
        constants={
            "HAS_POSITIONS": True,
            "INTERLEAVED": interleaved,
            "INVERSE": inverse,
            "HALF": half,
            "DIM": head_dim,
            "HEADS": heads,
            "PAIRS": pairs,
            "TAIL": tail_of(head_dim, half),
        },
        warps=warps,
        stages=1,
        undivided=frozenset(small),
    )
