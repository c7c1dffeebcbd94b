"""What a rank writes while it trains: its steps, signs of life, why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from shardplan.executor.measure import StepRecord, rank_file, write_json

ALIVE_S = 1.0
"""Shortest time from one sign of life to the next."""


def alive_file(folder: Path, rank: int) -> Path:
    """What `rank` touches while it does other things than steps."""
    return rank_file(folder, rank).with_suffix(".alive")


class RankRecorder:
    """Appends a rank's steps to its file; an exception that passes through is written beside it, with its time."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.folder = folder
        """Of the run."""
        self.path = rank_file(folder, rank)
        self.file: TextIO | None = None
        self.details: list[str] = []
        """Lines told with the exception."""
        self.alive_at = -ALIVE_S

    def __enter__(self) -> Self:
        self.path.parent.mkdir(exist_ok=True)
        self.path.with_suffix(".error.json").unlink(missing_ok=True)  # of before a restart
        drop_half_line(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def write(self, record: StepRecord) -> None:
        """Append one step; on disk as far as other processes can see when this returns."""
        assert self.file is not None
        self.file.write(json.dumps(asdict(record)) + "\n")
        self.file.flush()

    def alive(self) -> None:
        """Leave a sign of life, for the launcher to tell work other than steps from a hang."""
        if time.monotonic() - self.alive_at >= ALIVE_S:
            self.path.with_suffix(".alive").touch()
            self.alive_at = time.monotonic()

    def write_memory(self, parts: Mapping[str, float]) -> None:
        """Bytes by part at the end of the run, beside the steps."""
        write_json(self.path.with_suffix(".memory.json"), parts)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and error is not None:
            told = first_line(str(error))
            self._write_error(f"{kind.__name__}: {told}" if told else kind.__name__, details=self.details)
        assert self.file is not None
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # on a full disk it fails once more
            self.file.close()

    def told_to_end(self) -> None:
        """Of a SIGTERM: leave it as the error, unless there is one already."""
        if not self.path.with_suffix(".error.json").exists():
            self._write_error(f"ended by signal {int(signal.SIGTERM)} (SIGTERM)", told_to_end=os.getpid())

    def _write_error(self, told: str, **more: Any) -> None:
        found = {"time": time.time(), "error": told, **more}
        with contextlib.suppress(OSError):  # on a full disk the log may still take the exception itself
            write_json(self.path.with_suffix(".error.json"), found)


def first_line(text: str) -> str:
    """The first line that says something, with the next where it ends in a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])


def drop_half_line(path: Path) -> None:
    """Cut off what a kill left of a last line, so that the next begins a line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
