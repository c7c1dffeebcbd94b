"""Answers as tables for people (rich)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardplan.cli.console import make_console

GIB = 2.0**30
BAR = 24


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.1f}"


def seconds(value: float) -> str:
    """Seconds with a unit that reads well."""
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def new_table(title: str, *columns: tuple[str, str]) -> Table:
    """A table without lines, as wide as its title; columns as (heading, side)."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        pad_edge=False,
        min_width=min(len(title), 80),
    )
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def print_plan(document: Mapping[str, Any], *, written_to: str | None) -> None:
    """The ranked layouts, the winner's breakdown, the account of the search."""
    console = make_console()
    job, search, best = document["job"], document["search"], document["prediction"]
    console.print(
        f"[bold]{escape(document['model']['name'])}[/bold] on {document['gpus']} GPUs of "
        f"[bold]{escape(str(document['cluster']['name']))}[/bold], runtime {escape(document['runtime'])}: "
        f"global batch {job['global_batch']}, sequence {job['seq']}, {job['precision']}\n"
    )
    print_forms(console, search["forms"])
    print_ranking(console, search["ranked"])
    console.print()
    print_front(console, search.get("front") or (), search["memory_front"])
    print_breakdown(console, best)
    console.print()
    print_placement(console, search["placement"])
    print_account(console, search)
    print_assumptions(console, best["assumptions"])
    if written_to:
        console.print(f"\nplan written to {escape(written_to)}; next: shardplan explain {escape(written_to)}")


def print_forms(console: Console, forms: Sequence[Mapping[str, Any]]) -> None:
    """What each precision, switch and batch found, where the question left several open."""
    if not forms:
        return
    table = new_table(
        "What was left open",
        ("global batch", "right"),
        ("precision", "left"),
        ("runtime", "left"),
        ("GPUs", "right"),
        ("tokens/s", "right"),
        ("layout", "left"),
    )
    for row in forms:
        rate = "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"
        words = [str(row["global_batch"]), row["precision"], row["runtime"], str(row["gpus"]), rate]
        table.add_row(*map(escape, (*words, row["layout"] or "nothing fits")))
    console.print(table)
    console.print()


def print_ranking(console: Console, ranked: Sequence[Mapping[str, Any]]) -> None:
    """The best layout of each idea: step time, tokens/s/GPU, MFU, peak memory, headroom, how many variants fit and which rank it has."""
    right = "right"
    table = new_table(
        "The best layout of each idea (degrees, ZeRO stage, offload, full recompute)",
        ("rank", right),
        ("layout", "left"),
        ("step", right),
        ("tokens/s/GPU", right),
        ("MFU", right),
        ("peak GiB", right),
        ("headroom", right),
        ("variants", right),
    )
    for row in ranked:
        table.add_row(
            str(row["rank"]),
            escape(row["layout"]),
            seconds(row["step_s"]),
            f"{row['tokens_per_s_per_gpu']:,.0f}",
            f"{row['mfu']:.1%}",
            gib(row["device_peak_bytes"]),
            f"{row['headroom_fraction']:.0%}",
            f"{row['variants']:,}",
            style="bold" if row["rank"] == 1 else None,
        )
    console.print(table)


FRONT_ROWS = 8


