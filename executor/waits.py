"""While it is entered, `Waits` times every wait of this rank for another one, by mesh axis.

It puts a clock around the calls that block, and takes it away when it is left, so steps outside run untouched:

| call                                         | who calls it                                 | axis             |
|----------------------------------------------|----------------------------------------------|------------------|
| torch.distributed.all_reduce, ...            | fully_shard, clipping                        | of its group     |
| Work.wait of such a call with async_op=True  | fully_shard ahead of a chunk of a pipeline   | of its group     |
| and of batch_isend_irecv                     | rings of context parallelism, tied tables    | of its group     |
| torch.ops._c10d_functional.wait_tensor       | DTensor: tensor and loss parallelism         | of the issue     |
| pipelining's _batch_p2p, _wait_batch_p2p     | schedules: transfers and, with them, bubbles | pp               |
| Stream.wait_event, wait_stream of the stream that computes (GPU) | fully_shard              | dp               |

A collective on another stream than the one that computes is not a wait. Not seen: collectives inside compiled graphs or C++ autograd, and
those of DTensor where layers are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import schedules

from shardplan.executor.phases import StepClock
from shardplan.executor.traffic import Axes, Groups, resolve_group

BLOCKING = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
    "all_to_all",
    "broadcast",
)
"""Of torch.distributed; those that the installed version has."""
FUNCTIONAL = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
"""Of torch.ops._c10d_functional: they only start a collective."""
OTHER = "other"
"""The axis of groups that the mesh does not have."""
Call = Callable[..., Any]


class Waits:
    """Tells `clock` the waits of the rank; `axes` are those of `mesh` and of `groups` with more than one rank."""

    def __init__(self, clock: StepClock, mesh: DeviceMesh, groups: Groups = (), *, compiled: bool = False) -> None:
        self.clock = clock
        self.compiled = compiled
        """Layers may be compiled while it is entered: the compiler must meet the operators as they are."""
        self.axis_of = Axes(mesh, groups)
        self.axes = self.axis_of.names()
        self.started: dict[int, str] = {}
        """Axis of a functional collective by where its result lies."""
        self.works: dict[int, str] = {}
        """Axis of asynchronous works, by id."""
        self.replaced: list[tuple[Any, str, Any]] = []
        self.stream: Any = None

    def __enter__(self) -> None:
        self.clock.on = True
        for name in BLOCKING:
            if hasattr(dist, name):
                self._replace(dist, name, self._blocking)
        self._replace(dist, "batch_isend_irecv", self._passing)
        self._replace(dist.Work, "wait", self._work_wait)
        functional = torch.ops._c10d_functional
        for name in () if self.compiled else FUNCTIONAL:
            self._replace(functional, name, self._starting)
        if not self.compiled:
            self._replace(functional, "wait_tensor", self._wait_tensor)
        for name in ("_batch_p2p", "_wait_batch_p2p"):  # over gloo a receive takes up to milliseconds to be asked for
            self._replace(schedules, name, lambda call: self._along("pp", call))
        if self.clock.device.type == "cuda":
            self.stream = torch.cuda.current_stream(self.clock.device)
            for name in ("wait_event", "wait_stream"):
                self._replace(torch.cuda.Stream, name, self._stream_wait)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for owner, name, original in reversed(self.replaced):
            setattr(owner, name, original)
        self.replaced.clear()
        self.started.clear()
        self.works.clear()
        self.clock.on = False

    def _replace(self, owner: Any, name: str, wrap: Callable[[Call], Call]) -> None:
        original = getattr(owner, name)
        self.replaced.append((owner, name, original))
        setattr(owner, name, wrap(original))

    def _along(self, axis: str, call: Call) -> Call:
        def timed(*arguments: Any, **words: Any) -> Any:
            with self.clock.waiting(axis):
                return call(*arguments, **words)

        return timed

    def _blocking(self, call: Call) -> Call:
        def timed(*arguments: Any, **words: Any) -> Any:
            given = (one for one in (*arguments, *words.values()) if isinstance(one, dist.ProcessGroup))
            axis = self._axis(next(given, None) or dist.group.WORLD, call.__name__)
            if words.get("async_op"):
                work = call(*arguments, **words)
                self.works[id(work)] = axis
                return work
            if not self._computes_here():
                return call(*arguments, **words)
            with self.clock.waiting(axis):
                return call(*arguments, **words)

        return timed

    def _passing(self, call: Call) -> Call:
        def started(operations: list[dist.P2POp]) -> list[dist.Work]:
            works = call(operations)
            self.works.update((id(work), self._axis(operations[0].group, "send")) for work in works if operations)
            return works

        return started

    def _work_wait(self, call: Call) -> Call:
        def timed(work: Any, *arguments: Any, **words: Any) -> Any:
            axis = self.works.pop(id(work), None)
            if axis is None or not self._computes_here():
                return call(work, *arguments, **words)
            with self.clock.waiting(axis):
                return call(work, *arguments, **words)

        return timed

    def _starting(self, call: Any) -> Call:
        def started(*arguments: Any, **words: Any) -> Any:
            result = call(*arguments, **words)
            name = words.get("group_name", arguments[-1])
            self.started[result.data_ptr()] = self._axis(resolve_group(name), call.__name__)
            return result

        return _like(call, started)

    def _wait_tensor(self, call: Any) -> Call:
        def timed(tensor: torch.Tensor) -> torch.Tensor:
            axis = self.started.pop(tensor.data_ptr(), None)
            if axis is None:  # waited for before
                return call(tensor)
            with self.clock.waiting(axis):
                return call(tensor)

        return _like(call, timed)

    def _stream_wait(self, call: Call) -> Call:
        def timed(stream: Any, *arguments: Any) -> Any:
            if stream != self.stream or "dp" not in self.axes:
                return call(stream, *arguments)
            with self.clock.waiting("dp"):
                return call(stream, *arguments)

        return timed

    def _computes_here(self) -> bool:
        return self.stream is None or torch.cuda.current_stream(self.clock.device) == self.stream

    def _axis(self, group: dist.ProcessGroup | None, operation: str) -> str:
        return OTHER if group is None else self.axis_of(group, operation) or OTHER


def _like(operator: Any, call: Call) -> Call:
    """`call` with the overloads of `operator`, which some look up on it."""
    call.default = operator.default  # pyright: ignore[reportFunctionMemberAccess]
    return call
