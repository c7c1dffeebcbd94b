"""What a compiled kernel must keep to, and the line said of one that does not."""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.kernels.gate_compile import WARP_THREADS, Compiled
from shardplan.kernels.shipped import Shipped

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most shared memory of a block that asks for it (CUDA C++ Programming Guide, technical specifications by capability)."""
REGISTERS = 65_536
"""Of a multiprocessor, so also of a block; the compiler does not refuse more, the launch does."""
REGISTER_STEP = 8
"""Registers of a thread are given out in eights."""
TENSOR_MEMORY_COLUMNS = 512
TUNED_FOR = 90
"""The architecture whose configurations are tuned: spills and claims are judged there, elsewhere it must launch."""


def faults(entry: Shipped, arch: int, compiled: Compiled) -> list[str]:
    """One line each: kernel, value, limit, remedy; none where all is well."""
    if compiled.error:
        lines = [f"does not compile: {compiled.error}; change the configuration or take it out of shipped()"]
    else:
        lines = [*_launch_faults(arch, compiled), *(_tuning_faults(entry, compiled) if arch == TUNED_FOR else ())]
    return [f"{entry.name} (sm_{arch}): {line}" for line in lines]


def _launch_faults(arch: int, compiled: Compiled) -> Iterator[str]:
    if compiled.shared_bytes > SHARED_BYTES[arch]:
        yield (
            f"{compiled.shared_bytes:,} bytes of shared memory, limit {SHARED_BYTES[arch]:,}; "
            "use fewer stages or smaller tiles"
        )
    given = -(-compiled.registers // REGISTER_STEP) * REGISTER_STEP
    if given * compiled.threads > REGISTERS:
        yield (
            f"{given} registers x {compiled.threads} threads = {given * compiled.threads:,}, limit {REGISTERS:,}; "
            "use fewer warps or smaller tiles"
        )
    if compiled.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        yield (
            f"{compiled.tensor_memory_columns} columns of tensor memory, limit {TENSOR_MEMORY_COLUMNS}; use smaller tiles"
        )


def _tuning_faults(entry: Shipped, compiled: Compiled) -> Iterator[str]:
    if compiled.stack_bytes > entry.most_stack_bytes:
        yield (
            f"{compiled.stack_bytes:,} bytes of stack a thread, limit {entry.most_stack_bytes:,}; "
            "use smaller tiles or more warps, or name a bound in most_stack_bytes"
        )
    if entry.tensor_cores and not compiled.hgmma:
        yield (
            f"0 HGMMA instructions ({compiled.mma} of one warp), at least 1 claimed; "
            "give tl.dot bf16 or fp16 tiles of 64 rows or more and 4 warps or more, or drop tensor_cores"
        )
    if entry.specialised and compiled.threads <= WARP_THREADS * entry.warps:
        yield (
            f"{compiled.threads} threads in {entry.warps} warps, more claimed: no warps of its own load tiles; "
            "use tiles that Triton specialises (warps, stages), or drop specialised"
        )
    if entry.tma and not compiled.utmaldg:
        yield "0 UTMALDG instructions, at least 1 claimed; load tiles through a tensor descriptor, or drop tma"
