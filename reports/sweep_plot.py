"""Rows of a sweep -> one figure file: tokens/s over what is varied. Nothing is computed here."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shardplan.hw_profiles.errors import InputError
from shardplan.reports.plots import RUN_COLOURS

AXES = {
    "gpus": "GPUs",
    "network_gbps_per_gpu": "Gbit/s between nodes per GPU",
    "global_batch": "sequences per step",
    "seq": "tokens per sequence",
}
LABELS = {"gpus": "GPUs", "network_gbps_per_gpu": "Gbit/s", "global_batch": "batch", "seq": "seq"}
SUFFIXES = (".svg", ".png", ".pdf")


def draw_sweep(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Tokens/s over the swept quantity with most values, one line for each combination of the others; clusters alone are points side by
    side.

    Raises InputError when the suffix is not one of SUFFIXES or no point fits.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"suffix {file.suffix!r} is unknown", place=str(file), remedy=f"use one of {', '.join(SUFFIXES)}"
        )
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        raise InputError("no point of the sweep fits: nothing to draw", place=str(file), remedy="leave --plot out")
    varied = [name for name in AXES if _varies(name, fitting)]
    across = max(varied, key=lambda name: len({row[name] for row in fitting}), default="")
    names = list(dict.fromkeys(str(row["cluster"]) for row in fitting))
    if not across:
        across = "cluster" if len(names) > 1 else "gpus"
    others = [name for name in ("cluster", *AXES) if name != across and _varies(name, fitting)]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in fitting:
        label = ", ".join(_label(name, row[name]) for name in others) or str(row["cluster"])
        place = names.index(row["cluster"]) if across == "cluster" else row[across]
        lines.setdefault(label, []).append((place, row["tokens_per_s_per_gpu"], row["tokens_per_s"]))
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, (label, points) in enumerate(lines.items()):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        x, per_gpu, whole = zip(*sorted(points), strict=True)
        upper.plot(x, whole, marker="o", color=colour, label=label)
        lower.plot(x, per_gpu, marker="o", color=colour)
    for axes in (upper, lower):
        if across != "cluster":
            axes.set_xscale("log", base=2)
        axes.grid(visible=True, linewidth=0.6, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    if across == "cluster":
        lower.set_xticks(range(len(names)), names)
        lower.set_xlim(-0.5, len(names) - 0.5)
    else:
        ticks = sorted({row[across] for row in fitting})
        lower.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        lower.minorticks_off()
    lower.set_xlabel(AXES.get(across, "cluster"))
    upper.set_ylabel("tokens/s")
    lower.set_ylabel("tokens/s per GPU")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(file, dpi=144)


def _varies(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it has several values: a network rate only within one cluster, each has its own."""
    if name != "network_gbps_per_gpu":
        return len({row[name] for row in rows}) > 1
    clusters = {row["cluster"] for row in rows}
    return len({(row["cluster"], row[name]) for row in rows}) > len(clusters)


def _label(name: str, value: object) -> str:
    return str(value) if name == "cluster" else f"{LABELS[name]} {value:,.10g}"
