"""Tables of `shardplan validate` (rich)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from shardplan.cli.console import make_console

if TYPE_CHECKING:
    from shardplan.costmodel.validation import Outcome


def percent(value: float | None, *, signed: bool = False) -> str:
    """A percentage with one digit, "–" where there is none."""
    return "–" if value is None else f"{value:+.1f}" if signed else f"{value:.1f}"


def print_validation(
    outcomes: Sequence[Outcome], sources: Sequence[Mapping[str, Any]], left_out: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """Errors by source, what was refused and why, and how the fitted constants carry over."""
    console = make_console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("source")
    for name in ("rows", "timed", "mean %", "median", "p90", "bias", "in band", "order", "memory mean % (bias)"):
        table.add_column(name, justify="right")
    for one in sources:
        table.add_row(*_cells(one), style="bold" if one["source"].startswith("all") else "")
    console.print(table)
    total = sources[-1]
    console.print(
        f"\nband: covers {percent(total['band_coverage'])} % of rows, median half-width {percent(total['band_half_width'])} %; "
        f"pairs in the right order: {_share(total['pairs_3'])} of those more than 3 % apart, {_share(total['pairs_10'])} of those "
        f"more than 10 %; predicted best is {percent(total['best_choice_loss'])} % slower than the measured best; "
        f"out-of-memory rows called fitting: {total['oom_called_fitting']}; runs called too big: {total['ran_called_too_big']}"
    )
    refused = Counter(one.refused for one in outcomes if one.refused)
    for reason, count in refused.most_common():
        console.print(f"refused {count}: {escape(str(reason))}")
    for name, error in (left_out or {}).items():
        console.print(
            f"{name}: {error['rows']} rows, mean {percent(error['mape'])} %, median {percent(error['median'])} %, "
            f"90th percentile {percent(error['p90'])} %, bias {percent(error['bias'], signed=True)} %"
        )


def print_worst(outcomes: Sequence[Outcome], count: int) -> None:
    """The runs whose predicted times are furthest off, and in how many of the pairs more than 3 % apart each is misplaced."""
    from shardplan.costmodel.validation import misordered

    console, misplaced = make_console(), misordered(outcomes)
    timed = [one for one in outcomes if one.step_ratio is not None]
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("measured s", "predicted s", "off %", "pairs misplaced"):
        table.add_column(name, justify="right")
    for one in sorted(timed, key=lambda one: abs(math.log(one.step_ratio or 1.0)), reverse=True)[:count]:
        off = percent(100.0 * ((one.step_ratio or 1.0) - 1.0), signed=True)
        times = (f"{one.measured_step_s:.4g}", f"{one.predicted_step_s:.4g}")
        table.add_row(escape(one.case_id), *times, off, str(misplaced[one.case_id] or "–"))
    console.print("")
    console.print(table)


def _cells(one: Mapping[str, Any]) -> list[str]:
    time = one["time"]
    memory = "; ".join(
        f"{kind} {percent(error['mape'])} ({percent(error['bias'], signed=True)}, {error['rows']})"
        for kind, error in one["memory"].items()
    )
    return [
        escape(one["source"]),
        str(one["rows"]),
        str(time["rows"]),
        percent(time["mape"]),
        percent(time["median"]),
        percent(time["p90"]),
        percent(time["bias"], signed=True),
        percent(one["band_coverage"]),
        _share(one["pairs_3"]),
        memory or (f"{one['refused']} refused" if one["refused"] else "–"),
    ]


def _share(pairs: tuple[int, int]) -> str:
    right, total = pairs
    return f"{100 * right / total:.0f} % of {total}" if total else "–"
