"""Errors a user can cause, told in one line, and "did you mean" for misspelt words."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Malformed input: names the place, the field, the value and the remedy in one line (exit code 2)."""

    def __init__(self, problem: str, *, remedy: str = "", place: str = "") -> None:
        """`place` is a file or option, `problem` names field and value, `remedy` says what to do."""
        self.problem, self.remedy, self.place = problem, remedy, place
        super().__init__((f"{place}: " if place else "") + problem + (f"; {remedy}" if remedy else ""))


def nearest(word: str, known: Iterable[str], *, most: int = 3) -> str:
    """A remedy that lists the known words nearest to `word`, or all of them when none is near."""
    words = sorted(known)
    close = get_close_matches(word.lower(), [w.lower() for w in words], n=most, cutoff=0.5)
    found = [w for w in words if w.lower() in close]
    return f"did you mean {' or '.join(found)}?" if found else f"known: {', '.join(words)}"
