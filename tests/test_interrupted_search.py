"""Ctrl-C during a search: the best of what was looked at, marked as partial; and what a watcher is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardplan.cli import progress
from shardplan.costmodel.job import Job
from shardplan.costmodel.model_config import load_model
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import SearchResult, search
from shardplan.planner.watch import Watch


class Stopping(Watch):
    """Presses Ctrl-C when the search says that it is at a phase."""

    def __init__(self, at: str, *, keeps_best: bool = True) -> None:
        super().__init__(keeps_best=keeps_best)
        self.at, self.told = at, list[tuple[str, float, int]]()

    def phase(self, name: str, done: float, looked_at: int) -> None:
        self.told.append((name, done, looked_at))
        if name == self.at:
            raise KeyboardInterrupt


def searched(watch: Watch | None = None) -> SearchResult:
    return search(
        model=load_model("llama-3-8b"),
        job=Job(seq=4096, global_batch=64, precision="bf16"),
        cluster=load_cluster("h100-ib", gpus=16),
        runtime="megatron",
        watch=watch,
    )


@pytest.mark.parametrize("phase", ["looking", "estimating", "refining", "placing", "cutting"])
def test_an_interrupt_leaves_the_best_so_far(phase: str) -> None:
    whole, stopped = searched(), searched(Stopping(phase))
    assert whole.ranked is not None
    assert not whole.partial
    assert whole.complete
    assert stopped.partial
    assert not stopped.complete
    assert stopped.ranked is not None
    assert stopped.ranked.fits().all()
    assert stopped.ranked.step_s[0] >= whole.ranked.step_s[0]
    assert stopped.looked_at <= whole.looked_at


def test_nobody_asked_for_the_best_so_far() -> None:
    with pytest.raises(KeyboardInterrupt):
        searched(Stopping("estimating", keeps_best=False))


def test_a_watcher_sees_the_search_move() -> None:
    watch = Stopping("never")
    found = searched(watch)
    shares = [done for _, done, _ in watch.told]
    assert shares == sorted(shares)
    phases = ["looking", "estimating", "refining", "placing", "cutting"]
    assert list(dict.fromkeys(name for name, _, _ in watch.told)) == phases
    assert watch.told[-1][2] >= found.looked_at


def test_the_command_writes_a_partial_plan_and_says_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shardplan import cli

    def stop(_: progress.TerminalWatch, name: str, done: float, looked_at: int) -> None:
        if name == "refining":
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.TerminalWatch, "phase", stop)
    path = tmp_path / "plan.json"
    words = "plan llama-3-8b --cluster h100-ib --gpus 16 --global-batch 64:128 --seq 4096 --runtime megatron --json"
    monkeypatch.setattr("sys.argv", ["shardplan", *words.split(), "-o", str(path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    told = capsys.readouterr()
    assert json.loads(told.out)["search"]["partial"] is True
    assert told.err.count("\n") == 1
    assert json.loads(path.read_text())["search"]["partial"] is True


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    watch = progress.TerminalWatch()
    watch._start -= 10.0  # as if it took longer than a second
    watch.phase("looking", 0.5, 1000)
    watch.close()
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")
