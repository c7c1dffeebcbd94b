"""What a run says when it fails, and what it refuses before it starts."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.executor import check, measure
from shardplan.executor.checkpoint_files import CheckpointError, Progress
from shardplan.executor.failure import failure, stuck
from shardplan.executor.measure import StepRecord
from shardplan.executor.recorder import RankRecorder, first_line
from shardplan.hw_profiles.load import cluster_document
from shardplan.planner.plan import Plan, model_digest

GIB = 2**30
REPORT = """
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 1)
"""


def left_by(folder: Path, *, log: str = "", errors=(), steps=()) -> Path:
    """A run folder: `errors` are (rank, time, line, items besides...), `steps` the steps done by each rank."""
    (folder / "ranks").mkdir(parents=True)
    (folder / "log.txt").write_text(log)
    for rank, at, line, *more in errors:
        path = measure.rank_file(folder, rank).with_suffix(".error.json")
        path.write_text(json.dumps({"time": at, "error": line, "details": [], **dict(more)}))
    for rank, done in enumerate(steps):
        records = [StepRecord(step=s + 1, loss=1.0, grad_norm=1.0, step_s=1.0, tokens_per_s=1.0) for s in range(done)]
        measure.rank_file(folder, rank).write_text("".join(json.dumps(vars(record)) + "\n" for record in records))
    return folder


def test_the_first_rank_that_raised_is_told(tmp_path):
    left_by(tmp_path, errors=[(0, 2.0, "ValueError: later"), (1, 1.0, "ValueError: first")])
    assert failure(tmp_path, 1, ranks=2).line == "rank 1: ValueError: first"


def test_a_rank_that_only_lost_its_peer_is_not_told(tmp_path):
    errors = [(0, 1.0, "RuntimeError: Connection closed by peer [127.0.0.1]:1"), (1, 1.1, "ValueError: the cause")]
    left_by(tmp_path, errors=errors)
    assert failure(tmp_path, 1, ranks=2).line == "rank 1: ValueError: the cause"


def test_a_killed_rank_is_told_before_those_that_lost_it(tmp_path):
    left_by(tmp_path, log=REPORT.format(rank=1, code=-9), errors=[(0, 1.0, "RuntimeError: Connection reset by peer")])
    assert failure(tmp_path, 1, ranks=2).line == "rank 1 was killed by signal 9 SIGKILL (out of memory?)"


QUIET = "rank 1 ended with exit code 7 and left no word"


@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        (7, None, QUIET),
        (7, "RuntimeError: Connection reset by peer", QUIET),
        (7, "RuntimeError: Timed out waiting 60000ms", QUIET),
        (7, "ValueError: the cause", "rank 0: ValueError: the cause"),
        (1, None, "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "),
    ],
)
def test_a_rank_that_ends_without_a_word_is_told_by_its_exit_code(tmp_path, code, error, told):
    log = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + REPORT.format(rank=1, code=code)
    left_by(tmp_path, log=log, errors=[(0, 1.0, error)] if error else [], steps=(2, 2))
    assert failure(tmp_path, 1, ranks=2).line == told.rstrip()


TERMINATED = "ended by signal 15 (SIGTERM)"


def test_a_rank_that_is_told_to_end_is_told_before_those_that_lost_it(tmp_path):
    errors = [(0, 1.1, "RuntimeError: Connection closed by peer"), (1, 1.0, TERMINATED, ("told_to_end", 71))]
    left_by(tmp_path, errors=errors)
    assert failure(tmp_path, 1, ranks=2).line == f"rank 1: {TERMINATED}"


def test_a_rank_that_torchrun_ends_after_a_failure_is_not_told(tmp_path):
    ended, lost = (1, 1.0, TERMINATED, ("told_to_end", 71)), (0, 0.9, "RuntimeError: Connection closed by peer")
    log = "W0101 api.py:1] Sending process 71 closing signal SIGTERM\nImportError: no module\n"
    left_by(tmp_path / "alone", log=log, errors=[ended])
    assert failure(tmp_path / "alone", 1, ranks=2).line == "ImportError: no module"
    left_by(tmp_path / "later", errors=[ended, lost])
    assert failure(tmp_path / "later", 1, ranks=2).line == "rank 0: RuntimeError: Connection closed by peer"
    left_by(tmp_path / "stuck", log=log, errors=[ended], steps=(3, 2))
    assert stuck(tmp_path / "stuck", 60.0, ranks=2).line == "no step finished for 60 s; rank 1 hung after step 2"


def test_a_process_that_is_told_to_end_leaves_its_word_though_its_main_thread_is_blocked(tmp_path, child_environment):
    code = """
