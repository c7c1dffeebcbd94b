"""One measuring process: `python -m shardplan.executor.calibrate_worker TASK`, the task as JSON; rank 0 writes the answer."""

from __future__ import annotations

import os
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from shardplan.executor.calibrate_collectives import measure_collectives
from shardplan.executor.calibrate_kernels import (
    adam_timing,
    attention_timings,
    copy_timing,
    dispatch_seconds,
    gemm_timings,
    memory_timings,
)
from shardplan.executor.calibrate_measurements import (
    Rates,
    Timing,
    WorkerAnswer,
    WorkerTask,
    task_from_json,
    to_json,
)
from shardplan.executor.calibrate_points import CPU_POINTS, GPU_POINTS, measure_points
from shardplan.executor.calibrate_timing import CROWDED_SAMPLE_S, SAMPLE_S, Call, Timer, cuda_cover, heat
from shardplan.executor.device_facts import device_facts
from shardplan.hw_profiles.detect import cpu_facts

Value = TypeVar("Value")
POINT_BUDGET_S = 0.05
"""Per single point."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much to measure on one kind of device."""

    budget_s: float
    """Per measurement."""
    precisions: tuple[str, ...]
    gemm_edges: tuple[int, ...]
    memory_bytes: tuple[float, ...]
    attention_precisions: tuple[str, ...]
    attention_heads: int
    attention_seq: int
    host_bytes: float
    adam_parameters: int
    collective_bytes: tuple[float, ...]
    heat_s: float = 0.0
    rounds: int = 1
    """Passes over everything but collectives: the speed of a CPU that others use too moves within seconds."""


def effort(device: str, *, quick: bool) -> Effort:
    """The grids: on a GPU up to sizes that fill it, on a CPU up to what one core does in a fraction of a second."""
    if device == "cuda":
        return Effort(
            budget_s=0.03 if quick else 0.15,
            precisions=("bf16", "fp16", "tf32", "fp32"),
            gemm_edges=(512, 2048, 8192) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384),
            memory_bytes=(1e6, 64e6, 1e9) if quick else (1e6, 4e6, 16e6, 64e6, 256e6, 1e9, 4e9),
            attention_precisions=("bf16", "fp16"),
            attention_heads=16,
            attention_seq=2048 if quick else 8192,
            host_bytes=256e6,
            adam_parameters=50_000_000,
            collective_bytes=(8e3, 1e6, 64e6) if quick else (8e3, 128e3, 1e6, 8e6, 64e6, 512e6),
            heat_s=0.5 if quick else 3.0,
        )
    return Effort(
        budget_s=0.03 if quick else 0.2,
        precisions=("fp32", "bf16"),
        gemm_edges=(64, 256, 768) if quick else (32, 64, 128, 256, 512, 1024, 2048),
        memory_bytes=(64e3, 1e6, 32e6) if quick else (16e3, 128e3, 1e6, 8e6, 64e6, 256e6),
        attention_precisions=("fp32", "bf16"),
        attention_heads=4,
        attention_seq=256 if quick else 512,
        host_bytes=64e6 if quick else 256e6,
        adam_parameters=1_000_000 if quick else 8_000_000,
        collective_bytes=(4e3, 256e3, 4e6) if quick else (4e3, 64e3, 512e3, 4e6, 32e6),
        rounds=1 if quick else 3,
    )


def run(task: WorkerTask) -> WorkerAnswer:
    """Measure what `task` asks for, together with the other processes it names."""
    device = torch.device("cuda", task.rank) if task.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    group = _join(task, device)
    plan = effort(task.device, quick=task.quick)
    crowded = device.type == "cpu" and task.processes > cpu_facts().cores
    sample_s = CROWDED_SAMPLE_S if crowded else SAMPLE_S
    per_core = max(task.processes / cpu_facts().cores, 1.0) if device.type == "cpu" else 1.0
    timer = Timer(device=device, budget_s=plan.budget_s, sample_s=sample_s, per_core=per_core, group=group)
    context_bytes = timer.agree(_rank_bytes()) if device.type == "cpu" else None
    rates = _rates(task, timer, plan, context_bytes) if "rates" in task.parts else None
    collectives = measure_collectives(timer, plan.collective_bytes) if "collectives" in task.parts else None
    timer.agree(0.0)
    return WorkerAnswer(rates=rates, collectives=collectives)


def _join(task: WorkerTask, device: torch.device) -> dist.ProcessGroup | None:
    """Start the default group (NCCL on GPUs) and answer a CPU group of the same processes; None for one process."""
    if task.processes == 1:
        return None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=Path(task.store).as_uri(),
        rank=task.rank,
        world_size=task.processes,
        timeout=timedelta(seconds=task.timeout_s),
    )
    group = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
    return group if isinstance(group, dist.ProcessGroup) else None


def _rates(task: WorkerTask, timer: Timer, plan: Effort, context_bytes: float | None) -> Rates:
    cuda = timer.device.type == "cuda"
    if cuda:
        cover = cuda_cover(timer.device)
        timer = replace(timer, cover=cover, cover_s=heat(cover, plan.heat_s))
    notes: list[str] = []
    identity = _identity(task, timer.device)
    if cuda:
        identity = replace(identity, facts=_facts_at_work(cuda_cover(timer.device)))
    rates = _device_rates(identity, timer, plan, notes)
    rates = replace(rates, context_bytes=context_bytes)
    if cuda:
        rates = _with_cuda_memory(rates, timer, plan, notes)
    if task.points_s:
        grid, quick = (GPU_POINTS if cuda else CPU_POINTS), replace(timer, budget_s=POINT_BUDGET_S)
        points, missed = measure_points(quick, grid, limit_s=task.points_s)
        rates = replace(rates, points=points)
        notes += missed
    host = replace(timer, device=torch.device("cpu"), cover=None, cover_s=0.0)
    copy = _try(notes, "host copy", lambda: copy_timing(host, plan.host_bytes, source="cpu", target="cpu"))
    adam = _try(notes, "CPU AdamW", lambda: adam_timing(host, plan.adam_parameters))
    return replace(rates, host_copy=_times(copy, task.processes), adam=_times(adam, task.processes), notes=tuple(notes))


