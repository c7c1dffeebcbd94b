"""Spreads mixture-of-experts layers: experts over ep groups with all-to-all, or cut over tp as dense products are.

The ranks of a stage are counted in the order of the plan's mesh; ep neighbours of them hold all experts once, and the ranks ep apart the
same ones (the cost model's `expert_parallel.py`). So ep lies inside tp first, then inside dp: every rank sends its own tokens, under
sequence parallelism its part of each sequence. ZeRO shards experts over the ranks that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import Model
from shardplan.executor.experts import Back, Experts, MixtureOfExperts, Stream, inverse_of, pick
from shardplan.executor.mesh import local_part, mesh_ranks

EXPERT_AXES = ("pp", "expert_replicate", "expert_shard", "ep")
"""Of the mesh of experts, outermost first. The ranks of expert_replicate x expert_shard hold the same experts."""


def expert_mesh_ranks(layout: Layout) -> Tensor:
    """The rank at every place of the mesh of EXPERT_AXES."""
    stages = mesh_ranks(layout).flatten(1).sort(dim=1).values
    stage_ranks = layout.dp * layout.cp * layout.tp
    shards = (layout.dp_shard or layout.dp) * layout.cp * layout.tp // layout.ep if layout.zero else 1
    return stages.view(layout.pp, stage_ranks // (shards * layout.ep), shards, layout.ep)


def build_expert_mesh(layout: Layout, device: str) -> DeviceMesh | None:
    """The mesh of experts, over all ranks; None where they lie as dense products do."""
    if layout.ep == 1:
        return None
    return DeviceMesh(device, expert_mesh_ranks(layout), mesh_dim_names=EXPERT_AXES)


def expert_layers(model: nn.Module) -> Iterator[MixtureOfExperts]:
    """The mixture-of-experts layers of `model`."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


def build_token_group(layout: Layout) -> dist.ProcessGroup | None:
    """The ranks whose routers see different tokens of the same micro-batch, over cp and, where tokens are sent, tp; None: this one only."""
    if layout.cp == 1 and min(layout.ep, layout.tp) == 1:
        return None
    ranks = mesh_ranks(layout).movedim(4, 3).flatten(0, 2)  # stage and dp, tp, cp
    ranks = ranks.flatten(0, 1) if layout.ep == 1 else ranks.flatten(1)
    mine, _ = dist.new_subgroups_by_enumeration(ranks.sort(dim=1).values.tolist())
    return cast("dist.ProcessGroup", mine)


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """What experts are spread over, besides the plan's mesh."""

    mesh: DeviceMesh | None
    tokens: dist.ProcessGroup | None


def build_expert_groups(model: Model, layout: Layout, device: str) -> ExpertGroups:
    """Those of `layout`, none where `model` has no experts; all ranks call it together."""
    if not any(kind.experts for kind, _ in model.layers):
        return ExpertGroups(mesh=None, tokens=None)
    return ExpertGroups(mesh=build_expert_mesh(layout, device), tokens=build_token_group(layout))


def spread_experts(model: nn.Module, layout: Layout, mesh: DeviceMesh, groups: ExpertGroups) -> None:
    """Give every mixture-of-experts layer of `model` its part of the experts and the ways to the others, in place.

    Its router's loss is of all tokens of a micro-batch. Ranks take the parts of their tokens, whose gradients are averaged over cp and
    added up over tp; where experts are cut over tp all ranks see all tokens, and take an equal part.
    """
    tp = mesh["tp"]
    for layer in expert_layers(model):
        if tp.size() > 1:  # gradients of ranks add up, whether tokens or experts are cut
            layer.router.weight = nn.Parameter(
                DTensor.from_local(layer.router.weight.detach(), tp, [Replicate()], run_check=False)
            )
        layer.router.share = float(layout.cp)
        if groups.tokens is not None:
            layer.router.seen = _sum_over(groups.tokens)
        if groups.mesh is not None:
            _dispatch(layer, groups.mesh["ep"])
        elif tp.size() > 1:
            _cut(layer, tp, sequence_parallel=layout.sequence_parallel)


def _dispatch(layer: MixtureOfExperts, ep: DeviceMesh) -> None:
    """Whole experts, an equal number on each rank of `ep`."""
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, _shard(parameter, ep, 0))
    layer.exchange = AllToAll(ep.get_group())


