"""`shardplan validate`: predictions against tables of measured runs; refit the fitted constants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.cli import options

if TYPE_CHECKING:
    from shardplan.costmodel.published_rows import Row


def validate(
    tables: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE.csv…", help="Tables of measured runs; without one, the published runs shipped."),
    ] = None,
    refit: Annotated[
        Path | None,
        typer.Option("--refit", metavar="OUT.toml", help="Fit the constants on these rows and write them there."),
    ] = None,
    cross: Annotated[
        bool, typer.Option("--cross", help="Also errors with the source, or source and model, left out of the fit.")
    ] = False,
    worst: Annotated[
        int, typer.Option("--worst", min=0, metavar="N", help="Also the N runs whose times are furthest off.")
    ] = 0,
    as_json: options.JsonOption = False,
) -> None:
    """How far the cost model is off on runs that others measured, by source.

    Example: shardplan validate

    Columns of a table: docs/validation.md. A row the model does not cover is refused with the reason and counted.
    """
    from shardplan.costmodel.fit import fit_rows, left_out_errors
    from shardplan.costmodel.validation import summaries, validate_rows

    rows = _rows(tables or [])
    if refit is not None:
        _refit(rows, refit)
        return
    outcomes = validate_rows(rows)
    sources = summaries(outcomes)
    left_out = left_out_errors(fit_rows(rows)) if cross else None
    if as_json:
        import json

        document: dict[str, Any] = {"rows": [one.document() for one in outcomes], "sources": sources}
        typer.echo(json.dumps(document if left_out is None else {**document, "left_out": left_out}, indent=1))
        return
    from shardplan.cli.validation_tables import print_validation, print_worst

    print_validation(outcomes, sources, left_out)
    if worst:
        print_worst(outcomes, worst)


def _rows(tables: list[Path]) -> list[Row]:
    from importlib import resources

    from shardplan.costmodel.published_rows import read_rows

    if tables:
        return [row for table in tables for row in read_rows(table)]
    with resources.as_file(resources.files("shardplan.reports") / "published" / "runs.csv") as shipped:
        return read_rows(shipped)


def _refit(rows: list[Row], out: Path) -> None:
    """Fit from the shipped constants and write the file."""
    import numpy as np

    from shardplan.costmodel.fit import fit, fit_rows, fit_space, fitted_text, informed, log_ratio_jacobian, log_ratios
    from shardplan.costmodel.fitted import fitted
    from shardplan.hw_profiles.errors import InputError

    if not out.parent.is_dir():
        raise InputError("its folder does not exist", place=str(out), remedy=f"make {out.parent} first")
    usable = fit_rows(rows)
    if not usable:
        raise InputError("no row has a step time that the model covers", place="FILE.csv", remedy="give more rows")
    space = fit_space(usable)
    prior = space.prior  # whichever constants the shipped file has, the same ones are fitted
    space = informed(space, log_ratio_jacobian(usable, space, prior, log_ratios(usable, space.constants(prior))))
    x, ratios = fit(usable, space, space.vector(fitted()))
    constants = space.constants(x)
    text = fitted_text(constants, f"{len(usable)} rows of {len({r.source for r in usable})} sources")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as bad:
        raise InputError(f"cannot be written ({bad.strerror})", place=str(out), remedy="give another file") from None
    error = 100.0 * np.abs(np.expm1(ratios))
    typer.echo(
        f"{constants.count} constants on {len(usable)} rows: mean {error.mean():.1f} %, median {np.median(error):.1f} %; wrote {out}"
    )