import ctypes, sys
from pathlib import Path
from shardplan.executor.lifetime import tell_before_ending
from shardplan.executor.recorder import RankRecorder
with RankRecorder(Path(sys.argv[1]), rank=0) as recorder:
    tell_before_ending(recorder.told_to_end)
    print(flush=True)
    ctypes.CDLL(None).pause()  # no Python handler runs in here
    ctypes.CDLL(None).sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    found = json.loads(measure.rank_file(tmp_path, 0).with_suffix(".error.json").read_text())
    assert (found["error"], found["told_to_end"]) == (TERMINATED, process.pid)


def test_an_error_that_only_announces_the_next_line_is_told_with_it():
    assert first_line("backend='inductor' raised:\n\n  CppCompileError: no g++\n more") == (
        "backend='inductor' raised: CppCompileError: no g++"
    )
    assert first_line("one\ntwo") == "one"
    assert first_line("ends so:") == "ends so:"


def test_a_rank_that_others_waited_for_hung_though_torchrun_killed_it(tmp_path):
    waited = "RuntimeError: Timed out waiting 8000ms for recv operation"
    left_by(tmp_path, log=REPORT.format(rank=1, code=-9), errors=[(0, 1.0, waited)], steps=(3, 2))
    assert failure(tmp_path, 1, ranks=2).line == f"rank 1 hung after step 2; rank 0: {waited}"


def test_ranks_without_a_word_are_told_by_how_far_they_came(tmp_path):
    left_by(tmp_path / "one", steps=(3, 2, 3))
    assert stuck(tmp_path / "one", 60.0, ranks=3).line == "no step finished for 60 s; rank 1 hung after step 2"
    left_by(tmp_path / "all", steps=(3, 3))
    assert stuck(tmp_path / "all", 60.0, ranks=2).line == "no step finished for 60 s; all ranks hung after step 3"


def test_what_a_rank_said_before_a_restart_is_forgotten(tmp_path):
    with pytest.raises(ValueError, match="first"), RankRecorder(tmp_path, rank=0):
        raise ValueError("first")
    error = measure.rank_file(tmp_path, 0).with_suffix(".error.json")
    assert json.loads(error.read_text())["error"] == "ValueError: first"
    with RankRecorder(tmp_path, rank=0):
        assert not error.exists()


# --- refused before the start -------------------------------------------------------------------------------------


def plan(words: str = "dp=2", **changes) -> Plan:
    layout = parse_layout(words)
    made = Plan(
        model=load_model("tiny"),
        job=Job(seq=64, global_batch=4, precision="bf16"),
        cluster=cluster_document("h100-ib"),
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )
    return replace(made, **changes)


def rules(given: Plan, **options) -> list[str]:
    return [found.rule for found in check.refusals(given, device="cuda", cuda_devices=8, **options)]


def test_a_layout_of_another_world_size_is_refused():
    assert rules(plan()) == []
    assert rules(plan(gpus=4)) == ["gpus-product"]


def test_what_cannot_fit_even_at_the_edge_of_the_band_is_refused_unless_forced():
    def predicted(low: float) -> Plan:
        band = {"device_peak_bytes": [low * GIB, 100.0 * GIB]}
        return plan(prediction={"memory": {"capacity_bytes": 80.0 * GIB}, "error_band": band})

    assert rules(predicted(79.0)) == []
    assert rules(predicted(81.0)) == ["predicted-memory"]
    assert rules(predicted(81.0), force=True) == []
    (found,) = check.refusals(predicted(81.0), device="cuda", cuda_devices=8)
    assert found.detail == "at least 81.0 GiB are predicted, the device has 80.0 GiB"
    assert "--force" in found.remedy


def test_a_checkpoint_of_another_model_or_at_the_end_is_refused():
    saved = Progress(step=30, seed=0, model=model_digest(load_model("tiny")), layout="dp=1")
    assert check.resume_refusals(plan(), saved, steps=31) == []
    assert [found.rule for found in check.resume_refusals(plan(), saved, steps=30)] == ["checkpoint-step"]
    other = replace(saved, model="another")
    assert [found.rule for found in check.resume_refusals(plan(), other, steps=31)] == ["checkpoint-model"]


