"""Launches of the norm kernels over contiguous last dims, with the tiles of `layer_tiles` or others to be timed."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from shardplan.kernels.launch import on_device_of, resident_programs
from shardplan.kernels.layer_tiles import SUM, WIDEST_HELD, RowLaunch, SumTile
from shardplan.kernels.norm_kernels import norm_backward_kernel, norm_forward_kernel, sum_parts_kernel


def programs_of(rows: Tensor, launch: RowLaunch) -> int:
    """Programs over `rows` (M, N), M > 0: one a tile, or as many as stay on the device and walk over the tiles."""
    tiles = triton.cdiv(rows.shape[0], launch.rows)
    if launch.per_multiprocessor:
        return min(tiles, resident_programs(rows, launch.per_multiprocessor))
    return tiles


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    launch: RowLaunch,
) -> None:
    """x and residual (M, N), M > 0; y, total, mean and rstd are written, where total and mean are not empty."""
    centered = mean.numel() > 0
    with on_device_of(x):
        norm_forward_kernel[(programs_of(x, launch),)](
            x,
            x if residual is None else residual,
            weight,
            weight if bias is None else bias,
            y,
            y if residual is None else total,
            mean if centered else rstd,
            rstd,
            x.shape[0],
            x.shape[1],
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            eps,
            CENTERED=centered,
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            ROWS=launch.rows,
            BLOCK=launch.block,
            STAGES=launch.stages,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    value: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_value: Tensor,
    parts: Tensor,
    launch: RowLaunch,
) -> None:
    """grad_y, grad_total and value (M, N), M > 0; grad_value and parts (1 or 2 with db, programs, N) are written."""
    centered = mean.numel() > 0
    with on_device_of(value):
        norm_backward_kernel[(parts.shape[1],)](
            grad_y,
            grad_y if grad_total is None else grad_total,
            value,
            weight,
            mean if centered else rstd,
            rstd,
            grad_value,
            parts,
            value.shape[0],
            value.shape[1],
            grad_y.stride(0),
            grad_y.stride(0) if grad_total is None else grad_total.stride(0),
            value.stride(0),
            CENTERED=centered,
            HAS_TOTAL=grad_total is not None,
            HAS_BIAS=parts.shape[0] == 2,
            RELOAD=value.shape[1] > WIDEST_HELD,
            ROWS=launch.rows,
            BLOCK=launch.block,
            STAGES=launch.stages,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def parts_of(value: Tensor, outputs: int, launch: RowLaunch) -> Tensor:
    """Room for what each program of the backward adds to dw (and db)."""
    shape = (outputs, programs_of(value, launch), value.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=value.device)


def sum_parts(parts: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, tile: SumTile = SUM) -> None:
    """Parts (1 or 2, P, N) added over P, into dw and db (N,)."""
    outputs, programs, width = parts.shape
    with on_device_of(parts):
        sum_parts_kernel[(triton.cdiv(width, tile.columns), outputs)](
            parts,
            grad_weight,
            grad_weight if grad_bias is None else grad_bias,
            programs,
            width,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=1,
        )
