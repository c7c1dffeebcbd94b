"""What the launcher sees of a run that goes on: lines as they become whole, signs of life, at a cost that does not grow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shardplan.executor import measure
from shardplan.executor.following import Followed, Tail
from shardplan.executor.measure import StepRecord
from shardplan.executor.recorder import RankRecorder, alive_file


def record(step: int, **more) -> StepRecord:
    return StepRecord(step=step, loss=1.0, grad_norm=1.0, step_s=1.0, tokens_per_s=1.0, **more)


def test_a_growing_file_is_read_once_line_by_whole_line(tmp_path):
    tail = Tail(tmp_path / "grows")
    assert tail.new_lines() == []
    with (tmp_path / "grows").open("ab", buffering=0) as file:
        file.write("one\ntwö".encode()[:-1])
        assert tail.new_lines() == ["one"]
        assert tail.new_lines() == []
        file.write("ö".encode()[1:] + b"\nthree\n")
        assert tail.new_lines() == ["twö", "three"]
    assert tail.read_bytes == (tmp_path / "grows").stat().st_size


def test_steps_and_events_are_passed_on_once(tmp_path):
    steps, events = [], []
    followed = Followed(tmp_path, lambda record: steps.append(record.step), events.append)
    followed.follow()
    assert not followed.began
    with RankRecorder(tmp_path, rank=0) as recorder:
        for step in (1, 2, 3):
            recorder.write(record(step))
            followed.follow()
    (tmp_path / measure.EVENTS_FILE).write_text(json.dumps({"refused": ["a"], "told": "b"}) + "\n")
    followed.follow()
    followed.follow()
    assert (steps, events, followed.began) == ([1, 2, 3], ["a", "b"], True)


def test_a_sign_of_life_is_a_word_and_an_old_one_is_none(tmp_path):
    followed = Followed(tmp_path, lambda _: None)
    with RankRecorder(tmp_path, rank=0) as recorder:
        recorder.alive()
        followed.last_word = 0.0
        followed.follow()
        assert followed.last_word > 0.0
        followed.last_word = 0.0
        recorder.alive()  # within a second of the other: not written
        followed.follow()
        assert followed.last_word == 0.0
        stamp = alive_file(tmp_path, 0).stat().st_mtime_ns + 10**9
        os.utime(alive_file(tmp_path, 0), ns=(stamp, stamp))
        followed.follow()
        assert followed.last_word > 0.0


def test_what_a_kill_left_of_a_line_is_cut_off_before_steps_are_added(tmp_path):
    path = measure.rank_file(tmp_path, 0)
    with RankRecorder(tmp_path, rank=0) as recorder:
        recorder.write(record(1))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    with RankRecorder(tmp_path, rank=0) as recorder:
        recorder.write(record(2))
    assert [one.step for one in measure.read_records(tmp_path)[0]] == [1, 2]


def test_a_step_is_on_disk_before_it_is_validated(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the executor needs torch")
    from types import SimpleNamespace

    from shardplan.executor import train

    seen: list[list[int]] = []

    def validate(_data: object, _batches: int, on_batch) -> float:
        on_batch()
        seen.append(steps_on_disk(tmp_path))
        assert alive_file(tmp_path, 0).exists()
        return 2.0

    held_out = SimpleNamespace(data=None, batches=1, due=lambda step, steps: step == steps)
    exported: list[tuple[Path, object]] = []
    trainer = SimpleNamespace(
        recipe=SimpleNamespace(validation=held_out), validate=validate, export=lambda *args: exported.append(args)
    )
    monkeypatch.setattr(train, "run_step", lambda _trainer, step, _waits: record(step))
    monkeypatch.setattr(train, "memory", lambda _: {})
    with RankRecorder(tmp_path, rank=0) as recorder:
        train.train(trainer, recorder, steps=2, look_every=0)  # type: ignore[arg-type]
        assert exported == [(tmp_path, recorder.alive)]
    assert seen == [[1, 2]]
    assert [one.validation_loss for one in measure.read_records(tmp_path)[0]] == [None, 2.0]


def steps_on_disk(folder: Path) -> list[int]:
    return [one.step for one in measure.read_records(folder)[0]]
