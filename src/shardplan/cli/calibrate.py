"""`shardplan calibrate`: measure this machine into a cluster profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardplan.executor.calibrate_measurements import Measurements
    from shardplan.executor.calibrate_summary import SummaryRow
    from shardplan.hw_profiles.kernel_curves import KernelRates

OutOption = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Profile to write (TOML).")]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes", help="Processes that share the CPU, or GPUs to use; default: one per core (at least 2)."
    ),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats: seconds instead of a minute.")]
PointsOption = Annotated[
    Path | None,
    typer.Option(
        "--points",
        metavar="FILE",
        help="On one device, also measure single points (products by shape and layout, attention, launches) into this CSV.",
    ),
]
KernelsOption = Annotated[
    Path | None,
    typer.Option(
        "--kernels",
        metavar="FILE",
        help="On a GPU: curves of its attention kernels from this CSV of `shardplan bench kernels --only attention -o FILE`.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the profile if it exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else to stdout.")]


POINTS_S = 25.0
"""Time for single points."""


def calibrate(
    *,
    out: OutOption = Path("profile.toml"),
    processes: ProcessesOption = None,
    quick: QuickOption = False,
    points: PointsOption = None,
    kernels: KernelsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine into a profile for --cluster: matrix products, memory, attention, dispatch, collectives.

    Examples: shardplan calibrate -o profile.toml

    shardplan bench kernels --only attention -o kernels.csv; shardplan calibrate --kernels kernels.csv -o profile.toml

    Exit codes: 0 written, 1 torch is missing, 2 malformed input, 3 the measurement failed.
    """
    import sys
    from importlib.util import find_spec

    _check(out, processes, force)
    if find_spec("torch") is None:
        _stop("calibrating needs torch; install shardplan[run]", 1)
    rates = _kernel_rates(kernels) if kernels else None
    from shardplan.executor.calibrate import CalibrationError, measure_machine
    from shardplan.executor.calibrate_profile import base_document, profile_document
    from shardplan.executor.calibrate_summary import summary_rows

    if sys.stderr.isatty():
        print("measuring for up to a minute; other work on this machine would disturb it", file=sys.stderr)
    try:
        measurements = measure_machine(processes=processes, quick=quick, points_s=POINTS_S if points else 0.0)
    except CalibrationError as error:
        _stop(str(error), 3)
    base = base_document(measurements)
    profile = profile_document(measurements, base, rates)
    _write(profile, out)
    if points:
        _write_points(measurements, points)
    rows = summary_rows(measurements, base)
    if as_json:
        _print_json(measurements, rows, profile, out)
    else:
        _print_summary(measurements, rows, out)


def _kernel_rates(path: Path) -> KernelRates:
    """Read before anything is measured; InputError without a GPU."""
    from shardplan.executor.calibrate import has_gpu
    from shardplan.hw_profiles.errors import InputError
    from shardplan.hw_profiles.kernel_curves import read_kernel_rates

    found = read_kernel_rates(path)
    if not has_gpu():
        raise InputError(
            "there is no GPU here", place="--kernels", remedy="leave it out, or calibrate on the GPU's machine"
        )
    return found  # whose device is compared later: asking here for a name would take memory of the GPU that is measured


def _stop(line: str, code: int) -> NoReturn:
    typer.echo(f"shardplan: {line}", err=True)
    raise typer.Exit(code)


def _check(out: Path, processes: int | None, force: bool) -> None:
    """Raise InputError for what can be known before anything is measured."""
    from shardplan.hw_profiles.errors import InputError

    if processes is not None and processes < 1:
        raise InputError(f"processes={processes} is not positive", place="--processes", remedy="give 1 or more")
    if out.is_dir():
        raise InputError("is a folder, not a file", place=str(out), remedy=f"give {out / 'profile.toml'}")
    if not out.parent.is_dir():
        raise InputError(f"folder {str(out.parent)!r} does not exist", place="--out", remedy="make it first")
    if out.suffix != ".toml":
        raise InputError("does not end in .toml", place=str(out), remedy="--cluster takes such a file for a profile")
    if out.exists() and not force:
        raise InputError(
            "exists already", place=str(out), remedy="choose another file, or give --force to overwrite it"
        )


def _write(profile: dict[str, Any], out: Path) -> None:
    """Check the profile, write it beside `out`, then put it in place."""
    import os

    from shardplan.hw_profiles.errors import InputError
    from shardplan.hw_profiles.load import cluster_from_document
    from shardplan.hw_profiles.write import write_profile

    cluster_from_document(profile, place="measured profile")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        write_profile(profile, unfinished)
        unfinished.replace(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        problem = f"cannot be written: {error.strerror or error}"
        raise InputError(problem, place=str(out), remedy="choose another folder") from None


def _write_points(measurements: Measurements, path: Path) -> None:
    from shardplan.executor.calibrate_points import write_points
    from shardplan.hw_profiles.errors import InputError

    rates = measurements.rates
    try:
        write_points(
            path,
            rates.points,
            date=measurements.date,
            device=rates.device_name,
            software=rates.software,
            driver=rates.facts.get("driver", ""),
        )
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        raise InputError(problem, place=str(path), remedy="choose another folder") from None


def _print_json(measurements: Measurements, rows: Sequence[SummaryRow], profile: dict[str, Any], out: Path) -> None:
    import json
    from dataclasses import asdict

    document = {
        "profile": str(out),
        "cluster": profile["name"],
        "gpus": measurements.gpus,
        "summary": [asdict(row) for row in rows],
        "measurements": asdict(measurements),
        "notes": list(measurements.notes),
    }
    typer.echo(json.dumps(document, indent=1))


def _print_summary(measurements: Measurements, rows: Sequence[SummaryRow], out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from shardplan.cli.console import make_console

    console = make_console()
    rates = measurements.rates
    share = (
        f", {rates.processes} process{'' if rates.processes == 1 else 'es'} at work"
        if rates.device == "cpu"
        else f" x {measurements.gpus}"
    )
    console.print(f"[bold]{escape(rates.device_name)}[/bold]{share}, {escape(rates.software)}\n")
    if rates.facts:
        console.print(f"at work: {escape(', '.join(f'{name} {value}' for name, value in rates.facts.items()))}\n")
    table = Table(header_style="dim", box=None, pad_edge=False)
    for name in ("quantity", "measured", "unit", "known before", "from"):
        table.add_column(name, justify="right" if name in ("measured", "known before") else "left")
    for row in rows:
        known = "-" if row.known is None else f"{row.known:.3g}"
        table.add_row(row.quantity, f"{row.measured:.3g}", row.unit, known, row.known_kind or "-")
    console.print(table)
    for note in measurements.notes:
        console.print(f"[dim]note:[/dim] {escape(note)}")
    path = escape(str(out))
    console.print(f"\nprofile written to {path}; next:", soft_wrap=True)
    command = f"shardplan plan tiny --cluster {path} --gpus {measurements.gpus} --global-batch 8 --seq 256"
    console.print(f"  {command}", soft_wrap=True)
