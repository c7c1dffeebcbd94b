"""Training by a job file: tokens made from text, a loss that falls, the same curve on every layout, the files it leaves."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.executor.measure import StepRecord
from shardplan.executor.metrics_files import MetricsFiles, tokens_before
from shardplan.executor.text_tokens import tokenize_files
from shardplan.executor.token_files import open_tokens
from shardplan.hw_profiles.load import cluster_document
from shardplan.planner.plan import Plan

SEQ, BATCH = 64, 4
PREDICTION = {
    "time": {"step_s": 0.1},
    "throughput": {"tokens_per_s": 2560.0, "mfu": 0.4, "model_flop_per_s_per_gpu": 4e10},
    "memory": {"capacity_bytes": 2**31, "device_peak_bytes": 4e8, "allocated_peak_bytes": 1e8, "stages": []},
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
JOB = """
steps = 30
seed = 5
[data]
files = [{{ path = "{train}" }}]
[validation]
files = [{{ path = "{validation}" }}]
interval = 15
batches = 3
[learning_rate]
peak = 3e-3
minimum = 3e-4
warmup_steps = 5
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Token files of a part of the shipped text, verse by verse, in the 256 tokens that `tiny` has."""
    pytest.importorskip("tokenizers", reason="tokenize needs the tokenizers library")
    folder = tmp_path_factory.mktemp("tokens")
    packed = (resources.files("shardplan.executor") / "text" / "kjv.txt.gz").read_bytes()
    verses = gzip.decompress(packed).decode()[:300_000].splitlines()
    (folder / "kjv.jsonl").write_text("".join(json.dumps({"text": verse}) + "\n" for verse in verses))
    tokenize_files([folder / "kjv.jsonl"], folder / "made", vocabulary=256, validation_fraction=0.1)
    return folder / "made"


@pytest.fixture
def write(tmp_path, tokens):
    """Writes plan and job; returns their paths."""
    (tmp_path / "cores.toml").write_text(CPU_CLUSTER)

    def make(words: str, *, job: str = JOB, model=None) -> tuple[Path, Path]:
        layout = parse_layout(words)
        Plan(
            model=model or load_model("tiny"),
            job=Job(seq=SEQ, global_batch=BATCH, precision="fp32"),
            cluster=cluster_document(str(tmp_path / "cores.toml")),
            gpus=layout.gpus,
            runtime="shardplan",
            layout=layout,
            prediction=PREDICTION,
            search={},
            digests={},
            shardplan_version="0",
        ).write(tmp_path / "plan.json")
        given = job.format(train=tokens / "train.bin", validation=tokens / "validation.bin")
        (tmp_path / "job.toml").write_text(given)
        return tmp_path / "plan.json", tmp_path / "job.toml"

    return make


def shardplan_run(*words: str | Path):
    """Exit code, stdout, stderr of `shardplan run`, in this process; malformed input as the command line tells it."""
    from shardplan.cli.run import run

    app = typer.Typer()
    app.command()(run)
    return CliRunner().invoke(app, [str(word) for word in words])


def curve(folder: Path) -> tuple[list[float], list[float]]:
    """Losses and validation losses of rank 0."""
    lines = (folder / "ranks" / "rank-0000.jsonl").read_text().splitlines()
    records = [StepRecord(**json.loads(line)) for line in lines]
    return [r.loss for r in records if r.validation_loss is None], [
        r.validation_loss for r in records if r.validation_loss is not None
    ]


@pytest.mark.distributed
def test_a_job_trains_on_its_tokens_and_leaves_its_metrics(write, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    plan, job = write("dp=1 micro_batch=2")
    result = shardplan_run(plan, "--job", job, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    folder = Path(document["folder"])
    assert folder.parent == tmp_path / "runs"
    assert document["steps_done"] == 30
    losses, held_out = curve(folder)
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 256
    assert sum(losses[-5:]) / 5 < 4.8
    assert held_out[1] < held_out[0] < 5.55
    assert document["measured"]["validation_loss"] == held_out[1]
    assert "validation " in result.stderr
    assert "MFU " in result.stderr
    assert "(predicted 40.0 %)" in result.stderr

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss_metrics/global_avg_loss" in row] == [1, 10, 20, 30]
    assert {row["step"]: row["validation_metrics/loss"] for row in rows if "validation_metrics/loss" in row} == {
        15: held_out[0],
        30: held_out[1],
    }
    assert rows[1]["loss_metrics/global_avg_loss"] == losses[9]
    assert rows[1]["n_tokens_seen"] == 10 * BATCH * SEQ
    assert (rows[0]["lr"], rows[-2]["lr"]) == (pytest.approx(3e-3 / 5), pytest.approx(3e-4))
    assert scalars(folder / "tb", "loss_metrics/global_avg_loss") == {
        step: pytest.approx(losses[step - 1]) for step in (1, 10, 20, 30)
    }
    assert json.loads((folder / "job.json").read_text())["seed"] == 5


def scalars(folder: Path, tag: str) -> dict[int, float]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def short_curve(arguments: tuple[Path, Path], out: Path) -> tuple[list[float], list[float]]:
    """Of six steps, a validation after each third."""
    plan, job = arguments
    result = shardplan_run(plan, "--job", job, "--steps", "6", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    return curve(Path(json.loads(result.stdout)["folder"]))


SHORT_JOB = JOB.replace("interval = 15", "interval = 3")


@pytest.mark.distributed
def test_two_ranks_have_the_curve_of_one(write, tmp_path):
    """Data parallel, tensor parallel (split logits), pipeline (a schedule without a backward), parts of sequences validate differently."""
    pytest.importorskip("torch", reason="the executor needs torch")
    one = short_curve(write("dp=1", job=SHORT_JOB), tmp_path / "runs")
    assert (len(one[0]), len(one[1])) == (6, 2)
    for words in ("dp=2 zero=3 recompute=full", "tp=2 micro_batch=2", "pp=2", "cp=2 zero=2"):
        two = short_curve(write(words, job=SHORT_JOB), tmp_path / "runs")
        assert two[0] == pytest.approx(one[0], rel=2e-6), words
        assert two[1] == pytest.approx(one[1], rel=2e-6), words


@pytest.mark.distributed
def test_a_job_goes_on_in_another_layout_and_refuses_other_data(write, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    out = tmp_path / "runs"
    whole = short_curve(write("dp=1", job=SHORT_JOB), tmp_path / "whole")
    plan, job = write("dp=2 zero=2", job=SHORT_JOB)
    words = ("--job", job, "--out", out, "--checkpoint-every", "3", "--json")
    assert shardplan_run(plan, *words, "--steps", "3").exit_code == 0
    plan, job = write("tp=2 micro_batch=2", job=SHORT_JOB)
    result = shardplan_run(plan, *words, "--steps", "6", "--resume", "last")
    assert result.exit_code == 0, result.output
    losses, held_out = curve(Path(json.loads(result.stdout)["folder"]))
    assert losses == pytest.approx(whole[0][3:], rel=2e-6)
    assert held_out == pytest.approx(whole[1][1:], rel=2e-6)

    before = sorted(out.iterdir())
    job.write_text(job.read_text().replace("seed = 5", "seed = 6"))
    result = shardplan_run(plan, *words, "--steps", "9", "--resume", "last")
    assert "seed=5 where the training stopped, 6 now" in str(result.exception)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("train.bin", "other.bin"), "other.bin: no such token file; make it with `shardplan tokenize`"),
        (("batches = 3", "batches = 3000"), "validation.files: "),
        (("steps = 30", "stepz = 30"), "job.toml: unknown key stepz; did you mean steps?"),
    ],
)
def test_what_is_wrong_with_a_job_is_refused_before_training(write, tmp_path, change, told, capsys, monkeypatch):
    from shardplan.cli import main

    plan, job = write("dp=1")
    job.write_text(job.read_text().replace(*change))
    monkeypatch.setattr("sys.argv", ["shardplan", "run", str(plan), "--job", str(job)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert not (tmp_path / "runs").exists()


def test_tokens_beyond_the_models_vocabulary_are_refused_before_training(write, tokens):
    from shardplan.executor.job_file import read_job
    from shardplan.executor.recipe import check_job
    from shardplan.hw_profiles.errors import InputError

    plan, job = write("dp=1")
    content = Plan.read(plan)
    largest = int(open_tokens(tokens / "train.bin").tokens.max())
    check_job(replace(content, model=replace(content.model, vocab=largest + 1)), read_job(job))
    with pytest.raises(InputError, match=f"is not below the model's vocabulary of {largest}; tokenise with a smaller"):
        check_job(replace(content, model=replace(content.model, vocab=largest)), read_job(job))


def metrics_files(folder: Path, **changes) -> MetricsFiles:
    return MetricsFiles(folder, tokens_per_step=1000, prediction=PREDICTION, **changes)


def test_metrics_are_means_since_the_row_before_under_torchtitans_names(tmp_path):
    metrics = metrics_files(tmp_path, interval=2, steps=5, ranks=2, tensorboard=True)
    for step in range(1, 6):
        metrics(
            StepRecord(
                step=step,
                loss=1.0 / step,
                max_loss=2.0 / step,
                grad_norm=0.5,
                step_s=0.1 * step,
                tokens_per_s=1.0,
                active_bytes=2**29,
                reserved_bytes=step * 2**28,
                learning_rate=1e-3,
                data_s=0.01,
            )
        )
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert rows[2] == {
        "step": 4,
        "loss_metrics/global_avg_loss": 0.25,
        "loss_metrics/global_max_loss": 0.5,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "n_tokens_seen": 4000,
        "throughput(tps)": pytest.approx(1000 / 0.35 / 2),
        "mfu(%)": pytest.approx(40 * 0.1 / 0.35),
        "tflops": pytest.approx(0.04 * 0.1 / 0.35),
        "time_metrics/end_to_end(s)": pytest.approx(0.35),
        "time_metrics/data_loading(s)": pytest.approx(0.01),
        "time_metrics/data_loading(%)": pytest.approx(1 / 0.35),
        "memory/max_active(GiB)": 0.5,
        "memory/max_active(%)": 25,
        "memory/max_reserved(GiB)": 1.0,
        "memory/max_reserved(%)": 50,
        "predicted/end_to_end(s)": 0.1,
    }
    assert scalars(tmp_path / "tb", "memory/max_reserved(GiB)") == {1: 0.25, 2: 0.5, 4: 1.0, 5: 1.25}


def test_tokens_seen_before_a_resume_are_those_that_were_trained():
    from shardplan.executor.checkpoint_files import Progress

    saved = Progress(step=10, seed=0, model="", layout="dp=1", data={"step": 10, "sequences": 80, "seq": 64})
    assert tokens_before(saved, tokens_per_step=1) == 80 * 64
    assert tokens_before(replace(saved, data={"step": 10, "seed": 0}), tokens_per_step=500) == 5000


def test_tokens_seen_go_on_from_a_checkpoint(tmp_path):
    metrics = metrics_files(
        tmp_path, interval=1, steps=11, ranks=1, steps_before=10, tokens_before=300, tensorboard=False
    )
    metrics(StepRecord(step=11, loss=1.0, grad_norm=0.5, step_s=0.1, tokens_per_s=1.0))
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["n_tokens_seen"] == 1300
