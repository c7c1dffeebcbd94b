"""Starts the ranks of a plan with torchrun, watches them, and turns what they wrote into the files of a run folder.

runs/<UTC time>-<model>-<layout>/
    plan.json           the plan that ran
    measurements.csv    step, rank, metric, value, unit
    run.json            measured beside predicted, versions
    log.txt             everything the ranks printed
    ranks/              one JSON line per step and rank, as it happened
    events.jsonl        resuming, restarts, the wait for the last checkpoint
    checkpoints/        see checkpoint_files.py
    metrics.jsonl, tb/  torchtitan's metrics, for people and TensorBoard
    job.json            what the job file said, where there was one
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardplan.costmodel.layout import Layout
from shardplan.executor import measure
from shardplan.executor.checkpoint_files import Progress, read_progress
from shardplan.executor.compare import comparison
from shardplan.executor.failure import Failure, failure, stuck
from shardplan.executor.following import Followed
from shardplan.executor.job_file import JobFile, Metrics, write_resolved
from shardplan.executor.measure import StepRecord
from shardplan.executor.metrics_files import MetricsFiles, tokens_before
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

WARMUP_STEPS = 3
"""Steps left out of the medians."""
POLL_S = 0.1
STOP_S = 40.0
"""torchrun itself gives its ranks 30 s before it kills them."""
STUCK_STOP_S = 3.0
"""For ranks that hang anyway, where they die with torchrun."""
HANG_TIMEOUTS = 2.0
"""Ranks end themselves after one timeout; when rank 0 has left no word and no checkpoint grown for this many, the launcher ends them."""
START_S = 120.0
"""Allowed besides for starting processes, building the model, loading: before the first step, and where restarts may follow."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a run does so that a failure costs little."""

    checkpoint_every: int | None = None
    """Steps from one checkpoint to the next; the last step is saved too. None: no checkpoints."""
    keep: int = 3
    """Newest checkpoints kept."""
    resume: Path | None = None
    """A verified checkpoint folder to go on from (`checkpoint_files.find`)."""
    max_restarts: int = 0
    """How often all ranks are started again after a failure."""
    timeout_s: float = 300.0
    """Longest that one rank waits for another."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    folder: Path
    document: dict[str, Any]
    """What `run.json` holds."""
    error: str | None = None
    """One line of the rank that failed first; None when the run finished."""
    details: list[str] = field(default_factory=list[str])
    """Lines below it: a table of memory where it ran out."""


NO_RECOVERY = Recovery()


def run_plan(
    source: Path,
    *,
    device: str,
    steps: int,
    out: Path,
    on_step: Callable[[StepRecord], None],
    on_event: Callable[[str], None] = lambda _: None,
    recovery: Recovery = NO_RECOVERY,
    job: JobFile | None = None,
    look_every: int | None = None,
) -> Outcome:
    """Run the plan file `source` up to step `steps` on `device`, with what `job` says, looking into every `look_every`-th step (None:
    as often as costs nothing, train.LOOK_EVERY).

    `on_step` sees rank 0's steps at once, `on_event` what else happens.
    """
    plan = Plan.read(source)
    folder = make_folder(out, plan)
    saved = read_progress(recovery.resume) if recovery.resume else None
    warmup_steps = min(WARMUP_STEPS, max(steps - (saved.step if saved else 0) - 1, 0))
    command = _command(folder, plan, device=device, steps=steps, recovery=recovery)
    with _writing(folder):
        shutil.copyfile(source, folder / "plan.json")
        if job is not None:
            write_resolved(job, folder / "job.json")
            command += ["--job", str(folder / "job.json")]
        metrics = _metrics(folder, plan, steps=steps, words=job.metrics if job else Metrics(), saved=saved)
    if look_every is not None:
        command += ["--profile", str(look_every)]

    def tell(record: StepRecord) -> None:
        with _writing(folder):
            metrics(record)
        on_step(record)

    ended: Failure | None = Failure(line="stopped")
    document: dict[str, Any] = {}
    try:
        ended = _watch(command, Followed(folder, tell, on_event), plan, device=device, recovery=recovery)
    except InputError as bad:
        ended = Failure(line=str(bad))
    finally:  # also when stopped by hand: what was measured so far is kept
        document = summarise(
            folder, plan, device=device, steps=steps, warmup_steps=warmup_steps, error=ended.line if ended else None
        )
        try:
            with _writing(folder):
                metrics.close()
                measure.write_measurements(folder, measure.read_records(folder), ranks=plan.gpus)
                measure.write_json(folder / "run.json", document)
        except InputError as bad:
            ended = _also(ended, str(bad))
            document["error"] = ended.line
    return Outcome(folder=folder, document=document, error=document["error"], details=ended.details if ended else [])


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """InputError where something in `folder` cannot be written, as on a full disk."""
    try:
        yield
    except OSError as bad:
        raise InputError(
            f"cannot be written ({bad.strerror or bad})",
            place=str(folder),
            remedy="make room, or name another with --out",
        ) from bad


def _also(ended: Failure | None, problem: str) -> Failure:
    """`ended`, told with a `problem` that came up afterwards."""
    if ended is None or problem in ended.line:
        return Failure(line=problem, details=ended.details if ended else [])
    return Failure(line=f"{ended.line}; {problem}", details=ended.details)


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


def _metrics(folder: Path, plan: Plan, *, steps: int, words: Metrics, saved: Progress | None) -> MetricsFiles:
    per_step = plan.job.tokens_per_step
    return MetricsFiles(
        folder,
        interval=words.interval,
        steps=steps,
        ranks=plan.gpus,
        tokens_per_step=per_step,
        tokens_before=tokens_before(saved, per_step) if saved else 0,
        steps_before=saved.step if saved else 0,
        prediction=plan.prediction,
        tensorboard=words.tensorboard,
    )


def _command(folder: Path, plan: Plan, *, device: str, steps: int, recovery: Recovery) -> list[str]:
    torchrun = [sys.executable, "-m", "shardplan.executor.torchrun", str(os.getpid())]
    torchrun += ["--standalone", "--nproc-per-node", str(plan.gpus)]
    torchrun += ["--local-addr", "127.0.0.1"]  # else the ranks look each other up by host name, which may not resolve
    torchrun += ["--max-restarts", str(recovery.max_restarts)]
    rank = ["-m", "shardplan.executor.train", str(folder), "--steps", str(steps), "--device", device]
    rank += ["--timeout", str(recovery.timeout_s)]
    if recovery.checkpoint_every is not None:
        rank += ["--checkpoint-every", str(recovery.checkpoint_every), "--keep", str(recovery.keep)]
    if recovery.resume is not None:
        rank += ["--resume", str(recovery.resume)]
    return [*torchrun, *rank]


def _environment(device: str) -> dict[str, str]:
    # safe path: the working folder must not shadow packages; one thread: ranks of a CPU run share the cores
    changes = {"PYTHONSAFEPATH": "1", **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})}
    return {"PYTHONFAULTHANDLER": "1", **os.environ, **changes}  # a crash in native code leaves a stack in the log


def _watch(command: list[str], followed: Followed, plan: Plan, *, device: str, recovery: Recovery) -> Failure | None:
    """Start `command`, pass on what rank 0 tells until it ends; returns why it failed. Ends all ranks when interrupted or stuck."""
    folder = followed.folder
    with (folder / "log.txt").open("wb") as log, _terminate_interrupts():
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(device), start_new_session=True
        )
        try:
            while True:
                code = process.poll()
                followed.follow()
                if code is not None:
                    return failure(folder, code, ranks=plan.gpus) if code else None
                slack_s = START_S if recovery.max_restarts or not followed.began else 0.0
                silent_s = time.monotonic() - followed.last_word
                if silent_s > HANG_TIMEOUTS * recovery.timeout_s + slack_s and not followed.saving():
                    _stop(process, STOP_S if sys.platform == "darwin" else STUCK_STOP_S)
                    return stuck(folder, silent_s, ranks=plan.gpus)
                time.sleep(POLL_S)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes], patience_s: float = STOP_S) -> None:
    if process.poll() is not None:
        return
    process.terminate()  # torchrun passes it on to the ranks
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # ranks die with it: lifetime.die_with_parent
        process.wait()


@contextlib.contextmanager
def _terminate_interrupts() -> Iterator[None]:
    """Treat SIGTERM and the end of the terminal like Ctrl-C, so that ranks never outlive the launcher; nohup's choice is kept."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarise(
    folder: Path, plan: Plan, *, device: str, steps: int, warmup_steps: int, error: str | None
) -> dict[str, Any]:
    """The content of `run.json`, from what the ranks wrote."""
    records = measure.read_records(folder)
    found = measure.measured(records, tokens_per_step=plan.job.tokens_per_step, warmup_steps=warmup_steps)
    expected = measure.predicted(plan.prediction, memory_kind=found["memory_kind"])
    compared = comparison(folder, records, plan.prediction, step_s=found["step_s"], warmup_steps=warmup_steps)
    return {
        "plan": "plan.json",
        "model": plan.model.name,
        "layout": plan.layout.words(),
        "runtime": plan.runtime,
        "device": device,
        "versions": measure.versions(),
        "world_size": plan.gpus,
        "steps": steps,
        "steps_done": max((record.step for record in records.get(0, ())), default=0),
        "steps_timed": max(len({r.step for r in records.get(0, ())}) - warmup_steps, 0),
        "warmup_steps": warmup_steps,
        "error": error,
        "resumed": [event for event in measure.read_events(folder) if "restart" in event],
        "measured": {**found, **measure.mfu(plan.prediction, found["step_s"])},
        "predicted": expected,
        "ratio": measure.ratios(found, expected),
        "comparison": compared,
    }
