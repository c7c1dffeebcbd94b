"""The `shardplan` command: a thin face; every command lives in its own small file and imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardplan.cli import (
    bench,
    calibrate,
    diff,
    estimate,
    explain,
    hardware,
    models,
    plan,
    report,
    run,
    sweep,
    text_tokens,
    validate,
)

app = typer.Typer(
    name="shardplan",
    help="Which layout of this model on these GPUs fits, is fastest, why, and does it hold when run?",
    epilog="Example: shardplan plan llama-3-70b --cluster h100-ib --gpus 64 --global-batch 1024 --seq 8192",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("estimate")(estimate.estimate)
app.command("explain")(explain.explain)
app.command("diff")(diff.diff)
app.command("sweep")(sweep.sweep)
app.command("run")(run.run)
app.command("tokenize")(text_tokens.tokenize)
app.command("calibrate")(calibrate.calibrate)
app.command("report")(report.report)
app.command("validate")(validate.validate)
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
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which layout of this model on these GPUs fits, is fastest, why, and does it hold when run?"""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point: errors become one line on stderr and the exit code of the contract (2 malformed input, 1 no, 3 failed)."""
    sys.exit(_exit_code())


def _exit_code() -> int:
    from shardplan.hw_profiles.errors import InputError

    try:
        code: object = app(standalone_mode=False)
    except InputError as bad:
        _tell(str(bad), bad)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("shardplan: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone: nothing to flush to
        return 1
    except Exception as bad:
        return _unexpected(bad)
    return code if isinstance(code, int) else 0


def _unexpected(bad: Exception) -> int:
    """A usage error of the option parser (whichever copy of click typer carries), or an error of ours."""
    usage = getattr(bad, "format_message", None)
    if usage is None:
        _tell(f"internal error, {type(bad).__name__}: {bad}; please report it with the output of --debug", bad)
        return 3
    line = str(usage()).replace("\n", " ").strip()
    if not line:  # a group without a command has printed its help
        return 0
    _tell(line, bad)
    return int(getattr(bad, "exit_code", 2))


def _tell(line: str, cause: Exception) -> None:
    """One line on stderr, after the traceback when --debug was given."""
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(cause)
    print(f"shardplan: {line}", file=sys.stderr)
