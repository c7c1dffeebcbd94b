"""Compute on the unique keys, gather into the rows: what makes a million layouts a second possible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def _dense(codes: IntArray, span: int) -> tuple[IntArray, int]:
    """Codes 0..n-1 of the distinct values within [0, span), ascending, without sorting the rows when the range is small."""
    if span > 4 * len(codes) + 4096:
        values, inverse = np.unique(codes, return_inverse=True)
        return inverse.astype(np.int64), len(values)
    present = np.zeros(span, dtype=bool)
    present[codes] = True
    rank = np.cumsum(present) - 1
    return rank[codes], int(rank[-1]) + 1


def unique_keys(*columns: IntArray) -> tuple[IntArray, IntArray]:
    """(first, inverse) of the distinct rows of equally long columns: `column[first]` are the keys, `[inverse]` gathers.

    Keys come in ascending order of (columns[0], columns[1], ...). Columns must not be empty.
    """
    combined, span = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        low, high = int(column.min()), int(column.max())
        if low == high:
            continue
        codes, number = column - low, high - low + 1
        if span * number > 4 * len(column) + 4096:  # before the product outgrows the rows
            codes, number = _dense(codes, number)
            combined, span = _dense(combined, span)
        combined, span = combined * number + codes, span * number
    combined, count = _dense(combined, span)
    first = np.zeros(count, dtype=np.int64)
    first[combined[::-1]] = np.arange(len(combined) - 1, -1, -1)
    return first, combined
