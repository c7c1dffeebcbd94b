"""`shardplan bench`: how fast the cost model is on this machine, and the kernels beside the alternatives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardplan.cli import options

app = typer.Typer(help="Measure shardplan itself. Example: shardplan bench estimate", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure shardplan itself."""


@app.command("estimate")
def estimate(
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Passes over the space; the median counts.")] = 5,
    streamed: Annotated[
        int,
        typer.Option(
            "--layouts", min=0, help="Layouts to estimate one after the other for the peak of memory; 0: none."
        ),
    ] = 10_000_000,
    as_json: options.JsonOption = False,
) -> None:
    """Layouts estimated per second in one process: the valid layouts of gpt3-175b on 1,024 A100, batch 1536.

    Example: shardplan bench estimate
    """
    from shardplan.planner.benchmark import estimate_rate

    rate = estimate_rate(repeats, streamed)
    if as_json:
        import json

        typer.echo(json.dumps(rate))
        return
    slow, fast = rate["calculon_layouts_per_s"]
    typer.echo(
        f"{rate['layouts']:,} layouts of {rate['model']} on {rate['gpus']} GPUs in {rate['seconds']:.3f} s "
        f"(median of {rate['repeats']}): {rate['layouts_per_s']:,.0f} layouts/s, "
        "tables, every time part and the memory of the fullest stage included; "
        f"whole search of {rate['space']:,} in {rate['search_s']:.2f} s"
    )
    typer.echo(
        f"{rate['layouts_per_s'] / fast:,.0f} to {rate['layouts_per_s'] / slow:,.0f} times Calculon's {slow:.0f} to {fast:.0f} "
        "layouts/s (caa4b11, one process, 8,112 layouts of Turing-530B in 71 s; a sample of GPT-175B on 1,024 GPUs)"
    )
    if not streamed:
        return
    typer.echo(
        f"{rate['streamed']:,} layouts in {rate['streamed_s']:.1f} s the same way, step time and peak memory kept: "
        f"at most {rate['peak_gib']:.2f} GiB of the process"
    )


@app.command("kernels")
def kernels(
    *,
    only: Annotated[
        str, typer.Option("--only", metavar="WORDS", help="Cases whose kernel or name holds this, e.g. attention.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The headline of each kernel.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny shapes, once each, without a GPU.")] = False,
    budget_s: Annotated[
        float,
        typer.Option("--budget-s", min=0, help="Seconds it may take: rounds get shorter, then cases are left out."),
    ] = 600.0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="CSV: kernel, case, provider, metric, p20, p50, p80."),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Each kernel beside SDPA, flex_attention, torch.compile, Liger and a copy on this GPU, with the ratios to reach.

    Example: shardplan bench kernels --only attention -o attention.csv

    Exit codes: 0 measured (targets missed or not), 1 torch or a GPU is missing, 2 malformed input.
    """
    from importlib.util import find_spec

    from shardplan.hw_profiles.errors import InputError

    options.check_writable(output)
    if find_spec("torch") is None:
        typer.echo("shardplan: measuring kernels needs torch; install shardplan[run]", err=True)
        raise typer.Exit(1)
    from shardplan.kernels.benchmark import NoDeviceError, Options, keep, measure

    try:
        words = Options(only=only, quick=quick, dry_run=dry_run, budget_s=budget_s)
        report = measure(words, lambda so_far: keep(so_far, output))
    except ValueError as error:
        raise InputError(str(error), place="--only") from error
    except NoDeviceError as error:
        typer.echo(f"shardplan: {error}", err=True)
        raise typer.Exit(1) from error
    if output:
        output.write_text(report.csv(), encoding="utf-8")
    if as_json:
        import json

        typer.echo(json.dumps(report.json()))
        return
    typer.echo(report.table())


@app.command("executor")
def executor(
    *,
    model: Annotated[str, typer.Option("--model", help="A model that one device holds.")] = "tiny",
    seq: Annotated[int, typer.Option("--seq", min=1, help="Tokens of a sequence.")] = 256,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Sequences of a micro-batch.")] = 4,
    accumulation: Annotated[int, typer.Option("--accumulation", min=1, help="Micro-batches of a step.")] = 1,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Steps each way; the median of the ratios counts.")] = 30,
    as_json: options.JsonOption = False,
) -> None:
    """What the executor adds to a step: its loop beside a bare PyTorch loop of the same model, taking turns in one process.

    Example: shardplan bench executor --micro-batch 8

    Exit codes: 0 measured, 1 torch is missing, 2 malformed input.
    """
    import json
    from dataclasses import asdict
    from importlib.util import find_spec

    if find_spec("torch") is None:
        typer.echo("shardplan: measuring the executor needs torch; install shardplan[run]", err=True)
        raise typer.Exit(1)
    from shardplan.executor.overhead import measure_overhead

    found = measure_overhead(model=model, seq=seq, micro_batch=micro_batch, accumulation=accumulation, pairs=pairs)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(
        f"{found.model} in {found.precision} on one {found.device}: bare loop {found.bare_s * 1e3:.2f} ms, executor "
        f"{found.executor_s * 1e3:.2f} ms ({found.clock}); ratio {found.ratio:.3f} (p20 {found.ratio_p20:.3f}, p80 "
        f"{found.ratio_p80:.3f} of {found.pairs} pairs)"
    )