def print_front(console: Console, searched: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    """What less memory costs in time: the front that was `searched`, or else what was `found` on the way; nothing where the fastest layout
    also needs least."""
    front = searched or found
    if len(front) < 2:
        return
    title = (
        "Less memory for more time" if searched else "Less memory for more time, as found on the way (--front searches)"
    )
    priced = any(row.get("usd_per_million_tokens") is not None for row in front)
    columns = [("peak GiB", "right"), ("step", "right"), *([("USD/M tokens", "right")] if priced else [])]
    table = new_table(title, *columns, ("layout", "left"))
    at = range(len(front)) if searched else _some_of(len(front))
    for row in (front[i] for i in at):
        price = [f"{row['usd_per_million_tokens']:.4g}"] if priced else []
        table.add_row(gib(row["device_peak_bytes"]), seconds(row["step_s"]), *price, escape(row["layout"]))
    console.print(table)
    console.print()


def _some_of(count: int) -> list[int]:
    """FRONT_ROWS of so many rows at most, evenly."""
    return sorted({round(i * (count - 1) / (FRONT_ROWS - 1)) for i in range(FRONT_ROWS)})


def print_breakdown(console: Console, prediction: Mapping[str, Any]) -> None:
    """Step time by part, memory by stage, cost and what a token budget takes."""
    from shardplan.cli.result_lines import cost_lines
    from shardplan.planner.explain import TIME_WORDS

    time = prediction["time"]
    low, high = prediction["error_band"]["step_s"]
    table = new_table(
        f"Step time {seconds(time['step_s'])} (band {seconds(low)} to {seconds(high)})",
        ("part", "left"),
        ("time", "right"),
        ("share", "right"),
        ("", "left"),
    )
    for part, word in TIME_WORDS.items():
        if time[part] > 0:
            share = time[part] / time["step_s"]
            table.add_row(word, seconds(time[part]), f"{share:.1%}", "█" * round(BAR * share))
    hidden = {axis.removesuffix("_s"): s for axis, s in time["hidden"].items() if s > 0}
    for axis, value in hidden.items():
        table.add_row(f"hidden behind compute: {axis}", seconds(value), "", style="dim")
    console.print(table)
    console.print()
    _print_stages(console, prediction["memory"], {one["stage"]: one for one in prediction.get("stages") or ()})
    rate = prediction["throughput"]
    console.print(
        f"\n{rate['tokens_per_s']:,.0f} tokens/s, {rate['tokens_per_s_per_gpu']:,.0f} per GPU; "
        f"MFU {rate['mfu']:.1%}, HFU {rate['hfu']:.1%} ({rate['model_flop_per_s_per_gpu'] / 1e12:.0f} model TFLOP/s per GPU)"
    )
    for line in cost_lines(prediction):
        console.print(escape(line))


SHORT = {"parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "activ"}
"""Heads of the memory table where stages also say what they lie on: 120 columns hold it."""


def _print_stages(console: Console, memory: Mapping[str, Any], timed: Mapping[int, Mapping[str, Any]]) -> None:
    right = "right"
    names = ("parameters", "gradients", "optimizer", "activations", "buffers")
    rooms = {one["part"]: one["capacity_bytes"] for one in timed.values() if one["part"]}
    capacity = ", ".join(f"{gib(size)} on {part}" for part, size in rooms.items()) or gib(memory["capacity_bytes"])
    table = new_table(
        f"Memory per GPU in GiB, capacity {capacity}",
        ("stage", right),
        ("layers", right),
        *((SHORT.get(name, name) if rooms else name, right) for name in names),
        ("slack", right),
        ("context", right),
        ("device", right),
    )
    columns = _more_columns(timed)
    for name in columns:
        table.add_column(name, justify=right)
    shown = memory["stages"] if len(memory["stages"]) <= 8 else [*memory["stages"][:4], *memory["stages"][-3:]]
    for stage in shown:
        table.add_row(
            str(stage["stage"]),
            str(stage["layers"]),
            *(gib(stage[f"{name}_bytes"]) for name in names),
            gib(stage["allocator_slack_bytes"]),
            gib(stage["context_bytes"]),
            gib(stage["device_bytes"]),
            *(say(timed[stage["stage"]]) for say in columns.values()),
        )
    console.print(table)
    if len(shown) < len(memory["stages"]):
        console.print(f"({len(memory['stages']) - len(shown)} stages between are not shown)", style="dim")
    if memory["host_bytes"]:
        console.print(f"host memory {gib(memory['host_bytes'])} GiB per node")


def print_placement(console: Console, placement: Mapping[str, Any] | None) -> None:
    """Which axis of the mesh lies inside a node and which across, and what other orders would take."""
    from shardplan.planner.placement import placement_lines

    for line in placement_lines(placement) if placement else ():
        console.print(f"• {escape(line)}")


def _more_columns(timed: Mapping[int, Mapping[str, Any]]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """What is told of stages of pipelines: recomputed layers where stages differ, seconds of a micro-batch, the part they lie on."""
    stages = list(timed.values())
    if len(stages) < 2:
        return {}
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {}
    if len({one["recomputed_layers"] for one in stages}) > 1:
        columns["recomputed"] = lambda one: str(one["recomputed_layers"])
    columns["micro-batch"] = lambda one: seconds(one["micro_batch_s"])
    if any(one["part"] for one in stages):
        columns["on"] = lambda one: str(one["part"])
    return columns


def print_account(console: Console, search: Mapping[str, Any]) -> None:
    """How many layouts were looked at, how many refused and why."""
    refused = sum(rule["count"] for rule in search["refused"].values())
    fitting = search["looked_at"] - refused - search["slower"] - search["does_not_fit"]
    slower = f"{search['slower']:,} excluded by a bound, " if search["slower"] else ""
    more = f", and {search['refined']:,} variants of those that they could help" if search["refined"] else ""
    console.print(
        f"looked at {search['looked_at']:,} layouts in {seconds(search['seconds'])}: {refused:,} refused by a rule, {slower}"
        f"{search['does_not_fit']:,} do not fit in memory, {fitting:,} fit{more}"
    )
    if search["partial"]:
        console.print("[red]stopped before the end: a better layout may exist[/red]")
    elif not search["complete"]:
        console.print(
            "variants, orders or cuts of some layouts were left out to save time: a better one may exist among them"
        )
    for name, rule in list(search["refused"].items())[:8]:
        console.print(f"  {rule['count']:>9,}  {escape(name)}  [dim]{escape(rule['reason'])}[/dim]")


def print_assumptions(console: Console, lines: Sequence[str]) -> None:
    """What the numbers rest on."""
    for line in lines:
        style = "yellow" if line.startswith("warning: ") else "dim"
        console.print(f"[{style}]· {escape(line)}[/{style}]")


def print_answer(answer: Mapping[str, Any]) -> None:
    """One estimate."""
    console = make_console()
    _print_verdict(console, answer)
    if answer["time"]:
        console.print()
        print_breakdown(console, answer)
    print_assumptions(console, answer["assumptions"])


def _print_verdict(console: Console, answer: Mapping[str, Any]) -> None:
    """Whether a layout fits, and every reason why not."""
    from shardplan.costmodel.layout import layout_from_document

    refused = "[red]does not fit[/red]" if answer["time"] else "[red]not possible[/red]"
    verdict = "[green]fits[/green]" if answer["fits"] else refused
    console.print(
        f"{verdict}: {escape(layout_from_document(answer['layout']).words())} on {answer['gpus']} GPUs, runtime {answer['runtime']}"
    )
    for one in answer["rejections"]:
        console.print(f"  [red]{escape(one['rule'])}[/red]: {escape(one['detail'])}; {escape(one['remedy'])}")


def print_explanation(document: Mapping[str, Any]) -> None:
    """A plan or layout explained."""
    console = make_console()
    subject = document["subject"]
    console.print(f"[bold]{escape(subject['model'])}[/bold] on {escape(subject['cluster'])}")
    _print_verdict(console, document)
    for line in document["notes"]:
        console.print(f"• {escape(line)}")
    if document["time"]:
        console.print()
        print_breakdown(console, document)
    console.print()
    for line in document["binds"]:
        console.print(f"• {escape(line)}")
    print_placement(console, document["placement"])
    from shardplan.planner.explain import TIME_WORDS

    for other in document["runners_up"]:
        longer = other["step_s"] / document["time"]["step_s"] - 1.0
        parts = sorted(other["difference_s"].items(), key=lambda item: -abs(item[1]))
        shown = [(part, seconds_more) for part, seconds_more in parts if abs(seconds_more) >= 5e-4 * other["step_s"]]
        console.print(
            f"\nagainst {escape(other['layout'])}, which takes {seconds(other['step_s'])} ({longer:+.1%}) and "
            f"{gib(other['device_peak_bytes'])} GiB; {'what it takes more (+) or less (-) of:' if shown else 'every part takes as long'}"
        )
        for part, difference in shown:
            sign = "+" if difference > 0 else "-"
            console.print(f"    {sign}{seconds(abs(difference)):>8}  {TIME_WORDS[part]}")
    _print_changes(console, document)
    console.print()
    print_account(console, document["search"])
    print_assumptions(console, document["assumptions"])


def _print_changes(console: Console, document: Mapping[str, Any]) -> None:
    """What one change would do, and how much network the layout needs."""
    if document["one_change"]:
        console.print()
        figure, keeps = document["one_change_of"], document["one_change_keeps"] == "layout"
        title = "One change, the rest of the layout kept" if keeps else "One change, planned again"
        named = [] if keeps else [("layout, where another is best", "left")]
        table = new_table(f"{title}: {figure}", ("", "left"), ("gain", "right"), (figure, "right"), *named)
        for row in document["one_change"]:
            layout = [] if keeps else [escape(row["layout"] or "")]
            table.add_row(escape(row["change"]), f"{row['gain_fraction']:+.1%}", row["becomes"], *layout)
        console.print(table)
    need = document["network_needed"]
    if need:
        console.print(
            f"\nnetwork: {need['gbps_per_gpu']:.3g} of {need['now_gbps_per_gpu']:g} Gbit/s per GPU between nodes keep this layout "
            "within 5% of its step time"
        )


def print_nothing_fits(document: Mapping[str, Any]) -> None:
    """Nothing fits: how far off, and what would have to change."""
    from shardplan.costmodel.layout import layout_from_document
    from shardplan.planner.nothing_fits import NONE_DOES, ROOM

    console = make_console()
    late = any(one["rule"] == "deadline" for one in document["rejections"])
    console.print("[red]no layout is in time[/red]" if late else "[red]no layout fits[/red]")
    print_account(console, document["search"])
    told = document["search"]["refused"]
    if document["closest"]:
        console.print(f"\nclosest: {escape(layout_from_document(document['closest']['layout']).words())}")
    for one in document["rejections"][:5]:
        reason = [one["detail"]] if one["rule"] not in told else []  # the account has the others'
        remedy = [one["remedy"]] if one["rule"] not in ROOM or not document["closest"] else []
        console.print(f"  {escape(one['rule'])}: {escape('; '.join((*reason, *remedy)))}")
    if document["closest"]:
        console.print("no layout is nearer to fitting")
    if document["would_fit"]:
        console.print("\nwhat would fit instead:")
        for change in document["would_fit"]:
            console.print(f"  • {escape(change)}")
    elif not late:
        console.print(f"\n{NONE_DOES}")
