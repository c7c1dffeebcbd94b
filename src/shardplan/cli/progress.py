"""The progress bar of a search: on a terminal, when it takes longer than a second; an interrupt leaves the best so far."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from shardplan.planner.watch import Watch

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_S = 1.0


class TerminalWatch(Watch):
    """Draws on stderr; nothing where that is no terminal."""

    def __init__(self, *, keeps_best: bool = True) -> None:
        super().__init__(keeps_best=keeps_best)
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def phase(self, name: str, done: float, looked_at: int) -> None:
        """Now at `name`."""
        if time.monotonic() - self._start < QUIET_S or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[layouts]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(name, total=1.0, layouts="")
            self._bar.start()
        layouts = f"{looked_at:,} layouts" if looked_at else ""
        self._bar.update(self._bar.task_ids[0], description=name, completed=done, layouts=layouts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
