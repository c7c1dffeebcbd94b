"""The benchmark's plumbing: every case runs once without a GPU, files have their columns, targets are judged by ratio."""

from __future__ import annotations

import csv
import json
import time
from io import StringIO
from pathlib import Path

import pytest
import torch

from shardplan.kernels import benchmark
from shardplan.kernels.benchmark import Options, Report, main, measure
from shardplan.kernels.benchmark_attention import attention_targets
from shardplan.kernels.benchmark_case import COPY, CUDNN, FLASH, MUST, OURS, Case, Setting, Target
from shardplan.kernels.benchmark_cases import all_cases
from shardplan.kernels.benchmark_rows import COLUMNS, Outcome, long_rows, summary, table
from shardplan.kernels.benchmark_timing import Plan, Stopwatch, Timing

CPU = torch.device("cpu")
DRY = Setting(device=CPU, dry=True)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], dict]:
    """(CSV rows, JSON) of the whole dry run."""
    folder = tmp_path_factory.mktemp("benchmark")
    assert main(["--dry-run", "-o", str(folder / "b.csv"), "--json", str(folder / "b.json")]) == 0
    return list(csv.DictReader((folder / "b.csv").open())), json.loads((folder / "b.json").read_text())


def test_every_case_runs_dry(dry: tuple[list[dict[str, str]], dict]) -> None:
    rows, nested = dry
    assert tuple(rows[0]) == COLUMNS
    assert {(row["kernel"], row["case"]) for row in rows} == {(one.kernel, one.name) for one in all_cases(DRY)}
    ours = {row["kernel"]: row for row in rows if row["provider"] == OURS}
    attention = {kernel: row["metric"] for kernel, row in ours.items() if kernel.startswith("attention")}
    assert set(attention.values()) == {"rate"}, "attention is timed, forward and backward"
    broken = {kernel: row["note"] for kernel, row in ours.items() if row["metric"] == "not supported"}
    assert all("No module named" in note for note in broken.values()), broken
    assert [row for row in rows if row["provider"] == CUDNN and row["metric"] == "not supported"], "never dropped"
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert len(nested["cases"]) == len(all_cases(DRY))
    assert any("mean nothing" in note for note in nested["notes"])


def test_real_cases_cover_the_table() -> None:
    cases = {f"{one.kernel}, {one.name}": one for one in all_cases(Setting(device=CPU))}
    assert len(cases) == len(all_cases(Setting(device=CPU))), "names differ"
    for width in (64, 128, 256):
        for mask in ("full", "causal"):
            assert {f"attention forward, D{width} {mask} S{2**power}" for power in range(9, 15)} <= set(cases)
    forward = cases["attention forward, D128 full S4096"]
    assert forward.work == 4 * 4 * 16 * 4096**2 * 128
    assert cases["attention backward, D128 causal S4096"].work == forward.work * 2.5 / 2
    ranks = [one.rank for one in all_cases(Setting(device=CPU))][2:]
    assert ranks == sorted(ranks), "after the device's own rates, headlines first and the largest last"
    assert cases["attention forward, D64 full S16384"].rank == ranks[-1]


@pytest.mark.parametrize(
    ("passes", "width", "causal", "seq", "baseline", "ratio"),
    [
        ("forward", 128, False, 2048, FLASH, 1.15),
        ("forward", 128, True, 4096, CUDNN, 0.65),
        ("forward", 128, True, 1024, FLASH, 0.85),
        ("forward", 64, True, 2048, FLASH, 1.05),
        ("forward", 256, False, 8192, CUDNN, 0.6),
        ("backward", 128, False, 4096, CUDNN, 0.5),
        ("backward", 256, True, 4096, FLASH, 0.65),
        ("forward+backward", 128, True, 4096, FLASH, 0.95),
        ("forward+backward", 64, True, 4096, FLASH, None),
        ("forward", 128, True, 2048, FLASH, None),
    ],
)
def test_what_must_be_reached(
    passes: str, width: int, causal: bool, seq: int, baseline: str, ratio: float | None
) -> None:
    must = {one.baseline: one.ratio for one in attention_targets(passes, width, causal, seq) if one.level == MUST}
    assert must.get(baseline) == ratio


