"""`shardplan models`: the models known by name, and what one of them is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from shardplan.costmodel.model import Model

app = typer.Typer(help="Known models, and what a preset or a config.json is made of.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else.")]


@app.command("list", epilog="Example: shardplan models list --json")
def list_models(as_json: AsJson = False) -> None:
    """List the presets: name, parameters, main shapes (with --json also other names and the source)."""
    from shardplan.costmodel.model import parameter_counts
    from shardplan.costmodel.model_config import load_model
    from shardplan.costmodel.presets import all_presets

    presets = [(preset, load_model(preset.name)) for preset in all_presets().values()]
    if as_json:
        rows = [
            {
                "name": preset.name,
                "aliases": list(preset.aliases),
                "family": model.family,
                "parameters": parameter_counts(model)["total"],
                "active_parameters": parameter_counts(model)["active"],
                "published_parameters": preset.published_parameters,
                "layers": model.layer_count,
                "hidden": model.hidden,
                "vocab": model.vocab,
                "max_positions": model.max_positions,
                "source": preset.source,
            }
            for preset, model in presets
        ]
        _print_json({"models": rows})
        return
    table = _table("name", "family", "parameters >", "layers >", "hidden >", "vocab >", "context >")
    for preset, model in presets:
        table.add_row(
            preset.name,
            model.family,
            _billions(parameter_counts(model)["total"]),
            str(model.layer_count),
            str(model.hidden),
            str(model.vocab),
            str(model.max_positions),
        )
    _print(table, "A path to a Hugging Face config.json, or to a folder with one, is a MODEL too.")


@app.command("show", epilog="Example: shardplan models show llama-3-8b   (or: shardplan models show ./config.json)")
def show_model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Preset name, config.json, or a folder with one.")],
    as_json: AsJson = False,
) -> None:
    """Show one model: parameters by part, shapes, source."""
    from shardplan.costmodel.model import parameter_counts
    from shardplan.costmodel.model_config import load_model, model_digest, model_document
    from shardplan.costmodel.presets import find_preset

    model = load_model(name)
    counts = parameter_counts(model)
    if as_json:
        document = {
            "model": model_document(model),
            "parameters": dict(counts),
            "untied_total": _untied_total(model),
            "digest": model_digest(model),
        }
        _print_json(document)
        return
    preset = find_preset(name)
    aliases = [f"also known as: {', '.join(preset.aliases)}"] if preset and preset.aliases else []
    _print(_shape_table(model), _parameter_table(model), *aliases, f"source: {model.source}")


def _shape_table(model: Model) -> Table:
    """Shapes of the model and of each run of equal layers."""
    table = _table("shape", "value >", title=f"{model.name} ({model.family})")
    table.add_row("vocabulary (unpadded)", str(model.vocab))
    table.add_row("embedding and head", "tied" if model.tied_embeddings else "untied")
    table.add_row("positions", f"{model.max_positions} {'learned' if model.learned_positions else 'at most'}")
    for kind, count in model.layers:
        biases = {"qkv": kind.qkv_bias, "attention output": kind.attention_output_bias, "mlp": kind.mlp_bias}
        table.add_section()
        table.add_row("layers", str(count))
        table.add_row("hidden", str(kind.hidden))
        table.add_row("heads x width", f"{kind.heads} x {kind.head_dim}")
        table.add_row("key/value heads", str(kind.kv_heads))
        table.add_row("mlp width", f"{kind.ffn}{' gated' if kind.gated_mlp else ''}")
        if kind.experts:
            table.add_row("experts (a token)", f"{kind.experts} ({kind.experts_per_token})")
        table.add_row("norm", kind.norm)
        table.add_row("biases", ", ".join(part for part, has in biases.items() if has) or "none")
        table.add_row("dropout", "yes" if kind.dropout else "no")
    return table


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
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        justify = "right" if column.endswith(" >") else "left"
        table.add_column(column.removesuffix(" >"), justify=justify, no_wrap=column != columns[-1])
    return table


def _print(*parts: Table | str) -> None:
    """Tables and plain lines on stdout, without markup in user text."""

    from shardplan.cli.console import make_console

    console = make_console()
    for part in parts:
        console.print(part, markup=False, highlight=False)


def _print_json(document: object) -> None:
    """JSON alone on stdout."""
    import json

    typer.echo(json.dumps(document, indent=2))
