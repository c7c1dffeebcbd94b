"""A sweep as a table for people: columns that say nothing here are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from shardplan.cli.console import make_console
from shardplan.cli.result_lines import DAY_S, span, usd
from shardplan.cli.tables import new_table, seconds
from shardplan.planner.sweep import POINT

HEADINGS = {"network_gbps_per_gpu": "Gbit/s/GPU", "global_batch": "batch", "gpus": "GPUs"}


SHOWN_SAVING = 0.25
"""Of memory, from one row of a point to the next that is shown of its front."""


def thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is shown of fronts: of every point, fastest first, those ahead of all others that save SHOWN_SAVING each."""
    least: dict[tuple[object, ...], float] = {}
    shown: list[Mapping[str, Any]] = []
    for row in rows:
        point = tuple(row[name] for name in POINT)
        lean = row["fits"] and row["device_peak_gib"] <= (1.0 - SHOWN_SAVING) * least.get(point, float("inf"))
        if not row["fits"] or (row["pareto"] and lean):
            shown.append(row)
            least[point] = row["device_peak_gib"] if row["fits"] else float("inf")
    return shown


def print_sweep(
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Any] | None],
    *,
    days: float | None,
    written: Sequence[str],
) -> None:
    """Every point, then the answers; of fronts what `thinned` leaves."""
    console = make_console()
    fronts = len({tuple(row[name] for name in POINT) for row in rows}) < len(rows)
    varied = [name for name in POINT if name == "gpus" or len({row[name] for row in rows}) > 1]
    priced = any(row["usd_per_million_tokens"] is not None for row in rows)
    budget = any(row["days"] is not None for row in rows)
    table = new_table(
        f"Less and less memory at every point, {SHOWN_SAVING:.0%} a row (--csv and --json have more)"
        if fronts
        else "The best plan at every point",
        *((HEADINGS.get(name, name), "left" if name == "cluster" else "right") for name in varied),
        ("step", "right"),
        ("tokens/s", "right"),
        ("MFU", "right"),
        ("peak GiB", "right"),
        *([("USD/M tokens", "right")] if priced else []),
        *([("time", "right")] if budget else []),
        ("", "left"),
        ("layout", "left"),
    )
    for row in rows:
        table.add_row(*(_word(row[name]) for name in varied), *_figures(row, priced=priced, budget=budget))
    console.print(table)
    console.print("* no point of the same batch and sequence is better in speed, GPUs, memory and price", style="dim")
    console.print()
    for line in (*answer_lines(found, days), *unpriced_lines(rows)):
        console.print(escape(line))
    for file in written:
        console.print(f"wrote {escape(file)}", style="dim")


def _word(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,.10g}" if isinstance(value, int | float) else escape(str(value))


def _figures(row: Mapping[str, Any], *, priced: bool, budget: bool) -> list[str]:
    if not row["fits"]:
        return ["–"] * (4 + priced + budget) + ["", f"[dim]{escape(str(row['reason']))}[/dim]"]
    cells = [
        seconds(row["step_s"]),
        f"{row['tokens_per_s']:,.0f}",
        f"{row['mfu']:.1%}",
        f"{row['device_peak_gib']:.1f}",
    ]
    if priced:
        price = row["usd_per_million_tokens"]
        cells.append("–" if price is None else f"{price:.3g}")
    if budget:
        cells.append(_time(row))
    return [*cells, "*" if row["pareto"] else "", escape(row["layout"])]


def _time(row: Mapping[str, Any]) -> str:
    from shardplan.planner.sweep import days_of

    days = days_of(row)
    return "–" if days is None else span(days * DAY_S)


def answer_lines(found: Mapping[str, Mapping[str, Any] | None], days: float | None) -> list[str]:
    """The fastest, the fewest GPUs within the deadline and the cheapest, in sentences."""
    fastest, cheapest = found["fastest"], found["cheapest"]
    if fastest is None:
        return ["nothing fits at any point"]
    lines = [f"fastest: {_place(fastest)}, {fastest['tokens_per_s']:,.0f} tokens/s"]
    if days is not None:
        fewest = found["fewest"]
        within = f"within {days:g} days"
        if fewest is None:
            return [*lines, f"no point finishes {within}; the fastest takes {_time(fastest)}"]
        lines.append(f"fewest GPUs {within}: {_place(fewest)}, {_time(fewest)}")
    if cheapest is not None:
        whole = "" if cheapest["usd"] is None else f", {usd(cheapest['usd'])} in all"
        among = "" if days is None else f" within {days:g} days"
        lines.append(
            f"cheapest{among}: {_place(cheapest)}, {cheapest['usd_per_million_tokens']:.3g} USD per million tokens{whole}"
        )
    return lines


def unpriced_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Clusters that the cheapest was not sought among, in a sentence."""
    fitting = [row for row in rows if row["fits"]]
    without = list(dict.fromkeys(row["cluster"] for row in fitting if row["usd_per_million_tokens"] is None))
    if not without:
        return []
    return [f"no price known of {', '.join(without)}: left out of the cheapest (--price gives one)"]


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['gpus']:,} GPUs of {row['cluster']}, global batch {row['global_batch']}, sequence {row['seq']}: {row['layout']}"