def _cut(layer: MixtureOfExperts, tp: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Every expert cut over `tp` as a dense MLP: in by columns, out by rows; all ranks see all tokens."""
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, _shard(parameter, tp, 2 if name == "w2" else 1))
    layer.router.share /= tp.size()
    stream: Placement = Shard(1) if sequence_parallel else Replicate()
    layer.enter, layer.leave = _gather_from(stream, tp), _reduce_to(stream, tp)


def _shard(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """This rank's part of `parameter`, of which every rank has all values."""
    mine = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(mine, mesh, [Shard(dim)], run_check=False))


def _gather_from(stream: Placement, tp: DeviceMesh) -> Stream:
    def enter(x_BSH: Tensor) -> Tensor:
        whole = DTensor.from_local(x_BSH, tp, [stream], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    return enter


def _reduce_to(stream: Placement, tp: DeviceMesh) -> Stream:
    def leave(x_BSH: Tensor) -> Tensor:
        return DTensor.from_local(x_BSH, tp, [Partial()], run_check=False).redistribute(placements=[stream]).to_local()

    return leave


def _sum_over(group: dist.ProcessGroup) -> Stream:
    def seen(numbers: Tensor) -> Tensor:
        total = numbers.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    return seen


class AllToAll:
    """The `Exchange` over an ep group: numbers of rows first, then as many rows to each rank; there they are sorted by its experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    def __call__(self, rows_RH: Tensor, sent_E: Tensor) -> tuple[Tensor, Tensor, Back]:
        """Rows in the order of their experts, and how many each expert got from this rank."""
        came_E = torch.empty_like(sent_E)
        dist.all_to_all_single(came_E, sent_E, group=self.group)
        by_rank = torch.stack((sent_E, came_E)).unflatten(1, (self.ranks, -1))  # 2, ranks, experts of a rank
        sent, came = by_rank.sum(dim=2).tolist()
        arrived_RH = _Exchanged.apply(rows_RH, sent, came, self.group)
        expert = torch.arange(by_rank.shape[2], device=rows_RH.device).repeat(self.ranks)
        order = expert.repeat_interleave(came_E).argsort(stable=True)
        inverse = inverse_of(order)

        def back(out_RH: Tensor) -> Tensor:
            return _Exchanged.apply(pick(out_RH, inverse, order), came, sent, self.group)

        return pick(arrived_RH, order, inverse), by_rank[1].sum(dim=0), back


class _Exchanged(torch.autograd.Function):
    """All-to-all of rows; the gradient goes the other way. A functional collective, so that selective recompute can keep what came."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, sent: list[int], came: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, came), group
        return wait_tensor(all_to_all_single(rows_RH.contiguous(), came, sent, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, came = ctx.sizes
        return wait_tensor(all_to_all_single(grads[0].contiguous(), sent, came, ctx.group)), None, None, None


def shard_dim(parameter: Tensor, shards: int) -> Shard | None:
    """Along which dimension ZeRO cuts a stack of experts: by expert, or each of them where there are fewer experts than shards."""
    local = local_part(parameter)
    if local.dim() < 3 or local.shape[0] % shards == 0 or local.shape[1] % shards:
        return None
    return Shard(1)


@torch.no_grad()
def settle_experts(models: Iterable[nn.Module], layout: Layout) -> None:
    """Make the gradients of spread experts means over dp, like all others.

    An ep group's tokens meet in one gradient, and ZeRO averages over the dp * cp * tp / ep ranks that hold the same experts; they have to
    be divided by dp * cp.
    """
    scale = layout.tp / layout.ep
    if layout.ep == 1 or scale == 1.0:
        return
    for layer in (layer for model in models for layer in expert_layers(model)):
        for parameter in layer.experts.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


def set_gradient_scale(models: Iterable[nn.Module], scale: float) -> None:
    """Tell the routers what the gradient of a micro-batch's mean loss is multiplied with before its backward."""
    for layer in (layer for model in models for layer in expert_layers(model)):
        layer.router.gradient_scale = scale


class Surrounded(nn.Module):
    """A decoder layer within a call of its experts (`Experts.forward`), if it has any."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._surrounded = layer
        self.experts: tuple[Experts, ...] = tuple(
            one.experts for one in expert_layers(layer)
        )  # no child: a name for each parameter

    def forward(self, *inputs: Tensor | None, **words: Any) -> Tensor:
        """As the layer's."""
        run: Callable[..., Tensor] = partial(self._surrounded, **words)
        for experts in self.experts:
            run = partial(experts, run)
        return run(*inputs)
