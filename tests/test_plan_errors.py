"""Plan files that say something wrong, and what is said beside them: one line that names the file, or the option; options given twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., tuple[int, str, str]]


def planned(call: Call, path: Path) -> None:
    words = "plan tiny --cluster h100-ib --gpus 2 --global-batch 8 --seq 256 -o"
    assert call(*words.split(), str(path))[0] == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plan: plan.update(gpus=7), ("there are 7 GPUs", "gpus-product")),
        (lambda plan: plan.update(runtime="megatrn"), ("megatrn", "did you mean megatron")),
        (lambda plan: plan["cluster"].pop("node"), ("node is missing",)),
        (lambda plan: plan["layout"].update(tp=3), ("gpus-product", "make the plan again")),
        (lambda plan: plan["search"].update(headroom="x"), ("search.headroom='x'",)),
        (lambda plan: plan["search"].update(headroom=2), ("search.headroom=2",)),
        (lambda plan: plan["search"].update(fix="tp=zz"), ("tp='zz'",)),
        (lambda plan: plan["search"].update(ranked=[{"layout": "dp=x"}]), ("dp='x'",)),
    ],
)
def test_what_a_plan_file_says_wrong_is_said_with_its_name(
    call: Call, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: tuple[str, ...]
) -> None:
    path = tmp_path / "plan.json"
    planned(call, path)
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    code, out, err = call("explain", str(path))
    assert (code, out) == (2, "")
    assert str(path) in err
    assert all(word in err for word in told), err


def test_what_is_said_beside_a_plan_file_is_not_laid_to_the_file(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(call, path)
    for words, told in ((("--layout", "dp=2 zzz=3"), "'zzz' is unknown"), (("--price", "-1"), "price=-1")):
        code, _, err = call("explain", str(path), *words)
        assert code == 2
        assert told in err
        assert str(path) not in err


def test_words_fixed_one_option_at_a_time_all_hold(call: Call) -> None:
    words = ["plan", "tiny", "--cluster", "h100-ib", "--gpus", "2", "--global-batch", "8", "--seq", "256", "--json"]
    code, out, _ = call(*words, "--fix", "tp=2", "--fix", "zero=0 recompute=full")
    assert code == 0
    plan = json.loads(out)
    assert [plan["layout"][word] for word in ("tp", "zero", "recompute")] == [2, 0, "full"]
    assert plan["search"]["fix"] == "tp=2 zero=0 recompute=full"
    code, _, err = call(*words, "--fix", "tp=2", "--fix", "tp=1")
    assert (code, "'tp' is given twice" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--gpus 8 --runtime megatron", "runtime 'megatron' has no schedule=zero_bubble_v"),
        ("--gpus 1 --runtime fsdp2", "schedule=zero_bubble_v is that of a pipeline, and there is none on 1 GPUs"),
        ("--gpus 8 --runtime fsdp2 --forbid pipeline", "schedule=zero_bubble_v is that of a pipeline"),
    ],
)
def test_a_fixed_schedule_asks_for_a_pipeline(call: Call, words: str, told: str) -> None:
    """It was kept as a word without meaning on layouts that have none."""
    plan = "plan llama-3-8b --cluster h100-ib --global-batch 64 --seq 4096 --fix schedule=zero_bubble_v"
    code, out, _ = call(*plan.split(), *words.split())
    assert code == 1
    assert told in " ".join(out.split())


EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda plan: plan["job"].update(seq=128), "its job was edited"),
    (lambda plan: plan["layout"].update(micro_batch=1), "its layout was edited"),
    (lambda plan: plan["model"].update(vocab=512), "its model was edited"),
    (lambda plan: plan["search"].update(headroom=0.5), "its GPUs, runtime or wishes were edited"),
    (lambda plan: plan["prediction"]["time"].update(step_s=1.0), "its prediction was edited"),
    (lambda plan: plan["rank_map"].update(ranks=4), "its rank map was edited"),
]


@pytest.mark.parametrize(("change", "told"), EDITS)
def test_what_was_edited_since_the_plan_was_made_is_said(
    call: Call, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    """The prediction is of what stood there before: as with another runtime file, a note beside the answer and no refusal."""
    whole, edited = tmp_path / "whole.json", tmp_path / "edited.json"
    planned(call, whole)
    plan = json.loads(whole.read_text())
    change(plan)
    edited.write_text(json.dumps(plan))
    code, out, _ = call("explain", str(edited), "--json")
    notes = json.loads(out)["notes"]
    assert (code, notes[0].startswith(told), "plan again" in notes[0]) == (0, True, True), notes
    assert not any("the cost model now says" in note for note in notes)
    assert json.loads(call("explain", str(whole), "--json")[1])["notes"] == []
    code, out, _ = call("diff", str(whole), str(edited), "--json")
    assert (code, json.loads(out)["notes"]) == (0, [[], notes[:1]])


def test_run_diff_report_and_a_layout_beside_it_name_the_edited_file(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(call, path)
    plan = json.loads(path.read_text())
    plan["job"]["seq"] = 128
    path.write_text(json.dumps(plan))
    told = "its job was edited since the plan was made"
    assert f"{path}: {told}" in call("run", str(path))[2]
    assert told in " ".join(call("diff", str(path), str(path))[1].split())
    assert told in call("explain", str(path), "--layout", "dp=2 zero=1", "--json")[1]
    assert call("report", str(path), "-o", str(tmp_path / "page"))[0] == 0
    assert told in (tmp_path / "page" / "index.html").read_text()


def test_files_of_older_versions_are_not_checked(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(call, path)
    plan = json.loads(path.read_text())
    plan["digests"] = {name: plan["digests"][name] for name in ("model", "cluster", "runtime")}
    del plan["rank_map"]
    plan["job"]["seq"] = 128
    path.write_text(json.dumps(plan))
    code, out, _ = call("explain", str(path), "--json")
    assert code == 0
    assert not any("edited" in note for note in json.loads(out)["notes"])
