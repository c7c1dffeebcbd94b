"""Where trained weights may go: nothing of somebody else's is touched, and a place that will not do is told before training."""

from __future__ import annotations

import json

import pytest

from shardplan.executor.export_folder import check_export, give_name, part_of, run_mark, written_by
from shardplan.executor.hugging_face import INDEX
from shardplan.hw_profiles.errors import InputError


def test_each_run_has_a_mark_of_its_own_that_stays(tmp_path):
    assert run_mark(tmp_path / "one") == run_mark(tmp_path / "one") != run_mark(tmp_path / "two")
    assert part_of(tmp_path / "out", run_mark(tmp_path / "one")).parent == tmp_path


@pytest.mark.parametrize("text", [None, "{", "[]", '{"metadata": {}}', '{"metadata": 3}'])
def test_what_no_run_wrote_has_no_mark(tmp_path, text):
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    assert written_by(tmp_path) is None


def test_an_export_tells_its_run(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1, "run": "0123456789ab"}}))
    assert written_by(tmp_path) == "0123456789ab"


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "folder", "file"])
def test_a_name_that_is_taken_stays_with_whom_it_belongs_to(tmp_path, kind):
    part, target = tmp_path / "out.0123456789ab.tmp", tmp_path / "out"
    part.mkdir()
    (part / "config.json").write_text("ours")
    if "folder" in kind:
        target.mkdir()
    if kind == "folder":
        (target / "config.json").write_text("theirs")
    if kind == "file":
        target.write_text("theirs")
    assert give_name(part, target) is (kind == "nothing")
    assert part.exists() is (kind != "nothing")
    assert (target if kind == "nothing" else part).joinpath("config.json").read_text() == "ours"
    if kind == "file":
        assert target.read_text() == "theirs"


def test_what_lies_where_weights_go_is_refused_with_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"/out: exists already; name a new folder in weights.export"):
        check_export(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"/link: exists already"):
        check_export(tmp_path / "link")


@pytest.mark.parametrize("name", ["out.tmp", "out.0123456789ab.tmp"])
def test_what_an_export_has_left_is_refused_with_its_name(tmp_path, name):
    (tmp_path / "out.second.tmp").mkdir()  # no run calls anything so
    check_export(tmp_path / "out")
    (tmp_path / name).mkdir()
    with pytest.raises(
        InputError, match=rf"/{name}: is left over from an export to out that did not end; move it away"
    ):
        check_export(tmp_path / "out")
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("export", ["file/out", "/proc/nope/out"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, export):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"out: cannot be written \(.*\); name another folder in weights.export"):
        check_export(tmp_path / export)
    check_export(tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
