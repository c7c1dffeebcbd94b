"""Compute on the unique keys, gather into the rows: what makes millions of layouts a second possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)
Column_co = TypeVar("Column_co", covariant=True)

FEW_VALUES = 16
"""A range so small that its unused values cost less than finding the used ones."""


def _dense(codes: IntArray, span: int) -> tuple[IntArray, int]:
    """Codes 0..n-1 of the distinct values within [0, span), ascending, without sorting the rows when the range is small."""
    if span > 4 * len(codes) + 4096:
        values, inverse = np.unique(codes, return_inverse=True)
        return inverse.astype(np.int64), len(values)
    present = np.zeros(span, dtype=bool)
    present[codes] = True
    rank = np.cumsum(present) - 1
    return rank.take(codes), int(rank[-1]) + 1


def unique_keys(*columns: IntArray) -> tuple[IntArray, IntArray]:
    """(first, inverse) of the distinct rows of equally long columns: `column[first]` are the keys, `[inverse]` gathers.

    Keys come in ascending order of (columns[0], columns[1], ...). Columns must not be empty.
    """
    rows = len(columns[0])
    combined, span = np.zeros(rows, dtype=np.int64), 1
    for column in reversed(columns):
        low, high = int(column.min()), int(column.max())
        if low == high:
            continue
        codes, number = column - low, high - low + 1
        if number > FEW_VALUES:
            codes, number = _dense(codes, number)
        if span * number > 4 * rows + 4096:  # before the product outgrows the rows
            combined, span = _dense(combined, span)
        combined, span = (combined + codes * span, span * number) if span > 1 else (codes, number)
    combined, count = _dense(combined, span)
    first = np.zeros(count, dtype=np.int64)
    first[combined[::-1]] = np.arange(rows - 1, -1, -1)
    return first, combined


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The distinct rows among N of some columns."""

    first: IntArray
    """A row that has the key, (K,)."""
    of_row: IntArray
    """The key that a row has, (N,)."""


def keys_of(*columns: IntArray) -> Keys:
    """`unique_keys` by name."""
    first, inverse = unique_keys(*columns)
    return Keys(first=first, of_row=inverse)


def gathered(table: NDArray[Number], rows: IntArray) -> NDArray[Number]:
    """`table[rows]` of a table (K, ...), stored with the rows next to each other: arithmetic over few stages then runs along
    many rows, not along few stages."""
    return np.take(table.T, rows, axis=-1).T


class LazyColumns(Mapping[str, Column_co]):
    """Columns by name, each made anew whenever it is asked for: nothing is computed or kept of those that nobody reads."""

    def __init__(self, makers: Mapping[str, Callable[[], Column_co]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Column_co:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers
