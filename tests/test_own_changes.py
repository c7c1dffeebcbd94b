"""What one change does for a layout of the user's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.explain import explain_layout
from shardplan.planner.machines import with_gpus_changed
from shardplan.planner.own_changes import MEMORY, MOST_TOLD, own_changes
from shardplan.planner.plan import Plan
from shardplan.planner.search import judge, search
from shardplan.planner.sensitivity import RATES, Question
from shardplan.planner.space import Wishes

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "a100-h100.toml"
AROUND = {*RATES, "twice the global batch", "half the global batch", "twice the GPUs", "half the GPUs"}


def question(cluster: str | Path = "h100-ib", gpus: int = 64, runtime: str = "megatron") -> Question:
    return Question(
        model=load_model("qwen2.5-14b"),
        job=Job(seq=4096, global_batch=256, precision="bf16"),
        cluster=load_cluster(cluster, gpus=gpus),
        runtime=load_runtime(runtime),
        wishes=Wishes(),
        headroom=0.05,
    )


def rate(asked: Question, words: str) -> float:
    """Tokens/s per GPU of a layout that fits."""
    told = judge(parse_layout(words), model=asked.model, job=asked.job, cluster=asked.cluster, runtime=asked.runtime)
    assert isinstance(told, dict)
    assert told["fits"], told["rejections"]
    return float(told["throughput"]["tokens_per_s_per_gpu"])


@pytest.mark.parametrize("cluster", ["h100-ib", EXAMPLE])
@pytest.mark.parametrize(
    "words", ["dp=8 tp=4 pp=2 zero=1", "dp=4 tp=8 pp=2 zero=1 sequence_parallel=true recompute=full"]
)
def test_every_row_is_the_layout_estimated_with_that_change(cluster: str | Path, words: str) -> None:
    asked = question(cluster)
    rows = own_changes(asked, parse_layout(words))
    before = rate(asked, words)
    assert [row["gain_fraction"] for row in rows] == sorted((row["gain_fraction"] for row in rows), reverse=True)
    own = [row for row in rows if row["change"] not in AROUND and not row["change"].startswith(MEMORY)]
    assert 3 <= len(own) <= MOST_TOLD
    for row in own:
        assert row["gain_fraction"] == pytest.approx(rate(asked, row["layout"]) / before - 1.0, rel=1e-6)
        assert row["gain_fraction"] > 0.0
        assert set(row["change"].split()) <= set(parse_layout(row["layout"]).words(every=True).split())
    for change, faster in RATES.items():
        (row,) = (row for row in rows if row["change"] == change)
        assert row["layout"] is None
        after = rate(replace(asked, cluster=faster(asked.cluster)), words)
        assert row["gain_fraction"] == pytest.approx(after / before - 1.0, rel=1e-6)
        assert row["gain_fraction"] >= 0.0


def test_more_gpus_and_batches_keep_all_but_dp() -> None:
    asked, words = question(), "dp=16 tp=4 zero=1 sequence_parallel=true"
    rows = {row["change"]: row for row in own_changes(asked, parse_layout(words))}
    before = rate(asked, words)
    twice = replace(asked, cluster=asked.cluster.with_gpus(128))
    assert rows["twice the GPUs"]["layout"] == parse_layout(words.replace("dp=16", "dp=32")).words()
    gain = rate(twice, words.replace("dp=16", "dp=32")) / before - 1.0
    assert rows["twice the GPUs"]["gain_fraction"] == pytest.approx(gain, rel=1e-6)
    larger = replace(asked, job=replace(asked.job, global_batch=512))
    assert rows["twice the global batch"]["gain_fraction"] == pytest.approx(
        rate(larger, words) / before - 1.0, rel=1e-6
    )


def test_memory_is_told_with_the_word_it_makes_room_for() -> None:
    asked, words = question(gpus=16), "dp=8 tp=2 zero=1 sequence_parallel=true recompute=full"
    roomy = replace(
        asked, cluster=with_gpus_changed(asked.cluster, lambda g: replace(g, memory_bytes=1.1 * g.memory_bytes))
    )
    found = [row for row in own_changes(asked, parse_layout(words)) if row["change"].startswith(MEMORY)]
    for row in found:
        told = judge(
            parse_layout(row["layout"]), model=asked.model, job=asked.job, cluster=asked.cluster, runtime=asked.runtime
        )
        assert isinstance(told, dict)
        assert not told["fits"]
        assert row["gain_fraction"] == pytest.approx(rate(roomy, row["layout"]) / rate(asked, words) - 1.0, rel=1e-6)
    assert found


def test_a_layout_that_does_not_fit_is_told_what_makes_it_fit() -> None:
    asked, own = question(gpus=16), parse_layout("dp=16 zero=1")
    told = judge(own, model=asked.model, job=asked.job, cluster=asked.cluster, runtime=asked.runtime)
    assert isinstance(told, dict)
    assert not told["fits"]
    rows = own_changes(asked, own)
    assert rows
    assert all(row["layout"] is not None and rate(asked, row["layout"]) for row in rows if row["change"] not in AROUND)


def test_the_micro_batch_is_tried_down_to_one_and_words_that_go_are_named() -> None:
    asked, own = question(gpus=16), parse_layout("dp=4 tp=4 zero=1 sequence_parallel=true micro_batch=16")
    changes = [row["change"] for row in own_changes(asked, own)]
    assert {"micro_batch=4", "micro_batch=1"} < set(changes)
    assert "micro_batch=8" not in changes
    asked = question(gpus=32, runtime="fsdp2")
    rows = own_changes(asked, parse_layout("dp=32 zero=3 dp_shard=8 recompute=full"))
    (row,) = (row for row in rows if row["change"] == "without dp_shard")
    assert row["layout"] == "dp=32 tp=1 pp=1 micro_batch=1 zero=3 recompute=full"


def test_a_layout_of_the_users_own_is_held_against_what_has_its_words_too() -> None:
    """Quantised gathers are not searched unless asked for: a layout that has them is not to be faster than the best."""
    words = "explain qwen2.5-14b --cluster h100-ib --gpus 32 --global-batch 64 --seq 4096 --runtime deepspeed --layout"
    own = "dp=32 zero=3 qwz=true qgz=true hpz=8 recompute=full"
    printed = CliRunner().invoke(app, [*words.split(), own, "--json"])
    told = json.loads(printed.output)
    against = parse_layout(told["runners_up"][0]["layout"])
    assert told["time"]["step_s"] >= told["runners_up"][0]["step_s"]
    assert against.qwz or against.qgz or against.zero < 3


def test_one_gpu_has_no_links_to_change() -> None:
    asked = question("8x4090", 1, "fsdp2")
    rows = own_changes(asked, parse_layout("zero=3 recompute=full offload_optimizer=cpu offload_params=cpu"))
    assert not {"10 % faster links inside the node", "10 % faster network between nodes"} & {
        row["change"] for row in rows
    }


def test_explain_prints_the_table() -> None:
    words = "explain qwen2.5-14b --cluster h100-ib --gpus 16 --global-batch 64 --seq 4096 --runtime fsdp2 --layout"
    printed = CliRunner().invoke(app, [*words.split(), "dp=8 tp=2 zero=3 recompute=full"])
    assert printed.exit_code == 0, printed.output
    assert "One change, the rest of the layout kept: tokens/s/GPU" in printed.output
    assert "recompute=" in printed.output.split("One change")[1]


def test_the_best_layout_is_compared_with_the_next_and_not_with_itself() -> None:
    asked = {
        "model": load_model("llama-3-8b"),
        "job": Job(seq=4096, global_batch=64, precision="bf16"),
        "cluster": load_cluster("h100-ib", gpus=8),
        "runtime": load_runtime("megatron"),
    }
    found = search(**asked).ranked
    assert found is not None
    best = found.layouts.row(0)
    own = judge(replace(best, dp_shard=best.dp_shard or best.dp), **asked)  # the same layout, said otherwise
    assert isinstance(own, dict)
    told = explain_layout(own, **asked)
    assert told["notes"] == ["this layout is the best of the space"]
    (following,) = told["runners_up"]
    assert following["layout"] == told["search"]["ranked"][1]["layout"] != best.words()
    assert following["difference_s"]


def test_a_plans_own_layout_beside_it_is_called_that(tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    words = f"plan tiny --cluster h100-ib --gpus 2 --global-batch 8 --seq 256 -o {path}"
    assert CliRunner().invoke(app, words.split()).exit_code == 0
    own = Plan.read(path).layout
    printed = CliRunner().invoke(app, ["explain", path, "--layout", own.words()])
    assert printed.exit_code == 0
    assert "this is the plan's own layout" in printed.output
    against = [line for line in printed.output.splitlines() if line.startswith("against ")]
    assert against
    assert not any(line.startswith(f"against {own.words()},") for line in against)
    other = CliRunner().invoke(app, ["explain", path, "--layout", "dp=1 tp=2"])
    assert "the plan's own" not in other.output


def test_headroom_is_said_to_be_of_host_memory_too() -> None:
    """`Estimates.fits_below_gpu` keeps the same fraction of host memory and flash free."""
    for command in ("plan", "estimate", "explain", "sweep"):
        shown = " ".join(CliRunner().invoke(app, [command, "--help"]).output.replace("│", " ").split())
        assert "host memory and flash" in shown, command
