"""Calibration: measure this machine in processes of its own, then describe it as a cluster profile.

On a CPU, N processes of one thread measure at the same time: so do the ranks of a run share the cores. On GPUs one
process measures GPU 0, then one process per GPU measures the collectives.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from shardplan.executor.calibrate_measurements import (
    CollectiveRates,
    Measurements,
    Rates,
    WorkerAnswer,
    WorkerTask,
    answer_from_json,
    to_json,
)
from shardplan.hw_profiles.detect import cpu_facts

TIMEOUT_S = 300.0


class CalibrationError(RuntimeError):
    """The measuring processes failed or did not answer in time."""


def has_gpu() -> bool:
    """Whether GPUs would be measured."""
    return torch.cuda.is_available()


def measure_machine(
    *, processes: int | None = None, quick: bool = False, points_s: float = 0.0, timeout_s: float = TIMEOUT_S
) -> Measurements:
    """Measure this machine; `processes` (on a CPU, default one a core and at least two) work at the same time.

    `points_s` is the time to spend on single points beside them. Raises CalibrationError when the rates cannot be
    measured; failing collectives of GPUs are only a note.
    """
    date = datetime.now(UTC).date().isoformat()
    if not torch.cuda.is_available():
        used = processes or max(2, int(cpu_facts().cores))
        return _measure_cpu(date, used, quick=quick, points_s=points_s, timeout_s=timeout_s)
    gpus = min(torch.cuda.device_count(), processes or torch.cuda.device_count())
    rates = _present(_measure("cuda", 1, ("rates",), quick=quick, points_s=points_s, timeout_s=timeout_s).rates)
    collectives: CollectiveRates | None = None
    if gpus > 1:
        try:
            collectives = _measure("cuda", gpus, ("collectives",), quick=quick, timeout_s=timeout_s).collectives
        except CalibrationError as error:
            rates = replace(rates, notes=(*rates.notes, f"collectives not measured, the known value stays: {error}"))
    return Measurements(date=date, gpus=gpus, rates=rates, collectives=collectives)


def _measure_cpu(date: str, processes: int, *, quick: bool, points_s: float, timeout_s: float) -> Measurements:
    parts = ("rates", "collectives") if processes > 1 else ("rates",)
    start_s, busy_s, own_s = time.monotonic(), _busy_cpu_s(), _children_cpu_s()
    answer = _measure("cpu", processes, parts, quick=quick, points_s=points_s, timeout_s=timeout_s)
    rates = _present(answer.rates)
    busy_now_s = _busy_cpu_s()
    others_s = 0.0 if busy_s is None or busy_now_s is None else (busy_now_s - busy_s) - (_children_cpu_s() - own_s)
    share = others_s / (time.monotonic() - start_s) / (os.cpu_count() or 1)
    return Measurements(
        date=date, gpus=processes, rates=rates, collectives=answer.collectives, others_cpu_fraction=max(0.0, share)
    )


def _busy_cpu_s() -> float | None:
    """CPU seconds of all programs since the start, stolen ones included; None where the system does not tell."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, soft_irq, steal = (float(word) for word in words)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _present(rates: Rates | None) -> Rates:
    if rates is None:
        raise CalibrationError("the measuring process answered without rates")
    return rates


def _measure(
    device: str, processes: int, parts: Sequence[str], *, quick: bool, timeout_s: float, points_s: float = 0.0
) -> WorkerAnswer:
    """Start `processes` measuring processes, wait, and read what the first one wrote."""
    with tempfile.TemporaryDirectory(prefix="shardplan-calibrate-") as folder:
        answer = Path(folder, "answer.json")
        tasks = [
            WorkerTask(
                device="cuda" if device == "cuda" else "cpu",
                rank=rank,
                processes=processes,
                parts=tuple("rates" if part == "rates" else "collectives" for part in parts),
                quick=quick,
                store=str(Path(folder, "store")),
                answer=str(answer),
                timeout_s=timeout_s,
                points_s=points_s if processes == 1 else 0.0,
            )
            for rank in range(processes)
        ]
        _run_workers(tasks, Path(folder), one_thread=device == "cpu", timeout_s=timeout_s)
        return answer_from_json(answer.read_text())


def _run_workers(tasks: Sequence[WorkerTask], folder: Path, *, one_thread: bool, timeout_s: float) -> None:
    logs = [folder / f"rank{task.rank}.log" for task in tasks]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for task, log in zip(tasks, logs, strict=True):
            command = [sys.executable, "-m", "shardplan.executor.calibrate_worker", to_json(task)]
            with log.open("wb") as stream:
                workers.append(
                    subprocess.Popen(
                        command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=_environment(one_thread)
                    )
                )
        _wait(workers, logs, time.monotonic() + timeout_s)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _wait(workers: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], deadline_s: float) -> None:
    """Until all have ended well; raises CalibrationError at the first that did not, or at the deadline."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            lines = logs[failed].read_text(errors="replace").strip().splitlines()
            raise CalibrationError(f"measuring process {failed} ended with code {codes[failed]}: {(lines or [''])[-1]}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline_s:
            raise CalibrationError("the measuring processes did not finish in time; try --quick or fewer --processes")
        time.sleep(0.05)


def _environment(one_thread: bool) -> dict[str, str]:
    """This process's environment, with the package on the path, sockets on the loopback, and one thread if asked."""
    package_root = str(Path(sys.modules["shardplan"].__path__[0]).parent)
    path = os.pathsep.join(part for part in (package_root, os.environ.get("PYTHONPATH", "")) if part)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if one_thread else {}
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "GLOO_SOCKET_IFNAME": loopback, **threads}
