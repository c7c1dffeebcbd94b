"""Numbers in a layout word, equal ones in a row said once: `1,2*30,1`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby

MOST_TIMES = 10_000
"""That a number may be repeated."""
RUN = 3
"""Equal numbers in a row from which on words say them once."""


def numbers_word(numbers: Sequence[int]) -> str:
    """`1,2*30,1` for one 1, thirty 2 and one 1."""
    runs = [(number, len(list(same))) for number, same in groupby(numbers)]
    return ",".join(f"{n}*{times}" if times >= RUN else ",".join([str(n)] * times) for n, times in runs)


def read_numbers(word: str) -> tuple[int, ...]:
    """The numbers that a word stands for. Raises ValueError where it is none."""
    return tuple(chain.from_iterable(map(_repeated, word.split(","))))


def _repeated(part: str) -> list[int]:
    number, star, times = part.partition("*")
    count = int(times) if star else 1
    if not 1 <= count <= MOST_TIMES:
        raise ValueError(part)
    return [int(number)] * count
