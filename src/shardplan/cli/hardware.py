"""`shardplan hardware`: the machines known by name, and every number of one of them with its source."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from shardplan.cli.console import make_console

app = typer.Typer(
    help="Known GPUs, nodes, networks and clusters, with the source of every number.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else.")]
Name = Annotated[
    str, typer.Argument(help="A cluster, node, network or GPU of the catalog, localhost, or a cluster's TOML file.")
]

_COLUMNS: dict[str, dict[str, str]] = {
    "clusters": {
        **{"name": "name", "gpus": "GPUs", "gpu": "GPU", "network": "network", "node": "node", "nodes": "nodes"},
        "usd_per_gpu_hour": "USD/GPU h",
    },
    "nodes": {
        **{"name": "name", "gpus": "GPUs", "gpu": "GPU", "link": "link", "bandwidth_gb_per_s": "GB/s"},
        **{"ram_gib": "RAM GiB", "nvme_tb": "NVMe TB", "cores": "cores", "usd_per_hour": "USD/h"},
    },
    "networks": {
        **{"name": "name", "kind": "kind", "nics_per_node": "NICs", "nic_gbit_per_s": "Gbit/s", "leaf_nodes": "leaf"},
        **{"oversubscription": "oversub.", "rail_optimised": "rails"},
    },
    "gpus": {
        **{"name": "name", "architecture": "architecture", "memory_mib": "MiB", "bandwidth_gb_per_s": "GB/s"},
        **{"fp16_tflops": "fp16", "bf16_tflops": "bf16", "fp8_tflops": "fp8", "power_w": "W"},
    },
}
"""Key of a row -> heading, of what the list prints; JSON has all keys."""
_TITLES = {
    "clusters": "clusters",
    "nodes": "nodes: GB/s per GPU and direction inside the node",
    "networks": "networks: NICs per node, rate of one, nodes below a leaf",
    "gpus": "gpus: driver's MiB, memory GB/s, dense TFLOP/s, W",
}
_TIERS = {
    **{"tier": "tier", "gpus": "GPUs", "bandwidth_gb_per_s": "GB/s", "latency_us": "us"},
    **{"ring_efficiency_at_64_mib": "ring at 64 MiB", "all_reduce_efficiency_at_64_mib": "all-reduce at 64 MiB"},
    "switched": "switched",
}
_SPARE = ("node", "usd_per_hour", "cores", "fp16_tflops")
"""Columns that a narrow terminal does without, the first one first."""


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
        console.print(_list_table(console, kind, rows))
    console.print(
        "localhost is this machine, detected when asked for. Every number has its source: shardplan hardware show NAME"
    )
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
    sources: list[str] = []
    for section in shown["sections"]:
        console.print(_field_table(f"{shown['name']}: {section['title']}", section["rows"], sources))
    _print_sources(console, sources)
    if "tiers" in shown:
        console.print(_table(f"{shown['name']}: tiers, per GPU and one direction", _TIERS, shown["tiers"]))
        console.print(
            f"{shown['gpus']} GPUs; {len(shown['guesses'])} numbers are guesses; digest {shown['digest'][:12]}"
        )


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)


def _table(title: str, columns: dict[str, str], rows: list[dict[str, Any]], *, grouped: bool = False) -> Table:
    """One column per key of `columns`, which are the headings; numbers to the right; a gap between families of GPUs if `grouped`."""
    table = _plain_table(title)
    for key, heading in columns.items():
        is_number = all(isinstance(row[key], int | float | None) for row in rows)
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = grouped and after is not None and _family(after) != _family(row)
        cells = (_price(row[key]) if key.startswith("usd_") else _text(row[key]) for key in columns)
        table.add_row(*cells, end_section=ends)
    return table


def _family(row: dict[str, Any]) -> str:
    """The architecture without its variant: cdna2 and cdna3 are one, blackwell_ultra is blackwell."""
    return str(row["architecture"]).split("_", maxsplit=1)[0].rstrip("0123456789")


def _list_table(console: Console, kind: str, rows: list[dict[str, Any]]) -> Table:
    """The catalog's rows of one kind, in as many columns as fit."""
    columns = _COLUMNS[kind]
    table = _table(_TITLES[kind], columns, rows, grouped=kind != "networks")
    unlimited = console.options.update(max_width=10_000)
    for spare in _SPARE:
        if Measurement.get(console, unlimited, table).maximum <= console.width:
            break
        columns = {key: heading for key, heading in columns.items() if key != spare}
        table = _table(_TITLES[kind], columns, rows, grouped=kind != "networks")
    return table


def _field_table(title: str, rows: list[dict[str, Any]], sources: list[str]) -> Table:
    """Fields of one part below the names of their tables; a source is told by its number in `sources`, which grows."""
    table, above = _plain_table(title), ""
    for heading in ("field", "value", "kind", "source"):
        justify = "right" if heading == "source" else "left"
        table.add_column(heading, overflow="fold", justify=justify, no_wrap=heading == "field")
    for row in rows:
        place, _, field = row["field"].rpartition(".")
        if place and place != above:
            table.add_row(place)
        above = place
        if row["source"] and row["source"] not in sources:
            sources.append(row["source"])
        value = f"{_text(row['value'])} {row['unit']}".strip() + (f" ({row['date']})" if row.get("date") else "")
        number = str(sources.index(row["source"]) + 1) if row["source"] else ""
        table.add_row(f"  {field}" if place else field, value, row["source_kind"], number)
    return table


def _print_sources(console: Console, sources: list[str]) -> None:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.title, table.title_justify = "sources", "left"
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for number, source in enumerate(sources, start=1):
        table.add_row(str(number), source)
    console.print(table)
    console.print()


def _price(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:.2f}"


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
