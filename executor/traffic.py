"""What ranks send each other: payload bytes of every collective, by mesh axis, counted on the real thing.

A dispatch mode sees all of them: c10d operators (fully_shard, pipelining, clipping) and functional ones (DTensor). It slows a step, so
it is for tests and for looking into single steps, never for timing.

The payload is the buffer that `costmodel.collectives` takes: what is reduced, what has been gathered, what a rank holds before an
all-to-all, what it sends to a neighbour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateUsage]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL_BYTES = 4096
"""Payloads below are told apart: norms of gradients, losses, what stages tell each other of shapes."""
WORLD = "world"
"""The axis of a group that is none of the mesh."""
Groups = Sequence[tuple[str, dist.ProcessGroup]]
"""(axis, group) of this rank, beside those of the mesh."""
_PLACES: Mapping[str, tuple[str, str]] = {
    "_c10d_functional::all_reduce": ("all_reduce", "first"),
    "_c10d_functional::all_reduce_": ("all_reduce", "first"),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "result"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", "first"),
    "_c10d_functional::all_to_all_single": ("all_to_all", "first"),
    "_c10d_functional::broadcast": ("broadcast", "first"),
    "_dtensor::shard_dim_alltoall": ("all_to_all", "first"),
    "c10d::allreduce_": ("all_reduce", "first"),
    "c10d::_allgather_base_": ("all_gather", "first"),
    "c10d::allgather_": ("all_gather", "first"),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "second"),
    "c10d::alltoall_base_": ("all_to_all", "second"),
    "c10d::alltoall_": ("all_to_all", "second"),
    "c10d::broadcast_": ("broadcast", "first"),
    "c10d::send": ("send", "first"),
}
"""Operator -> what it is called here, and where its payload is: the first or second argument, or the result."""


class Traffic(TorchDispatchMode):
    """Counts while it is entered: `payload_bytes` and `times` by (axis, operation); payloads under SMALL_BYTES in `small_times`."""

    def __init__(self, mesh: DeviceMesh, groups: Groups = ()) -> None:
        super().__init__()
        self.axis_of = Axes(mesh, groups)
        self.payload_bytes: Counter[tuple[str, str]] = Counter()
        self.times: Counter[tuple[str, str]] = Counter()
        self.small_times: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(one, DTensor) for one in types):  # which comes back with what it is made of
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        found = _PLACES.get(func.name().partition(".")[0])
        if found is not None:
            self._count(found, result, [*args, *(kwargs or {}).values()])
        return result

    def _count(self, found: tuple[str, str], result: Any, arguments: Sequence[Any]) -> None:
        operation, place = found
        size, axis = _bytes_of({"first": arguments[0], "second": arguments[1], "result": result}[place]), WORLD
        for group in filter(None, map(_group, arguments)):
            axis = self.axis_of(group, operation) or WORLD
        if size < SMALL_BYTES:
            self.small_times[axis, operation] += 1
        else:
            self.payload_bytes[axis, operation] += size
            self.times[axis, operation] += 1


def group_axes(mesh: DeviceMesh) -> dict[tuple[int, ...], str]:
    """Axis by the ranks of its group with this rank, both parts of dp as `dp`; groups of one rank are left out.

    By ranks, not by name: DTensor may hold on to another group of the same ranks.
    """
    found: dict[tuple[int, ...], str] = {}
    for axis in mesh.mesh_dim_names or ():
        if mesh[axis].size() > 1:
            found[ranks_of(mesh.get_group(axis))] = axis.partition("_")[0]
    return found


class Axes:
    """The axis of a process group: by name of those in `groups`, else by its ranks, of the mesh first, else that within whose group all its
    ranks lie (`hpz` gathers among a part of dp).

    The ep group may be that of another axis of the mesh, as torch makes one for the same ranks; on it, all-to-all is what experts do.
    """

    def __init__(self, mesh: DeviceMesh, groups: Groups) -> None:
        self.of_name = {group.group_name: axis for axis, group in groups if axis != "ep"}
        self.of_experts = {ranks_of(group) for axis, group in groups if axis == "ep"}
        beside = {ranks_of(group): axis for axis, group in groups if axis != "ep"}
        self.of_ranks = dict.fromkeys(self.of_experts, "ep") | beside | group_axes(mesh)

    def __call__(self, group: dist.ProcessGroup, operation: str) -> str | None:
        """None for a group of neither."""
        ranks, known = ranks_of(group), self.of_name.get(group.group_name)
        if known is None and operation.startswith("all_to_all") and ranks in self.of_experts:
            return "ep"
        known = known or self.of_ranks.get(ranks)
        return known or next((axis for all_ranks, axis in self.of_ranks.items() if set(ranks) < set(all_ranks)), None)

    def names(self) -> list[str]:
        """Axes with more than one rank."""
        return sorted({*self.of_ranks.values(), *self.of_name.values(), *(["ep"] if self.of_experts else [])})


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of that name; raises where there is none."""
    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType] (2.13 calls the string GroupName)


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """All ranks of a group, ascending."""
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0


def _group(argument: Any) -> dist.ProcessGroup | None:
    """A group or that of a name; None for what is neither."""
    try:
        if isinstance(argument, str):
            return resolve_group(argument)
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError, ValueError):  # the name of an operation, another object
        return None
    return None
