"""Compute on the unique keys, gather into the rows: what makes millions of layouts a second possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)
Column_co = TypeVar("Column_co", covariant=True)

FEW_VALUES = 8
"""A range so small that its unused values cost less than finding the used ones."""
ROWS_IN_CACHE = 1 << 14
"""Rows that are coded, gathered or added up together: their few columns stay in the cache of a core."""
KEYS_IN_CACHE = 1 << 13
"""The same of keys, for formulas with many intermediate arrays over stages."""
SETTINGS_AT_ONCE = 8
"""Settings, told apart as `Same`, of which is kept what all their layouts share."""


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """A column whose values have codes 0..count-1, ascending: `code_of[value - low]`."""

    column: IntArray
    low: int
    code_of: IntArray
    count: int


def _coded(column: IntArray, *, dense: bool = False) -> _Coded | None:
    """The codes of a column's values; None where all rows have the same. A `dense` column uses nearly all values of its range."""
    if column.strides == (0,):
        return None
    low, high = int(column.min()), int(column.max())
    if low == high:
        return None
    if dense or high - low < FEW_VALUES:
        return _Coded(column=column, low=low, code_of=np.arange(high - low + 1), count=high - low + 1)
    if high - low > _widest(len(column)):
        values, codes = np.unique(column, return_inverse=True)
        return _Coded(column=codes.astype(np.int64), low=0, code_of=np.arange(len(values)), count=len(values))
    low = min(low, 0) if high <= _widest(len(column)) else low  # as good a start as `low`, and saves a subtraction
    present = np.zeros(high - low + 1, dtype=bool)
    present[column - low if low else column] = True
    values = np.flatnonzero(present)
    code_of = np.empty(len(present), dtype=np.int64)  # only places of values are written and read
    code_of[values] = np.arange(len(values))
    return _Coded(column=column, low=low, code_of=code_of, count=len(values))


def _widest(rows: int) -> int:
    """Range of codes up to which a table of all of them is quicker than sorting the rows."""
    return 4 * rows + 4096


def _added(coded: list[_Coded]) -> IntArray:
    """One code of all the columns for each row, ascending with (coded[0], coded[1], ...)."""
    tables, stride = list[tuple[_Coded, IntArray]](), 1
    for one in reversed(coded):
        tables.append((one, one.code_of * stride))
        stride *= one.count
    codes = np.empty(len(coded[0].column), dtype=np.int64)
    for start in range(0, len(codes), ROWS_IN_CACHE):
        some = slice(start, start + ROWS_IN_CACHE)
        parts = [table.take(one.column[some] - one.low if one.low else one.column[some]) for one, table in tables]
        codes[some] = sum(parts[1:], parts[0])
    return codes


def unique_keys(*columns: IntArray, dense: bool = False) -> tuple[IntArray, IntArray]:
    """(row, inverse) of the distinct rows of equally long columns: `column[row]` are the keys, `[inverse]` gathers.

    Keys come in ascending order of (columns[0], columns[1], ...). Columns must not be empty; `dense` ones are keys themselves.
    """
    rows = len(columns[0])
    group, span = list[_Coded](), 1
    for column in columns:
        coded = _coded(column, dense=dense)
        if coded is None:
            continue
        if span * coded.count > _widest(rows):  # before the product outgrows the rows
            fewer = _coded(_added(group))
            assert fewer is not None, "columns that differ have codes that differ"
            group, span = [fewer], fewer.count
        group.append(coded)
        span *= coded.count
    if not group:
        return np.zeros(1, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    codes = _added(group)
    if span > _widest(rows):
        _, row, inverse = np.unique(codes, return_index=True, return_inverse=True)
        return row.astype(np.int64), inverse.astype(np.int64)
    table = np.full(span, -1, dtype=np.int32)  # a large table, filled at few places: the narrower the quicker
    table[codes] = np.arange(rows, dtype=np.int32)
    values = np.flatnonzero(table >= 0)
    row = table.take(values).astype(np.int64)
    table[values] = np.arange(len(values), dtype=np.int32)
    for start in range(0, rows, ROWS_IN_CACHE):
        some = slice(start, start + ROWS_IN_CACHE)
        codes[some] = table.take(codes[some])
    return row, codes


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The distinct rows among N of some columns."""

    row: IntArray
    """A row that has the key, (K,)."""
    of_row: IntArray
    """The key that a row has, (N,)."""


def keys_of(*columns: IntArray, dense: bool = False) -> Keys:
    """`unique_keys` by name."""
    row, inverse = unique_keys(*columns, dense=dense)
    return Keys(row=row, of_row=inverse)


def one_of(column: NDArray[Any], values: Iterable[int]) -> NDArray[np.bool_]:
    """Rows whose value is one of a few: `np.isin` makes a table of them first, which takes longer."""
    found = np.zeros(len(column), dtype=bool)
    for value in values:
        found |= column == value
    return found


def gathered(table: NDArray[Number], rows: IntArray) -> NDArray[Number]:
    """`table[rows]` of a table (K, ...), stored with the rows next to each other: arithmetic over few stages then runs along
    many rows, not along few stages."""
    return np.take(table.T, rows, axis=-1).T


def in_pieces(rows: int, make: Callable[[slice], Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
    """Columns (N,) of many intermediate arrays, made of as many rows at a time as keep those in the cache."""
    pieces = [make(slice(start, start + KEYS_IN_CACHE)) for start in range(0, rows, KEYS_IN_CACHE)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


@dataclass(frozen=True, eq=False)
class Same:
    """Objects that are the same only if they are the very same: comparing all their fields would take longer than a small estimate."""

    objects: tuple[Any, ...]

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.objects)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and all(a is b for a, b in zip(self.objects, other.objects, strict=True))


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
