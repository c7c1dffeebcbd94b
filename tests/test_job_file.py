"""Job files: what they say, and one line for what is wrong with them."""

from __future__ import annotations

import math

import pytest

from shardplan.executor.job_file import read_job, read_resolved, write_resolved
from shardplan.executor.loss_scale import ScaleWords
from shardplan.executor.schedule import WarmupCosine
from shardplan.hw_profiles.errors import InputError

SMALLEST = """
steps = 100
[data]
files = [{ path = "tokens/train.bin" }]
[learning_rate]
peak = 1e-3
"""


@pytest.fixture
def write(tmp_path):
    def make(text: str):
        (tmp_path / "job.toml").write_text(text)
        return tmp_path / "job.toml"

    return make


def test_the_smallest_job_and_its_defaults(write, tmp_path):
    job = read_job(write(SMALLEST))
    assert job.data.files[0].path == str(tmp_path / "tokens" / "train.bin")
    assert job.output == str(tmp_path / "runs")
    assert (job.steps, job.seed, job.decay_steps, job.validation) == (100, 0, 100, None)
    assert (job.optimizer.betas, job.optimizer.weight_decay, job.optimizer.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert job.data.attend_across_documents
    assert ScaleWords(**job.loss_scale.model_dump()) == ScaleWords()


def test_a_run_of_fewer_steps_learns_at_the_rates_of_the_whole_one(write):
    few, more = (read_job(write(SMALLEST), steps=steps) for steps in (7, 300))
    assert (few.steps, few.decay_steps, more.steps, more.decay_steps) == (7, 100, 300, 300)
    warm = SMALLEST.replace("peak = 1e-3", "peak = 1e-3\nwarmup_steps = 10")
    assert read_job(write(warm), steps=5).learning_rate.warmup_steps == 10
    longer = SMALLEST.replace("peak = 1e-3", "peak = 1e-3\nwarmup_steps = 150")
    assert read_job(write(longer), steps=300).decay_steps == 300
    with pytest.raises(InputError, match="warmup_steps = 150 is not below the last step of the decay, 120; give fewer"):
        read_job(write(longer), steps=120)
    for bad in ("0", "true", "-5"):
        with pytest.raises(InputError, match="steps = "):
            read_job(write(SMALLEST.replace("steps = 100", f"steps = {bad}")), steps=300)
    said = SMALLEST.replace("peak = 1e-3", "peak = 1e-3\ndecay_steps = 50")
    assert [read_job(write(said), steps=steps).decay_steps for steps in (7, 300)] == [50, 50]
    assert read_job(write(SMALLEST.replace("steps = 100", "")), steps=7).decay_steps == 7


def test_everything_a_job_says_survives_the_way_to_the_ranks(write, tmp_path):
    job = read_job(
        write(
            """
            steps = 1000
            seed = 7
            output = "/elsewhere"
            [data]
            shuffle = false
            attend_across_documents = false
            files = [
                { path = "a", weight = 2 },
                { path = "/b.bin", weight = 0.5, dtype = "uint32", end_of_document = 50256 },
            ]
            [validation]
            files = [{ path = "v.bin" }]
            interval = 50
            batches = 2
            [learning_rate]
            peak = 1
            minimum = 0.1
            warmup_steps = 10
            decay_steps = 900
            [optimizer]
            betas = [0.9, 0.99]
            epsilon = 1e-6
            weight_decay = 0
            clip = 0.5
            [loss_scale]
            initial = 1024
            window = 50
            hysteresis = 1
            minimum = 2
            [metrics]
            interval = 5
            tensorboard = false
            """
        )
    )
    assert [one.path for one in job.data.files] == [str(tmp_path / "a"), "/b.bin"]
    assert job.output == "/elsewhere"
    assert not job.data.attend_across_documents
    assert ScaleWords(**job.loss_scale.model_dump()) == ScaleWords(initial=1024, window=50, hysteresis=1, minimum=2)
    write_resolved(job, tmp_path / "job.json")
    assert read_resolved(tmp_path / "job.json") == job


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("steps", "step"), "unknown key step; did you mean seed or steps?"),
        (("steps = 100", ""), "steps is missing; add steps"),
        (("peak = 1e-3", "peek = 1e-3"), "unknown key learning_rate.peek; did you mean peak?"),
        (("path =", "file ="), "unknown key data.files.0.file"),
        (("steps = 100", "steps = 1.5"), "steps = 1.5 is not a whole number; give a whole number"),
        (("steps = 100", "steps = 0"), "steps = 0 is not at least 1"),
        (("steps = 100", "steps = true"), "steps = True is not a whole number"),
        (("peak = 1e-3", "peak = -1"), "learning_rate.peak = -1"),
        (("peak = 1e-3", "peak = nan"), "learning_rate.peak = nan is not"),
        (("peak = 1e-3", 'peak = "high"'), "learning_rate.peak = 'high' is not a number"),
        (("peak = 1e-3", "peak = 1e-3\nminimum = 1"), "minimum = 1 is above peak = 0.001; give a smaller minimum"),
        (
            ("peak = 1e-3", "peak = 1e-3\nwarmup_steps = 100"),
            "learning_rate.warmup_steps = 100 is not below the last step of the decay, 100; give fewer",
        ),
        (
            ('"tokens/train.bin"', '"a", dtype = "int8"'),
            "data.files.0.dtype = 'int8' is unknown; use 'uint16' or 'uint32'",
        ),
        (('[{ path = "tokens/train.bin" }]', "[]"), "data.files has 0 entries"),
        (('[{ path = "tokens/train.bin" }]', '"train.bin"'), "data.files = 'train.bin' is not a list"),
        (('[{ path = "tokens/train.bin" }]', '["train.bin"]'), "data.files.0 = 'train.bin' is not a table"),
        (
            ("[learning_rate]", "[optimizer]\nbetas = [0.9, 1.0]\n[learning_rate]"),
            "optimizer.betas.1 = 1.0 is not below 1",
        ),
        *(
            (
                ("[learning_rate]", f"[optimizer]\nbetas = {betas}\n[learning_rate]"),
                f"optimizer.betas = {betas} is not a list of two numbers; give two numbers",
            )
            for betas in ([], [0.9], [0.9, 0.95, 0.99])
        ),
        (("[learning_rate]", 'shuffle = "no"\n[learning_rate]'), "data.shuffle = 'no' is not true or false"),
        (
            ("[learning_rate]", '[metrics]\ntensorboard = "no"\n[learning_rate]'),
            "metrics.tensorboard = 'no' is not true or false",
        ),
        (("[learning_rate]", "[validation]\n[learning_rate]"), "validation.files is missing"),
        (
            ("[learning_rate]", "[loss_scale]\nminimum = 70000\n[learning_rate]"),
            "minimum = 70000 is above initial = 65536; give a smaller minimum",
        ),
        (
            ("[learning_rate]", "attend_across_documents = 0\n[learning_rate]"),
            "data.attend_across_documents = 0 is not true or false",
        ),
        (("steps = 100", "steps ="), "is not TOML"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(write, change, told):
    path = write(SMALLEST.replace(*change))
    with pytest.raises(InputError) as refused:
        read_job(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert told in line
    assert "\n" not in line


def test_a_missing_job_file(tmp_path):
    with pytest.raises(InputError, match=r"no such job file; docs/training.md"):
        read_job(tmp_path / "job.toml")


def test_warm_up_and_cosine():
    rate = WarmupCosine(peak=1.0, minimum=0.1, warmup_steps=10, decay_steps=110)
    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(60) == pytest.approx(0.55)  # half way between peak and minimum
    assert rate(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(110) == rate(500) == pytest.approx(0.1)
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))
    assert WarmupCosine(peak=1.0, minimum=1.0, warmup_steps=0, decay_steps=5)(3) == 1.0
