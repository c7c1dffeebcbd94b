"""A file that is hashed while it is written, past the page cache where the file system lets it.

Filling the cache costs a checkpoint twice: fresh pages are slow to get (0.4 GB/s with hashing on a virtual machine's disk that takes
0.8 so), and they push out what the training reads. So bytes gather in a small aligned buffer that goes to the disk directly (O_DIRECT).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import mmap
import os
from pathlib import Path

DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has none (macOS)."""
BUFFER_BYTES = 8 * 2**20
NOT_TAKEN = (errno.EINVAL, errno.EOPNOTSUPP)
"""What file systems say to direct access that they do not have."""


class HashedFile(io.RawIOBase):
    """Write-only; complete and on the disk once it is closed, when `sha256` and `size_bytes` are those of the whole file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.handle = _opened(path)
        except OSError:
            super().close()  # or it would be closed once more when it is collected
            raise
        self.buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # begins at a page, as direct writes ask
        self.filled, self.size_bytes = 0, 0
        self.hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal."""
        return self.hash.hexdigest()

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self.size_bytes

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All of `data`."""
        given = memoryview(data).cast("B")
        for start in range(0, len(given), BUFFER_BYTES):
            self._add(given[start : start + BUFFER_BYTES])
        self.size_bytes += len(given)
        return len(given)

    def _add(self, part: memoryview) -> None:
        """At most a buffer's worth."""
        first = min(len(part), BUFFER_BYTES - self.filled)
        self.buffer[self.filled : self.filled + first] = part[:first]
        self.filled += first
        if self.filled == BUFFER_BYTES:
            self._empty()
            rest = len(part) - first
            self.buffer[:rest] = part[first:]
            self.filled = rest

    def _empty(self) -> None:
        held = self.buffer[: self.filled]
        self.hash.update(held)
        while held:
            held = held[self._put(held) :]
        self.filled = 0

    def _put(self, held: memoryview) -> int:
        try:
            return os.write(self.handle, held)
        except OSError as bad:
            if bad.errno not in NOT_TAKEN or not self._stop_direct():
                raise
            return os.write(self.handle, held)

    def _stop_direct(self) -> bool:
        """Go through the cache from here on, as a file's end must that fills no whole block; False where it does already."""
        flags = fcntl.fcntl(self.handle, fcntl.F_GETFL)
        if not flags & DIRECT:
            return False
        fcntl.fcntl(self.handle, fcntl.F_SETFL, flags & ~DIRECT)
        return True

    def close(self) -> None:
        """Write what is left, flush it to the disk."""
        if self.closed:
            return
        try:
            self._stop_direct()
            self._empty()
            os.fsync(self.handle)
        finally:
            super().close()  # first, so that nothing closes the handle again, which may be another file's by then
            os.close(self.handle)


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as bad:
        if bad.errno not in NOT_TAKEN:
            raise
        return os.open(path, flags, 0o666)