def outcome(ours_s: float) -> Outcome:
    """10 bytes by ours; a copy of 20 bytes in 2 s, so W is 10 bytes/s."""

    def seconds(value: float) -> Timing:
        return Timing(p20_s=value * 0.9, p50_s=value, p80_s=value * 1.1)

    targets = (Target(level=MUST, baseline=COPY, ratio=0.8), Target(level=MUST, baseline=FLASH, ratio=1.0))
    case = Case(
        kernel="k", name="c", work=10.0, unit="GB/s", providers=lambda at: {}, targets=targets, works={COPY: 20.0}
    )
    return Outcome(case=case, found={OURS: seconds(ours_s), COPY: seconds(2.0), FLASH: "no kernel"})


@pytest.mark.parametrize(("ours_s", "met"), [(1.25, 1), (1.3, 0)])
def test_targets_are_ratios_of_rates(ours_s: float, met: int) -> None:
    assert outcome(ours_s).ratio(COPY) == pytest.approx(1 / ours_s)
    assert summary([outcome(ours_s)])[MUST] == {"met": met, "missed": 1 - met, "not timed": 1}
    assert f"must 0.80 {'met' if met else 'missed'}" in table([outcome(ours_s)])


def test_rows_are_long() -> None:
    rows = long_rows([outcome(1.25)], {"device": "gpu", "date": "now"})
    assert [(row["provider"], row["metric"]) for row in rows] == [
        (OURS, "time"), (OURS, "rate"), (COPY, "time"), (COPY, "rate"), (COPY, "ratio"), (FLASH, "not supported"),
    ]  # fmt: skip
    assert rows[0]["p50"] == "1.25e+06"
    assert rows[0]["unit"] == "us"
    assert float(rows[1]["p20"]) < float(rows[1]["p50"]) < float(rows[1]["p80"])
    assert rows[-1]["note"] == "no kernel"


def test_the_time_of_the_host_is_a_row_where_it_was_measured() -> None:
    timing = Timing(p20_s=1e-4, p50_s=1e-4, p80_s=1e-4, host_s=2.5e-5)
    rows = long_rows([Outcome(case=outcome(1.0).case, found={OURS: timing})], {})
    assert [(row["metric"], row["p50"]) for row in rows[:2]] == [("time", "100"), ("host time", "25")]


def test_rounds_are_interleaved_and_failures_are_named() -> None:
    order: list[str] = []

    def broken() -> None:
        raise RuntimeError("out of luck\nmore")

    calls = {"a": lambda: order.append("a"), "broken": broken, "b": lambda: order.append("b")}
    found = Stopwatch(CPU).interleaved(calls, Plan(rounds=3, round_s=0, warm_up_s=0, fewest=1))
    assert "".join(order) == "aabb" + "ab" * 3  # each once to compile and once to see how long it takes
    assert found["broken"] == "RuntimeError: out of luck"
    assert isinstance(found["a"], Timing)


def test_a_spent_budget_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    report = measure(Options(only="swiglu", dry_run=True, budget_s=100))
    assert [("all" in one.found) for one in report.outcomes] == [False, False, False, True]
    assert any("1 of 4 cases left out" in note for note in report.notes)
    assert "left out: the budget of 100 s was spent" in report.table()


def test_what_is_there_is_kept_after_each_case() -> None:
    lengths: list[int] = []

    def after(report: Report) -> None:
        lengths.append(len({(row["kernel"], row["case"]) for row in csv.DictReader(StringIO(report.csv()))}))

    measure(Options(only="swiglu", dry_run=True), after)
    assert lengths == [1, 2, 3, 4]


def test_no_such_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--only", "swigl2", "-o", str(tmp_path / "b.csv")]) == 2
    assert "no case holds 'swigl2'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("numpy", "told"), [("2.3.5", False), ("2.4.0", True)])
def test_an_interpreter_that_cannot_loop_is_told(numpy: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "version", {"triton": "3.6.0", "numpy": numpy}.__getitem__)
    assert any(f"fails under numpy {numpy}" in note for note in benchmark.interpreter_notes()) == told
