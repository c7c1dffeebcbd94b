"""AdamW, and gradient clipping by the norm over all ranks, whatever tensors they hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shardplan.executor.schedule import MAX_NORM, AdamWords

SHARDED_AXES: tuple[str, ...] = ("dp_shard", "tp")
"""Mesh axes that parameters may be split over."""


def build_optimizer(
    parameters: Iterable[nn.Parameter], *, rate: float, words: AdamWords | None = None
) -> torch.optim.AdamW:
    """One parameter group per mesh: a fused update takes either plain tensors or distributed tensors of one mesh."""
    words = words or AdamWords()
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group} for group in groups.values()],
        lr=rate,
        betas=words.betas,
        eps=words.epsilon,
        weight_decay=words.weight_decay,
        fused=True,
    )


def settle_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients that are still partial over tp (norms under sequence parallelism hold a part of the sequence)."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements):
            whole = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
            parameter.grad = grad.redistribute(placements=whole)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], mesh: DeviceMesh, max_norm: float = MAX_NORM) -> Tensor:
    """Scale gradients in place so that their global L2 norm is at most `max_norm`; returns the norm before, a scalar.

    Each rank sums the squares it holds, apart for each set of axes a gradient is split over; a set's sum is added
    up over just those axes, so what is replicated counts once. Pipeline stages hold different parameters: sum over pp.
    """
    pieces = [(_split_axes(p.grad), _local(p.grad)) for p in parameters if p.grad is not None]
    device = mesh.device_type if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
    kinds = [frozenset(axes) for size in range(3) for axes in itertools.combinations(SHARDED_AXES, size)]
    squares = torch.zeros(len(kinds), device=device)
    for axes, grad in pieces:
        squares[kinds.index(axes)] += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
    for axis in SHARDED_AXES:
        if mesh[axis].size() > 1:
            rows = [i for i, kind in enumerate(kinds) if axis in kind]
            part = squares[rows]
            dist.all_reduce(part, group=mesh.get_group(axis))
            squares[rows] = part
    total = squares.sum()
    if mesh["pp"].size() > 1:
        dist.all_reduce(total, group=mesh.get_group("pp"))
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in pieces:
        grad.mul_(scale)
    return norm


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _split_axes(grad: Tensor) -> frozenset[str]:
    if not isinstance(grad, DTensor):
        return frozenset()
    names = grad.device_mesh.mesh_dim_names or ()
    return frozenset(name for name, how in zip(names, grad.placements, strict=True) if not how.is_replicate())
