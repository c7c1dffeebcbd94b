"""The part of the page about one plan: what was chosen, what it costs, what it was chosen over, what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardplan.reports import formatting as say
from shardplan.reports.elements import (
    Column,
    Html,
    element,
    escape,
    figure,
    folded,
    join,
    layout_words,
    number,
    plain,
    table,
    text,
    tiles,
)
from shardplan.reports.inputs import PlanInput
from shardplan.reports.plots import memory_svg, time_svg
from shardplan.reports.tables import (
    assumption_table,
    headline_table,
    hidden_table,
    memory_table,
    records,
    refused_table,
    runner_up_table,
    time_table,
)

_FEW_REFUSALS = 12


def plan_section(one: PlanInput, *, index: int) -> Html:
    """Everything about one plan; `index` makes the identifiers of its figures unique."""
    facts = records(headline_table([one]))[0]
    return element(
        "section",
        join(
            [
                text("h2", f"{facts['model']} on {facts['gpus']} GPUs of {facts['cluster']}"),
                *(text("p", f"{one.path}: {note}.", css="lead") for note in one.plan.notes()),
                _headline(facts),
                _memory(one, facts, index),
                _time(one, index),
                _runners_up(one),
                _assumptions(one),
            ]
        ),
    )


def _headline(facts: Mapping[str, Any]) -> Html:
    job = (
        f"{say.large(facts['parameters'])} parameters, {facts['global_batch']:,} sequences of {facts['seq']:,} tokens "
        f"a step, {facts['precision']}, run by {facts['runtime']}. Plan {facts['plan']}."
    )
    step_band = _band(facts["step_s_low"], facts["step_s_high"], "s")
    peak_band = _band(facts["peak_low_bytes"], facts["peak_high_bytes"], "bytes")
    boxes = tiles(
        [
            ("step time", say.seconds(facts["step_s"]), step_band),
            ("tokens/s per GPU", say.significant(facts["tokens_per_s_per_gpu"], 4), _total(facts)),
            ("model FLOP utilisation", say.percent(facts["mfu"]), "of the dense peak"),
            ("peak memory", say.gib(facts["device_peak_bytes"]), peak_band),
            ("headroom", say.percent(facts["headroom_fraction"]), f"of {say.gib(facts['capacity_bytes'])}"),
        ]
    )
    misfit = Html("") if facts["fits"] else text("p", "This layout does not fit.", css="bad")
    return join([text("p", job, css="lead"), text("p", facts["layout"], css="words"), misfit, boxes])


def _band(low: float | None, high: float | None, unit: str) -> str:
    return f"likely {say.span(low, high, unit)}" if low is not None else ""


def _total(facts: Mapping[str, Any]) -> str:
    return f"{say.significant(facts['tokens_per_s'], 4)} in all" if facts["tokens_per_s"] is not None else ""


def _memory(one: PlanInput, facts: Mapping[str, Any], index: int) -> Html:
    memory = memory_table(one)
    capacity_bytes = facts["capacity_bytes"]
    capacity_gib = capacity_bytes / 2**30 if capacity_bytes is not None else None
    drawing = memory_svg(memory, capacity_gib=capacity_gib, name=f"memory{index}")
    by_stage: dict[int, dict[str, Any]] = {}
    for row in records(memory):
        by_stage.setdefault(row["stage"], {"layers": row["layers"]})[row["part"]] = row["bytes"]
    parts = list(dict.fromkeys(memory["part"]))
    columns = [
        number("stage", lambda row: str(row["stage"])),
        number("layers", lambda row: str(row["layers"] or say.DASH)),
        *(_bytes_column(part) for part in parts),
        number("in all", lambda row: say.gib(sum(row[part] for part in parts))),
    ]
    rows = [{"stage": stage, **row} for stage, row in by_stage.items()]
    return join(
        [
            text("h3", "Memory by pipeline stage"),
            figure(drawing, "What one GPU of each stage holds at its peak."),
            folded("The same as numbers", table(columns, rows)),
        ]
    )


def _bytes_column(part: str) -> Column:
    return number(part, lambda row: say.gib(row[part]))


def _time(one: PlanInput, index: int) -> Html:
    time = time_table(one)
    if time.empty:
        return Html("")
    columns = [
        plain("part", lambda row: row["part"]),
        number("time", lambda row: say.seconds(row["seconds"])),
        number("of the step", lambda row: say.percent(row["fraction"])),
    ]
    hidden = [f"{row['part']} {say.seconds(row['seconds'])}" for row in records(hidden_table(one))]
    return join(
        [
            text("h3", "Where the step time goes"),
            figure(time_svg(time, name=f"time{index}"), "What nothing hides; the parts add up to the step."),
            text("p", f"Hidden behind compute: {', '.join(hidden)}.", css="note") if hidden else Html(""),
            folded("The same as numbers", table(columns, records(time))),
        ]
    )


def _runners_up(one: PlanInput) -> Html:
    search = one.plan.search
    ranked = records(runner_up_table(one))
    parts = [text("h3", "Why this layout"), text("p", _looked_at(search), css="lead")]
    if ranked:
        columns = [
            number("", lambda row: str(row["rank"])),
            layout_words("layout", lambda row: str(row.get("layout", say.DASH))),
            number("step", lambda row: say.seconds(row.get("step_s"))),
            number("slower by", _slower),
            number("tokens/s/GPU", lambda r: say.significant(r.get("tokens_per_s_per_gpu"), 4)),
            number("MFU", lambda row: say.percent(row.get("mfu"))),
            number("peak", lambda row: say.gib(row.get("device_peak_bytes"))),
            number("headroom", lambda row: say.percent(row.get("headroom_fraction"))),
        ]
        parts.append(
            table(columns, ranked, row_css=lambda row: "chosen" if row["layout"] == one.plan.layout.words() else "")
        )
    return join([*parts, _refused(one)])


def _slower(row: Mapping[str, Any]) -> str:
    return say.percent(row["slower_fraction"]) if row["slower_fraction"] else say.DASH


def _looked_at(search: Mapping[str, Any]) -> str:
    if "looked_at" not in search:
        return "The layout was given, not searched for."
    took = f" in {say.seconds(search['seconds'])}" if search.get("seconds") is not None else ""
    return f"{search['looked_at']:,} layouts were looked at{took}; these are the best."


def _refused(one: PlanInput) -> Html:
    rows = records(refused_table(one))
    if not rows:
        return Html("")
    columns = [
        plain("rule", lambda row: row["rule"]),
        number("layouts", lambda row: f"{row['count']:,}"),
        plain("because, for instance", lambda row: row["reason"]),
    ]
    total = sum(row["count"] for row in rows)
    more = len(rows) - _FEW_REFUSALS
    note = text("p", f"{more} rules that refused fewer are left out.", css="note") if more > 0 else Html("")
    return folded(f"What was refused: {total:,} layouts, by rule", join([table(columns, rows[:_FEW_REFUSALS]), note]))


def _assumptions(one: PlanInput) -> Html:
    rows = records(assumption_table(one))
    if not rows:
        return Html("")
    tag = text("span", "guess", css="tag")
    items = [element("li", tag if row["kind"] == "guess" else Html(""), escape(row["text"])) for row in rows]
    return join([text("h3", "What this rests on"), element("ul", join(items))])
