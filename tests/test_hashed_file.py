"""Files of a checkpoint: what was written is on the disk whole, with its sha256, whatever the file system takes directly."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import random
import sys

import pytest

from shardplan.executor import hashed_file
from shardplan.executor.hashed_file import HashedFile

PIECES = ([], [1], [4096], [4095, 1, 8192], [70_000, 3, 66_000, 1], [8192] * 5 + [17])
"""Sizes of writes, around a buffer of 8 KiB."""


@pytest.fixture(params=["usual", "no direct", "refused at the start", "refused at a write"])
def disk(request, monkeypatch):
    """What a file system makes of direct writes."""
    monkeypatch.setattr(hashed_file, "BUFFER_BYTES", 8192)
    if request.param == "no direct":
        monkeypatch.setattr(hashed_file, "DIRECT", 0)
    elif request.param == "refused at the start":
        usual = os.open

        def refusing(path, flags, *mode):
            if flags & hashed_file.DIRECT:
                raise OSError(errno.EINVAL, "no direct writes here")
            return usual(path, flags, *mode)

        monkeypatch.setattr(os, "open", refusing)
    elif request.param == "refused at a write":
        write = os.write

        def through_the_cache(handle, data):
            if fcntl.fcntl(handle, fcntl.F_GETFL) & hashed_file.DIRECT:
                raise OSError(errno.EINVAL, "not aligned")
            return write(handle, data)

        monkeypatch.setattr(os, "write", through_the_cache)


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("sizes", PIECES)
def test_what_was_written_is_there_with_its_hash(tmp_path, sizes):
    content = [random.Random(size).randbytes(size) for size in sizes]
    with HashedFile(tmp_path / "file") as file:
        for number, piece in enumerate(content):
            assert file.tell() == sum(sizes[:number])
            assert file.write(memoryview(piece)) == len(piece)
    whole = b"".join(content)
    assert (tmp_path / "file").read_bytes() == whole
    assert (file.size_bytes, file.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_part_of_a_buffer_taken_is_followed_by_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(hashed_file, "BUFFER_BYTES", 8192)
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:4096]))
    content = random.Random(0).randbytes(50_000)
    with HashedFile(tmp_path / "file") as file:
        file.write(content)
    assert (tmp_path / "file").read_bytes() == content


def test_a_full_disk_is_an_error_and_leaves_no_open_file(tmp_path, monkeypatch):
    def full(_handle, _data):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)
    file = HashedFile(tmp_path / "file")
    file.write(b"some")
    with pytest.raises(OSError, match="no space"):
        file.close()
    assert file.closed
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file.handle)


def test_what_cannot_be_opened_is_told_once(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with pytest.raises(FileNotFoundError):
        HashedFile(tmp_path / "no folder" / "file")
    gc.collect()
    assert not told
