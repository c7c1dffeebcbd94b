"""The part of the page about runs: what was measured, the loss, and how well the prediction held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.reports import formatting as say
from shardplan.reports.elements import (
    Column,
    Html,
    element,
    figure,
    join,
    layout_words,
    name,
    number,
    plain,
    table,
    text,
)
from shardplan.reports.inputs import RunInput
from shardplan.reports.plots import agreement_svg, loss_svg
from shardplan.reports.tables import comparison_table, loss_table, records, run_table


def run_section(runs: Sequence[RunInput]) -> Html:
    """Everything about the given runs, side by side."""
    return element("section", join([text("h2", "Runs"), _measured(runs), _loss(runs), _agreement(runs)]))


def _measured(runs: Sequence[RunInput]) -> Html:
    columns = [
        name("run", lambda row: str(row["run"])),
        layout_words("model, layout", lambda row: f"{row['model']}: {row['layout']}"),
        plain("on", _place),
        number("steps", _steps),
        number("step, median", lambda row: say.seconds(row["step_s"])),
        number("p20 to p80", lambda row: say.span(row["step_s_p20"], row["step_s_p80"], "s")),
        number("tokens/s", lambda row: say.significant(row["tokens_per_s"], 4)),
    ]
    rows = records(run_table(runs))
    failed = [text("p", f"{row['run']} failed: {row['error']}", css="bad") for row in rows if row["error"]]
    return join([table(columns, rows), *failed])


def _steps(row: Mapping[str, Any]) -> str:
    done, asked = _whole(row["steps_done"]), _whole(row["steps"])
    return done if done == asked else f"{done} of {asked}"


def _place(row: Mapping[str, Any]) -> str:
    return f"{_whole(row['world_size'])}\u00a0×\u00a0{row['device'] or say.DASH}"


def _whole(value: float | None) -> str:
    return say.DASH if value is None else f"{int(value):,}"


def _loss(runs: Sequence[RunInput]) -> Html:
    losses = loss_table(runs)
    if losses.empty:
        return Html("")
    columns = [
        name("run", lambda row: str(row["run"])),
        number("first loss", lambda row: say.significant(row["first_loss"], 5)),
        number("last loss", lambda row: say.significant(row["last_loss"], 5)),
    ]
    caption = "Layouts of one job train the same model: their curves should lie on each other."
    return join(
        [
            text("h3", "Loss"),
            figure(loss_svg(losses, name="loss"), caption if len(runs) > 1 else "Mean over the ranks that report it."),
            table(columns, records(run_table(runs))),
        ]
    )


def _agreement(runs: Sequence[RunInput]) -> Html:
    comparison = comparison_table(runs)
    if comparison.empty:
        return Html("")
    columns = [
        name("run", lambda row: str(row["run"])),
        plain("quantity", lambda row: str(row["quantity"])),
        number("predicted", lambda row: say.quantity(row["predicted"], row["unit"])),
        number("error band", lambda row: say.span(row["low"], row["high"], row["unit"])),
        number("measured", lambda row: say.quantity(row["measured"], row["unit"])),
        number("measured / predicted", lambda row: say.significant(row["ratio"])),
        Column(heading="in the band", cell=_verdict, mark=lambda row: _VERDICTS[row["inside"]][1]),
    ]
    drawing = [agreement_svg(comparison, name="agreement")] if comparison["ratio"].notna().any() else []
    return join(
        [
            text("h3", "Predicted and measured"),
            *(figure(svg, "1 is a perfect prediction; orange dots lie outside their error band.") for svg in drawing),
            table(columns, records(comparison)),
        ]
    )


_VERDICTS: Mapping[object, tuple[str, str]] = {True: ("yes", "good"), False: ("no", "bad"), None: (say.DASH, "")}


def _verdict(row: Mapping[str, Any]) -> str:
    return _VERDICTS[row["inside"]][0]
