"""Predicted beside measured: terms add up, the busiest rank counts, the sentence names what the difference is of."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from shardplan.costmodel.runtime import load_runtime
from shardplan.executor import measure
from shardplan.executor.compare import comparison, comparison_lines
from shardplan.executor.layout_cases import LAYOUTS, layout_cases
from shardplan.executor.measure import StepRecord
from shardplan.executor.validate_layouts import LayoutResult, pairs_in_order
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import judge

PREDICTION = {
    "time": {
        "step_s": 0.100,
        "compute_s": 0.060,
        "recompute_s": 0.010,
        "host_s": 0.006,
        "optimizer_s": 0.004,
        "tp_exposed_s": 0.0,
        "cp_exposed_s": 0.0,
        "ep_exposed_s": 0.0,
        "dp_exposed_s": 0.005,
        "pp_exposed_s": 0.002,
        "bubble_s": 0.013,
        "offload_exposed_s": 0.0,
        "phases": {"forward_s": 0.02, "backward_s": 0.05},
    },
    "memory": {
        "stages": [
            {
                "stage": stage,
                "parameters_bytes": 100.0,
                "gradients_bytes": 100.0,
                "optimizer_bytes": 200.0,
                "activations_bytes": 500.0,
                "buffers_bytes": 0.0,
                "allocated_bytes": 900.0,
                "allocator_slack_bytes": 0.0,
                "context_bytes": 100.0,
                "device_bytes": 1000.0,
            }
            for stage in (0, 1)
        ]
    },
}


def record(step: int, *, step_s: float, forward_s: float | None = None, **fields: float) -> StepRecord:
    busy = {} if forward_s is None else {"forward_s": forward_s, "backward_s": 2 * forward_s, "optimizer_s": 0.004}
    common = {"loss": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "data_s": 0.001, "rss_bytes": 1}
    return StepRecord(step=step, step_s=step_s, **common, **busy, **fields)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ranks").mkdir()
    for rank, peak in enumerate((1100.0, 1500.0)):
        parts = {"stage": rank, "parameters": 100.0, "gradients": 100.0, "optimizer": 200.0, "context": 100.0}
        rest = {"activations and buffers": peak - 500.0, "of the device": peak}
        (tmp_path / "ranks" / f"rank-{rank:04d}.memory.json").write_text(json.dumps(parts | rest))
    return tmp_path


def compared(folder, *, step_s: float = 0.125):
    slow = [record(step, step_s=step_s, forward_s=0.03, dp_exposed_s=0.005, pp_exposed_s=0.02) for step in range(1, 8)]
    quick = [record(step, step_s=step_s, forward_s=0.01, dp_exposed_s=0.05, pp_exposed_s=0.03) for step in range(1, 8)]
    return comparison(folder, {0: quick, 1: slow}, PREDICTION, step_s=step_s, warmup_steps=2)


def test_both_sides_add_up_to_the_step(folder):
    whole, *parts = compared(folder)["times"]
    assert whole["term"] == "step"
    assert sum(part["predicted"] for part in parts) == pytest.approx(whole["predicted"])
    assert sum(part["measured"] for part in parts) == pytest.approx(whole["measured"])


def test_steps_that_wait_now_here_now_there_leave_no_rest(folder):
    """The parts of each step add up to it; their medians do not."""
    steps = []
    for i in range(9):
        waits = {f"{axis}_exposed_s": 0.1 if i % 3 == at else 0.0 for at, axis in enumerate(("dp", "tp", "pp"))}
        steps.append(record(i + 1, step_s=0.195, forward_s=0.03, **waits))
    times = {
        term["term"]: term["measured"]
        for term in comparison(folder, {0: steps}, PREDICTION, step_s=0.195, warmup_steps=0)["times"]
    }
    assert times["rest"] == pytest.approx(0.0, abs=1e-9)
    assert times["exposed dp"] + times["exposed tp"] + times["bubble, transfers"] == pytest.approx(0.1)


def test_the_busiest_rank_after_the_warm_up_counts(folder):
    phases = compared(folder)["phases"]
    assert (phases["rank"], phases["steps"]) == (1, 5)
    assert phases["forward_s"] == pytest.approx({"p20": 0.03, "p50": 0.03, "p80": 0.03})
    assert "tp_exposed_s" not in phases


def test_the_sentence_names_the_largest_part_of_the_difference(folder):
    found = compared(folder)
    assert found["time_culprit"] == (
        "step: 125.0 ms measured, 100.0 ms predicted (+25%); mostly forward: 8.0 ms more than predicted, 32% of the difference"
    )
    assert "mostly activations and buffers" in found["memory_culprit"]
    assert "(+50%)" in found["memory_culprit"]


def test_what_agrees_has_no_culprit_but_a_largest_part(folder):
    assert compared(folder, step_s=0.1005)["time_culprit"].endswith("; other parts make up for it")


def test_a_run_that_nothing_looked_into_says_so(folder):
    found = comparison(folder, {0: [record(1, step_s=0.1)]}, PREDICTION, step_s=0.1, warmup_steps=0)
    assert [term["term"] for term in found["times"]] == ["step"]
    assert found["time_culprit"] is None
    assert "phases: no step was looked into (--profile)" in comparison_lines({"comparison": found})


def test_the_table_has_a_line_a_term(folder):
    lines = comparison_lines({"comparison": compared(folder)})
    (forward,) = (line.split() for line in lines if line.startswith("forward"))
    assert forward == ["forward", "22.0", "ms", "30.0", "ms", "1.36", "30.0", "ms", "30.0", "ms"]
    assert any(line.startswith("bubble, transfers") for line in lines)


def test_steps_that_were_looked_into_are_not_timed_when_others_are_there():
    steps = [record(step, step_s=0.1) for step in (1, 2, 3)] + [record(4, step_s=0.5, forward_s=0.1)]
    found = measure.measured({0: steps}, tokens_per_step=1, warmup_steps=0)
    assert found["step_s"] == found["step_s_p80"] == pytest.approx(0.1)
    found = measure.measured({0: steps[2:]}, tokens_per_step=1, warmup_steps=0)
    assert found["step_s"] == pytest.approx(0.3), "too few others"


def test_utilisation_of_what_was_measured_counts_what_the_prediction_counts():
    prediction = {"time": {"step_s": 2.0}, "throughput": {"mfu": 0.3}, "assumptions": ["x", "MFU counts 6 FLOP"]}
    assert measure.mfu(prediction, 3.0) == {"mfu": pytest.approx(0.2), "mfu_counts": "MFU counts 6 FLOP"}
    assert measure.mfu({}, 3.0) == {"mfu": None, "mfu_counts": None}


def shardplan_compare(*words):
    from shardplan.cli.compare import compare

    app = typer.Typer()
    app.command()(compare)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_finished_folder_is_compared_again(folder):
    run = {"layout": "dp=2", "measured": {"step_s": 0.13}, "comparison": compared(folder)}
    (folder / "run.json").write_text(json.dumps(run))
    result = shardplan_compare(folder)
    assert result.exit_code == 0, result.output
    assert f"{folder}: dp=2" in result.stdout
    assert "mostly forward" in result.stdout
    assert json.loads(shardplan_compare(folder, "--json").stdout)[str(folder)] == run["comparison"]


def test_what_is_no_run_folder_is_told(tmp_path):
    from shardplan.hw_profiles.errors import InputError

    result = shardplan_compare(tmp_path)
    assert isinstance(result.exception, InputError)
    (tmp_path / "run.json").write_text("{}")
    assert "no field 'comparison'" in str(shardplan_compare(tmp_path).exception)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_layouts_to_validate_break_no_rule(ranks):
    cluster, runtime = load_cluster("localhost").with_gpus(ranks), load_runtime("shardplan")
    for case in layout_cases(ranks):
        assert case.layout().gpus == ranks
        answer = judge(case.layout(), model=case.model(), job=case.job(), cluster=cluster, runtime=runtime)
        assert isinstance(answer, dict), (case.name, answer)
    assert len(layout_cases(1)) + len(layout_cases(2)) >= 2 * 8


def test_pairs_too_close_to_tell_do_not_count():
    def result(predicted_s: float, step_s: float, size: str = "tiny") -> LayoutResult:
        case = layout_cases(1)[0 if size == "tiny" else -1]
        return LayoutResult(case=case, predicted_s=predicted_s, working_s=1, pace=1, step_s=step_s, cpu_s=1, phases={})

    results = [result(1.0, 1.0), result(1.2, 1.05), result(0.9, 1.5), result(9.0, 0.1, "wide")]
    assert pairs_in_order(results, "predicted_s", "step_s") == (0, 2)


@pytest.mark.distributed
def test_the_bare_loop_trains_what_the_executor_trains():
    pytest.importorskip("torch", reason="the executor needs torch")
    words = ["bench", "executor", "--seq", "32", "--micro-batch", "2", "--accumulation", "2", "--pairs", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "from shardplan.cli import main; main()", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["last_loss"][1] == pytest.approx(found["last_loss"][0], rel=1e-5)
    assert found["bare_s"] > 0


@pytest.mark.parametrize(("words", "copies"), [("zero=0", 1.0), ("zero=3", 0.0)])
def test_whole_copies_count_as_parameters(words, copies):
    """On one rank in bf16, fp32 shards and 16-bit copies: of the layers too unless ZeRO-3 has dropped them behind the forward."""
    pytest.importorskip("torch", reason="the executor needs torch")
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", GATHERED, words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    root, layers = found["root"], found["layers"]
    assert found["gathered"] == 2 * (root + copies * layers)
    assert found["told"] == 4 * (root + layers) + found["gathered"]
    assert found["watches"] == 0


GATHERED = """
import json, os, sys
import torch
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.executor.device_run import start_alone
from shardplan.executor.train import memory
from shardplan.executor.trainer import Trainer
from shardplan.planner.plan import Plan

device = torch.device("cpu")
layout, job = parse_layout(sys.argv[1]), Job(seq=32, global_batch=1, precision="bf16")
plan = Plan(model=load_model("tiny"), job=job, cluster={}, gpus=1, runtime="shardplan", layout=layout,
            prediction={}, search={}, digests={}, shardplan_version="")
trainer = Trainer(plan, start_alone(device), device)
sizes = {name: parameter.numel() for name, parameter in trainer.chunks[0].named_parameters()}
layers = sum(size for name, size in sizes.items() if name.startswith("layers"))
trainer.forward_backward(1)
trainer.update(1)
print(json.dumps({"gathered": trainer.gathered_bytes, "told": memory(trainer)["parameters"], "layers": layers,
                  "root": sum(sizes.values()) - layers, "watches": len(trainer.watches)}), flush=True)
os._exit(0)
"""
"""A step of one process, whose process group a test process cannot have."""
