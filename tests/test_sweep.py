"""Shortlists, sweeps and two plans side by side."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardplan.cli.sweep import positive_numbers, whole_numbers
from shardplan.cli.sweep_table import answer_lines, unpriced_lines
from shardplan.costmodel.job import Job
from shardplan.costmodel.memory import FULL
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.recompute import ALL_LAYERS
from shardplan.costmodel.remedies import LEAST_SAVING
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, load_cluster
from shardplan.planner.choose import make_plan
from shardplan.planner.deadline import narrowed
from shardplan.planner.diff import diff_plans
from shardplan.planner.machines import network_gbps_per_gpu, with_network_rate
from shardplan.planner.plan import Plan
from shardplan.planner.search import SearchResult, search, search_document
from shardplan.planner.shortlist import IDEA_COLUMNS, distinct, memory_front, worth_telling
from shardplan.planner.space import Wishes, parse_wishes
from shardplan.planner.sweep import COLUMNS, Grid, Sweep, answers, mark_front

MODEL = "llama-3-8b"


def found(gpus: int = 16) -> SearchResult:
    return search(
        model=load_model(MODEL),
        job=Job(seq=4096, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=gpus),
        runtime="megatron",
    )


def plan(gpus: int = 8, *, cluster: str = "h100-ib", fix: str = "") -> Plan:
    model, job, runtime = load_model(MODEL), Job(seq=4096, global_batch=64), load_runtime("megatron")
    result = search(
        model=model, job=job, cluster=load_cluster(cluster, gpus=gpus), runtime=runtime, wishes=parse_wishes(fix)
    )
    return make_plan(
        result,
        model=model,
        job=job,
        runtime=runtime,
        runtime_name="megatron",
        cluster_document=cluster_document(cluster),
        version="0",
    )


def test_each_idea_comes_once_with_its_best_variant() -> None:
    ranked = found().ranked
    assert ranked is not None
    first, variants = distinct(ranked.layouts)
    every_layer = (ranked.layouts.recompute == FULL) & (ranked.layouts.recompute_layers == ALL_LAYERS)
    columns = np.stack([*(getattr(ranked.layouts, name) for name in IDEA_COLUMNS), every_layer], 1)
    seen: dict[tuple[int, ...], list[int]] = {}
    for at, idea in enumerate(columns.tolist()):
        seen.setdefault(tuple(idea), []).append(at)
    assert [(rows[0], len(rows)) for rows in seen.values()] == list(zip(first, variants, strict=True))
    assert variants.sum() == len(ranked)


def test_the_front_of_time_and_memory_is_the_lower_hull_of_all() -> None:
    ranked = found().ranked
    assert ranked is not None
    time, peak = ranked.step_s, ranked.device_peak_bytes
    front = memory_front(ranked)
    assert front[0] == time.argmin()
    assert (np.diff(time[front]) >= 0).all()
    assert (np.diff(peak[front]) <= -LEAST_SAVING * peak[front][:-1]).all()
    for row in front:
        assert not ((time < time[row]) & (peak <= peak[row])).any()
    assert peak[front[-1]] * (1 - LEAST_SAVING) <= peak.min()


def test_cp_in_place_of_dp_is_told_once() -> None:
    """dp=4 cp=2 with twice the sequences in a micro-batch is dp=8 again, unless it is the better one or needs less memory."""
    ranked = found().ranked
    assert ranked is not None
    first, _ = distinct(ranked.layouts)
    told = ranked.take(first[worth_telling(ranked, first)])
    seen: dict[tuple[int, ...], float] = {}
    for at in range(len(told)):
        row, peak = told.layouts.row(at), float(told.device_peak_bytes[at])
        mesh = (row.dp * row.cp, row.tp, row.pp)
        assert peak <= (1.0 - LEAST_SAVING) * seen.get(mesh, np.inf)
        seen[mesh] = peak
    assert (told.layouts.cp == 1).any()


def test_runners_up_are_as_good_as_knobs_make_them() -> None:
    inputs = {"model": load_model("llama-3-70b"), "job": Job(seq=4096, global_batch=256), "runtime": "fsdp2"}
    cluster = load_cluster("h100-ib", gpus=64)
    ranked = search(**inputs, cluster=cluster).ranked
    assert ranked is not None
    first, _ = distinct(ranked.layouts)
    compared = 0
    for row in first[worth_telling(ranked, first)][1:4]:
        one = ranked.layouts.row(int(row))
        if one.recompute == "full":  # an idea of its own beside the same with less
            continue
        compared += 1
        words = ("dp", "tp", "pp", "cp", "ep", "zero", "offload_optimizer")
        fixed = parse_wishes(" ".join(f"{word}={getattr(one, word)}" for word in words), ["stage_layers"])
        alone = search(**inputs, cluster=cluster, wishes=fixed).ranked
        assert alone is not None
        assert float(alone.step_s[0]) >= float(ranked.step_s[row]) * (1.0 - 1e-9), one.words()
    assert compared


def test_a_plan_lists_ideas_and_the_front() -> None:
    document = search_document(found(), 4)
    assert len(document["ranked"]) == 4
    assert document["ideas"] > 4
    assert [row["rank"] for row in document["ranked"]] == sorted({row["rank"] for row in document["ranked"]})
    assert document["memory_front"][0]["layout"] == document["ranked"][0]["layout"]


def sweep_of(runtime: str = "megatron") -> Sweep:
    return Sweep(model=load_model(MODEL), runtime=load_runtime(runtime), wishes=Wishes())


def grid_of(*, tokens: float | None = None, gpus: tuple[int, ...] = (), rates: tuple[float, ...] = ()) -> Grid:
    job = Job(seq=4096, global_batch=64, tokens=tokens)
    cluster = load_cluster("h100-ib", gpus=64)
    return Grid(machines=[(cluster, job)], global_batches=[64, 128], seqs=[4096], gpus=gpus, network_gbps_per_gpu=rates)


def test_a_sweep_is_a_search_at_every_point() -> None:
    rows = list(sweep_of().rows(grid_of(gpus=(8, 12, 16), rates=(100.0, 400.0))))
    assert [(row["network_gbps_per_gpu"], row["global_batch"], row["gpus"]) for row in rows] == [
        (rate, batch, gpus) for rate in (100.0, 400.0) for batch in (64, 128) for gpus in (8, 12, 16)
    ]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {row["reason"] for row in rows if not row["fits"]} == {
        "gpus=12 is not a whole number of 'h100-ib' nodes of 8 GPUs"
    }
    best = found().ranked
    assert best is not None
    unchanged = next(row for row in rows if (row["network_gbps_per_gpu"], row["gpus"]) == (400.0, 16))
    assert unchanged["step_s"] == pytest.approx(float(best.step_s[0]))
    assert unchanged["layout"] == best.layouts.row(0).words()
    slower = next(row for row in rows if (row["network_gbps_per_gpu"], row["gpus"]) == (100.0, 16))
    assert slower["step_s"] > unchanged["step_s"]


def test_a_number_of_gpus_without_layouts_says_what_excludes_them_and_which_number_has_some() -> None:
    """It told the first candidate that a rule refused."""
    job, cluster = Job(seq=4096, global_batch=64), load_cluster("h100-ib", gpus=8 * 35 * 2)
    (row,) = sweep_of().rows(
        Grid(machines=[(cluster, job)], global_batches=[64], seqs=[4096], gpus=(560,)),
    )
    for part in ("no dp*tp*pp*cp = 560 (2^4*5*7) is left", "dp=", "tp=", "layers", "GPUs, the nearest number below"):
        assert part in row["reason"], row["reason"]


def test_a_deadline_is_met_by_the_fewest_gpus() -> None:
    sweep, grid = sweep_of(), grid_of(tokens=1e11)
    every = [
        sweep.row(grid.machines[0][0], gpus, Job(seq=4096, global_batch=64, tokens=1e11)) for gpus in range(8, 65, 8)
    ]
    days = next(row["days_with_failures"] or row["days"] for row in every if row["gpus"] == 48) * 1.0001
    rows = list(sweep.rows(dataclasses.replace(grid, global_batches=[64]), days))
    least = answers(rows, days)["fewest"]
    assert least is not None
    assert least["gpus"] == min(row["gpus"] for row in every if (row["days_with_failures"] or row["days"]) <= days)
    assert {row["gpus"] for row in rows} >= {1, 2, 4, 8, 16, 32, 64, least["gpus"]}


def test_answers_name_the_fastest_and_the_cheapest() -> None:
    empty = dict.fromkeys(COLUMNS)
    slow = {
        **empty,
        "gpus": 8,
        "fits": True,
        "tokens_per_s": 1.0,
        "usd_per_million_tokens": 1.0,
        "days": 9.0,
        "step_s": 1,
    }
    fast = {**slow, "gpus": 16, "tokens_per_s": 2.0, "usd_per_million_tokens": 2.0, "days": 3.0}
    nothing = {**empty, "gpus": 4, "fits": False}
    assert answers([slow, fast, nothing], None) == {"fastest": fast, "cheapest": slow}
    assert answers([slow, fast, nothing], 4.0) == {"fastest": fast, "cheapest": fast, "fewest": fast}
    late = answers([slow, fast], 2.0)
    assert late == {"fastest": fast, "cheapest": None, "fewest": None}
    assert "no point finishes within 2 days" in answer_lines(late, 2.0)[-1]
    assert answers([nothing], None) == {"fastest": None, "cheapest": None}


def test_the_fewest_gpus_in_time_are_sought_to_the_node() -> None:
    for least in (8, 16, 1000, 1008, 4096, 8184, 8192):
        asked: list[int] = []

        def in_time(gpus: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(gpus)
            return gpus >= least

        assert narrowed(0, 8192, 8, in_time) == -(-least // 8) * 8
        assert len(asked) <= 7 * 4


def test_the_front_of_a_sweep_and_clusters_without_a_price() -> None:
    def row(gpus: int, tokens: float, gib: float, price: float | None, **more: Any) -> dict[str, Any]:
        figures = {"gpus": gpus, "tokens_per_s": tokens, "device_peak_gib": gib, "usd_per_million_tokens": price}
        return {**dict.fromkeys(COLUMNS), "fits": True, "cluster": "c", "seq": 1, "global_batch": 1, **figures, **more}

    rows = [
        row(8, 10.0, 60.0, 1.0),
        row(16, 19.0, 60.0, 1.1),
        row(16, 19.0, 61.0, 1.2),
        row(16, 18.0, 60.0, None),
        row(32, 15.0, 40.0, 2.0),
        row(32, 15.0, 70.0, 2.0, global_batch=2),
        row(4, 0.0, 0.0, None, fits=False, cluster="d"),
        row(8, 9.0, 59.0, None, cluster="e"),
    ]
    mark_front(rows)
    assert [one["pareto"] for one in rows] == [True, True, False, False, True, True, None, False]
    (line,) = unpriced_lines(rows)
    assert line.startswith("no price known of c, e: ")
    assert not unpriced_lines(rows[:3])


def test_a_network_rate_is_that_of_each_gpu() -> None:
    cluster = load_cluster("selene", gpus=16)
    assert network_gbps_per_gpu(cluster) == 200.0
    assert network_gbps_per_gpu(with_network_rate(cluster, 50.0)) == 50.0
    with pytest.raises(InputError, match="not a positive rate"):
        with_network_rate(cluster, 0.0)
    with pytest.raises(InputError, match="no network between nodes"):
        with_network_rate(load_cluster("8x4090"), 100.0)


def test_lists_of_numbers() -> None:
    assert whole_numbers("64, 128 64", "--gpus") == [64, 128]
    assert positive_numbers("100,200.5", "--network-gbps") == [100.0, 200.5]
    for text, told in (
        ("64,x", "'x' is not a positive whole number"),
        ("1.5", "'1.5'"),
        ("-8", "'-8'"),
        (",", "no number"),
    ):
        with pytest.raises(InputError, match=told):
            whole_numbers(text, "--gpus")


def test_a_diff_tells_inputs_layout_and_terms() -> None:
    before, after = plan(8), plan(16, fix="tp=4")
    document = diff_plans(before, after)
    assert document["inputs"] == {"gpus": [8, 16]}
    assert document["layout"]["dp"] == [before.layout.dp, after.layout.dp]
    assert document["layout"]["tp"] == [before.layout.tp, 4]
    assert [sum(pair[side] for pair in document["time_s"].values()) for side in (0, 1)] == pytest.approx(
        document["step_s"]
    )
    parts = {name: pair for name, pair in document["memory_bytes"].items() if name != "device_bytes"}
    for side in (0, 1):
        whole = sum(pair[side] for pair in parts.values())
        assert whole == pytest.approx(document["memory_bytes"]["device_bytes"][side])
    assert not document["same"]
    assert diff_plans(before, before)["same"]
    other = diff_plans(before, plan(8, cluster="selene"))["inputs"]
    assert other["cluster.name"] == ["h100-ib", "selene"]


def test_what_was_asked_of_the_search_is_compared_too() -> None:
    before = plan(8)
    after = dataclasses.replace(before, search={**before.search, "headroom": 0.2, "forbid": ["offload"]})
    assert diff_plans(before, after)["inputs"] == {
        "headroom": [before.search["headroom"], 0.2],
        "forbid": [[], ["offload"]],
    }
    assert not diff_plans(before, after)["same"]


def test_a_changed_runtime_file_is_told() -> None:
    before = plan(8)
    after = dataclasses.replace(before, digests={**before.digests, "runtime": "0" * 64})
    assert list(diff_plans(before, after)["inputs"]) == ["runtime (its file)"]


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from shardplan.cli import _exit_code

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["shardplan", *words])
        return _exit_code(), capsys.readouterr().out

    table, drawing = tmp_path / "sweep.csv", tmp_path / "sweep.svg"
    words = (MODEL, "--cluster", "h100-ib", "--cluster", "selene", "--global-batch", "64", "--seq", "4096")
    code, out = call("sweep", *words, "--gpus", "8,16", "--csv", str(table), "--plot", str(drawing))
    assert code == 0
    assert "fastest: 16 GPUs of h100-ib" in out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["cluster"], row["gpus"]) for row in rows] == [
        (cluster, gpus) for cluster in ("h100-ib", "selene") for gpus in ("8", "16")
    ]
    assert "<svg" in drawing.read_text()
    code, out = call("sweep", *words, "--gpus", "8", "--tokens", "1e13", "--days", "1", "--json")
    assert code == 1
    assert json.loads(out)["answers"]["fewest"] is None
    assert call("sweep", *words, "--days", "1")[0] == 2
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    plan(8).write(first)
    plan(16).write(second)
    code, out = call("diff", str(first), str(second))
    assert code == 0
    assert "Step time" in out
    assert call("diff", str(first), str(tmp_path / "none.json"))[0] == 2
