"""What a calibration measures, as plain data: seconds by size, all SI; written as JSON by the process that measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

Device = Literal["cpu", "cuda"]
RING_STEPS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Passes round the ring; each has members - 1 steps and moves (members - 1) / members of the tensor."""
DISTURBED_FRACTION = 0.05
"""Part of the machine's CPU time, used by other programs, above which a profile says so."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one operation of one size."""

    size: float
    """FLOP of a matrix product or an attention, bytes of an element-wise kernel, a copy or a collective."""
    seconds: float

    @property
    def rate(self) -> float:
        """Size per second."""
        return self.size / self.seconds


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of one kernel at one shape, for fitting; no profile holds it."""

    kernel: str
    shape: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One accelerator, or the share of a CPU that one of `processes` equal processes gets while all of them work."""

    device: Device
    device_name: str
    software: str
    """For instance "torch 2.13.0"."""
    processes: int
    """Processes that worked at the same time."""
    cores: int
    ram_bytes: float
    """Of the whole machine."""
    memory_bytes: float
    """Of the accelerator; on a CPU, the machine's memory divided among the processes."""
    context_bytes: float | None = None
    """Outside the allocator; on a CPU, resident memory of a process before its first tensor."""
    multiprocessors: int = 0
    l2_bytes: float = 0.0
    gemm: Mapping[str, tuple[Timing, ...]] = field(default_factory=dict[str, tuple[Timing, ...]])
    """By precision word; FLOP ascending."""
    memory: tuple[Timing, ...] = ()
    """Element-wise kernel; bytes read and written, ascending."""
    attention: Mapping[str, Mapping[str, Timing]] = field(default_factory=dict[str, Mapping[str, Timing]])
    """Fused causal attention by precision word, the one that counts first: keys forward, backward; FLOP counted without
    the masked half."""
    attention_seq: int = 0
    """Tokens per sequence of that attention."""
    dispatch_s: float | None = None
    """Host time of one tiny eager operation, automatic differentiation included."""
    host_copy: Timing | None = None
    """All the processes together: bytes read and written by one large copy in host memory."""
    adam: Timing | None = None
    """All the processes together: parameters updated by one step of the fused CPU AdamW."""
    host_to_device: Timing | None = None
    """Bytes of one pinned copy to the accelerator."""
    device_to_host: Timing | None = None
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the driver says of a GPU at work: driver, clocks, power, temperature."""
    points: tuple[Point, ...] = ()
    """Single points, if they were asked for."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclass(frozen=True, kw_only=True)
class CollectiveRates:
    """Collectives among all the processes or GPUs of the machine."""

    backend: str
    members: int
    timings: Mapping[str, tuple[Timing, ...]] = field(default_factory=dict[str, tuple[Timing, ...]])
    """By operation (all_reduce, all_gather, reduce_scatter, send_receive); bytes of the whole, unsharded tensor, or of
    the tensor sent; ascending."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything measured on one machine."""

    date: str
    """UTC, year-month-day."""
    gpus: int
    """Accelerators of the machine; on a CPU, the processes."""
    rates: Rates
    collectives: CollectiveRates | None = None
    others_cpu_fraction: float = 0.0
    """Of the machine's CPU time, used by other programs meanwhile."""

    @property
    def disturbance(self) -> str:
        """A few words when other programs took so much CPU time that the rates are too low; else empty."""
        if self.others_cpu_fraction <= DISTURBED_FRACTION:
            return ""
        return f"other programs used {self.others_cpu_fraction:.0%} of the CPU meanwhile"

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be measured, and why; what disturbed the rest."""
        disturbed = (f"{self.disturbance}; measure again when the machine is idle",) if self.disturbance else ()
        return (*self.rates.notes, *(self.collectives.notes if self.collectives else ()), *disturbed)


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What one measuring process is told."""

    device: Device
    rank: int
    processes: int
    parts: tuple[Literal["rates", "collectives"], ...]
    quick: bool
    store: str
    """File through which the processes find each other."""
    answer: str
    """File that rank 0 writes."""
    timeout_s: float
    points_s: float = 0.0
    """Seconds to spend on single points; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class WorkerAnswer:
    """What rank 0 of the measuring processes answers."""

    rates: Rates | None = None
    collectives: CollectiveRates | None = None


def to_json(value: WorkerTask | WorkerAnswer | Measurements) -> str:
    """One of the records above as JSON."""
    return TypeAdapter(type(value)).dump_json(value).decode()


def task_from_json(text: str) -> WorkerTask:
    """The task written by `to_json`; raises pydantic's ValidationError."""
    return TypeAdapter(WorkerTask).validate_json(text)


def answer_from_json(text: str) -> WorkerAnswer:
    """The answer written by `to_json`; raises pydantic's ValidationError."""
    return TypeAdapter(WorkerAnswer).validate_json(text)
