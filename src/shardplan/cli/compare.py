"""`shardplan compare`: what a run was predicted to take beside what it took, of a folder that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardplan.cli import options


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    *,
    as_json: options.JsonOption = False,
) -> None:
    """Predicted and measured of every phase, axis of communication and part of memory, and what the difference is mostly of.

    Example: shardplan compare runs/20260102T030405Z-tiny-dp2

    Exit codes: 0 compared, 1 nothing was measured, 2 not a run folder.
    """
    import json

    from shardplan.executor.compare import comparison_lines, read_run

    found = {str(folder): read_run(folder) for folder in folders}
    if as_json:
        typer.echo(json.dumps({name: run["comparison"] for name, run in found.items()}, indent=1))
    else:
        told = ("\n".join([f"{name}: {run['layout']}", *comparison_lines(run)]) for name, run in found.items())
        typer.echo("\n\n".join(told))
    if any(run["measured"]["step_s"] is None for run in found.values()):
        raise typer.Exit(1)
