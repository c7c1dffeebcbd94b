"""What a run folder tells while the ranks write it: events, steps of rank 0, signs of life."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from shardplan.executor import measure
from shardplan.executor.checkpoint_files import CHECKPOINTS_FOLDER, PART_SUFFIX
from shardplan.executor.measure import StepRecord
from shardplan.executor.recorder import alive_file


class Tail:
    """Reads a file as it grows; what was read is not read again."""

    def __init__(self, path: Path) -> None:
        self.path, self.read_bytes = path, 0

    def new_lines(self) -> list[str]:
        """Whole lines since this was last asked; a half-written last one comes when it is whole."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.read_bytes)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.read_bytes += len(whole) + len(end)
        return whole.decode("utf-8").splitlines()


class Followed:
    """Passes on what the folder of a run tells, and knows since when it has been silent."""

    def __init__(
        self, folder: Path, on_step: Callable[[StepRecord], None], on_event: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.on_step, self.on_event = folder, on_step, on_event
        self.events, self.steps = Tail(folder / measure.EVENTS_FILE), Tail(measure.rank_file(folder, 0))
        self.began = False
        """Has a step been done?"""
        self.saved_bytes, self.alive_ns = 0, 0
        self.last_word = time.monotonic()

    def saving(self) -> bool:
        """Has a checkpoint grown since this was last asked?"""
        parts = (self.folder / CHECKPOINTS_FOLDER).glob(f"*{PART_SUFFIX}/*")
        with contextlib.suppress(FileNotFoundError):  # one was completed meanwhile: it has grown
            before, self.saved_bytes = self.saved_bytes, sum(path.stat().st_size for path in parts)
            if self.saved_bytes == before:
                return False
        self.last_word = time.monotonic()
        return True

    def follow(self) -> None:
        """Pass on what is new."""
        events, steps = self.events.new_lines(), self.steps.new_lines()
        for event in map(json.loads, events):
            for line in (*event["refused"], event["told"]):
                self.on_event(line)
        for line in steps:
            self.on_step(StepRecord(**json.loads(line)))
        self.began = self.began or bool(steps)
        if events or steps or self._alive():
            self.last_word = time.monotonic()

    def _alive(self) -> bool:
        """Has rank 0 left a sign of life since this was last asked?"""
        with contextlib.suppress(FileNotFoundError):
            before, self.alive_ns = self.alive_ns, alive_file(self.folder, 0).stat().st_mtime_ns
            return self.alive_ns != before
        return False
