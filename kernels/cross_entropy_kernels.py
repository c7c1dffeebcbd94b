"""The kernels of the cross-entropy; formulas and sources are in `cross_entropy.py`.

Shapes: T tokens, V columns of the logits, a rank's range [start, start + V) of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.interpreter import as_output

STATISTICS_BLOCK = 8_192
STATISTICS_WARPS = 8
GRADIENT_BLOCK = 2_048
GRADIENT_WARPS = 4
SUM_BLOCK = 4_096
SUM_WARPS = 8


@triton.jit
def statistics_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    statistics: tl.tensor,
    losses: tl.tensor,
    lses: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    ignore_index: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    WHOLE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a token. WHOLE writes losses (T,) and lses (2, T), else statistics (4, T); SUM adds up the logits."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    target = tl.load(targets + token).to(tl.int64)
    ignored = target == ignore_index
    # an ignored token's row is not even read when its loss is all that is asked for
    end = columns
    if WHOLE:
        end = tl.where(ignored, 0, columns)
    largest = -float("inf")
    sum_exp = 0.0
    total = 0.0
    for first in range(0, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, axis=0))
        shift = tl.where(new == -float("inf"), 0.0, new)  # nothing but masked logits so far
        sum_exp = sum_exp * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), axis=0)
        if SUM:
            total += tl.sum(tl.where(column < columns, x, 0.0), axis=0)
        largest = new
    local = target - start
    inside = (local >= 0) & (local < columns)
    at_target = tl.load(row + local, mask=inside, other=0.0).to(tl.float32)
    if WHOLE:
        log_sum = tl.log(sum_exp)
        lse = largest + log_sum
        near = lse - largest
        rest = (largest - (lse - near)) + (log_sum - near)  # what that sum rounds off (Knuth's two-sum)
        rest = tl.where(tl.abs(lse) < float("inf"), rest, 0.0)
        loss = lse - (1.0 - smoothing) * at_target + z_loss * lse * lse
        if SUM:
            loss -= smoothing / columns * total
        loss = tl.where(inside, loss, float("nan"))  # a target outside the vocabulary must be seen
        tl.store(losses + token, tl.where(ignored, 0.0, loss))
        tl.store(lses + token, tl.where(ignored, 0.0, lse))
        tl.store(lses + tokens + token, tl.where(ignored, 0.0, rest))
    else:
        tl.store(statistics + token, largest)
        tl.store(statistics + tokens + token, sum_exp)
        tl.store(statistics + 2 * tokens + token, at_target)
        tl.store(statistics + 3 * tokens + token, total)


@triton.jit
def logit_gradient_kernel(
    logits: tl.tensor,
    out: tl.tensor,
    targets: tl.tensor,
    lses: tl.tensor,
    grad: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    ignore_index: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    PER_TOKEN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of a token's columns; out may be logits."""
    blocks = tl.cdiv(columns, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(logits + token * stride + column, mask=mask, other=-float("inf")).to(tl.float32)
    target = tl.load(targets + token).to(tl.int64)
    lse = tl.load(lses + token)
    rest = tl.load(lses + tokens + token)
    g = tl.load(grad + token).to(tl.float32) if PER_TOKEN else tl.load(grad).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(scale)
    dx = tl.exp((x - lse) - rest) * (1.0 + 2.0 * z_loss * lse) - smoothing / vocabulary
    dx = tl.where(column + start == target, dx - (1.0 - smoothing), dx) * g
    dx = tl.where(target == ignore_index, 0.0, dx)
    tl.store(out + token * out_stride + column, as_output(dx, out), mask=mask)


@triton.jit
def sum_losses_kernel(
    losses: tl.tensor,
    targets: tl.tensor,
    loss: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    ignore_index: tl.tensor,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: loss is the sum, or the mean over the tokens that count; scale is the gradient of it by the sum."""
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        mask = token < tokens
        sums += tl.load(losses + token, mask=mask, other=0.0)
        counts += tl.where(mask & (tl.load(targets + token, mask=mask, other=0) != ignore_index), 1, 0)
    total = tl.sum(sums, axis=0)
    if MEAN:
        count = tl.sum(counts, axis=0).to(tl.float32)
        tl.store(loss, total / count)
        tl.store(scale, 1.0 / tl.maximum(count, 1.0))
    else:
        tl.store(loss, total)
        tl.store(scale, 1.0)
