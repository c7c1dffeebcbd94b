"""`shardplan sweep`: the best plan over sizes, batches, sequences, clusters and network rates; how many GPUs for a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.cli import options

if TYPE_CHECKING:
    from shardplan.planner.sweep import Grid, Sweep


def sweep(
    model: options.ModelArgument,
    cluster: Annotated[
        list[str],
        typer.Option("--cluster", metavar="PROFILE", help="Catalog name or TOML file, one or more: h100-ib,selene."),
    ],
    global_batch: Annotated[str, typer.Option("--global-batch", help="Sequences per step, one or more: 512,1024.")],
    seq: Annotated[str, typer.Option("--seq", help="Tokens per sequence, one or more: 4096,8192.")],
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", help="Sizes: 64,128,256; default: parts of a node, doubling nodes, the whole profile."),
    ] = None,
    network_gbps: Annotated[
        str | None, typer.Option("--network-gbps", help="Gbit/s between nodes per GPU, one or more: 100,200,400.")
    ] = None,
    runtime: options.RuntimeOption = "shardplan",
    fix: options.FixOption = None,
    forbid: Annotated[
        list[str] | None, typer.Option("--forbid", help="Word or word=value to leave out. Repeatable.")
    ] = None,
    headroom: options.HeadroomOption = 0.05,
    precision: options.PrecisionOption = None,
    optimizer: options.OptimizerOption = "adamw",
    grad_dtype: options.GradDtypeOption = None,
    expert_imbalance: options.ImbalanceOption = 1.0,
    capacity_factor: options.CapacityOption = None,
    tokens: options.TokensOption = None,
    method: options.MethodOption = "full",
    lora_rank: options.LoraRankOption = 16,
    lora_targets: options.LoraTargetsOption = "all",
    document_tokens: options.DocumentOption = None,
    days: Annotated[
        float | None,
        typer.Option("--days", help="Deadline for --tokens: the fewest GPUs and the cheapest that meet it."),
    ] = None,
    price: options.PriceOption = None,
    front: Annotated[
        bool,
        typer.Option(
            "--front",
            help="Also the fastest layouts with less and less memory at every point: the front over time, memory, money and GPUs.",
        ),
    ] = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write every point to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw tokens/s over what is swept: .svg or .png.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """The best plan at every point: GPUs, global batch, sequence, cluster, network rate.

    Examples: shardplan sweep llama-3-70b --cluster h100-ib --gpus 64,128,256 --global-batch 1024 --seq 8192

    How many GPUs for 1T tokens in 30 days: shardplan sweep llama-3-8b --cluster h100-ib --cluster selene
    --global-batch 1024 --seq 8192 --tokens 1e12 --days 30

    Time, memory, money and GPUs against each other: shardplan sweep llama-3-8b --cluster h100-ib --gpus 8,16,32,64
    --global-batch 1024 --seq 8192 --front

    Exit code 1 when nothing fits anywhere, or nothing meets the deadline.
    """
    from shardplan.hw_profiles.errors import InputError
    from shardplan.planner.sweep import answers, fastest_of_points, mark_front

    if days is not None and (tokens is None or not days > 0):
        raise InputError(
            f"days={days:g} needs a token budget" if days > 0 else f"days={days:g} is not a positive number",
            place="--days",
            remedy="give --tokens and a number of days above 0",
        )
    for file in (csv, plot):
        options.check_writable(file)
    shared = {
        "runtime": runtime,
        "precision": precision,
        "optimizer": optimizer,
        "grad_dtype": grad_dtype,
        "expert_imbalance": expert_imbalance,
        "capacity_factor": capacity_factor,
        "tokens": tokens,
        "method": method,
        "lora_rank": lora_rank,
        "lora_targets": lora_targets,
        "document_tokens": document_tokens,
        "price": price,
    }
    one, grid = _read(
        model,
        cluster,
        global_batch,
        seq,
        gpus,
        network_gbps,
        " ".join(fix or []),
        forbid or [],
        headroom,
        front,
        shared,
    )
    rows = _points(one, grid, days if gpus is None else None)
    mark_front(rows)
    found = answers(rows, days)
    if csv:
        _write_csv(rows, csv)
    if plot:
        from shardplan.reports.sweep_plot import draw_sweep

        draw_sweep(fastest_of_points(rows), plot)
    if as_json:
        import json

        typer.echo(json.dumps({"rows": rows, "answers": found}, indent=1))
    else:
        from shardplan.cli.sweep_table import print_sweep, thinned

        print_sweep(
            thinned(rows) if front else rows, found, days=days, written=[str(file) for file in (csv, plot) if file]
        )
    if found["fastest"] is None or (days is not None and found["fewest"] is None):
        raise typer.Exit(1)


def _read(
    model: str,
    clusters: Sequence[str],
    batches: str,
    seqs: str,
    gpus: str | None,
    rates: str | None,
    fix: str,
    forbid: list[str],
    headroom: float,
    front: bool,
    shared: dict[str, Any],
) -> tuple[Sweep, Grid]:
    """The sweep and its grid; every cluster is read and checked before the first search."""
    from shardplan.planner.space import parse_wishes
    from shardplan.planner.sweep import Grid, Sweep

    batch_sizes, lengths = whole_numbers(batches, "--global-batch"), whole_numbers(seqs, "--seq")
    read = [
        options.read_inputs(model, name, None, global_batch=batch_sizes[0], seq=lengths[0], **shared)
        for name in dict.fromkeys(name for text in clusters for name in text.split(","))
    ]
    return (
        Sweep(
            model=read[0].model,
            runtime=read[0].runtime,
            wishes=parse_wishes(fix, forbid),
            headroom=headroom,
            front=front,
        ),
        Grid(
            machines=[(inputs.cluster, inputs.job) for inputs in read],
            global_batches=batch_sizes,
            seqs=lengths,
            gpus=whole_numbers(gpus, "--gpus") if gpus else (),
            network_gbps_per_gpu=positive_numbers(rates, "--network-gbps") if rates else (),
        ),
    )


def _points(one: Sweep, grid: Grid, days: float | None) -> list[dict[str, Any]]:
    """All rows, with a progress bar on a terminal; Ctrl-C keeps those that are done."""
    from rich.console import Console
    from rich.progress import track

    screen = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    try:
        points = one.rows(grid, days)
        rows.extend(track(points, "searching", console=screen, transient=True, disable=not screen.is_terminal))
    except KeyboardInterrupt:
        screen.print(f"stopped after {len(rows)} points")
    places = list(dict.fromkeys(cluster.name for cluster, _ in grid.machines))
    order = ("network_gbps_per_gpu", "global_batch", "seq", "gpus")
    return sorted(rows, key=lambda row: (places.index(row["cluster"]), *((row[name] or 0) for name in order)))


def whole_numbers(text: str, place: str) -> list[int]:
    """`64,128` -> [64, 128]; raises InputError for anything but whole numbers above 0."""
    return [int(number) for number in _numbers(text, place, whole=True)]


def positive_numbers(text: str, place: str) -> list[float]:
    """`100,200.5` -> [100.0, 200.5]; raises InputError for anything but numbers above 0."""
    return _numbers(text, place, whole=False)


def _numbers(text: str, place: str, *, whole: bool) -> list[float]:
    from shardplan.hw_profiles.errors import InputError

    words = text.replace(",", " ").split()
    found: list[float] = []
    for word in words:
        try:
            number = float(word)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf") or (whole and number != int(number)):
            kind = "whole number" if whole else "number"
            raise InputError(f"{word!r} is not a positive {kind}", place=place, remedy="give for instance 64,128,256")
        found.append(number)
    if not found:
        raise InputError("names no number", place=place, remedy="give for instance 64,128,256")
    return list(dict.fromkeys(found))


def _write_csv(rows: Sequence[dict[str, Any]], file: Path) -> None:
    import csv

    from shardplan.planner.sweep import COLUMNS

    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, list[str](COLUMNS))
        table.writeheader()
        table.writerows(rows)
