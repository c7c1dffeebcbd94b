"""What one change does for a layout of the user's own, the rest of it kept: one word of it, a rate of the machine, the batch, the GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from shardplan.costmodel.layout import CODES, Layout, layout_table
from shardplan.costmodel.mixed import estimate_any, part_settings
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.mixed_cuts import estimated_on_parts
from shardplan.planner.placement import open_orders
from shardplan.planner.sensitivity import CHANGES, FIGURES, Question, faster_machines
from shardplan.planner.space import Wishes

MOST_TOLD = 6
"""Changes of a word of the layout, the best first."""
MEMORY = "10 % more GPU memory"
FASTER = FIGURES["throughput"]
CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Virtual stages that schedules are tried with."""


def own_changes(question: Question, layout: Layout) -> list[dict[str, Any]]:
    """What one change each does to tokens/s/GPU, the best first: the rows of `sensitivity.one_change`, gains against what the layout
    takes, or would if it fitted. All rows fit and break no rule: of changes of one word (degrees at the cost of another one) the
    MOST_TOLD best that gain something, or of a layout that is none itself those that are. Memory is told with the word that it makes
    room for. `layout` must have a meaning."""
    at = _setting(question)
    before = _rate(at, float(estimate_any(at, layout).step_s[0]))
    valid = bool(_fitting(question, [layout]))
    words = dict(_neighbours(at, layout))
    today = _fitting(question, words)
    rows = [
        _row(words[other], before, _rate(at, step_s), other)
        for other, step_s in today.items()
        if _rate(at, step_s) > before or not valid
    ][:MOST_TOLD]
    roomy = replace(question, **CHANGES[MEMORY](question))
    first = next((one for one in _fitting(roomy, [layout, *words]).items() if one[0] not in today), None)
    if first is not None and first[0] == layout and not valid:
        rows.append(_row(MEMORY, before, _rate(at, first[1]), None))
    elif first is not None and valid and first[0] != layout and _rate(at, first[1]) > before:
        rows.append(_row(f"{MEMORY} and {words[first[0]]}", before, _rate(at, first[1]), first[0]))
    for change, asked, other in _around(question, layout):
        for found, step_s in _fitting(asked, [other]).items():
            rows.append(_row(change, before, _rate(_setting(asked), step_s), None if found == layout else found))
    return sorted(rows, key=lambda row: -float(row["gain_fraction"]))


def _row(change: str, before: float, rate: float, layout: Layout | None) -> dict[str, Any]:
    return {
        "change": change,
        "gain_fraction": FASTER.gain(before, rate),
        "becomes": FASTER.told(rate),
        "layout": None if layout is None else layout.words(),
    }


def _setting(question: Question) -> Setting:
    return Setting(model=question.model, job=question.job, cluster=question.cluster, runtime=question.runtime)


def _rate(setting: Setting, step_s: float) -> float:
    """Tokens/s per GPU."""
    return setting.job.global_batch * setting.job.seq / step_s / setting.cluster.gpus


def _fitting(question: Question, layouts: Iterable[Layout]) -> dict[Layout, float]:
    """{layout: seconds of its step} of those that fit and break no rule, fastest first."""
    by_row = {layout_table([one]).row(0): one for one in layouts}
    at = _setting(question)
    table = layout_table(list(by_row)) if by_row else None
    for part in part_settings(at):
        table = table.take(unbroken(part, table)) if table is not None and len(table) else None
    if table is None or not len(table):
        return {}
    found = estimated_on_parts(at, table) if at.cluster.parts else estimated(at, table)
    rows = np.flatnonzero(found.fits(question.headroom))
    rows = rows[np.argsort(found.step_s[rows], kind="stable")]
    return {by_row[found.layouts.row(int(row))]: float(found.step_s[row]) for row in rows}


def _around(question: Question, layout: Layout) -> Iterator[tuple[str, Question, Layout]]:
    """(change, changed question, the layout there) of what is not in the layout: rates, batch, GPUs."""
    for change, cluster in faster_machines(question.cluster):
        yield change, replace(question, cluster=cluster), layout
    for change, dp in (
        ("twice the global batch", layout.dp),
        ("half the global batch", layout.dp),
        ("twice the GPUs", 2 * layout.dp),
        ("half the GPUs", layout.dp // 2),
    ):
        try:
            asked = replace(question, **CHANGES[change](question))
            yield change, asked, replace(layout, dp=dp)
        except InputError:  # not a size of this cluster, no half of the batch or of dp
            continue


def _neighbours(setting: Setting, layout: Layout) -> Iterator[tuple[Layout, str]]:
    """(layout, the words that change in it) of every change of one word, whether rules allow it or not."""
    for values in _one_change_each(setting, layout):
        try:
            other = replace(layout, **{**values, **_consequences(replace(layout, **values))})
        except InputError:
            continue
        changed = {name: value for name, value in values.items() if getattr(layout, name) != value}
        if other != layout and changed:
            yield other, " ".join(_told(name, value) for name, value in changed.items())


def _told(name: str, value: Any) -> str:
    return f"without {name}" if value is None else f"{name}={str(value).lower()}"


def _one_change_each(setting: Setting, layout: Layout) -> Iterator[dict[str, Any]]:
    abilities, offload = setting.runtime.abilities, setting.runtime.offload
    for name in ("micro_batch", "ep"):
        degree = getattr(layout, name)
        yield from ({name: other} for other in (2 * degree, *_divisors(degree)))
    for more, less in permutations(("dp", "tp", "pp", "cp"), 2):
        degree = getattr(layout, less)
        factor = next((prime for prime in (2, 3, 5, 7) if degree % prime == 0), degree)
        if factor > 1:
            moved = {more: factor * getattr(layout, more), less: degree // factor}
            yield from ({**moved, "sequence_parallel": on} for on in (True, False)) if more == "tp" else (moved,)
    for schedule in abilities.schedules if layout.pp > 1 else ():
        yield from ({"schedule": schedule, "virtual_stages": chunks} for chunks in CHUNKS)
    yield from ({"zero": zero} for zero in abilities.zero)
    yield from ({"recompute": word} for word in ("none", "selective", "full"))
    yield from ({"sequence_parallel": on} for on in (True, False))
    nodes = sorted({node.gpus for part in part_settings(setting) for node, _ in part.cluster.node_runs})
    yield from ({"dp_shard": ranks} for ranks in (None, *nodes) if layout.zero)
    yield from ({"offload_optimizer": tier} for tier in abilities.offload_optimizer)
    yield from ({"offload_params": tier} for tier in ("none", *offload.parameters))
    yield from ({"offload_activations": tier} for tier in ("none", *offload.activations))
    yield from ({"cp_kind": kind} for kind in CODES["cp_kind"] if layout.cp > 1)
    yield from ({"order": order} for order in open_orders(setting, Wishes()))


def _divisors(degree: int) -> list[int]:
    """Those below it, down to one."""
    return [one for one in range(degree // 2, 0, -1) if degree % one == 0]


def _consequences(layout: Layout) -> dict[str, Any]:
    """What else is dropped since it lost its meaning."""
    dropped: dict[str, Any] = {}
    if layout.tp == 1:
        dropped["sequence_parallel"] = False
    if layout.pp == 1:
        dropped |= {"schedule": "1f1b", "virtual_stages": 1}
    if layout.stage_layers is not None and len(layout.stage_layers) != layout.pp * layout.virtual_stages:
        dropped["stage_layers"] = None
    if layout.dp_shard is not None and (not layout.zero or layout.dp % layout.dp_shard):
        dropped["dp_shard"] = None
    return dropped
