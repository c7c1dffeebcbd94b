"""Whether the warp-specialised forward pass can be trusted here: tried once, beside the plain kernel."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from shardplan.kernels.attention_launch import Sequences, forward, is_ragged, pick, specialised_forward
from shardplan.kernels.attention_reference import Shape

LARGEST_ERROR = 0.02
"""Relative difference (Frobenius norm) of two bf16 results that are both right; a wrong mask differs by 0.1 and more."""
TRIAL_TOKENS = (320, 448)
"""Queries and keys of the trial: several tiles, the last of them partial; without a ragged tile the keys fill the last one."""

_verdicts: dict[tuple[str, torch.dtype, int, bool, bool], bool] = {}


def specialised_if_trusted(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor] | None:
    """(O, LSE) by the specialised kernel, None where it is not `trusted` or does not run; the plain kernel does."""
    ragged = is_ragged(q, k.shape[1])
    if not trusted(q, shape, ragged=ragged):
        return None
    try:
        return specialised_forward(q, k, v, shape)
    except Exception as problem:  # what the trial did not meet: a launch that needs more than this device has
        _distrust(q, shape, ragged, f"{type(problem).__name__}: {str(problem)[:200]}")
        return None


def trusted(q: Tensor, shape: Shape, *, ragged: bool) -> bool:
    """Whether the specialised kernel compiles here and agrees with the plain one for q's dtype, head dimension and mask, and for keys
    that fill whole tiles or leave a `ragged` one.

    The first call of a kind runs both; not while a CUDA graph is captured, when only a verdict already reached counts.
    """
    key = _kind(q, shape, ragged)
    if key not in _verdicts:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        problem = trial(q, causal=shape.right == 0, ragged=ragged)
        _verdicts[key] = True
        if problem:
            _distrust(q, shape, ragged, problem)
    return _verdicts[key]


def _kind(q: Tensor, shape: Shape, ragged: bool) -> tuple[str, torch.dtype, int, bool, bool]:
    return str(q.device), q.dtype, q.shape[3], shape.right == 0, ragged


def _distrust(q: Tensor, shape: Shape, ragged: bool, problem: str) -> None:
    warnings.warn(
        f"warp-specialised attention (head_dim {q.shape[3]}, causal={shape.right == 0}) is not used: {problem}",
        stacklevel=2,
    )
    _verdicts[_kind(q, shape, ragged)] = False


def trial(q: Tensor, *, causal: bool, ragged: bool) -> str:
    """Run both kernels on random tensors like q; what is wrong with the specialised one, or nothing."""
    generator = torch.Generator(q.device).manual_seed(0)
    queries, keys = TRIAL_TOKENS
    if not ragged:
        tile = pick("specialised", q, True).keys
        keys = -(-keys // tile) * tile
    wide, narrow = ((1, tokens, heads, q.shape[3]) for tokens, heads in ((queries, 4), (keys, 2)))
    a, b, c = (torch.randn(size, generator=generator, device=q.device).to(q.dtype) for size in (wide, narrow, narrow))
    shape = Shape(scale=q.shape[3] ** -0.5, right=0 if causal else -1)
    wanted, wanted_lse = forward(a, b, c, shape, Sequences(a, b, None, None, (0, 0)), None, None)
    try:
        own, own_lse = specialised_forward(a, b, c, shape)
        error = max(_distance(own, wanted), _distance(own_lse, wanted_lse))
    except Exception as problem:  # whatever the compiler or the launch says, the plain kernel still runs
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return "" if error <= LARGEST_ERROR else f"its result is off by {error:.3g}"


def _distance(own: Tensor, wanted: Tensor) -> float:
    return ((own.float() - wanted.float()).norm() / wanted.float().norm()).item()
