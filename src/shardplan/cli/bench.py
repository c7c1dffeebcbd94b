"""`shardplan bench`: how fast the cost model is on this machine."""

from __future__ import annotations

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
