"""Static gate: every shipped kernel compiles without a GPU, does not spill, fits, and uses the units it claims.

    python -m shardplan.kernels.static_gate [--arch 90] [--only attention] [--json gate.json]

Exit codes: 0 all well, 1 a kernel is refused (one line each on stderr), 2 it cannot run here.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton
from triton import knobs

import shardplan.kernels
from shardplan.kernels.gate_compile import Compiled, disassembled
from shardplan.kernels.gate_jobs import Job, compile_all, default_cache
from shardplan.kernels.gate_rules import SHARED_BYTES, faults


def shipping_modules() -> list[str]:
    """Modules of this package that define `shipped()`; the others are not imported."""
    names = [f"shardplan.kernels.{one.name}" for one in pkgutil.iter_modules(shardplan.kernels.__path__)]
    return [name for name in names if "\ndef shipped(" in _source_of(name)]


def jobs_of(modules: Sequence[str], archs: Sequence[int], only: str = "") -> list[Job]:
    """Every entry of `modules` for each of `archs` it is shipped for. Raises ValueError for a name used twice."""
    entries = [(name, entry) for name in modules for entry in importlib.import_module(name).shipped()]
    twice = [name for name, count in Counter(entry.name for _, entry in entries).items() if count > 1]
    if twice:
        raise ValueError(f"names of shipped kernels must differ; used twice: {', '.join(sorted(twice))}")
    return [
        Job(module=module, entry=entry, arch=arch)
        for module, entry in entries
        for arch in archs
        if arch in entry.capabilities and only in f"{module} {entry.name}"
    ]


def table(jobs: Sequence[Job], found: Sequence[Compiled]) -> str:
    """One line a kernel; `-` where instructions are not counted."""
    width = max(len("kernel"), *(len(job.entry.name) for job in jobs))
    head = f"{'kernel':<{width}}  arch  registers  threads  stack B  shared KiB  tensor core  TMA load/store  local"
    return "\n".join([head, *(_row(job, one, width) for job, one in zip(jobs, found, strict=True))])


def _row(job: Job, one: Compiled, width: int) -> str:
    start = f"{job.entry.name:<{width}}  {job.arch:>4}"
    if one.error:
        return f"{start}  does not compile"
    tensor_core = f"{one.hgmma}" if one.hgmma or not one.mma else f"{one.mma} warp"
    tma, local = f"{one.utmaldg}/{one.utmast}", f"{one.local_loads + one.local_stores}"
    if not disassembled(job.entry):
        tensor_core = tma = local = "-"
    return (
        f"{start}  {one.registers:>9}  {one.threads:>7}  {one.stack_bytes:>7}  {one.shared_bytes / 1024:>10.1f}  "
        f"{tensor_core:>11}  {tma:>14}  {local:>5}"
    )


def as_json(jobs: Sequence[Job], found: Sequence[Compiled]) -> list[dict[str, Any]]:
    """One object a kernel and architecture, with its faults."""
    return [
        {"kernel": job.entry.name, "module": job.module, "arch": job.arch, "warps": job.entry.warps}
        | {"stages": job.entry.stages}
        | asdict(one)
        | {"faults": faults(job.entry, job.arch, one)}
        for job, one in zip(jobs, found, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, name what is refused."""
    words = _parser().parse_args(arguments)
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    start_s = time.monotonic()
    try:
        jobs = jobs_of(words.module or shipping_modules(), sorted(set(words.arch or SHARED_BYTES)), words.only)
    except (ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    if not jobs:
        print(f"no kernel's module or name holds {words.only!r} for these architectures", file=sys.stderr)
        return 2
    if words.json and not words.json.absolute().parent.is_dir():
        print(f"{words.json}: its folder does not exist; create it first", file=sys.stderr)
        return 2
    found, compiled = compile_all(jobs, words.cache, words.processes)
    refused = [line for job, one in zip(jobs, found, strict=True) for line in faults(job.entry, job.arch, one)]
    if words.json:
        words.json.write_text(json.dumps(as_json(jobs, found), indent=1) + "\n")
    print(table(jobs, found))
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    print(
        f"{len(jobs)} kernels, {compiled} compiled now, {len(refused)} faults, {time.monotonic() - start_s:.0f} s "
        f"(triton {triton.__version__})"
    )
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shardplan.kernels.static_gate", description=inspect.cleandoc(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_BYTES), help="only this one; repeat")
    parser.add_argument("--only", default="", help="entries whose module or name holds this")
    parser.add_argument("--module", action="append", help="look for shipped() here, not in the package; repeat")
    parser.add_argument("--json", type=Path, help="file for all that was counted")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for results of unchanged kernels")
    parser.add_argument("--processes", type=_positive, default=2)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes; give at least 1")
    return number


def _source_of(module: str) -> str:
    spec = find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""


if __name__ == "__main__":
    sys.exit(main())
