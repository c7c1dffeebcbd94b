"""Who watches a search: told how far it is, and whether an interrupt shall leave the best so far instead of ending it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Watch:
    """Nobody: an interrupt ends the search. A subclass shows what it is told."""

    keeps_best: bool = False
    """KeyboardInterrupt ends the phase in hand; what is known by then is ranked, and the result says that it is partial."""

    def phase(self, name: str, done: float, looked_at: int) -> None:
        """Now at `name`, about `done` (0 to 1) of it behind, so many layouts looked at."""
