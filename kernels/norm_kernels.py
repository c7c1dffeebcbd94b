"""The kernels of RMSNorm and LayerNorm; formulas and sources are in `norm.py`, launches in `norm_launch.py`.

Shapes: M rows, N width, P programs.
"""

# pyright: reportPossiblyUnboundVariable=false
# (a branch on a constexpr picks code when the kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from shardplan.kernels.interpreter import as_output


@triton.jit
def norm_forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """P programs; program p takes tiles p, p + P, … of ROWS rows."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    # read before the rows: held for all of them, and on their way while the first is
    w = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last")[None, :]
    if HAS_BIAS:
        b = tl.load(bias + column, mask=inside, other=0.0, eviction_policy="evict_last")[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        alive = row < rows
        mask = alive[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        place = row[:, None] * width + column[None, :]
        if HAS_RESIDUAL:
            added = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
            # the statistics are those of the sum as it is stored, which is what the backward sees
            rounded = as_output(value + added.to(tl.float32), total)
            tl.store(total + place, rounded, mask=mask)
            value = rounded.to(tl.float32)
        if CENTERED:
            center = tl.sum(value, axis=1) / width
            value = tl.where(mask, value - center[:, None], 0.0)
            tl.store(mean + row, center, mask=alive)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
        tl.store(rstd + row, scale, mask=alive)
        out = value * scale[:, None] * w.to(tl.float32)
        if HAS_BIAS:
            out += b.to(tl.float32)
        tl.store(y + place, as_output(out, y), mask=mask)


@triton.jit
def norm_backward_kernel(
    grad_y: tl.tensor,
    grad_total: tl.tensor,
    value: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    grad_value: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    grad_y_stride: tl.tensor,
    grad_total_stride: tl.tensor,
    value_stride: tl.tensor,
    CENTERED: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELOAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """P programs; program p takes tiles p, p + P, … and writes its part of dw (and db) to parts (1 or 2, P, N)."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if not RELOAD:
        w = tl.load(weight + column, mask=inside, other=0.0)[None, :]
    dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    db = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        alive = row < rows
        mask = alive[:, None] & inside[None, :]
        dy_at = grad_y + row[:, None] * grad_y_stride + column[None, :]
        s_at = value + row[:, None] * value_stride + column[None, :]
        dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(s_at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=alive, other=0.0)
        if CENTERED:
            center = tl.load(mean + row, mask=alive, other=0.0)
            h = h - center[:, None]
        h = h * scale[:, None]
        if RELOAD:
            w = tl.load(weight + column, mask=inside, other=0.0)[None, :]
        g = dy * w.to(tl.float32)
        along = tl.sum(g * h, axis=1) / width
        if CENTERED:
            level = tl.sum(g, axis=1) / width
        if RELOAD:
            # another eviction policy, so that the compiler does not merge the two loads and hold both rows in registers
            dy = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            h = tl.load(s_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if CENTERED:
                h = h - center[:, None]
            h = h * scale[:, None]
            w = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last")[None, :]
            g = dy * w.to(tl.float32)
        dw += dy * h
        out = g - h * along[:, None]
        if CENTERED:
            out -= level[:, None]
        if HAS_BIAS:
            db += dy
        out = out * scale[:, None]
        if HAS_TOTAL:
            ds = tl.load(grad_total + row[:, None] * grad_total_stride + column[None, :], mask=mask, other=0.0)
            out += ds.to(tl.float32)
        tl.store(grad_value + row[:, None] * width + column[None, :], as_output(out, grad_value), mask=mask)
    part = program.to(tl.int64) * width + column
    tl.store(parts + part, tl.sum(dw, axis=0), mask=inside)
    if HAS_BIAS:
        tl.store(parts + programs.to(tl.int64) * width + part, tl.sum(db, axis=0), mask=inside)


@triton.jit
def sum_parts_kernel(
    parts: tl.tensor,
    grad_weight: tl.tensor,
    grad_bias: tl.tensor,
    programs: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Parts (1 or 2, P, N) added over P in a fixed order; axis 1 of the grid is weight, then bias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    which = tl.program_id(1)
    first = parts + which.to(tl.int64) * programs * width
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & inside[None, :]
        sums += tl.load(first + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    out = tl.sum(sums, axis=0)
    if which == 0:
        tl.store(grad_weight + column, as_output(out, grad_weight), mask=inside)
    else:
        tl.store(grad_bias + column, as_output(out, grad_bias), mask=inside)
