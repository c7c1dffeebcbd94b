"""AdamW, and gradient clipping by the norm over all ranks, whatever tensors they hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from shardplan.executor.mesh import local_part
from shardplan.executor.schedule import MAX_NORM, AdamWords

SHARDED_AXES: tuple[str, ...] = ("dp_shard", "tp", "expert_shard", "ep")
"""Mesh axes that parameters may be split over, of the mesh of all or of that of experts."""


class ShardAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) by torch's fused update, which is handed the shards themselves: through distributed tensors
    every launch waits for their dispatch, 0.1 ms a parameter on the host. States are placed as their parameters are."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient; there is no closure."""
        for group in self.param_groups:
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not held:
                continue
            states = [self.state[parameter] or self._first(parameter) for parameter in held]
            beta1, beta2 = group["betas"]
            adamw(
                [local_part(parameter) for parameter in held],
                [local_part(parameter.grad) for parameter in held],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _first(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def build_optimizer(parameters: Iterable[nn.Parameter], *, rate: float, words: AdamWords | None = None) -> ShardAdamW:
    """Of one group, whatever meshes the parameters are on."""
    words = words or AdamWords()
    defaults = {"lr": rate, "betas": words.betas, "eps": words.epsilon, "weight_decay": words.weight_decay}
    return ShardAdamW(list(parameters), defaults)


def settle_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Place gradients as their parameters are: under sequence parallelism those of norms are partial sums over tp, and that of an
    embedding split over the vocabulary can come out whole."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter],
    mesh: DeviceMesh,
    max_norm: float = MAX_NORM,
    *,
    loss_scale: float = 1.0,
    copies: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Scale gradients in place so that their global L2 norm is at most `max_norm`; returns the norm before, a scalar.

    `loss_scale` is divided out of them in the same pass, and so of the norm.

    Each rank sums the squares it holds, apart for each set of axes a gradient is split over; a set's sum is added
    up over just those axes, so what is replicated counts once. Pipeline stages hold different parameters: sum over pp.
    Gradients of `copies` are scaled, but other stages count them.
    """
    elsewhere = {id(copy) for copy in copies}
    device = mesh.device_type if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
    groups = {axis: group for p in parameters for axis, group in _groups(p.grad)}
    kinds = [frozenset(axes) for size in range(3) for axes in itertools.combinations(SHARDED_AXES, size)]
    counted: list[list[Tensor]] = [[] for _ in kinds]
    grads = [local_part(p.grad) for p in parameters if p.grad is not None]
    for parameter in parameters:
        if parameter.grad is not None and id(parameter) not in elsewhere:
            counted[kinds.index(_split_axes(parameter.grad))].append(local_part(parameter.grad))
    squares = torch.zeros(len(kinds), device=device)
    for kind, held in enumerate(counted):
        if held:
            squares[kind] = torch.stack(torch._foreach_norm(held, 2.0, torch.float32)).square().sum()  # pyright: ignore[reportPrivateImportUsage]
    for axis in SHARDED_AXES:
        if axis in groups:  # on all ranks of a stage or on none: they hold the same parameters
            rows = [i for i, kind in enumerate(kinds) if axis in kind]
            part = squares[rows]
            dist.all_reduce(part, group=groups[axis])
            squares[rows] = part
    total = squares.sum()
    if mesh["pp"].size() > 1:
        dist.all_reduce(total, group=mesh.get_group("pp"))
    norm = total.sqrt() / loss_scale
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale
    torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _split_axes(grad: Tensor) -> frozenset[str]:
    return frozenset(axis for axis, _ in _groups(grad))


def _groups(grad: Tensor | None) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """The axes that a gradient is split over, with the ranks along them."""
    if isinstance(grad, DTensor):
        mesh = grad.device_mesh
        for dim, how in enumerate(grad.placements):
            if not how.is_replicate() and mesh.size(dim) > 1:
                yield (mesh.mesh_dim_names or ())[dim], mesh.get_group(dim)
