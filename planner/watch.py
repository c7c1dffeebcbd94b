"""Who watches searches: told how far they are, and whether an interrupt shall leave the best so far instead of ending it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Watch:
    """Nobody: an interrupt ends the search. A subclass shows what it is told."""

    keeps_best: bool = False
    """KeyboardInterrupt ends the phase in hand; what is known by then is ranked, and the result says that it is partial."""

    def phase(self, name: str, done: float, looked_at: int) -> None:
        """Now at `name`, about `done` (0 to 1) of it behind, so many layouts looked at."""


class StepWatch(Watch):
    """One of several searches that are watched as one: what it is told is passed on as part of the whole. An interrupt ends it."""

    def __init__(self, whole: Watch, name: str, start: float, end: float) -> None:
        super().__init__()
        self._whole, self._name, self._start, self._share = whole, name, start, end - start
        whole.phase(name, start, 0)

    def phase(self, name: str, done: float, looked_at: int) -> None:
        """Passed on under the name of the step."""
        self._whole.phase(self._name, self._start + done * self._share, looked_at)
