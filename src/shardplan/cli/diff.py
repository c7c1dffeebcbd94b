"""`shardplan diff`: two plans side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shardplan.cli import options


def diff(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="A plan file.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Another plan file.")],
    as_json: options.JsonOption = False,
) -> None:
    """What differs between two plans: inputs, layout, and term by term what that does to time and memory.

    Example: shardplan diff a.json b.json
    """
    from shardplan.planner.diff import diff_plans
    from shardplan.planner.plan import Plan

    document = diff_plans(Plan.read(before), Plan.read(after))
    if as_json:
        import json

        typer.echo(json.dumps(document, indent=1))
        return
    _print(document, str(before), str(after))


def _print(document: Mapping[str, Any], before: str, after: str) -> None:
    from rich.markup import escape

    from shardplan.cli.console import make_console
    from shardplan.cli.tables import new_table, seconds
    from shardplan.planner.explain import TIME_WORDS

    console = make_console()
    for path, notes in zip((before, after), document["notes"], strict=True):
        for note in notes:
            console.print(f"[yellow]{escape(path)}: {escape(note)}[/yellow]")
    if document["same"]:
        console.print("the plans are the same")
        return
    fields = new_table("What differs", ("", "left"), (escape(before), "left"), (escape(after), "left"))
    changed = {**document["inputs"], **document["layout"]}
    shown = [name for name in changed if _is_shown(name, changed)]
    for name in shown:
        fields.add_row(escape(name.removesuffix(".value")), *(_short(value) for value in changed[name]))
    if changed:
        console.print(fields)
        if len(shown) < len(changed):
            console.print(
                f"({len(changed) - len(shown)} more fields: sources, or of another machine or model; --json has all)"
            )
        console.print()
    one, other = document["step_s"]
    times = new_table(
        f"Step time {seconds(one)} and {seconds(other)} ({other / one - 1:+.1%})",
        ("part", "left"),
        ("A", "right"),
        ("B", "right"),
        ("difference", "right"),
    )
    for part, (a, b) in document["time_s"].items():
        times.add_row(TIME_WORDS[part], seconds(a), seconds(b), _signed_seconds(b - a))
    console.print(times)
    console.print()
    sizes = new_table(
        "Memory of the fullest stage in GiB", ("part", "left"), ("A", "right"), ("B", "right"), ("difference", "right")
    )
    for part, (a, b) in document["memory_bytes"].items():
        word = part.removesuffix("_bytes").replace("_", " ")
        sizes.add_row(word, *(f"{size / 2**30:.1f}" for size in (a, b)), f"{(b - a) / 2**30:+.1f}")
    console.print(sizes)
    rates = document["throughput"]["tokens_per_s_per_gpu"]
    if all(rates):
        console.print(f"\ntokens/s per GPU {rates[0]:,.0f} and {rates[1]:,.0f} ({rates[1] / rates[0] - 1:+.1%})")


def _is_shown(name: str, changed: Mapping[str, Any]) -> bool:
    """Not sources, and of another machine or model the names alone."""
    if ".source" in name:
        return False
    whole = name.partition(".")[0]
    return f"{whole}.name" not in changed or name.endswith(".name") or name == "cluster.nodes.value"


def _short(value: object) -> str:
    from rich.markup import escape

    text = "–" if value is None else str(value)
    return escape(text if len(text) <= 60 else text[:59] + "…")


def _signed_seconds(value: float) -> str:
    from shardplan.cli.tables import seconds

    return "0" if value == 0 else f"{'+' if value > 0 else '-'}{seconds(abs(value))}"
