"""Which mesh axis lies inside a node and which across: every order of axes that the runtime knows, for every layout it could make the best.

The order changes what exchanges cost and nothing else: neither memory nor compute. So a layout that fits in one order fits in all, and
its compute, recompute, update and fixed host time are the least a step can take in any. Layouts whose least time is above the step of
the best one so far need no second look; the others are estimated in every order that gives them other groups of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.axis_order import AXES, DEFAULT_ORDER, INNERMOST, ORDERS, SAME_AS, is_bound, used_axes
from shardplan.costmodel.collectives import members_per_node
from shardplan.costmodel.estimate import times_alone
from shardplan.costmodel.estimates import Estimates, joined
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.order_rules import ORDER_RULES
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import codes
from shardplan.costmodel.rules import rejections
from shardplan.hw_profiles.topology import tier_table
from shardplan.planner.at_setting import estimated
from shardplan.planner.space import Wishes

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FIRST_LAYOUTS = 2048
"""Of the ranking in the default order, placed whatever their least time: the shortlist shows them."""
MOST_ROWS = 400_000
"""Layouts times orders that are estimated at most; beyond it the best are placed, and the account says that not all were."""
BETTER = 1.0 - 1e-9
"""Times the step in the default order that another must undercut: orders of the same groups differ in rounding only."""

ALIKE = 5e-4
"""Difference of step times that is not told."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The account of it."""

    orders: tuple[str, ...]
    """That were open: those of the runtime, or the one the user fixed."""
    layouts: int
    """Looked at in more than one order."""
    estimated: int
    """Layouts in another order than the default."""
    moved: int
    """Layouts for which another order is better."""
    complete: bool
    """No other layout of the space could become the best by another order."""

    def document(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **{name: value for name, value in self.__dict__.items() if name != "orders"},
            "open_orders": list(self.orders),
        }


def open_orders(setting: Setting, wishes: Wishes) -> tuple[str, ...]:
    """Orders that the runtime knows and the user leaves open, the default one first."""
    if "order" in wishes.fixed_words:
        return (wishes.fixed.order,)
    out = {value for word, value in wishes.forbidden if word == "order"}
    if None in out:
        return (DEFAULT_ORDER,)
    return tuple(order for order in setting.runtime.abilities.orders if order not in out)


PACE = ("compute_s", "recompute_s", "tp_exposed_s", "cp_exposed_s", "ep_exposed_s", "host_s")
"""Time parts of micro-batches: the bubble is so many of them."""


def least_step_s(
    setting: Setting, estimates: Estimates, wishes: Wishes, changes: tuple[str, ...] = (), *, even: bool = False
) -> FloatArray:
    """Seconds that each layout takes at least, (N,), in any open order and whatever the time parts `changes` shrink to.

    Layouts in the default order are meant: tensor parallelism, innermost there, is nowhere faster, but on meshes. `even`: stages are alike
    (`estimate.on_mean_stage`), so that the bubble shrinks no faster than what a micro-batch takes.
    """
    time, orders = estimates.time, open_orders(setting, wishes)
    as_it_is = np.array(time["step_s"])
    for part in changes:
        as_it_is -= time[part]
    if len(orders) < 2 or is_bound(estimates.layouts.order):
        return as_it_is
    if only_outer(orders):  # tp, cp and experts lie the same way in all
        moved = as_it_is - sum((time[part] for part in ("dp_exposed_s", "pp_exposed_s") if part not in changes), 0.0)
    else:
        kept = [part for part in ("compute_s", "recompute_s", "host_s") if part not in changes]
        if is_switched(setting) and "tp_exposed_s" not in changes:
            kept.append("tp_exposed_s")
        moved = np.sum([time[part] for part in kept], axis=0)
        if even:
            moved = with_bubble(time, moved)
        moved = moved + (0.0 if "optimizer_s" in changes else time["optimizer_s"])
    return np.where(movable(estimates.layouts, orders), moved, as_it_is)


def with_bubble(time: Mapping[str, FloatArray], pace_s: FloatArray) -> FloatArray:
    """Seconds of a pipeline of equal stages, (N,), whose micro-batches take `pace_s` together instead of what `time` says of PACE."""
    return pace_s * (1.0 + time["bubble_s"] / np.sum([time[part] for part in PACE], axis=0))


INNER = "tp-cp-"


def only_outer(orders: tuple[str, ...]) -> bool:
    """Whether the orders differ in the place of dp and pp at most."""
    return all(order.startswith(INNER) for order in orders)


