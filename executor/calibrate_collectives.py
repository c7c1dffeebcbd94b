"""Seconds of collectives among the processes of one machine, by bytes of the whole tensor.

Among processes of a CPU each comes behind a product, as in training: gloo's threads then have to wake on cores that compute, and the
faster process waits. The tensors hold zeros: repeated sums of anything else would overflow, and a transport does not look at values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from shardplan.executor.calibrate_measurements import RING_STEPS, CollectiveRates, Timing
from shardplan.executor.calibrate_timing import Call, Timer

EDGE = 512
"""Of the square product before a collective of a CPU: 2 to 5 ms on one core."""
SEND = "send_receive"
"""Every member sends one tensor to the next and receives one from the member before."""


def measure_collectives(timer: Timer, sizes_bytes: Sequence[float]) -> CollectiveRates:
    """Ring collectives, and sends to the neighbour, of fp32 on the default process group; `timer` holds its CPU group."""
    timer = replace(timer, sample_s=0.0) if timer.device.type == "cpu" else timer
    backend = str(dist.get_backend())
    rates = CollectiveRates(backend=backend, members=dist.get_world_size())
    timings: dict[str, tuple[Timing, ...]] = {}
    notes: list[str] = []
    for name in (*RING_STEPS, SEND):
        try:
            timings[name] = tuple(_timing(timer, name, size) for size in sorted(sizes_bytes))
        except (RuntimeError, NotImplementedError) as error:
            notes.append(f"{backend} {name} not measured, the known value stays: {str(error).splitlines()[0]}")
    return replace(rates, timings=timings, notes=tuple(notes))


def _timing(timer: Timer, name: str, size_bytes: float) -> Timing:
    members = dist.get_world_size()
    shard = max(1, round(size_bytes / 4 / members))
    call = _call(name, torch.zeros(shard * members, device=timer.device), torch.zeros(shard, device=timer.device))
    if timer.device.type == "cpu":
        left, right = torch.randn(EDGE, EDGE), torch.randn(EDGE, EDGE)
        seconds = timer.seconds_behind(lambda: torch.mm(left, right), call)
    else:
        seconds = timer.host_seconds(call)
    return Timing(size=4.0 * shard * members, seconds=seconds)


def _call(name: str, whole: torch.Tensor, part: torch.Tensor) -> Call:
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        SEND: lambda: _send_to_the_next(whole, torch.empty_like(whole)),
    }
    return calls[name]


def _send_to_the_next(sent: torch.Tensor, received: torch.Tensor) -> None:
    rank, members = dist.get_rank(), dist.get_world_size()
    operations = [
        dist.P2POp(dist.isend, sent, (rank + 1) % members),
        dist.P2POp(dist.irecv, received, (rank - 1) % members),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