def test_a_wrong_number_of_processes_is_refused_by_the_ranks(monkeypatch):
    pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.start import check_world_size

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="the plan is for 2 processes, 3 were started; start as many as it says"):
        check_world_size(plan())


# --- out of memory ------------------------------------------------------------------------------------------------


def test_out_of_memory_is_told_by_part_predicted_beside_actual():
    from shardplan.executor.memory_parts import told_parts

    sizes = {"parameters": 1, "gradients": 2, "optimizer": 3, "activations": 4, "buffers": 1}
    sizes |= {"allocated": 11, "allocator_slack": 1, "device": 13}
    stage = {"stage": 1, **{f"{name}_bytes": size * GIB for name, size in sizes.items()}}
    actual = {"parameters": 1, "gradients": 2, "optimizer": 3, "activations and buffers": 9, "allocated peak": 15}
    actual |= {"reserved": 16, "of the device": 17, "free": 0, "capacity": 17}
    lines = told_parts(
        {"memory": {"stages": [{"stage": 0}, stage]}}, stage=1, actual={k: v * GIB for k, v in actual.items()}
    )
    assert lines == [
        "out of memory on stage 1:",
        "                           predicted      actual",
        "parameters                  1.00 GiB    1.00 GiB",
        "gradients                   2.00 GiB    2.00 GiB",
        "optimizer                   3.00 GiB    3.00 GiB",
        "activations and buffers     5.00 GiB    9.00 GiB",
        "allocated peak             11.00 GiB   15.00 GiB",
        "reserved                   12.00 GiB   16.00 GiB",
        "of the device              13.00 GiB   17.00 GiB",
        "the device has 17.00 GiB, 0.00 GiB of it free",
        "furthest above its prediction: activations and buffers, by 4.00 GiB",
    ]


def test_out_of_memory_is_seen_through_the_error_of_a_pipeline_stage():
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.memory_parts import ran_out_of_memory

    try:
        try:
            raise torch.OutOfMemoryError("no more")
        except torch.OutOfMemoryError as inner:
            raise RuntimeError("stage 0 failed to run forward") from inner
    except RuntimeError as error:
        assert ran_out_of_memory(error)
    assert not ran_out_of_memory(RuntimeError("other"))


def test_a_disk_that_fills_up_is_told_in_the_words_of_the_rank(tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    from concurrent.futures import Future

    from torch.distributed.checkpoint.api import CheckpointException

    from shardplan.executor.checkpoint import Checkpoints
    from shardplan.executor.checkpoint_files import CheckpointError

    saves = Checkpoints.__new__(Checkpoints)
    saves.saving = Future()
    full = OSError(28, "No space left on device")
    saves.saving.set_exception(CheckpointException("write", {3: (full, [])}))
    with pytest.raises(CheckpointError, match=r"^saving failed on rank 3: OSError: .*No space left on device"):
        saves.wait()


def test_a_full_disk_is_told_with_a_remedy(tmp_path):
    full = "CheckpointError: saving failed on rank 0: OSError: [Errno 28] No space left on device"
    left_by(tmp_path, errors=[(0, 1.0, full)])
    assert failure(tmp_path, 1, ranks=2).line == f"rank 0: {full}; make room, or name another folder with --out"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_rank_whose_steps_cannot_be_written_says_so_where_it_can(tmp_path):
    with pytest.raises(OSError, match="No space left"), RankRecorder(tmp_path, rank=0) as recorder:
        recorder.file = Path("/dev/full").open("a")  # noqa: SIM115 - the recorder closes it
        recorder.write(StepRecord(step=1, loss=1.0, grad_norm=1.0, step_s=1.0, tokens_per_s=1.0))
    found = json.loads(measure.rank_file(tmp_path, 0).with_suffix(".error.json").read_text())
    assert found["error"] == "OSError: [Errno 28] No space left on device"


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should-not-exist",))


def test_an_index_that_would_run_code_is_refused(tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.checkpoint import CheckpointReader

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"system is not part of a checkpoint's index"):
        CheckpointReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
        CheckpointReader(tmp_path).read_metadata()
