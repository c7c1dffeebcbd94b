"""Jobs of one device: what they are, what is predicted, how they are told; one program run on this machine."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from torch.nn.attention import SDPBackend

from shardplan.costmodel.attention_time import OWN_KERNEL
from shardplan.executor import attention_kernel
from shardplan.executor.attention_kernel import attention_backends, runs_own_attention
from shardplan.executor.calibrate_measurements import Point
from shardplan.executor.calibrate_points import GPU_POINTS, write_points
from shardplan.executor.device_cases import CPU_CASES, GPU_CASES, Case
from shardplan.executor.device_facts import parse_facts
from shardplan.executor.device_run import Measured
from shardplan.executor.device_table import case_rows, table_line, unit_of
from shardplan.executor.validate_device import Bench, chosen_profiles, validate
from shardplan.hw_profiles.load import cluster_document, list_parts, load_gpu


@pytest.fixture
def bench() -> Bench:
    import torch

    profiles = {"catalog": cluster_document("h200-ib")}
    return Bench(device=torch.device("cpu"), profiles=profiles, mesh=None)  # pyright: ignore[reportArgumentType]


def test_names_tell_the_cases_apart() -> None:
    for cases in (GPU_CASES, CPU_CASES):
        assert len({case.name for case in cases}) == len(cases)
    assert Case(seq=4096, micro_batch=2, recompute="full").name == "llama-3-8b:8 seq=4096 mb=2 full"


def test_a_shrunk_preset_keeps_everything_but_its_layers() -> None:
    shapes = Case(seq=4096, layers=4).shapes()
    assert (shapes.layer_count, shapes.vocab, shapes.hidden) == (4, 128256, 4096)


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_every_case_has_a_prediction(bench: Bench, case: Case) -> None:
    answer = bench.predictions(case)["catalog"]
    broken = [found["rule"] for found in answer["rejections"]]
    assert broken in ([], ["device-memory"]), "memory may be too small, the words may not be wrong"
    assert 0.001 < answer["time"]["step_s"] < 5


def test_the_cudnn_kernel_is_predicted_as_such(bench: Bench) -> None:
    flash, cudnn = (bench.predictions(Case(seq=8192, kernel=kernel))["catalog"] for kernel in ("flash", "cudnn"))
    assert cudnn["time"]["compute_s"] < flash["time"]["compute_s"]


def test_the_own_kernel_is_what_auto_means_on_hopper(bench: Bench) -> None:
    flash, auto = (bench.predictions(Case(seq=8192, kernel=kernel))["catalog"] for kernel in ("flash", "auto"))
    assert auto["time"]["compute_s"] < flash["time"]["compute_s"]
    whole = [
        bench.predictions(Case(seq=2048, layers=4, precision="fp32", kernel=k))["catalog"] for k in ("flash", "auto")
    ]
    assert whole[0]["time"] == whole[1]["time"], "it takes 16 bits only"


def test_a_job_that_cannot_fit_is_not_tried(bench: Bench) -> None:
    result = bench.run(Case(seq=8192, layers=32, micro_batch=8), left_s=100)
    assert (result.measured, result.error) == (None, "skipped: predicted not to fit")


def test_a_job_that_would_outlast_the_budget_is_not_tried(bench: Bench) -> None:
    assert bench.run(Case(seq=8192), left_s=1.0).error == "skipped: no time left"


def test_what_fails_is_a_row(bench: Bench) -> None:
    result = bench.run(Case(seq=64, model="tiny", layers=1, precision="fp8"), left_s=100)
    assert result.measured is None
    assert "fp8" in result.error
    assert result.error in table_line(result.case, result.predicted, None, result.error)


def test_a_line_and_rows_of_one_case(bench: Bench) -> None:
    case = Case(seq=4096, micro_batch=2)
    predicted = bench.predictions(case)
    step_s = predicted["catalog"]["time"]["step_s"]
    measured = Measured(
        step_s=step_s / 1.1, metrics={"step_s": step_s / 1.1, "allocated_bytes": 2.0**36}, kernels={"k": 0.1}
    )
    line = table_line(case, predicted, measured, "")
    assert "+10.0" in line
    assert "64.0" in line
    rows = {
        (source, metric): (value, unit) for _, (source, metric, value, unit) in case_rows(case, predicted, measured, "")
    }
    assert rows["measured", "allocated_bytes"] == (2.0**36, "B")
    assert rows["profile", "k"] == (0.1, "s")
    assert rows["predicted:catalog", "fits"] == ("true", "")
    assert rows["measured", "mfu"][0] == pytest.approx(1.1 * predicted["catalog"]["throughput"]["mfu"])


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("step_s_least", "s"),
        ("tokens_per_s", "tokens/s"),
        ("device_bytes", "B"),
        ("last_loss", "nats"),
        ("timed_steps", "1"),
    ],
)
def test_a_metric_ends_in_its_unit(metric: str, unit: str) -> None:
    assert unit_of(metric) == unit


def test_what_the_driver_does_not_tell_is_left_out() -> None:
    facts = parse_facts("580.159.04, 1980, 1980, 3201, 412.50, [N/A], 41\n")
    assert facts["driver"] == "580.159.04"
    assert facts["power_w"] == "412.50"
    assert "power_limit_w" not in facts
    assert parse_facts("") == parse_facts("no devices\n") == {}


@pytest.mark.parametrize(
    ("word", "device", "precision", "first"),
    [
        ("auto", "cuda", "bf16", SDPBackend.FLASH_ATTENTION),
        ("flash", "cuda", "bf16", SDPBackend.FLASH_ATTENTION),
        ("flash", "cuda", "fp32", SDPBackend.EFFICIENT_ATTENTION),
        ("unfused", "cuda", "bf16", SDPBackend.MATH),
        ("flash", "cpu", "fp32", SDPBackend.FLASH_ATTENTION),
    ],
)
def test_attention_runs_the_kernel_that_is_predicted(word: str, device: str, precision: str, first: SDPBackend) -> None:
    assert attention_backends(word, device_type=device, precision=precision)[0] is first
    assert attention_backends("auto", device_type="cpu", precision="fp32") == ()


HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("word", "precision", "head_dim", "capability", "own"),
    [
        ("auto", "bf16", 128, HOPPER, True),
        ("auto", "fp16", 256, HOPPER, True),
        ("auto", "fp32", 128, HOPPER, False),
        ("auto", "bf16", 512, HOPPER, False),
        ("auto", "bf16", 128, AMPERE, False),
        ("auto", "bf16", 128, None, False),
        ("flash", "bf16", 128, HOPPER, False),
        ("unfused", "bf16", 128, HOPPER, False),
        ("triton", "bf16", 128, AMPERE, True),
    ],
)
def test_when_the_own_kernel_runs(
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    precision: str,
    head_dim: int,
    capability: tuple[int, int] | None,
    own: bool,
) -> None:
    monkeypatch.setattr(attention_kernel, "triton_is_installed", lambda: True)
    assert runs_own_attention(word, precision=precision, head_dim=head_dim, capability=capability) is own


def test_without_triton_auto_is_the_flash_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "triton_is_installed", lambda: False)
    assert not runs_own_attention("auto", precision="bf16", head_dim=128, capability=HOPPER)


def test_the_catalog_has_its_rates_for_the_gpus_that_run_it() -> None:
    for name in list_parts("gpus"):
        gpu = load_gpu(name)
        assert (OWN_KERNEL in gpu.attention_efficiency) == (gpu.architecture == "hopper"), name


def test_a_case_that_had_no_time_is_not_written(bench: Bench, tmp_path: Path) -> None:
    validate(
        bench, (Case(seq=8192), Case(seq=8192, layers=32, micro_batch=8)), tmp_path, budget_s=1.0, date="2026-01-02"
    )
    rows = list(csv.DictReader((tmp_path / "validation.csv").open()))
    assert {row["case"] for row in rows} == {"llama-3-8b:32 seq=8192 mb=8"}


def test_points_are_written_in_long_format(tmp_path: Path) -> None:
    point = Point(kernel="gemm", shape="m=1 n=2 k=3", metric="rate", value=1.5, unit="TFLOP/s")
    write_points(tmp_path / "p.csv", (point,), date="2026-01-02", device="X", software="torch", driver="1")
    (row,) = csv.DictReader((tmp_path / "p.csv").open())
    assert (row["kernel"], row["value"], row["unit"]) == ("gemm", "1.5", "TFLOP/s")
    assert len(set(GPU_POINTS.gemm_mnk)) == len(GPU_POINTS.gemm_mnk)


def test_without_the_calibrated_profile_the_catalog_is_left(tmp_path: Path) -> None:
    assert list(chosen_profiles(tmp_path / "none.toml")) == ["catalog"]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_program_runs_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardplan.executor.validate_device", "-o", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "validation.csv").open()))
    assert {row["case"] for row in rows} == {case.name for case in CPU_CASES}
    assert any(row["metric"] == "step_s" and row["source"] == "measured" for row in rows)
