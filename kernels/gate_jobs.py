"""Compiles many entries in a few processes and keeps what was counted, so that unchanged kernels cost nothing."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from triton import knobs

from shardplan.kernels.gate_compile import Compiled, compile_entry, key
from shardplan.kernels.shipped import Shipped


@dataclass(frozen=True, kw_only=True)
class Job:
    """One entry for one architecture; a process finds the entry again by its module and name."""

    module: str
    entry: Shipped
    arch: int


def default_cache() -> Path:
    """`shardplan/kernels` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "shardplan", "kernels")


def compile_all(jobs: Sequence[Job], cache: Path, processes: int) -> tuple[list[Compiled], int]:
    """What each job uses, in order, and how many were compiled now."""
    files = [cache / f"{key(job.entry, job.arch)}.json" for job in jobs]
    found = [_read(file) for file in files]
    missing = [index for index, compiled in enumerate(found) if compiled is None]
    for index, compiled in zip(missing, _compile([jobs[index] for index in missing], processes), strict=True):
        found[index] = compiled
        if not compiled.error:  # a full disk may be why it failed
            _write(files[index], compiled)
    return [compiled for compiled in found if compiled is not None], len(missing)


def _compile(jobs: Sequence[Job], processes: int) -> Iterable[Compiled]:
    """In order; a crash of the compiler takes only its own job with it."""
    if not jobs:
        return []
    scratch = tempfile.mkdtemp(prefix="shardplan-gate-")
    try:
        try:
            return _in_processes(jobs, min(processes, len(jobs)), scratch)
        except BrokenProcessPool:
            return [_alone(job, scratch) for job in jobs]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _alone(job: Job, scratch: str) -> Compiled:
    try:
        (compiled,) = _in_processes([job], 1, scratch)
        return compiled
    except BrokenProcessPool:
        return Compiled(error="the compiler crashed")


def _in_processes(jobs: Sequence[Job], processes: int, scratch: str) -> list[Compiled]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(scratch,)) as pool:
        return list(pool.map(_run, [(job.module, job.entry.name, job.arch) for job in jobs]))


def _start(scratch: str) -> None:
    knobs.cache.dir = scratch  # Triton keeps every stage of every kernel; only the counts are wanted


def _run(task: tuple[str, str, int]) -> Compiled:
    module, name, arch = task
    (entry,) = (one for one in importlib.import_module(module).shipped() if one.name == name)
    return compile_entry(entry, arch)


def _read(file: Path) -> Compiled | None:
    try:
        return Compiled(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, compiled: Compiled) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(asdict(compiled)))
    whole.replace(file)
