"""`shardplan report`: one page about plans and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Plan files, run folders, or folders of runs.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for index.html; made if needed.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Write one self-contained page: predictions, runner-up layouts, runs, predicted against measured.

    Example: shardplan report plan.json runs/* -o report
    """
    from shardplan.reports.page import write_report

    page = write_report(paths, out)
    typer.echo(json.dumps({"page": str(page)}) if as_json else f"wrote {page}")
