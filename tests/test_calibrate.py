"""Calibration: one quick run on this machine, and the profile made of invented measurements."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("torch", reason="calibrating needs torch")

from shardplan.cli.calibrate import calibrate
from shardplan.costmodel.attention_time import AttentionShape, fused_attention_s
from shardplan.costmodel.collectives import collective_s
from shardplan.executor import calibrate_profile
from shardplan.executor.calibrate import CalibrationError, measure_machine
from shardplan.executor.calibrate_measurements import (
    CollectiveRates,
    Measurements,
    Rates,
    Timing,
    WorkerAnswer,
    answer_from_json,
    to_json,
)
from shardplan.executor.calibrate_profile import base_document, profile_document, undisturbed
from shardplan.executor.calibrate_summary import summary_rows
from shardplan.executor.calibrate_timing import Timer
from shardplan.executor.calibrate_worker import usual
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, cluster_from_document, load_cluster
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import tier_table
from shardplan.hw_profiles.write import write_profile

MEASURED_ON_A_CPU = (
    "nodes",
    "gpu.memory_mib",
    "gpu.bandwidth_gb_per_s",
    "gpu.launch_us",
    "gpu.context_gib",
    "gpu.peak_tflops.fp32",
    "gpu.gemm_efficiency.default",
    "gpu.gemm_efficiency.fp32",
    "gpu.attention_efficiency.forward",
    "gpu.attention_efficiency.backward",
    "gpu.memory_efficiency",
    "node.gpus",
    "node.intra.bandwidth_gb_per_s",
    "node.intra.latency_us",
    "node.intra.efficiency",
    "node.intra.all_reduce_efficiency",
    "node.intra.point_to_point_fraction",
    "node.host.cores",
    "node.host.ram_gib",
    "node.host.memory_bandwidth_gb_per_s",
    "node.host.memory_efficiency",
)


def timings(rate: float, *sizes: float) -> tuple[Timing, ...]:
    """Timings that reach `rate` at the last size and a tenth, a hundredth of it below."""
    return tuple(
        Timing(size=size, seconds=size / (rate * 0.1 ** (len(sizes) - 1 - turn))) for turn, size in enumerate(sizes)
    )


def attention(forward: float, backward: float) -> dict[str, Timing]:
    return {"forward": Timing(size=forward, seconds=1.0), "backward": Timing(size=backward, seconds=1.0)}


def collectives(backend: str, members: int, rate: float) -> CollectiveRates:
    names = ("all_reduce", "all_gather", "reduce_scatter", "send_receive")
    return CollectiveRates(
        backend=backend, members=members, timings={name: timings(rate, 4e3, 1e6, 64e6) for name in names}
    )


def cpu_measurements() -> Measurements:
    rates = Rates(
        device="cpu",
        device_name="Some CPU @ 3 GHz",
        software="torch 2.13.0",
        processes=4,
        cores=4,
        ram_bytes=64 * 2.0**30,
        memory_bytes=16 * 2.0**30,
        context_bytes=0.25 * 2.0**30,
        gemm={"fp32": timings(1e11, 1e6, 1e8, 1e9), "bf16": timings(4e11, 1e6, 1e8, 1e9)},
        memory=(*timings(1e11, 1e5, 1e6), Timing(size=1e8, seconds=1e8 / 2e10)),
        attention={"fp32": attention(3e10, 2e10), "bf16": attention(4e10, 4e10)},
        attention_seq=512,
        dispatch_s=4e-6,
        host_copy=Timing(size=4e10, seconds=1.0),
        adam=Timing(size=1e9, seconds=1.0),
    )
    return Measurements(date="2026-01-02", gpus=4, rates=rates, collectives=collectives("gloo", 4, 1e9))


def cuda_measurements(name: str = "NVIDIA H200") -> Measurements:
    rates = Rates(
        device="cuda",
        device_name=name,
        software="torch 2.11.0",
        processes=1,
        cores=16,
        ram_bytes=128 * 2.0**30,
        memory_bytes=143155 * 2.0**20,
        context_bytes=0.6 * 2.0**30,
        multiprocessors=132,
        l2_bytes=60 * 2.0**20,
        gemm={"bf16": timings(7.9e14, 1e9, 1e11, 1e12), "fp32": timings(5e13, 1e9, 1e11, 1e12)},
        memory=timings(4.3e12, 1e6, 64e6, 1e9),
        attention={"bf16": attention(5e14, 4e14)},
        attention_seq=8192,
        dispatch_s=6e-6,
        host_copy=Timing(size=2e11, seconds=1.0),
        adam=Timing(size=6e9, seconds=1.0),
        host_to_device=Timing(size=5.5e10, seconds=1.0),
        device_to_host=Timing(size=5.0e10, seconds=1.0),
        notes=("gemm fp16 not measured: unsupported",),
    )
    return Measurements(date="2026-01-02", gpus=1, rates=rates)


@pytest.fixture
def cpu_cluster() -> Cluster:
    found = cpu_measurements()
    return cluster_from_document(profile_document(found, calibrate_profile.stand_in("cpu")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measurements]:
    """One quick calibration of this machine, written as a profile."""
    path = tmp_path_factory.mktemp("calibrated") / "profile.toml"
    measurements = measure_machine(processes=2, quick=True)
    write_profile(profile_document(measurements, base_document(measurements)), path)
    return path, measurements


@pytest.mark.distributed
def test_this_machine_calibrates_to_a_profile_that_loads(quick: tuple[Path, Measurements]) -> None:
    path, measurements = quick
    cluster = load_cluster(path)
    assert cluster.gpus == measurements.gpus
    assert cluster.gpu.device == measurements.rates.device
    assert cluster.gpu.peak_flop_per_s["fp32"] > 0
    assert 0 < cluster.gpu.launch_s < 1e-2
    if measurements.rates.device == "cpu":
        not_measured = {p for p in MEASURED_ON_A_CPU if cluster.provenance[p].kind != "measured"}
        assert not not_measured, measurements.notes
        assert not [note for note in measurements.notes if "not measured" in note]
        assert 50e6 < cluster.gpu.context_bytes < cluster.gpu.memory_bytes
    assert measurements.rates.software in cluster.provenance["gpu.launch_us"].text
    assert measurements.date in cluster.provenance["gpu.launch_us"].text
    assert not list(path.parent.glob(".*")), "no unfinished file is left"


@pytest.mark.distributed
def test_every_rate_of_this_machine_is_positive(quick: tuple[Path, Measurements]) -> None:
    _, measurements = quick
    every = [*measurements.rates.memory]
    for group in (
        *measurements.rates.gemm.values(),
        *(measurements.collectives.timings.values() if measurements.collectives else ()),
    ):
        assert [timing.size for timing in group] == sorted({timing.size for timing in group})
        every += group
    assert all(timing.rate > 0 for timing in every)
    assert all(row.measured > 0 for row in summary_rows(measurements, base_document(measurements)))


def test_a_cpu_is_measured_against_its_best_rate(cpu_cluster: Cluster) -> None:
    gpu = cpu_cluster.gpu
    assert gpu.peak_flop_per_s["fp32"] == pytest.approx(1e11)
    assert gpu.gemm_curve("bf16").fractions == pytest.approx((0.01, 0.1, 1.0))
    assert gpu.gemm_curve("bf16").sizes == pytest.approx((1e6, 1e8, 1e9))
    assert gpu.gemm_curve("default").fractions == gpu.gemm_curve("fp32").fractions
    assert gpu.memory_bandwidth_bytes_per_s == pytest.approx(1e11)
    assert gpu.memory_efficiency.fractions[-1] == pytest.approx(0.2)
    assert (gpu.memory_bytes, gpu.context_bytes) == (16 * 2.0**30, 0.25 * 2.0**30)
    assert (gpu.launch_s, gpu.name) == (4e-6, "Some CPU @ 3 GHz")
    assert (cpu_cluster.name, cpu_cluster.gpus) == ("some-cpu-3-ghz-x4", 4)


def test_the_cost_model_meets_the_measured_attention(cpu_cluster: Cluster) -> None:
    import numpy as np

    gpu, seq = cpu_cluster.gpu, np.asarray(512.0)
    shape = AttentionShape(pairs=np.asarray(3e10 / (2 * 512 * 512 * 64)), seq=seq, keys=seq, head_dim=64.0)
    forward, backward = fused_attention_s(gpu, "fp32", gpu.attention_curve(["flash2"]), shape)
    assert float(forward) == pytest.approx(1.0, rel=1e-3)
    assert 2.5 * 3e10 / float(backward) == pytest.approx(2e10, rel=1e-3)


@pytest.mark.parametrize("size", [4e3, 1e6, 64e6])
def test_the_cost_model_meets_the_measured_collectives(cpu_cluster: Cluster, size: float) -> None:
    measured = cpu_measurements().collectives
    assert measured is not None
    tiers = tier_table(cpu_cluster)
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        expected = next(timing.seconds for timing in undisturbed(measured.timings[name]) if timing.size == size)
        predicted = float(collective_s(tiers, name, size, 4.0, 1.0))
        assert predicted == pytest.approx(expected, rel=0.05)


def test_host_memory_carries_adam(cpu_cluster: Cluster) -> None:
    host = cpu_cluster.node.host
    rate = host.memory_bandwidth_bytes_per_s * host.memory_efficiency / host.adam_bytes_per_parameter
    assert rate == pytest.approx(1e9, rel=1e-3)
    assert host.memory_bandwidth_bytes_per_s == pytest.approx(4e10)


def test_a_known_gpu_keeps_its_specified_peaks() -> None:
    base = cluster_document("h200-ib")
    before = copy.deepcopy(base)
    cluster = cluster_from_document(profile_document(cuda_measurements(), base))
    assert base == before, "the base is not changed"
    gpu = cluster.gpu
    assert gpu.memory_bytes == 143771 * 2.0**20
    assert list(gpu.attention_efficiency) == ["plain"], "measured attention goes in place of the catalog's kernels"
    assert gpu.peak_flop_per_s["bf16"] == pytest.approx(989e12, rel=0.01)
    assert cluster.provenance["gpu.peak_tflops.bf16"].kind == "spec"
    assert gpu.gemm_curve("bf16").fractions[-1] == pytest.approx(7.9e14 / gpu.peak_flop_per_s["bf16"], rel=1e-3)
    assert gpu.memory_efficiency.fractions[-1] == pytest.approx(4.3 / 4.8, rel=1e-3)
    assert cluster.provenance["gpu.gemm_efficiency.bf16"].kind == "measured"
    assert cluster.provenance["gpu.peak_tflops.fp8"].kind == "spec", "what was not measured stays"
    assert cluster.node.host.pcie_bytes_per_s == pytest.approx(5e10), "the slower direction"
    assert (
        cluster.provenance["node.intra.latency_us"] == cluster_from_document(base).provenance["node.intra.latency_us"]
    )
    assert (cluster.gpus, cluster.nodes) == (1, 1)


def test_a_gpu_nobody_knows_becomes_its_measurements() -> None:
    found = cuda_measurements("Unheard-of GPU")
    cluster = cluster_from_document(profile_document(found, calibrate_profile.stand_in("cuda")))
    gpu = cluster.gpu
    assert (gpu.device, gpu.name, gpu.multiprocessors) == ("cuda", "Unheard-of GPU", 132)
    assert gpu.peak_flop_per_s == pytest.approx({"fp32": 5e13, "bf16": 7.9e14})
    assert gpu.memory_bytes == pytest.approx(143155 * 2.0**20, rel=1e-3)
    assert gpu.memory_bandwidth_bytes_per_s == pytest.approx(4.3e12)
    assert "node.intra.latency_us" in cluster.guesses()


def test_collectives_of_gpus_are_fractions_of_the_wire() -> None:
    found = replace(cuda_measurements(), gpus=8, collectives=collectives("nccl", 8, 2e11))
    cluster = cluster_from_document(profile_document(found, cluster_document("h200-ib")))
    link = cluster.node.intra
    assert cluster.provenance["node.intra.bandwidth_gb_per_s"].kind == "spec"
    assert link.efficiency.fractions[-1] == pytest.approx(2e11 * 7 / 8 / link.bandwidth_bytes_per_s, rel=1e-3)
    assert link.all_reduce_efficiency is not None
    assert link.all_reduce_efficiency.fractions[-1] == pytest.approx(2 * link.efficiency.fractions[-1], rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_could_not_be_measured_keeps_the_known_value(device: str) -> None:
    full = cpu_measurements() if device == "cpu" else cuda_measurements()
    bare = Rates(
        **{
            key: getattr(full.rates, key)
            for key in ("device", "device_name", "software", "processes", "cores", "ram_bytes", "memory_bytes")
        }
    )
    base = calibrate_profile.stand_in("cpu") if device == "cpu" else cluster_document("h200-ib")
    cluster = cluster_from_document(profile_document(replace(full, rates=bare, collectives=None), base))
    known = cluster_from_document(base)
    assert cluster.gpu.launch_s == known.gpu.launch_s
    assert cluster.gpu.gemm_efficiency == known.gpu.gemm_efficiency
    assert cluster.node.intra == known.node.intra


def test_no_catalog_part_means_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> dict[str, Any]:
        raise InputError(f"GPU at {name} is not in the catalog")

    monkeypatch.setattr(calibrate_profile, "cluster_document", unknown)
    base = base_document(cuda_measurements("Unheard-of GPU"))
    assert base["gpu"]["device"] == "cuda"
    assert cluster_from_document(base).gpu.device == "cuda"


def test_a_disturbed_collective_takes_no_longer_than_a_larger_one() -> None:
    raw = [Timing(size=1.0, seconds=3.0), Timing(size=2.0, seconds=1.0), Timing(size=3.0, seconds=2.0)]
    assert [timing.seconds for timing in undisturbed(raw)] == [1.0, 1.0, 2.0]


def test_a_disturbed_measurement_says_so() -> None:
    found = replace(cpu_measurements(), others_cpu_fraction=0.3)
    assert found.notes == ("other programs used 30% of the CPU meanwhile; measure again when the machine is idle",)
    cluster = cluster_from_document(profile_document(found, calibrate_profile.stand_in("cpu")))
    assert "other programs used 30%" in cluster.provenance["gpu.launch_us"].text
    assert cpu_measurements().notes == ()


def test_of_several_rounds_the_median_timing_of_each_size_counts() -> None:
    rounds = [
        [Timing(size=1.0, seconds=3.0), Timing(size=2.0, seconds=1.0)],
        [Timing(size=2.0, seconds=4.0), Timing(size=1.0, seconds=2.0), Timing(size=3.0, seconds=5.0)],
        [Timing(size=1.0, seconds=9.0), Timing(size=2.0, seconds=3.0)],
    ]
    assert [timing.seconds for timing in usual(rounds)] == [3.0, 3.0, 5.0]


def test_answers_survive_json() -> None:
    found = cpu_measurements()
    answer = WorkerAnswer(rates=found.rates, collectives=found.collectives)
    assert answer_from_json(to_json(answer)) == answer


def test_summary_names_what_was_known() -> None:
    base = cluster_document("h200-ib")
    rows = {row.quantity: row for row in summary_rows(cuda_measurements(), base)}
    product = rows["matrix product bf16, best"]
    assert (product.unit, product.known_kind) == ("TFLOP/s", "spec")
    assert product.measured == pytest.approx(790)
    assert product.known is not None and product.known < 989


@pytest.mark.distributed
def test_processes_that_do_not_answer_are_ended() -> None:
    with pytest.raises(CalibrationError, match="did not finish in time"):
        measure_machine(processes=2, quick=True, timeout_s=0.2)


def test_command_writes_a_profile_and_says_what_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shardplan.executor.calibrate.measure_machine", lambda **_: cpu_measurements())
    out = tmp_path / "here.toml"
    calibrate(out=out)
    said = capsys.readouterr().out
    assert f"shardplan plan tiny --cluster {out} --gpus 4 --global-batch 8 --seq 256" in said
    assert "all_reduce among 4" in said
    assert load_cluster(out).gpus == 4
    calibrate(out=out, force=True, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["profile"], answer["gpus"], answer["notes"]) == (str(out), 4, [])
    assert tomllib.loads(out.read_text())["name"] == answer["cluster"]
    assert [path.name for path in tmp_path.iterdir()] == ["here.toml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda folder: {"out": folder / "p.toml", "processes": 0}, "--processes: processes=0 is not positive"),
        (lambda folder: {"out": folder / "none" / "p.toml"}, "does not exist; make it first"),
        (lambda folder: {"out": folder}, "is a folder, not a file"),
        (lambda folder: {"out": folder / "there.toml"}, "exists already; .*--force"),
        (lambda folder: {"out": folder / "p.json"}, "does not end in .toml"),
    ],
)
def test_bad_input_is_refused_before_measuring(
    tmp_path: Path, words: Callable[[Path], dict[str, Any]], message: str
) -> None:
    (tmp_path / "there.toml").write_text("mine")
    with pytest.raises(InputError, match=message):
        calibrate(**words(tmp_path))
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_without_torch_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(typer.Exit) as stop:
        calibrate(out=tmp_path / "p.toml")
    assert stop.value.exit_code == 1
    assert capsys.readouterr().err == "shardplan: calibrating needs torch; install shardplan[run]\n"


def test_a_failed_measurement_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> Measurements:
        raise CalibrationError("measuring process 1 ended with code 1: out of memory")

    monkeypatch.setattr("shardplan.executor.calibrate.measure_machine", fail)
    with pytest.raises(typer.Exit) as stop:
        calibrate(out=tmp_path / "p.toml")
    assert stop.value.exit_code == 3
    assert "out of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_collective_of_a_cpu_is_timed_behind_a_product_each_time():
    import torch

    did: list[str] = []
    timer = Timer(device=torch.device("cpu"), budget_s=0.001, sample_s=0.0)
    timer.seconds_behind(lambda: did.append("product"), lambda: did.append("collective"))
    assert did[-6:] == ["product", "collective"] * 3
