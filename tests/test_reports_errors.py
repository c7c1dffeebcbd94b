"""What `shardplan report` refuses, in one line that names the file and says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardplan.hw_profiles.errors import InputError
from shardplan.reports import formatting as say
from shardplan.reports.page import write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with nothing but a good run.json."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"measured": {}, "predicted": {}}))
    return folder


def refused(paths: list[Path], out: Path) -> str:
    with pytest.raises(InputError) as caught:
        write_report(paths, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def test_missing_path(tmp_path: Path) -> None:
    assert "no such file or folder" in refused([tmp_path / "absent.json"], tmp_path / "out")


def test_folder_without_runs(tmp_path: Path) -> None:
    assert "without run.json" in refused([tmp_path], tmp_path / "out")


def test_not_a_plan(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert "a.json: schema=None" in refused([tmp_path / "a.json"], tmp_path / "out")


def test_run_without_plan(run: Path) -> None:
    assert "plan.json: no such plan file" in refused([run], run / "out")


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"measured": 3}'])
def test_bad_run_record(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    assert "run.json" in refused([run], run / "out")


def test_nothing(tmp_path: Path) -> None:
    assert "nothing to report on" in refused([], tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "text"),
    [(83.14, "83.1 s"), (0.01234, "12.3 ms"), (2.5e-4, "250 µs"), (0.0, "0 s"), (None, "–"), (float("nan"), "–")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert say.seconds(value) == text


def test_numbers_for_people() -> None:
    assert say.gib(68.5 * 2**30) == "68.5 GiB"
    assert say.gib(2**20) == "1.00 MiB"
    assert say.large(70_553_706_496) == "70.6 B"
    assert say.significant(123456.0) == "123,456"
    assert say.percent(0.4723) == "47.2 %"
    assert say.quantity(512.34, "tokens/s") == "512.3 tokens/s"
    assert say.span(1.0, 2.0, "s") == "1.00 to 2.00 s"
    assert say.span(0.9, 1.1, "s") == "900 ms to 1.10 s"
    assert say.span(4818, 5708, "tokens/s") == "4,818 to 5,708 tokens/s"
    assert say.span(None, None, "s") == say.DASH
