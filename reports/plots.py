"""Tables (shardplan.reports.tables) -> figures, each as the text of one inline SVG. Nothing is computed here.

Ink, grid and background are CSS variables of the page (`--ink`, `--muted`, `--line`, `--paper`), so that one figure
reads well on light and on dark. Fill colours are from Okabe and Ito's palette, safe for colour-blind readers.
"""

# pyright: reportUnknownMemberType=false
# (matplotlib leaves the keyword arguments of nearly every method unannotated)

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from shardplan.reports.tables import records

MEMORY_COLOURS = {
    "parameters": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer": "#009e73",
    "activations": "#e69f00",
    "buffers": "#cc79a7",
    "allocator slack": "#a8a8a8",
    "context": "#6f6f6f",
}
TIME_COLOURS = {
    "compute": "#0072b2",
    "recompute": "#56b4e9",
    "tensor parallel": "#e69f00",
    "context parallel": "#b8a11a",
    "expert parallel": "#8c6bb1",
    "data parallel": "#cc79a7",
    "pipeline transfer": "#d55e00",
    "bubble": "#a8a8a8",
    "offload": "#8c564b",
    "optimizer": "#009e73",
    "host": "#6f6f6f",
}
OTHER_COLOUR = "#c49c94"
RUN_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#8c564b")
LIMIT_COLOUR = "#d55e00"

_INK, _MUTED, _LINE, _PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)", _PAPER: "var(--paper)"}
"""Stand-ins drawn by matplotlib -> the page's colours."""
_WIDTH_INCHES = 9.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.id": None,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
}


def memory_svg(memory: pd.DataFrame, *, capacity_gib: float | None, name: str) -> str:
    """Stacked bars, one a pipeline stage, from `memory_table`, below the line of the GPU's capacity."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height_inches=3.6)
        for part, colour in MEMORY_COLOURS.items():
            rows = memory[memory["part"] == part]
            axes.bar(
                rows["stage"],
                rows["gib"],
                bottom=rows["bottom_gib"],
                color=colour,
                edgecolor=_PAPER,
                linewidth=0.8,
                width=0.72,
                label=part,
            )
        stages = memory["stage"].unique()
        axes.set_xticks(stages[:: 1 + len(stages) // 32])
        axes.set_xlim(-0.8, max(len(stages), 4) - 0.2)
        axes.set_xlabel("pipeline stage")
        axes.set_ylabel("GiB")
        axes.grid(visible=True, axis="y")
        if capacity_gib is not None:
            axes.axhline(capacity_gib, color=LIMIT_COLOUR, linewidth=1.6, linestyle="--", label="capacity")
            axes.set_ylim(0, capacity_gib * 1.06)
        _legend_beside(axes)
        return _svg(figure, name=name, label="Memory of each pipeline stage, by part")


def time_svg(time: pd.DataFrame, *, name: str) -> str:
    """One bar, the step, cut into the parts of `time_table`."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height_inches=1.9)
        for row in records(time):
            colour = TIME_COLOURS.get(row["part"], OTHER_COLOUR)
            style: dict[str, Any] = {"color": colour, "edgecolor": _PAPER, "linewidth": 0.8, "label": row["part"]}
            axes.barh([0], [row["seconds"]], left=[row["start_s"]], height=0.6, **style)
        axes.set_yticks([])
        axes.set_ylim(-0.45, 0.45)
        axes.margins(x=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("seconds of one step")
        figure.legend(loc="outside upper left", ncols=6, handlelength=1.0, handleheight=1.0, columnspacing=1.4)
        return _svg(figure, name=name, label="Time of one step, by part")


def loss_svg(losses: pd.DataFrame, *, name: str) -> str:
    """One line a run from `loss_table`. Later lines are thinner, so that runs that agree stay visible."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height_inches=3.0)
        rows = records(losses)
        runs = list(dict.fromkeys(str(row["run"]) for row in rows))
        for number, run in enumerate(runs):
            points = [(row["step"], row["loss"]) for row in rows if row["run"] == run]
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            width = 1.5 + 2.0 * (len(runs) - 1 - number) / len(runs)
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=_shortened(run))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(visible=True)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.6)
        return _svg(figure, name=name, label="Loss by step")


def agreement_svg(comparison: pd.DataFrame, *, name: str) -> str:
    """Measured / predicted of every row of `comparison_table`: a dot on its error band; 1 is a perfect prediction."""
    rows = [row for row in records(comparison) if row["ratio"] is not None]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height_inches=1.0 + 0.34 * len(rows))
        for number, row in enumerate(rows):
            if row["low_ratio"] is not None and row["high_ratio"] is not None:
                axes.plot(
                    [row["low_ratio"], row["high_ratio"]],
                    [number, number],
                    color=_LINE,
                    linewidth=9,
                    solid_capstyle="round",
                )
            axes.plot([row["ratio"]], [number], marker="o", markersize=7, color=_dot_colour(row), linestyle="none")
        axes.axvline(1.0, color=_MUTED, linewidth=1.0)
        axes.set_yticks(range(len(rows)), [f"{_shortened(row['run'])}: {row['quantity']}" for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("measured / predicted  (grey: the predicted error band)")
        return _svg(figure, name=name, label="Measured over predicted")


def _dot_colour(row: Mapping[str, Any]) -> str:
    return LIMIT_COLOUR if row["inside"] is False else RUN_COLOURS[0]


def _shortened(text: str) -> str:
    return text if len(text) <= 34 else text[:33] + "…"


def _figure(*, height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _legend_beside(axes: Axes) -> None:
    """Beside the axes, in the order in which the bars are stacked."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.2)


def _svg(figure: Figure, *, name: str, label: str) -> str:
    """The figure as SVG text to stand inside HTML: identifiers start with `name`, colours follow the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    width = float(figure.get_size_inches()[0]) * 96
    head = f'<svg class="plot" role="img" aria-label="{label}" style="max-width:{width:.0f}px"'
    text = re.sub(r"^<svg", head, text, count=1)
    return re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
