"""Compiles one shipped kernel for one GPU architecture, without a GPU, and counts what it uses."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardplan.kernels.shipped import Shipped

WARP_THREADS = 32
FORMAT = 2
"""Goes into the key of a kept result; a change of `Compiled` or of how it is counted raises it."""
_INTEGER = re.compile(r"[iu](8|16|32|64)")
_MNEMONIC = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)[. ;]", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one kernel uses on one architecture, or why it does not compile."""

    registers: int = 0
    """Of a thread."""
    stack_bytes: int = 0
    """Of a thread; spilled registers are there."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""
    tensor_memory_columns: int = 0
    threads: int = 0
    """Of a block; more than asked for where warps are specialised."""
    hgmma: int = 0
    """Tensor-core instructions of a warp group: HGMMA, QGMMA (fp8), IGMMA (int8); UTC*MMA on sm_100."""
    mma: int = 0
    """Tensor-core instructions of one warp, which run at half the rate on sm_90."""
    utmaldg: int = 0
    """Loads of a tile by the tensor memory accelerator."""
    utmast: int = 0
    """Stores and reductions of a tile by the tensor memory accelerator."""
    local_loads: int = 0
    local_stores: int = 0
    error: str = ""


def key(entry: Shipped, arch: int) -> str:
    """Changes whenever the compiled kernel may: its source, what it calls, its types, constants, options or Triton."""
    kernel = plain_kernel(entry.kernel)
    parts = (
        FORMAT,
        triton.__version__,
        arch,
        kernel.cache_key,
        sorted(entry.signature.items()),
        sorted((name, getattr(value, "cache_key", repr(value))) for name, value in entry.constants.items()),
        sorted(entry.undivided),
        entry.warps,
        entry.stages,
        entry.contracted,
        disassembled(entry),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def plain_kernel(kernel: Any) -> Any:
    """The function below autotuning and heuristics."""
    while not hasattr(kernel, "arg_names") or not hasattr(kernel, "cache_key"):
        if not hasattr(kernel, "fn"):
            raise TypeError(f"{kernel!r} is not a triton.jit function compiled in this process; unset TRITON_INTERPRET")
        kernel = kernel.fn
    return kernel


def compile_entry(entry: Shipped, arch: int) -> Compiled:
    """Compile as a launch on that architecture would; a compiler's failure is a value."""
    with _diverted_stderr() as noise:
        try:
            kernel = triton.compile(
                _source(entry),
                target=GPUTarget("cuda", arch, WARP_THREADS),
                options={
                    "num_warps": entry.warps,
                    "num_stages": entry.stages,
                    "enable_fp_fusion": entry.contracted,
                },
            )
            return _count(kernel.asm["cubin"], kernel.metadata, instructions=disassembled(entry))
        except (
            Exception
        ) as error:  # the compiler raises anything, PTXASError to RuntimeError("PassManager::run failed")
            return Compiled(error=_reason(error, noise.read_text(errors="replace")))


def disassembled(entry: Shipped) -> bool:
    """Whether instructions are counted: only where some are claimed, as that takes longer than to compile most kernels.

    What spills shows in the stack of any kernel.
    """
    return entry.tensor_cores or entry.tma


def _source(entry: Shipped) -> ASTSource:
    kernel = plain_kernel(entry.kernel)
    unknown = sorted((set(entry.signature) | set(entry.constants)) - set(kernel.arg_names))
    if unknown:
        raise ValueError(f"{kernel.__name__} has no argument {', '.join(unknown)}")
    constants = dict(entry.constants)
    for parameter in kernel.params:
        if parameter.name not in entry.signature and parameter.name not in constants:
            if not parameter.has_default:
                raise ValueError(f"argument {parameter.name} has neither a type nor a value")
            constants[parameter.name] = parameter.default
    types = {name: entry.signature.get(name, "constexpr") for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=_divisibility(types, entry.undivided))


def _divisibility(types: Mapping[str, str], undivided: frozenset[str]) -> dict[tuple[int], list[list[Any]]]:
    """What a launch finds out by itself: pointers and integers that are multiples of 16."""
    return {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(types.items())
        if name not in undivided and (kind.startswith("*") or _INTEGER.fullmatch(kind))
    }


def _count(cubin: bytes, metadata: Any, *, instructions: bool) -> Compiled:
    with tempfile.TemporaryDirectory(prefix="shardplan-gate-") as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        usage = _USAGE.search(_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)))
        counts: Counter[str] = Counter()
        if instructions:
            counts.update(_MNEMONIC.findall(_tool(knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(binary))))
    if usage is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    return Compiled(
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        threads=metadata.num_warps * WARP_THREADS,
        hgmma=sum(n for name, n in counts.items() if re.fullmatch(r"[HQIB]GMMA|UTC\w*MMA", name)),
        mma=sum(n for name, n in counts.items() if re.fullmatch(r"[HIQDO]MMA", name)),
        utmaldg=counts["UTMALDG"],
        utmast=counts["UTMASTG"] + counts["UTMAREDG"],
        local_loads=counts["LDL"],
        local_stores=counts["STL"],
    )


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def _diverted_stderr() -> Iterator[Path]:
    """The compiler prints whole programs when it fails; keep them for the one line that says why."""
    with tempfile.NamedTemporaryFile(prefix="shardplan-gate-") as noise:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(noise.fileno(), 2)
        try:
            yield Path(noise.name)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _reason(error: Exception, noise: str) -> str:
    """One line: what the compiler printed first, else what it raised last."""
    printed = next((line for line in noise.splitlines() if "error:" in line), "")
    raised = next(
        (line for line in reversed(str(error).strip().splitlines()) if line.strip(" ^")), type(error).__name__
    )
    cause = error.__cause__
    if cause is not None:
        raised = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
    return " ".join(f"{type(error).__name__}: {printed or raised}".split())[:300]
