"""Which mesh axis lies beside which: the order of axes from the innermost (neighbouring ranks) to the outermost, and what follows.

An order is a word such as `tp-cp-dp-pp`: tp beside each other, pp farthest apart. The distance of two neighbours on an axis, in ranks,
is the product of the axes inside it; a node holds so many neighbouring ranks, so the order says which axis stays inside the node.
Expert groups are carved out of the ranks of a stage and have no place of their own (Megatron-Core writes tp-cp-ep-dp-pp for this one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from shardplan.hw_profiles.errors import InputError

IntArray = NDArray[np.int64]

AXES = ("tp", "cp", "dp", "pp")
"""In the default order, innermost first."""
ORDERS = tuple("-".join(axes) for axes in permutations(AXES))
"""Every order; a column stores the index into it, 0 is the default."""
DEFAULT_ORDER = ORDERS[0]
INNERMOST = len(ORDERS)
"""Code of a column that is no order but a bound of all: every axis as if it were the innermost one."""


def is_bound(orders: IntArray) -> bool:
    """Whether a column of codes is that bound of all orders: no order of its rows."""
    return bool((orders == INNERMOST).all())


def read_order(word: str) -> str:
    """The order that `word` names, with ep left out where it stands behind cp; raises InputError for what is no order of AXES."""
    axes = word.lower().split("-")
    kept = [axis for at, axis in enumerate(axes) if not (axis == "ep" and at > 0 and axes[at - 1] == "cp")]
    if "-".join(kept) not in ORDERS:
        raise InputError(
            f"order={word!r} does not name each of {', '.join(AXES)} once",
            place="layout",
            remedy=f"write for instance {DEFAULT_ORDER} (innermost first)",
        )
    return "-".join(kept)


def axis_stride(axis: str, orders: IntArray, size_of: Callable[[str], IntArray]) -> IntArray:
    """Ranks between neighbours on `axis`, (N,), in rows with these codes of ORDERS; `size_of` gives the column of an axis."""
    codes = orders[:1] if orders.strides == (0,) else np.unique(orders)
    found: IntArray | None = None
    for code in codes:
        axes: list[str] = [axis] if code == INNERMOST else ORDERS[int(code)].split("-")
        stride = np.ones(len(orders), dtype=np.int64)
        for inner in axes[: axes.index(axis)]:
            stride = stride * size_of(inner)
        found = stride if found is None else np.where(orders == code, stride, found)
    return np.ones(0, dtype=np.int64) if found is None else found


def _same_as() -> NDArray[np.int64]:
    """The first order that puts the axes in use the same way, by order and by the set of axes above 1 as bits."""
    table = np.zeros((len(ORDERS), 1 << len(AXES)), dtype=np.int64)
    for used in range(1 << len(AXES)):
        first: dict[tuple[str, ...], int] = {}
        for code, word in enumerate(ORDERS):
            shown = tuple(axis for axis in word.split("-") if used >> AXES.index(axis) & 1)
            table[code, used] = first.setdefault(shown, code)
    return table


SAME_AS = _same_as()


def used_axes(sizes: Sequence[IntArray]) -> IntArray:
    """The axes above 1 as bits, (N,); `sizes` are the columns of AXES."""
    return np.sum([(size > 1).astype(np.int64) << at for at, size in enumerate(sizes)], axis=0)
