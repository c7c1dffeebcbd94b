"""`shardplan models`: the models known by name, and what one of them is made of."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from shardplan.costmodel.model import LayerKind, Model
    from shardplan.costmodel.presets import Preset

app = typer.Typer(help="Known models, and what a preset or a config.json is made of.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else.")]


@app.command("list", epilog="Example: shardplan models list --json")
def list_models(as_json: AsJson = False) -> None:
    """List the presets by family: name, parameters, main shapes (with --json also other names and the source)."""
    from shardplan.cli.console import make_console
    from shardplan.costmodel.model_config import load_model
    from shardplan.costmodel.model_families import FAMILIES
    from shardplan.costmodel.presets import all_presets

    rows = [_row(preset, load_model(preset.name)) for preset in all_presets().values()]
    if as_json:
        _print_json({"models": rows})
        return
    order = list(FAMILIES)
    rows.sort(key=lambda row: (order.index(row["family"]), row["parameters"]))
    table = _table("name", "parameters >", "a token >", "layers >", "hidden >", "context >", "layers have")
    for family, members in groupby(rows, key=lambda row: row["family"]):
        table.add_row(family, style="bold")
        for row in members:
            total, active = row["parameters"], row["active_parameters"]
            used = "" if active == total else _billions(active)
            numbers = (f"{row[key]:,}" for key in ("layers", "hidden", "max_positions"))
            table.add_row(f"  {row['name']}", _billions(total), used, *numbers, row["features"])
        table.add_section()
    console = make_console()
    console.print(table)
    console.print(
        f"{len(rows)} presets; parts and source of each: shardplan models show NAME. A path to a Hugging Face config.json of one of "
        "these types, or to a folder with one, is a MODEL too: docs/models.md",
        markup=False,
    )


def _row(preset: Preset, model: Model) -> dict[str, Any]:
    """What the list says about one preset."""
    from shardplan.costmodel.model import parameter_counts

    counts = parameter_counts(model)
    return {
        "name": preset.name,
        "aliases": list(preset.aliases),
        "family": model.family,
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "published_parameters": preset.published_parameters,
        "layers": model.layer_count,
        "hidden": model.hidden,
        "vocab": model.vocab,
        "max_positions": model.max_positions,
        "features": _features(model),
        "source": preset.source,
    }


def _features(model: Model) -> str:
    """What distinguishes the layers, in a few words."""
    from shardplan.costmodel.model import PART_NAMES, layer_parts

    kinds = [kind for kind, _ in model.runs]
    widest = max(kinds, key=lambda kind: kind.experts)
    words = [f"{widest.experts} experts, {widest.experts_per_token} a token"] if widest.experts else []
    windows = sorted({kind.window for kind in kinds if kind.window})
    if windows:
        seen = sum(count for kind, count in model.layers if kind.window)
        share = "" if seen == model.layer_count else f" in {seen}"
        words.append(f"window {' and '.join(map(str, windows))}{share}")
    has = {part for kind in kinds for part in layer_parts(kind)} - {"window", "gelu_gate"}
    return ", ".join([*words, *(name for part, name in PART_NAMES.items() if part in has)])


@app.command("show", epilog="Example: shardplan models show llama-3-8b   (or: shardplan models show ./config.json)")
def show_model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Preset name, config.json, or a folder with one.")],
    as_json: AsJson = False,
) -> None:
    """Show one model: shapes of each kind of layer, parameters by part, runtimes that have its parts, source."""
    from shardplan.cli.console import make_console
    from shardplan.costmodel.model import parameter_counts
    from shardplan.costmodel.model_config import load_model, model_digest, model_document
    from shardplan.costmodel.presets import find_preset

    model, preset = load_model(name), find_preset(name)
    missing = _missing_by_runtime(model)
    if as_json:
        document = {
            "model": model_document(model),
            "parameters": dict(parameter_counts(model)),
            "untied_total": _untied_total(model),
            "published_parameters": preset.published_parameters if preset else None,
            "runtimes_lack": missing,
            "digest": model_digest(model),
        }
        _print_json(document)
        return
    console = make_console()
    positions = "any number of" if model.max_positions is None else f"{model.max_positions:,}"
    console.print(
        f"{model.name}: vocabulary {model.vocab:,} (unpadded), embedding and head {'tied' if model.tied_embeddings else 'untied'}, "
        f"{positions} {'learned ' if model.learned_positions else ''}positions",
        markup=False,
    )
    console.print(_shape_table(model), _parameter_table(model))
    for line in _closing_lines(model, preset, missing):
        console.print(line, markup=False)


def _closing_lines(model: Model, preset: Preset | None, missing: dict[str, list[str]]) -> list[str]:
    """Order of the layers, runtimes, names and sources, one line each."""
    from shardplan.costmodel.model_families import FAMILIES

    lines: list[str] = []
    if model.pattern:
        runs = [f"{len(list(run))} of the {model.layers[kind][1]}" for kind, run in groupby(model.pattern)]
        lines.append(f"order of the layers: {', '.join(runs)}, and so on")
    able = [runtime for runtime, parts in missing.items() if not parts]
    lines.append(f"runtimes: {', '.join(able) or 'none has all of its parts'}")
    lines += [f"not in {runtime}: {', '.join(parts)}" for runtime, parts in missing.items() if parts]
    if preset:
        lines += [f"also known as: {', '.join(preset.aliases)}"] if preset.aliases else []
        lines.append(f"published: {preset.published_parameters} parameters")
    architecture = FAMILIES[model.family].architecture if model.family in FAMILIES else model.family
    lines.append(f"read as: {model.family} ({architecture})")
    return [*lines, f"source: {model.source}"]


def _missing_by_runtime(model: Model) -> dict[str, list[str]]:
    """What each runtime lacks of the model's layers, in words."""
    from shardplan.costmodel.model_rules import lacking
    from shardplan.costmodel.runtime import load_runtime
    from shardplan.costmodel.runtime_document import runtime_names

    kinds = [kind for kind, _ in model.runs]
    found: dict[str, list[str]] = {}
    for name in runtime_names():
        runtime = load_runtime(name)
        experts = any(kind.experts for kind in kinds) and not runtime.abilities.experts
        found[name] = [*(["experts"] if experts else []), *lacking(kinds, runtime)]
    return found


