"""The `shardplan` command: a thin face; every command lives in its own small file and imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardplan.cli import bench, calibrate, estimate, explain, hardware, models, plan, report, run

app = typer.Typer(
    name="shardplan",
    help="Which layout of this model on these GPUs fits, is fastest, why, and does it hold when run?",
    epilog="Example: shardplan plan llama-3-70b --cluster h100-ib --gpus 64 --global-batch 1024 --seq 8192",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("estimate")(estimate.estimate)
app.command("explain")(explain.explain)
app.command("run")(run.run)
app.command("calibrate")(calibrate.calibrate)
app.command("report")(report.report)
app.add_typer(hardware.app, name="hardware")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from shardplan import __version__

        typer.echo(f"shardplan {__version__}")
        raise typer.Exit


@app.callback()
def top_level(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which layout of this model on these GPUs fits, is fastest, why, and does it hold when run?"""


def main() -> None:
    """Entry point: errors become one line on stderr and the exit code of the contract (2 malformed input, 1 no, 3 failed run)."""
    import click

    from shardplan.hw_profiles.errors import InputError

    try:
        code = app(standalone_mode=False)
    except InputError as bad:
        if "--debug" in sys.argv:
            raise
        print(f"shardplan: {bad}", file=sys.stderr)
        code = 2
    except click.ClickException as bad:
        print(f"shardplan: {bad.format_message()}", file=sys.stderr)
        code = bad.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("shardplan: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
