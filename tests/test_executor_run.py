"""`shardplan run` as a user meets it: a run folder that is complete, a loss that falls, exit codes, runs that die."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.executor.launch import run_plan
from shardplan.hw_profiles.load import cluster_document
from shardplan.planner.plan import Plan

PREDICTION = {
    "time": {"step_s": 0.1},
    "throughput": {"tokens_per_s": 2560.0},
    "memory": {"device_peak_bytes": 4e8, "allocated_peak_bytes": 1e8, "stages": []},
}
CPU_CLUSTER = """
name = "four-cores"
source = "this test"
source_kind = "guess"
nodes = 1
gpu = { base = "cpu" }
[node]
base = "8x4090"
gpus = 4
[network]
base = "none"
"""


@pytest.fixture
def write_plan(tmp_path):
    """Writes a plan for local CPU processes (or another cluster, model) and returns its path."""
    profile = tmp_path / "cores.toml"
    profile.write_text(CPU_CLUSTER)

    def write(words: str, *, cluster: str | None = None, model=None, precision: str = "fp32") -> Path:
        layout = parse_layout(words)
        plan = Plan(
            model=model or load_model("tiny"),
            job=Job(seq=64, global_batch=4, precision=precision),
            cluster=cluster_document(cluster or str(profile)),
            gpus=layout.gpus,
            runtime="shardplan",
            layout=layout,
            prediction=PREDICTION,
            search={},
            digests={},
            shardplan_version="0",
        )
        plan.write(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    return write


def shardplan_run(*words: str | Path):
    """Exit code, stdout, stderr of `shardplan run`, in this process."""
    from shardplan.cli.run import run

    app = typer.Typer()
    app.command()(run)
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.distributed
def test_thirty_steps_leave_a_complete_run_folder_and_a_lower_loss(write_plan, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    plan = write_plan("dp=2 zero=2")
    result = shardplan_run(plan, "--steps", "30", "--out", tmp_path / "runs", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert "step  1/30" in result.stderr
    assert "predicted 100.0 ms" in result.stderr

    folder = Path(document["folder"])
    assert folder.name.endswith("Z-tiny-dp2-zero2")
    assert (folder / "plan.json").read_bytes() == plan.read_bytes()
    saved = json.loads((folder / "run.json").read_text())
    assert saved == {key: value for key, value in document.items() if key not in ("folder", "rejections")}
    assert (saved["world_size"], saved["steps"], saved["steps_done"], saved["device"]) == (2, 30, 30, "cpu")
    measured = saved["measured"]
    assert measured["first_loss"] == pytest.approx(5.55, abs=0.1)  # ln 256
    assert measured["last_loss"] < 3.2
    assert measured["step_s_p20"] <= measured["step_s"] <= measured["step_s_p80"]
    assert measured["memory_kind"] == "rss"
    assert saved["ratio"]["step_s"] == pytest.approx(measured["step_s"] / 0.1)

    rows = list(csv.DictReader((folder / "measurements.csv").open()))
    losses = [float(row["value"]) for row in rows if row["metric"] == "loss_metrics/global_avg_loss"]
    assert len(losses) == 2 * 30
    largest = [float(row["value"]) for row in rows if row["metric"] == "loss_metrics/global_max_loss"]
    assert largest[0::2] == largest[1::2]
    assert all(most >= mean for most, mean in zip(largest, losses, strict=True))
    assert {row["rank"] for row in rows} == {"0", "1"}
    assert losses[-1] == pytest.approx(measured["last_loss"])


@pytest.mark.distributed
def test_a_cuda_plan_runs_on_processes_when_forced(write_plan, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    plan = write_plan("dp=1 micro_batch=2", cluster="h100-ib", precision="bf16")
    result = shardplan_run(plan, "--force", "--steps", "1", "--out", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "predicted    measured   ratio" in result.stdout
    assert "step time" in result.stdout


def test_a_cuda_plan_without_gpus_is_refused(write_plan, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    plan = write_plan("dp=2 zero=3", cluster="h100-ib", precision="bf16")
    result = shardplan_run(plan, "--out", tmp_path / "runs", "--json")
    assert result.exit_code == 1
    assert [found["rule"] for found in json.loads(result.stdout)["rejections"]] == ["cuda-devices"]
    assert "needs 2 CUDA GPUs, this machine has none" in result.stderr
    assert "--force" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_not_executable_is_refused_in_one_line(write_plan, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    result = shardplan_run(write_plan("dp=2 cp=2 attention=flash"), "--out", tmp_path / "runs")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "shardplan: cp_kind=ring attends block by block and needs each block's log-sum-exp, which 'shardplan' does not take from "
        "attention=flash; leave attention=auto, or use cp_kind=ulysses"
    ]


def test_a_missing_torch_is_told_in_one_line(write_plan, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = shardplan_run(write_plan("dp=1"))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["shardplan: running needs torch; install shardplan[run]"]


def test_a_malformed_plan_exits_2_without_a_traceback(write_plan, tmp_path):
    plan = write_plan("dp=1")
    plan.write_text(plan.read_text()[:500])
    code = "import sys; from shardplan.cli import main; sys.argv[0] = 'shardplan'; main()"
    command = [sys.executable, "-c", code, "run", str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "plan.json: truncated or not JSON" in done.stderr


@pytest.mark.distributed
def test_a_rank_that_raises_ends_the_run_with_its_last_line(write_plan, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the executor needs torch")
    monkeypatch.setattr("shardplan.executor.check.refusals", lambda *_, **__: [])
    monkeypatch.setattr("shardplan.executor.check.shipped_text_refusals", lambda _: [])
    plan = write_plan("dp=1", model=replace(load_model("tiny"), vocab=64))  # the text has bytes above 64
    result = shardplan_run(plan, "--steps", "2", "--out", tmp_path / "runs")
    assert result.exit_code == 3
    told = result.stderr.splitlines()[-1]
    assert told.startswith("shardplan: run failed: rank 0: IndexError: index out of range")
    assert "log.txt" in told
    assert "Traceback" not in result.output
    assert "Traceback" in next((tmp_path / "runs").glob("*/log.txt")).read_text()


@pytest.mark.distributed
def test_training_that_diverges_ends_before_it_is_saved(write_plan, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    numbers = np.random.default_rng(0).integers(0, 256, 40_000).astype(np.uint16)
    numbers.tofile(tmp_path / "tokens.bin")
    job = tmp_path / "job.toml"
    job.write_text('[data]\nfiles = [{ path = "tokens.bin" }]\n[learning_rate]\npeak = 1e30\n')
    words = ("--job", job, "--steps", "6", "--checkpoint-every", "1", "--out", tmp_path / "runs")
    result = shardplan_run(write_plan("dp=1"), *words)
    assert result.exit_code == 3
    assert "training diverged; lower learning_rate.peak" in " ".join(result.output.split())
    (folder,) = (tmp_path / "runs").iterdir()
    kept = sorted(one.name for one in (folder / "checkpoints").iterdir() if one.is_dir())
    told = (folder / "metrics.jsonl").read_text()
    assert len(kept) == len(told.splitlines()) > 0
    assert "NaN" not in told


@pytest.mark.distributed
def test_a_wrong_number_of_processes_is_told_in_a_line_of_each(write_plan, tmp_path, child_environment):
    pytest.importorskip("torch", reason="the executor needs torch")
    write_plan("dp=2")
    command = [sys.executable, "-m", "shardplan.executor.train", str(tmp_path), "--steps", "1", "--device", "cpu"]
    environment = {**child_environment, "RANK": "0", "WORLD_SIZE": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    line = "InputError: the plan is for 2 processes, 3 were started; start as many as it says"
    assert done.stderr.splitlines() == [line]


def test_a_crash_in_native_code_leaves_a_stack_unless_the_user_decides_otherwise(monkeypatch):
    from shardplan.executor.launch import _environment

    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)
    assert _environment("cpu")["PYTHONFAULTHANDLER"] == "1"
    monkeypatch.setenv("PYTHONFAULTHANDLER", "")
    assert _environment("cpu")["PYTHONFAULTHANDLER"] == ""


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "rank 1 was killed by signal 9 SIGKILL (out of memory?)"),
        (signal.SIGTERM, "rank 1: ended by signal 15 (SIGTERM)"),
    ],
)
def test_a_killed_rank_ends_the_run_and_keeps_what_was_measured(write_plan, tmp_path, number, told):
    pytest.importorskip("torch", reason="the executor needs torch")

    def kill_rank_1(record) -> None:
        if record.step == 3:
            os.kill(rank_processes(tmp_path)[1], number)

    outcome = run_plan(write_plan("dp=2"), device="cpu", steps=100_000, out=tmp_path / "runs", on_step=kill_rank_1)
    assert outcome.error == told
    assert outcome.document["steps_done"] >= 3
    assert json.loads((outcome.folder / "run.json").read_text())["error"] == outcome.error
    assert len((outcome.folder / "measurements.csv").read_text().splitlines()) > 3 * 5
    assert rank_processes(tmp_path) == {}


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_an_interrupted_run_ends_its_ranks_and_keeps_what_was_measured(write_plan, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")

    def interrupt(record) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(write_plan("dp=1"), device="cpu", steps=100_000, out=tmp_path / "runs", on_step=interrupt)
    assert rank_processes(tmp_path) == {}
    saved = json.loads(next((tmp_path / "runs").glob("*/run.json")).read_text())
    assert saved["error"] == "stopped"
    assert saved["steps_done"] >= 2


@pytest.mark.parametrize("when", ["at a step", "at the end"])
def test_a_full_disk_ends_the_run_in_one_line(write_plan, tmp_path, monkeypatch, when):
    from shardplan.executor import launch, measure

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watch(_command, followed, *_: object, **__: object) -> None:
        (followed.folder / "ranks").mkdir()
        followed.on_step(measure.StepRecord(step=1, loss=1.0, grad_norm=1.0, step_s=1.0, tokens_per_s=1.0))

    monkeypatch.setattr(launch, "_watch", watch)
    if when == "at a step":
        monkeypatch.setattr(launch.MetricsFiles, "__call__", full)
    monkeypatch.setattr(measure, "write_json", full)
    outcome = run_plan(write_plan("dp=1"), device="cpu", steps=1, out=tmp_path / "runs", on_step=lambda _: None)
    assert outcome.error == (
        f"{outcome.folder}: cannot be written (No space left on device); make room, or name another with --out"
    )
    assert outcome.document["error"] == outcome.error


LAUNCHER = """
import signal
import sys
from pathlib import Path
from shardplan.executor.launch import run_plan
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, which tests may run under, a launcher rightly goes on
run_plan(Path(sys.argv[1]), device="cpu", steps=100_000, out=Path(sys.argv[2]), on_step=lambda record: print(record.step, flush=True))
"""


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_ranks_do_not_outlive_a_launcher_that_is_killed_or_loses_its_terminal(
    write_plan, tmp_path, child_environment, number
):
    pytest.importorskip("torch", reason="the executor needs torch")
    command = [sys.executable, "-c", LAUNCHER, str(write_plan("dp=1")), str(tmp_path / "runs")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline()  # a step
        assert rank_processes(tmp_path)
        launcher.send_signal(number)
        launcher.wait(60)
    until = time.monotonic() + 10
    while rank_processes(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert rank_processes(tmp_path) == {}
    assert (number == signal.SIGHUP) == any((tmp_path / "runs").glob("*/run.json"))


def rank_processes(folder: Path) -> dict[int, int]:
    """Rank -> process id of the ranks that run in a folder below `folder`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        rank = next((word.removeprefix("RANK=") for word in environment if word.startswith("RANK=")), None)
        if rank is not None and any(word.startswith(str(folder)) for word in words):
            found[int(rank)] = int(process.name)
    return found