def movable(layouts: LayoutTable, orders: tuple[str, ...]) -> NDArray[np.bool_]:
    """Rows that some order gives other groups than the default one, as far as their axes go and, with few orders, their experts."""
    used = used_axes([getattr(layouts, axis) for axis in AXES])
    several = np.any([SAME_AS[code] != SAME_AS[0] for code in codes(orders, ORDERS)], axis=0)[used]
    if not only_outer(orders):
        return several
    inside = layouts.tp * layouts.cp  # what a pipeline surrounds has to be an expert group (`order_rules.py`)
    return several & (~layouts.dispatches | (layouts.ep * layouts.expert_tp == inside))


def is_switched(setting: Setting) -> bool:
    """Whether a GPU has all its links to whatever others of its node; on a mesh neighbours may be slower than other nodes."""
    return bool(tier_table(setting.cluster).is_switched[0])


def as_innermost(setting: Setting, layouts: LayoutTable) -> tuple[LayoutTable, NDArray[np.bool_]]:
    """(the layouts with each axis laid as the innermost one, for a bound of their time in every order; rows for which it is one).

    Where nodes and axes are powers of two, no other distance of its ranks puts more of a group into one node.
    """
    sizes = np.stack([getattr(layouts, axis) for axis in AXES])
    node = setting.cluster.node.gpus
    even = ((sizes & (sizes - 1)) == 0).all(axis=0) & (node & (node - 1) == 0)
    even &= is_switched(setting)
    return replace(layouts, order=np.broadcast_to(np.int64(INNERMOST), len(layouts))), even


def may_take_less(setting: Setting, estimates: Estimates, wishes: Wishes, best_s: float) -> NDArray[np.bool_]:
    """Rows whose step may take less than `best_s` in some open order."""
    found = least_step_s(setting, estimates, wishes) < best_s
    orders = open_orders(setting, wishes)
    if only_outer(orders):  # then that is about as much
        return found
    at = np.flatnonzero(found & movable(estimates.layouts, orders))
    if len(at):
        layouts, bounded = as_innermost(setting, estimates.layouts.take(at))
        if bounded.any():
            inside = times_alone(setting, layouts.take(np.flatnonzero(bounded)))
            found[at[bounded]] = inside["step_s"] < best_s
    return found


def place(setting: Setting, ranked: Estimates, wishes: Wishes) -> tuple[Estimates, Placement]:
    """(the layouts of a ranking, each in its best order, not ranked anew; the account)."""
    orders = open_orders(setting, wishes)
    layouts = ranked.layouts
    nothing = Placement(orders=orders, layouts=0, estimated=0, moved=0, complete=True)
    if len(orders) < 2:
        return ranked, nothing
    step_s, least_s = np.array(ranked.step_s), least_step_s(setting, ranked, wishes)
    order = np.array(layouts.order)
    first = np.arange(min(FIRST_LAYOUTS, len(layouts)))
    tried = _try(setting, layouts, first, orders, step_s, order)
    hopeful = np.flatnonzero((least_s < step_s.min()) & movable(layouts, orders))
    later = hopeful[hopeful >= len(first)]
    later = later[np.argsort(step_s[later], kind="stable")]
    enough = np.searchsorted(np.cumsum(_ways(layouts.take(later), orders)), MOST_ROWS - tried, side="right")
    tried += _try(setting, layouts, later[:enough], orders, step_s, order)
    other = order != layouts.order
    moved = int(other.sum())
    account = replace(
        nothing,
        layouts=len(first) + int(enough),
        estimated=tried,
        moved=moved,
        complete=bool(enough == len(later) or (least_s[later[enough:]] >= step_s.min()).all()),
    )
    if not moved:
        return ranked, account
    placed = replace(layouts, order=order)
    at, stay = np.flatnonzero(other), np.flatnonzero(~other)
    pieces = [estimated(setting, placed.take(at)), *([ranked.take(stay)] if len(stay) else [])]
    return joined(pieces, placed.take(np.concatenate([at, stay]))).take(np.argsort(np.concatenate([at, stay]))), account


def _other_groups(layouts: LayoutTable, orders: tuple[str, ...]) -> dict[int, NDArray[np.bool_]]:
    """Rows to which each order, by its code, gives other groups than all orders before it."""
    used = used_axes([getattr(layouts, axis) for axis in AXES])
    found: dict[int, NDArray[np.bool_]] = {}
    before: list[IntArray] = [SAME_AS[layouts.order, used]]
    for code in codes(orders, ORDERS):
        same = SAME_AS[code][used]
        found[code] = ~np.any([same == one for one in before], axis=0)
        before.append(same)
    return found


def _ways(layouts: LayoutTable, orders: tuple[str, ...]) -> IntArray:
    """Other orders to estimate of each row."""
    return np.asarray(np.sum(list(_other_groups(layouts, orders).values()), axis=0, dtype=np.int64))


