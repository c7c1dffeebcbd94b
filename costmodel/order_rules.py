"""Rules of the order of mesh axes; `rules.py` holds the whole list."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.axis_order import AXES, INNERMOST, ORDERS, SAME_AS, is_bound, used_axes
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import codes


def _unknown_to_runtime(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: none of the runtime's orders puts the axes above 1 this way."""
    if not table.order.any():  # every runtime has the default one
        return np.zeros(len(table), dtype=bool)
    used = used_axes([getattr(table, axis) for axis in AXES])
    known = [SAME_AS[code, used] for code in codes(setting.runtime.abilities.orders, ORDERS)]
    return ~np.any(SAME_AS[table.order, used] == known, axis=0)


def _cuts_expert_groups(_: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: a pipeline inside other axes surrounds a part of an expert group, or of the ranks between its replicas."""
    if not table.order.any() or is_bound(table.order) or not table.dispatches.any():
        return np.zeros(len(table), dtype=bool)
    inside = table.stride("pp")
    surrounded = (table.pp > 1) & (inside != table.dp * table.cp * table.tp)
    return table.dispatches & surrounded & (table.ep * table.expert_tp != inside)


ORDER_RULES: tuple[Rule, ...] = (
    Rule(
        id="runtime-order",
        broken=_unknown_to_runtime,
        detail=lambda s, x: f"runtime {s.runtime.name!r} ({s.runtime.version}) does not order its ranks {x.order}",
        remedy=lambda s, x: (
            f"use order={' or '.join(s.runtime.abilities.orders)}"
            if len(s.runtime.abilities.orders) < len(ORDERS)
            else "use another --runtime"
        ),
    ),
    Rule(
        id="order-experts",
        broken=_cuts_expert_groups,
        detail=lambda s, x: (
            f"order={x.order}: the {x.ep * (x.etp or 1)} ranks of ep*etp are not the ranks inside the pipeline, so expert groups "
            "would lie unevenly"
        ),
        remedy=lambda s, x: "use an order that ends with pp, or an ep*etp of the axes before pp",
        structural=True,
        evidence="Megatron-Core parallel_state.py: without pp last, data-parallel sizes of attention and experts must be equal",
    ),
    Rule(
        id="order-zeropp",
        broken=lambda s, t: ((t.hpz > 1) | (t.qwz > 0) | (t.qgz > 0)) & (t.order > 0) & (t.order < INNERMOST),
        detail=lambda s, x: f"order={x.order} with ZeRO++, whose groups are neighbours of one node",
        remedy=lambda s, x: "drop order, or hpz, qwz and qgz",
        structural=True,
    ),
)
