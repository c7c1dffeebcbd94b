"""Known models by name: TOML tables in the folder `presets/`, each with its source and its published size.

`null` lists keys of the config that are null, for which TOML has no word.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from shardplan.hw_profiles.names import spelling


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One known model, as its publisher describes it."""

    name: str
    aliases: tuple[str, ...]
    """Other names for it, also its Hugging Face repository."""
    config: Mapping[str, object]
    """Keys and values of its Hugging Face config.json."""
    published_parameters: str
    """Total as the source prints it: exact (`6,738,415,616`) or rounded (`18.4 B` = 18.4e9)."""
    source: str


@cache
def all_presets() -> Mapping[str, Preset]:
    """Every preset by name, file by file in alphabetical order."""
    found: dict[str, Preset] = {}
    folder = files("shardplan.costmodel").joinpath("presets")
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".toml"):
            continue
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        file_source: str = tables.pop("source", "")
        for name, table in tables.items():
            found[name] = Preset(
                name=name,
                aliases=tuple(table["aliases"]),
                config=MappingProxyType({**table["config"], **dict.fromkeys(table.get("null", ()))}),
                published_parameters=table["parameters"],
                source=table.get("source", file_source),
            )
    return MappingProxyType(found)


@cache
def _by_any_name() -> Mapping[str, Preset]:
    return {word.lower(): preset for preset in all_presets().values() for word in (preset.name, *preset.aliases)}


def find_preset(name: str) -> Preset | None:
    """The preset of this name or alias, in upper or lower case; None when there is none.

    Separators may differ (`gpt-2`) where that leaves one preset and no file or folder has the name.
    """
    exact = _by_any_name().get(name.strip().lower())
    alike = _by_spelling().get(spelling(name), ())
    if exact is None and len(alike) == 1 and not Path(name).exists():
        return alike[0]
    return exact


@cache
def _by_spelling() -> Mapping[str, tuple[Preset, ...]]:
    found: dict[str, dict[str, Preset]] = {}
    for word, preset in _by_any_name().items():
        found.setdefault(spelling(word), {})[preset.name] = preset
    return {word: tuple(presets.values()) for word, presets in found.items()}


def preset_words() -> tuple[str, ...]:
    """Names and short aliases (no repository names), for suggestions."""
    return tuple(word for word in _by_any_name() if "/" not in word)
