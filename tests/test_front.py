"""What less memory costs: the searched front of a plan, and with money and GPUs of a sweep (brute force: test_search_brute_force.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.cli.sweep_table import SHOWN_SAVING, thinned
from shardplan.costmodel.job import Job
from shardplan.costmodel.mixed import estimate_any
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.front import FRONT_SAVING, memory_points, searched_front
from shardplan.planner.machines import with_gpu_memory, with_memory_times
from shardplan.planner.one_size import LEAN_STEP, memory_for
from shardplan.planner.search import search
from shardplan.planner.space import Wishes
from shardplan.planner.sweep import COLUMNS, Grid, Sweep, fastest_of_points, mark_front
from shardplan.planner.watch import Watch

HEADROOM = 0.05
EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "a100-h100.toml"


def setting(gpus: int = 16, runtime: str = "megatron") -> Setting:
    return Setting(
        model=load_model("llama-2-7b"),
        job=Job(seq=4096, global_batch=64, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=gpus),
        runtime=load_runtime(runtime),
    )


@pytest.mark.parametrize("runtime", ["megatron", "fsdp2"])
def test_every_point_is_the_best_of_a_search_on_gpus_with_that_much_memory(runtime: str) -> None:
    """Stages cut, orders and context parallelism included."""
    at = setting(runtime=runtime)
    points = list(memory_points(at, Wishes(), HEADROOM))
    assert len(points) > 4
    memory_bytes = at.cluster.gpu.memory_bytes
    for point in points:
        cluster = with_gpu_memory(at.cluster, memory_bytes)
        found = search(model=at.model, job=at.job, cluster=cluster, runtime=at.runtime).ranked
        assert found is not None
        assert point.step_s == pytest.approx(float(found.step_s[0]), rel=1e-9)
        memory_bytes = memory_for(at, (1.0 - FRONT_SAVING) * point.peak_bytes, HEADROOM)
    cluster = with_gpu_memory(at.cluster, memory_bytes)
    assert search(model=at.model, job=at.job, cluster=cluster, runtime=at.runtime).ranked is None


def test_a_front_never_gets_faster_and_always_leaner() -> None:
    points = list(memory_points(setting(), Wishes(), HEADROOM))
    for one, other in pairwise(points):
        assert other.step_s >= one.step_s
        assert other.peak_bytes <= (1.0 - FRONT_SAVING) * one.peak_bytes * (1.0 + 1e-12)


def test_the_leanest_layout_has_its_stages_cut() -> None:
    asked = {
        "model": load_model("llama-3-8b"),
        "job": Job(seq=8192, global_batch=64, precision="bf16"),
        "runtime": "megatron",
    }
    cluster = load_cluster("h100-ib", gpus=16)
    leanest = search(**asked, cluster=cluster, objective="memory").ranked
    assert leanest is not None
    assert leanest.layouts.row(0).stage_layers is not None
    peak_bytes = float(leanest.device_peak_bytes[0])
    at = Setting(**{**asked, "runtime": load_runtime("megatron")}, cluster=cluster)
    less = with_gpu_memory(cluster, memory_for(at, (1.0 - LEAN_STEP) * peak_bytes, HEADROOM))
    assert search(**asked, cluster=less).ranked is None
    same = with_gpu_memory(cluster, memory_for(at, (1.0 + 1e-9) * peak_bytes, HEADROOM))
    assert search(**asked, cluster=same).ranked is not None


def mixed() -> Setting:
    cluster = load_cluster(EXAMPLE)
    small = replace(cluster, parts=tuple(part.with_gpus(8) for part in cluster.parts))
    small = replace(small, node_runs=tuple(run for part in small.parts for run in part.node_runs))
    return replace(setting(), cluster=small)


@pytest.mark.slow
def test_on_mixed_nodes_every_point_is_the_best_of_a_search_with_that_share_of_memory() -> None:
    at = mixed()
    points = list(memory_points(at, Wishes(), HEADROOM))
    assert len(points) > 4
    times = 1.0
    for point in points:
        cluster = with_memory_times(at.cluster, times)
        found = search(model=at.model, job=at.job, cluster=cluster, runtime=at.runtime).ranked
        assert found is not None
        assert point.step_s == pytest.approx(float(found.step_s[0]), rel=1e-9)
        own = Setting(model=at.model, job=at.job, cluster=point.cluster, runtime=at.runtime)
        again = estimate_any(own, point.found.layouts.row(0))
        assert float(again.step_s[0]) == pytest.approx(point.step_s, rel=1e-9)
        assert bool(again.fits(HEADROOM)[0])
        assert point.share <= times
        times = memory_for(at, (1.0 - FRONT_SAVING) * point.share, HEADROOM)


def test_the_front_of_mixed_nodes_gets_leaner_and_slower() -> None:
    rows, stopped = searched_front(mixed(), Wishes(), HEADROOM, Watch())
    assert not stopped
    assert {tuple(sorted(row["parts"])) for row in rows} == {("a100-80gb", "h100-sxm")}
    for one, other in pairwise(rows):
        assert other["step_s"] > one["step_s"]
        assert 1.0 - other["headroom_fraction"] <= (1.0 - FRONT_SAVING) * (1.0 - one["headroom_fraction"]) * (
            1.0 + 1e-12
        )


class Stopping(Watch):
    """Presses Ctrl-C after some points."""

    def __init__(self, after: int) -> None:
        super().__init__(keeps_best=True)
        self.left = after

    def phase(self, name: str, done: float, looked_at: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_the_points_so_far() -> None:
    rows, stopped = searched_front(setting(), Wishes(), HEADROOM, Stopping(3))
    assert (len(rows), stopped) == (3, True)


def test_the_command_writes_the_front_into_the_plan(tmp_path: Path, root: Path) -> None:
    words = "plan llama-2-7b --cluster h100-ib --gpus 16 --global-batch 64 --seq 4096 --runtime fsdp2 --front -o"
    told = CliRunner().invoke(app, [*words.split(), str(tmp_path / "plan.json")])
    assert told.exit_code == 0, told.output
    assert "Less memory for more time" in told.output
    document = json.loads((tmp_path / "plan.json").read_text())
    front = document["search"]["front"]
    assert front[0]["layout"] == document["search"]["ranked"][0]["layout"]
    assert all(row["usd_per_million_tokens"] for row in front)
    schema = Draft202012Validator(json.loads((root / "planner" / "plan.schema.json").read_text()))
    assert not list(schema.iter_errors(document))


def test_a_sweep_marks_the_front_over_time_memory_money_and_gpus() -> None:
    at = setting()
    sweep = Sweep(model=at.model, runtime=at.runtime, wishes=Wishes(), front=True)
    sizes = (4, 8, 16)
    grid = Grid(machines=[(at.cluster, at.job)], global_batches=[64], seqs=[4096], gpus=sizes)
    rows: list[dict[str, Any]] = list(sweep.rows(grid))
    mark_front(rows)
    assert all(tuple(row) == COLUMNS for row in rows)
    for gpus in sizes:
        fronts = list(memory_points(setting(gpus), Wishes(), HEADROOM))
        assert [row["step_s"] for row in rows if row["gpus"] == gpus] == [point.step_s for point in fronts]
    assert [row["gpus"] for row in fastest_of_points(rows)] == list(sizes)
    assert all(row["pareto"] for row in fastest_of_points(rows))  # each is the fastest on its GPUs, more are faster
    assert len([row for row in rows if row["pareto"]]) > len(sizes)
    shown = thinned(rows)
    assert [row for row in shown if row in fastest_of_points(rows)] == fastest_of_points(rows)
    for one, other in pairwise(shown):
        lean = other["device_peak_gib"] <= (1.0 - SHOWN_SAVING) * one["device_peak_gib"]
        assert one["gpus"] < other["gpus"] or (one["gpus"] == other["gpus"] and lean)


def test_a_row_that_fits_stands_for_its_point() -> None:
    """Two machines of one name, of which the first holds nothing."""
    point = {"cluster": "ours", "gpus": 8, "network_gbps_per_gpu": 400.0, "global_batch": 64, "seq": 4096}
    rows = [{**point, "fits": fits, "tokens_per_s": rate} for fits, rate in ((False, None), (True, 2.0), (True, 1.0))]
    assert fastest_of_points(rows) == [rows[1]]
