"""What a save costs a run: threads that write it, the wait at the end."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future
from threading import Timer

import pytest

pytest.importorskip("torch", reason="the executor needs torch")


@pytest.mark.parametrize(
    ("size_bytes", "cores", "ranks", "threads"),
    [(1e6, 16, 1, 1), (1.2e9, 16, 1, 2), (18e9, 16, 1, 4), (18e9, 16, 8, 2), (18e9, 2, 4, 1)],
)
def test_large_shards_are_written_by_several_threads(monkeypatch, size_bytes, cores, ranks, threads):
    from shardplan.executor.checkpoint import writers

    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert writers(size_bytes) == threads


def test_a_run_that_waits_for_its_last_checkpoint_tells_so(tmp_path, monkeypatch):
    from shardplan.executor import train
    from shardplan.executor.checkpoint import Checkpoints
    from shardplan.executor.measure import read_events

    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train, "SHORT_WAIT_S", 0.05)
    saves = Checkpoints.__new__(Checkpoints)  # without a process group
    saves.root = tmp_path / "checkpoints"
    told = []
    for wait_s in (0.0, 0.5):
        saves.saving = Future()
        Timer(wait_s, saves.saving.set_result, (None,)).start()
        train.finish_saving(saves, 7)
        assert saves.saving is None
        told.append([event["told"] for event in (read_events(tmp_path))])
    quick, slow = told
    assert quick == []
    assert [line.partition(" is ")[0] for line in slow] == ["the checkpoint of step 7"] * 2
    assert "being written" in slow[0]
    assert "complete, 0." in slow[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("refusing", ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"])
def test_a_full_disk_under_any_of_the_threads_fails_the_save(tmp_path, monkeypatch, refusing):
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from shardplan.executor import checkpoint, hashed_file
    from shardplan.executor.checkpoint_files import Progress, checkpoints, part_folder

    class Full(hashed_file.HashedFile):
        def __init__(self, path):
            super().__init__(path)
            self.name = path.name

        def _put(self, held):
            if self.name == refusing:
                raise OSError(errno.ENOSPC, "no space")
            return super()._put(held)

    monkeypatch.setattr(checkpoint, "writers", lambda _: 3)
    monkeypatch.setattr(checkpoint, "HashedFile", Full)
    state = {f"weight{number}": torch.ones(1000) for number in range(6)}
    progress = Progress(step=1, seed=0, model="", layout="")
    part_folder(tmp_path, 1).mkdir()
    with pytest.raises(CheckpointException, match="no space"):
        save(state, storage_writer=checkpoint.CheckpointWriter(tmp_path, progress, keep=1), no_dist=True)
    assert checkpoints(tmp_path) == []