def _try(
    setting: Setting,
    layouts: LayoutTable,
    rows: NDArray[np.intp],
    orders: tuple[str, ...],
    step_s: FloatArray,
    order: IntArray,
) -> int:
    """Estimate `rows` in every other order and note the better ones in `step_s` and `order`; how many that were."""
    table, of = _in_other_orders(setting, layouts.take(rows), orders)
    if not len(table):
        return 0
    found = times_alone(setting, table)["step_s"]
    ends = np.flatnonzero(np.diff(table.order, append=-1)) + 1  # one order after the other
    for some in map(slice, [0, *ends[:-1]], ends):
        one, at = found[some], rows[of[some]]
        better = one < BETTER * step_s[at]
        step_s[at[better]], order[at[better]] = one[better], table.order[some][better]
    return len(found)


def in_other_orders(setting: Setting, layouts: LayoutTable, wishes: Wishes) -> LayoutTable:
    """The layouts in every other open order that gives them other groups and breaks no rule."""
    return _in_other_orders(setting, layouts, open_orders(setting, wishes))[0]


def _in_other_orders(
    setting: Setting, layouts: LayoutTable, orders: tuple[str, ...]
) -> tuple[LayoutTable, NDArray[np.intp]]:
    """(those, order by order; the row that each is of)."""
    others = {code: np.flatnonzero(other) for code, other in _other_groups(layouts, orders).items()}
    at = np.concatenate([np.zeros(0, dtype=np.intp), *others.values()])
    codes_of = np.repeat(np.asarray(list(others), dtype=np.int64), [len(rows) for rows in others.values()])
    table = replace(layouts.take(at), order=codes_of)
    good = np.flatnonzero(~np.any([rule.broken(setting, table) for rule in ORDER_RULES], axis=0))
    return table.take(good), at[good]


def placement_document(setting: Setting, layout: Layout) -> dict[str, Any] | None:
    """Where each axis of a layout lies, and the step time in every order that gives other groups; None on a mixed cluster, which
    `planner/mixed_search.py` lays out by parts.

    `axes`: {axis, ranks, stride, ranks_in_node, nodes}; `orders`: {order, step_s, runtime_knows}, fastest first.
    """
    if setting.cluster.parts:
        return None
    tiers = tier_table(setting.cluster)
    table = layout_table([layout])
    axes: list[dict[str, Any]] = []
    for axis in layout.order.split("-"):
        ranks, stride = getattr(layout, axis), int(table.stride(axis)[0])
        if ranks > 1:
            inside = int(members_per_node(tiers, ranks, stride))
            node = {"ranks_in_node": inside, "nodes": ranks // inside}
            axes.append({"axis": axis, "ranks": ranks, "stride": stride, **node})
    every = [layout, *(replace(layout, order=ORDERS[c]) for c, new in _other_groups(table, ORDERS).items() if new[0])]
    rows: list[dict[str, Any]] = []
    for one in every:
        broken, structural = rejections(setting, one)
        if not structural:
            step_s = float(estimated(setting, layout_table([one])).step_s[0])
            knows = all(rule.rule != "runtime-order" for rule in broken)
            rows.append({"order": one.order, "step_s": step_s, "runtime_knows": knows})
    return {"order": layout.order, "axes": axes, "orders": sorted(rows, key=lambda row: float(row["step_s"]))}


def placement_lines(document: Mapping[str, Any]) -> list[str]:
    """The same in sentences: where the axes lie, and what the next order and the best one that the runtime lacks would take."""
    if not document["axes"]:
        return []
    told = ", ".join(f"{row['axis']}={row['ranks']} {_where(row)}" for row in document["axes"])
    lines = [f"placement (order={document['order']}): {told}"]
    own = next(row["step_s"] for row in document["orders"] if row["order"] == document["order"])
    others = [row for row in document["orders"] if row["order"] != document["order"]]
    known = [row for row in others if row["runtime_knows"]]
    told_of = next((row for row in known if row["order"] == DEFAULT_ORDER), known[0] if known else None)
    if told_of:
        more = told_of["step_s"] / own - 1.0
        lines.append(f"order={told_of['order']} would take {'as long' if abs(more) < ALIKE else f'{more:+.1%}'}")
    lacking = [row for row in others if not row["runtime_knows"] and row["step_s"] < (1.0 - ALIKE) * own]
    if lacking:
        gain = 1.0 - lacking[0]["step_s"] / own
        lines.append(f"order={lacking[0]['order']} would save {gain:.1%}, but the runtime does not know it")
    return lines


def _where(row: Mapping[str, Any]) -> str:
    if row["nodes"] == 1:
        return "inside a node"
    if row["ranks_in_node"] == 1:
        return f"across {row['nodes']} nodes"
    return f"across {row['nodes']} nodes, {row['ranks_in_node']} in each"