def _facts_at_work(cover: Call) -> dict[str, str]:
    """What the driver says while `cover` keeps the GPU busy."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(device_facts)
        while not asked.done():
            cover()
            torch.cuda.synchronize()
        return asked.result()


def _device_rates(rates: Rates, timer: Timer, plan: Effort, notes: list[str]) -> Rates:
    """Products, attention, element-wise kernels, dispatch; of several rounds the median, as training will meet them all."""
    gemm: dict[str, list[tuple[Timing, ...]]] = defaultdict(list)
    attention: dict[str, list[dict[str, Timing]]] = defaultdict(list)
    memory: list[tuple[Timing, ...]] = []
    precisions = _usable(plan.precisions, timer.device)
    for _ in range(plan.rounds):
        for precision in precisions:
            found = _try(notes, f"gemm {precision}", partial(gemm_timings, timer, precision, plan.gemm_edges))
            gemm[precision].append(found or ())
        for precision in [word for word in plan.attention_precisions if word in precisions]:
            ways = _try(notes, f"attention {precision}", partial(_attention, timer, precision, plan))
            attention[precision] += [ways] if ways else []
        memory.append(_try(notes, "memory", partial(memory_timings, timer, plan.memory_bytes)) or ())
    return replace(
        rates,
        gemm={word: usual(rounds) for word, rounds in gemm.items() if any(rounds)},
        attention={
            word: {way: usual([(ways[way],) for ways in rounds])[0] for way in rounds[0]}
            for word, rounds in attention.items()
            if rounds
        },
        attention_seq=plan.attention_seq,
        memory=usual(memory),
        dispatch_s=_try(notes, "dispatch", partial(dispatch_seconds, timer)),
    )


def usual(rounds: Sequence[Sequence[Timing]]) -> tuple[Timing, ...]:
    """Of several rounds, the median timing of each size."""
    seconds: dict[float, list[float]] = defaultdict(list)
    for timing in chain.from_iterable(rounds):
        seconds[timing.size].append(timing.seconds)
    return tuple(Timing(size=size, seconds=median(seconds[size])) for size in sorted(seconds))


def _attention(timer: Timer, precision: str, plan: Effort) -> dict[str, Timing]:
    return attention_timings(
        timer, precision, batch=2, heads=plan.attention_heads, seq=plan.attention_seq, head_dims=(64, 128)
    )


def _times(timing: Timing | None, processes: int) -> Timing | None:
    """The same for all the processes together."""
    return timing and replace(timing, size=timing.size * processes)


def _with_cuda_memory(rates: Rates, timer: Timer, plan: Effort, notes: list[str]) -> Rates:
    """Copies over the host link, and what the context holds beyond the allocator once the libraries are loaded."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(timer.device)
    device = str(timer.device)
    return replace(
        rates,
        context_bytes=max(0.0, float(total_bytes - free_bytes - torch.cuda.memory_reserved(timer.device))),
        host_to_device=_try(
            notes, "host to device", lambda: copy_timing(timer, plan.host_bytes, source="cpu", target=device)
        ),
        device_to_host=_try(
            notes, "device to host", lambda: copy_timing(timer, plan.host_bytes, source=device, target="cpu")
        ),
    )


def _try(notes: list[str], what: str, measure: Callable[[], Value]) -> Value | None:
    """`measure()`, or None and a note when this machine or version cannot do it."""
    try:
        return measure()
    except (RuntimeError, NotImplementedError, MemoryError) as error:
        notes.append(
            f"{what} not measured, the known value stays: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
        return None


def _usable(precisions: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
    """The precisions with matrix hardware: NVIDIA has tf32 and bf16 from compute capability 8.0."""
    if device.type == "cpu":
        return precisions
    old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    no_tf32 = old or torch.version.hip is not None
    return tuple(p for p in precisions if not (p == "tf32" and no_tf32) and not (p == "bf16" and old))


def _identity(task: WorkerTask, device: torch.device) -> Rates:
    cpu = cpu_facts()
    rates = Rates(
        device=task.device,
        device_name=cpu.model,
        software=f"torch {torch.__version__}",
        processes=task.processes,
        cores=max(1, round(cpu.cores)),
        ram_bytes=cpu.ram_bytes,
        memory_bytes=cpu.ram_bytes / task.processes,
    )
    if device.type == "cpu":
        return rates
    properties = torch.cuda.get_device_properties(device)
    return replace(
        rates,
        device_name=str(properties.name),
        memory_bytes=float(properties.total_memory),
        multiprocessors=int(properties.multi_processor_count),
        l2_bytes=float(getattr(properties, "L2_cache_size", 0)),
    )


def _rank_bytes() -> float:
    """Resident memory of a rank before it holds a model: process group joined, executor loaded, one backward pass run."""
    import_module("shardplan.executor.train")
    x = torch.randn(1024, 128, requires_grad=True)
    (x @ x.T).sum().backward()
    return _resident_bytes()


def _resident_bytes() -> float:
    """Resident memory of this process; where the system does not tell, its largest so far."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Run the task given as the only argument.

    The process ends without its libraries' clean-up: gloo's threads now and then abort it there, the answer written.
    """
    task = task_from_json(sys.argv[1])
    answer = run(task)
    if task.rank == 0:
        Path(task.answer).write_text(to_json(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
