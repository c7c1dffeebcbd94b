"""Integer columns over the rows of a table. A column of one value for all rows keeps it once (its stride is 0) through takes and joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def is_constant(column: IntArray) -> bool:
    """Whether all rows, of which there are some, have the same value."""
    return column.strides == (0,) or bool((column == column[0]).all())


def constant(column: IntArray, rows: int) -> IntArray:
    """The first value of a column for all of so many rows, kept once: what `broadcast_to` gives, in a tenth of the time."""
    return np.ndarray(rows, column.dtype, column[:1], 0, (0,))


def taken(column: IntArray, rows: NDArray[Any]) -> IntArray:
    """`column[rows]`; a column that keeps one value for all rows stays one."""
    if column.strides != (0,) or not len(rows):
        return column.take(rows)
    return column[: len(rows)] if len(rows) <= len(column) else constant(column, len(rows))


def joined_column(parts: Sequence[IntArray]) -> IntArray:
    """Parts of a column in order; kept once where it is the same constant in all of them."""
    some = [part for part in parts if len(part)]
    if some and all(part.strides == (0,) and part[0] == some[0][0] for part in some):
        return constant(some[0], sum(map(len, some)))
    return np.concatenate(parts)
