"""Starts the ranks of a plan with torchrun, watches them, and turns what they wrote into the files of a run folder.

runs/<UTC time>-<model>-<layout>/
    plan.json           the plan that ran
    measurements.csv    step, rank, metric, value, unit
    run.json            measured beside predicted, versions
    log.txt             everything the ranks printed
    ranks/              one JSON line per step and rank, as it happened
    metrics.jsonl, tb/  torchtitan's metrics, for people and TensorBoard
    job.json            what the job file said, where there was one
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardplan.costmodel.layout import Layout
from shardplan.executor import measure
from shardplan.executor.job_file import JobFile, Metrics, write_resolved
from shardplan.executor.measure import StepRecord
from shardplan.executor.metrics_files import MetricsFiles
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

WARMUP_STEPS = 3
"""Steps left out of the medians."""
POLL_S = 0.1
STOP_S = 40.0
"""torchrun itself gives its ranks 30 s before it kills them."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    folder: Path
    document: dict[str, Any]
    """What `run.json` holds."""
    error: str | None = None
    """One line of the rank that failed first; None when the run finished."""


def run_plan(
    source: Path,
    *,
    device: str,
    steps: int,
    out: Path,
    on_step: Callable[[StepRecord], None],
    job: JobFile | None = None,
) -> Outcome:
    """Run the plan file `source` for `steps` steps on `device`, with what `job` says; `on_step` sees each step of rank 0 at once."""
    plan = Plan.read(source)
    folder = make_folder(out, plan)
    shutil.copyfile(source, folder / "plan.json")
    warmup_steps = min(WARMUP_STEPS, steps - 1)
    command = _command(folder, plan, device=device, steps=steps)
    if job is not None:
        write_resolved(job, folder / "job.json")
        command += ["--job", str(folder / "job.json")]
    metrics = _metrics(folder, plan, steps=steps, words=job.metrics if job else Metrics())

    def tell(record: StepRecord) -> None:
        metrics(record)
        on_step(record)

    code: int | None = None
    try:
        code = _watch(command, folder, device=device, on_step=tell)
    finally:  # also when stopped by hand: what was measured so far is kept
        metrics.close()
        error = None if code == 0 else "stopped" if code is None else failure(folder, code)
        document = summarise(folder, plan, device=device, steps=steps, warmup_steps=warmup_steps, error=error)
    return Outcome(folder=folder, document=document, error=error)


def make_folder(out: Path, plan: Plan) -> Path:
    """A new folder below `out`, named by time, model and layout; InputError where it cannot be made."""
    model = re.sub(r"[^\w.-]+", "_", plan.model.name)
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model}-{layout_slug(plan.layout)}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                (out / f"{stem}{suffix}").mkdir()
                return out / f"{stem}{suffix}"
    except OSError as bad:
        raise InputError(
            f"folder {str(out)!r} cannot be written ({bad.strerror})", place="--out", remedy="name another folder"
        ) from None
    raise FileExistsError(f"{out / stem} and 999 more exist")


def layout_slug(layout: Layout) -> str:
    """Layout words for a file name: `dp2-tp2-zero3`."""
    words = [word.split("=") for word in layout.words().split()]
    kept = [name if value == "true" else f"{name}{value}" for name, value in words if name == "dp" or value not in "01"]
    return re.sub(r"[^\w.-]+", "_", "-".join(kept))


def _metrics(folder: Path, plan: Plan, *, steps: int, words: Metrics) -> MetricsFiles:
    return MetricsFiles(
        folder,
        interval=words.interval,
        steps=steps,
        ranks=plan.gpus,
        tokens_per_step=plan.job.tokens_per_step,
        prediction=plan.prediction,
        tensorboard=words.tensorboard,
    )


def _command(folder: Path, plan: Plan, *, device: str, steps: int) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.gpus)]
    torchrun += ["--local-addr", "127.0.0.1"]  # else the ranks look each other up by host name, which may not resolve
    return [*torchrun, "-m", "shardplan.executor.train", str(folder), "--steps", str(steps), "--device", device]


def _environment(device: str) -> dict[str, str]:
    # safe path: the working folder must not shadow packages; one thread: ranks of a CPU run share the cores
    changes = {"PYTHONSAFEPATH": "1", **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})}
    return {**os.environ, **changes}


def _watch(command: list[str], folder: Path, *, device: str, on_step: Callable[[StepRecord], None]) -> int:
    """Start `command`, pass on rank 0's steps until it ends; returns its exit code. Ends all ranks when interrupted."""
    with (folder / "log.txt").open("wb") as log, _terminate_interrupts():
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(device), start_new_session=True
        )
        seen = 0
        try:
            while True:
                code = process.poll()
                seen += _pass_on(folder, seen, on_step)
                if code is not None:
                    return code
                time.sleep(POLL_S)
        finally:
            _stop(process)


def _pass_on(folder: Path, seen: int, on_step: Callable[[StepRecord], None]) -> int:
    try:
        text = measure.rank_file(folder, 0).read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0
    fresh = measure.parse_records(text)[seen:]
    for record in fresh:
        on_step(record)
    return len(fresh)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()  # torchrun passes it on to the ranks
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _terminate_interrupts() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that ranks never outlive the launcher."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failure(folder: Path, code: int) -> str:
    """Why the run failed, one line: a rank killed by a signal, else the first that raised, else the exit code."""
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    report = re.findall(r"rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", log)
    for rank, exit_code in report:
        number = -int(exit_code)
        if number > 0 and number != signal.SIGTERM:  # SIGTERM is torchrun ending the others
            hint = " (out of memory?)" if number == signal.SIGKILL else ""
            return f"rank {rank} was killed by signal {number} {signal.Signals(number).name}{hint}"
    raised: list[tuple[float, str]] = []
    for path in (folder / measure.RANKS_FOLDER).glob("rank-*.error.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        rank = int(path.name.removeprefix("rank-").partition(".")[0])
        raised.append((found["time"], f"rank {rank}: {found['error']}"))
    if raised:
        return min(raised)[1]
    lines = [line.strip() for line in log.splitlines() if re.match(r"\S*(Error|Exception)\b", line.strip())]
    return lines[-1] if lines else f"torchrun ended with exit code {code}"


def summarise(
    folder: Path, plan: Plan, *, device: str, steps: int, warmup_steps: int, error: str | None
) -> dict[str, Any]:
    """Merge what the ranks wrote into `measurements.csv` and `run.json`; returns the latter."""
    records = measure.read_records(folder)
    measure.write_measurements(folder, records, ranks=plan.gpus)
    found = measure.measured(records, tokens_per_step=plan.job.tokens_per_step, warmup_steps=warmup_steps)
    expected = measure.predicted(plan.prediction, memory_kind=found["memory_kind"])
    document = {
        "plan": "plan.json",
        "model": plan.model.name,
        "layout": plan.layout.words(),
        "runtime": plan.runtime,
        "device": device,
        "versions": measure.versions(),
        "world_size": plan.gpus,
        "steps": steps,
        "steps_done": max((record.step for record in records.get(0, ())), default=0),
        "warmup_steps": warmup_steps,
        "error": error,
        "measured": found,
        "predicted": expected,
        "ratio": measure.ratios(found, expected),
    }
    measure.write_json(folder / "run.json", document)
    return document