def _shape_table(model: Model) -> Table:
    """Shapes of the model, and of each kind of layer in a column of its own."""
    layers = [f"{count} layers" for _, count in model.layers]
    modules = [f"{count} prediction module{'s' if count > 1 else ''}" for _, count in model.runs[len(layers) :]]
    table = _table("shape", *(f"{heading} >" for heading in (*layers, *modules)))
    columns = [_kind_rows(kind) for kind, _ in model.runs]
    for label in columns[0]:
        cells = [column[label] for column in columns]
        if any(cells):
            table.add_row(label, *(cell or "-" for cell in cells))
    return table


def _kind_rows(kind: LayerKind) -> dict[str, str]:
    """Shapes of one kind of layer by label; empty where it has none."""
    from shardplan.costmodel.model import PART_NAMES, layer_parts

    biases = {"qkv": kind.qkv_bias, "attention output": kind.attention_output_bias, "mlp": kind.mlp_bias}
    biases |= {"router": kind.router_bias}
    widths = f" + {kind.qk_rope_head_dim} rotary" if kind.kv_lora_rank else ""
    values = f", values {kind.value_dim}" if kind.v_head_dim else ""
    latents = {"queries": kind.q_lora_rank, "keys and values": kind.kv_lora_rank}
    said = ("window", "latent_attention", "shared_experts", "expert_biases")
    return {
        "hidden": f"{kind.hidden:,}",
        "heads x width": f"{kind.heads} x {kind.head_dim - kind.qk_rope_head_dim}{widths}{values}",
        "key/value heads": str(kind.kv_heads),
        "latents": ", ".join(f"{what} {width:,}" for what, width in latents.items() if width),
        "keys a query sees": f"{kind.window:,}" if kind.window else "all",
        "mlp width": f"{kind.ffn:,}{' gated' if kind.gated_mlp else ''}",
        "experts (a token)": f"{kind.experts} ({kind.experts_per_token})" if kind.experts else "",
        "shared experts' width": f"{kind.shared_ffn:,}" if kind.shared_ffn else "",
        "norms": f"{kind.norms} {kind.norm}",
        "biases": ", ".join(part for part, has in biases.items() if has),
        "dropout": "yes" if kind.dropout else "",
        **{name: "yes" if part in layer_parts(kind) else "" for part, name in PART_NAMES.items() if part not in said},
    }


def _parameter_table(model: Model) -> Table:
    """Parameters by part with their share; tied and untied totals where they differ."""
    from shardplan.costmodel.model import parameter_counts

    counts = dict(parameter_counts(model))
    total, active = counts.pop("total"), counts.pop("active")
    table = _table("part", "parameters >", "share >")
    for part, number in counts.items():
        if number:
            table.add_row(part.replace("_", " "), f"{number:,}", f"{number / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", _billions(total))
    if active != total:
        table.add_row("active for a token", f"{active:,}", f"{active / total:.1%}")
    if model.tied_embeddings:
        table.add_row("total if the head were untied", f"{_untied_total(model):,}", "")
    return table


def _untied_total(model: Model) -> int:
    """Parameters when embedding and head are counted apart; publishers count either way."""
    from shardplan.costmodel.model import parameter_counts

    return parameter_counts(model)["total"] + (model.vocab * model.hidden if model.tied_embeddings else 0)


def _billions(number: int) -> str:
    """`6.74 B`, `124 M`."""
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _table(*columns: str, title: str | None = None) -> Table:
    """An empty table; a column that ends in ` >` is aligned right, only the last one may wrap."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        justify = "right" if column.endswith(" >") else "left"
        table.add_column(column.removesuffix(" >"), justify=justify, no_wrap=column != columns[-1])
    return table


def _print_json(document: object) -> None:
    """JSON alone on stdout."""
    typer.echo(json.dumps(document, indent=2))
