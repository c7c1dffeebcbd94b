"""Checkpoint folders without torch: a kill between any two file operations loses nothing; what is damaged is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from shardplan.executor import checkpoint_files
from shardplan.executor.checkpoint_files import CheckpointError, Progress


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it happens."""


def progress(step: int) -> Progress:
    return Progress(step=step, seed=0, model="digest", layout="dp=1", data={"position": step})


EMPTY_INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)R."
"""`Metadata()` as a pickle; what is behind the last full stop is not read."""


def write_digest(path: Path) -> None:
    content = path.read_bytes()
    checkpoint_files.write_digest(path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def save(root: Path, step: int, *, keep: int = 2) -> Path:
    """What a save does, with files in place of tensors."""
    part = checkpoint_files.part_folder(root, step)
    part.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        content = f"{name} of step {step}".encode() * 50
        (part / name).write_bytes(EMPTY_INDEX + content if name == ".metadata" else content)
        write_digest(part / name)
    target = checkpoint_files.commit(part, progress(step))
    checkpoint_files.prune(root, keep=keep, newest=target)
    return target


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    folder = save(tmp_path, 10)
    assert folder.name == "step-00000010"
    assert checkpoint_files.verify(folder) == progress(10)
    assert (tmp_path / "LATEST").read_text() == "step-00000010\n"
    assert not list(folder.glob("*.sha256"))


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint_files.checkpoints(tmp_path)] == ["step-00000008", "step-00000006"]


def test_what_was_just_saved_is_kept_whatever_else_is_there(tmp_path):
    save(tmp_path, 20, keep=1)
    save(tmp_path, 4, keep=1)
    assert [path.name for path in checkpoint_files.checkpoints(tmp_path)] == ["step-00000004"]


def test_saving_a_step_again_does_not_write_over_it(tmp_path):
    first = save(tmp_path, 4)
    again = [save(tmp_path, 4, keep=3).name for _ in range(2)]
    assert again == ["step-00000004-2", "step-00000004-3"]
    assert checkpoint_files.verify(first).step == 4
    assert checkpoint_files.find(tmp_path)[0].name == "step-00000004-3"


OPERATIONS = [
    (owner, name, getattr(owner, name))
    for owner, names in ((os, ["fsync"]), (Path, ["rename", "replace", "unlink", "mkdir"]), (shutil, ["rmtree"]))
    for name in names
]


@pytest.mark.parametrize("steps", [(2, 4, 6, 8), (2, 4, 4, 4)], ids=["forward", "over the same step"])
def test_killed_between_any_two_operations_nothing_complete_is_lost(tmp_path, monkeypatch, steps):
    def killed_at(count: int, root: Path) -> bool:
        """Save one after the other, die at operation `count`; True when all went through before."""
        left = count
        with monkeypatch.context() as patch:
            for owner, name, real in OPERATIONS:

                def operation(*given, real=real, **named):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return real(*given, **named)

                patch.setattr(owner, name, operation)
            done = 0
            try:
                for step in steps:
                    save(root, step)
                    done = step
            except Killed:
                pass
            else:
                return True
        found, refused = checkpoint_files.newest([root])
        assert refused == []
        assert found is not None or done == 0
        if found is not None:
            assert checkpoint_files.verify(found).step >= done
        checkpoint_files.clear_parts(root)  # as the next start does
        assert not list(root.glob("step-*.tmp"))
        assert found is None or checkpoint_files.verify(save(root, 10)).step == 10
        return False

    points = 0
    while not killed_at(points, tmp_path / f"{points}"):
        points += 1
    assert points > 40


def truncate(folder: Path) -> str:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-7])
    return "__0_0.distcp has 1093 bytes of 1100"


def flip(folder: Path) -> str:
    path = folder / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return "__1_0.distcp is corrupt (its sha256 differs)"


def lose(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def cut_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:200])
    return "manifest.json is truncated or not readable"


def change_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    return "manifest.json is corrupt (its digest differs)"


def lead_outside(folder: Path) -> str:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["files"]["../LATEST"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps({**manifest, "digest": checkpoint_files.digest(manifest)}))
    return "manifest.json names files outside the folder"


@pytest.mark.parametrize(
    ("pickled", "told"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", ".metadata is refused (os.system is not part of a checkpoint's index)"),
        (b"cbuiltins\neval\n.", ".metadata is refused (builtins.eval is not part of a checkpoint's index)"),
        (b"(dp0\n.", ".metadata holds no index"),
        (b"no pickle", ".metadata is refused ("),
    ],
    ids=["system", "eval", "dict", "text"],
)
def test_a_forged_index_with_a_manifest_that_matches_is_refused(tmp_path, pickled, told):
    part = checkpoint_files.part_folder(tmp_path, 4)
    part.mkdir(parents=True)
    (part / ".metadata").write_bytes(pickled)
    write_digest(part / ".metadata")
    folder = checkpoint_files.commit(part, progress(4))
    with pytest.raises(CheckpointError) as error:
        checkpoint_files.verify(folder)
    assert str(error.value).startswith(f"checkpoint {folder}: {told}")


@pytest.mark.parametrize("damage", [truncate, flip, lose, cut_manifest, change_manifest, lead_outside])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(tmp_path, damage):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    told = damage(newest)
    with pytest.raises(CheckpointError) as error:
        checkpoint_files.verify(newest)
    assert str(error.value) == f"checkpoint {newest}: {told}"
    found, refused = checkpoint_files.find(tmp_path)
    assert found.name == "step-00000002"
    assert refused == [str(error.value)]


def test_a_run_without_a_whole_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; name a run made with --checkpoint-every"):
        checkpoint_files.find(tmp_path)
    flip(save(tmp_path / "checkpoints", 4))
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000004: __1_0.distcp is corrupt"):
        checkpoint_files.find(tmp_path)


def test_the_last_run_is_the_newest_that_has_a_whole_checkpoint(tmp_path):
    older = save(tmp_path / "20260101T000000Z-a" / "checkpoints", 4)
    newer = save(tmp_path / "20260102T000000Z-b" / "checkpoints", 2)
    (tmp_path / "20260103T000000Z-c").mkdir()
    assert checkpoint_files.find_last(tmp_path) == (newer, [])
    told = flip(newer)
    assert checkpoint_files.find_last(tmp_path) == (older, [f"checkpoint {newer}: {told}"])
    flip(older)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000002.*step-00000004"):
        checkpoint_files.find_last(tmp_path)
    with pytest.raises(CheckpointError, match="holds no run with a checkpoint"):
        checkpoint_files.find_last(tmp_path / "nothing")
