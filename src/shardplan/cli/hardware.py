"""`shardplan hardware`: the machines known by name, and every number of one of them with its source."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from shardplan.cli.console import make_console

app = typer.Typer(
    help="Known GPUs, nodes, networks and clusters, with the source of every number.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else.")]
Name = Annotated[
    str, typer.Argument(help="A cluster, node, network or GPU of the catalog, localhost, or a cluster's TOML file.")
]


@app.command("list", epilog="Example: shardplan hardware list --json")
def list_hardware(as_json: AsJson = False) -> None:
    """List the catalog: clusters, nodes, networks, GPUs, with their key figures."""
    from shardplan.hw_profiles.show import hardware_list

    rows_by_kind = hardware_list()
    if as_json:
        _print_json(dict(rows_by_kind))
        return
    console = make_console()
    for kind, rows in rows_by_kind.items():
        console.print(_table(kind, rows))
    console.print("A cluster's TOML file is a PROFILE too: docs/hardware_profiles.md", style="dim")


@app.command(
    "show", epilog="Example: shardplan hardware show h100-ib   (or: shardplan hardware show ./my-cluster.toml)"
)
def show_hardware(name: Name, as_json: AsJson = False) -> None:
    """Show every field of one part or profile: value, unit, and whether it is spec, measured, published or a guess."""
    from shardplan.hw_profiles.show import hardware_show

    shown = hardware_show(name)
    if as_json:
        _print_json(shown)
        return
    console = make_console()
    for section in shown["sections"]:
        console.print(_field_table(f"{shown['name']}: {section['title']}", section["rows"]))
    if "tiers" in shown:
        console.print(_table(f"{shown['name']}: tiers, per GPU and one direction", shown["tiers"]))
        console.print(
            f"{shown['gpus']} GPUs; {len(shown['guesses'])} numbers are guesses; digest {shown['digest'][:12]}"
        )


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """One column per key of the rows; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        is_number = all(isinstance(row[key], int | float | None) for row in rows)
        table.add_column(key.replace("_", " "), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    return table


def _field_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("field", "value", "kind", "source", title=title, title_justify="left")
    for row in rows:
        table.add_row(row["field"], f"{_text(row['value'])} {row['unit']}".strip(), row["source_kind"], row["source"])
    return table


def _text(value: object) -> str:
    """A cell: a dash for nothing, six digits of a number, first and last point of a curve."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        points = cast("list[list[float]]", value)
        first, last = points[0], points[-1]
        return f"{first[1]:g} at {first[0]:g} to {last[1]:g} at {last[0]:g}"
    return str(value)
