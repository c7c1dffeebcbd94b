"""The tables of a runtime's file: laid over those of its `base`, with switches laid over them. `runtime.py` says what they mean."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, cast

from shardplan.costmodel.job import PRECISIONS
from shardplan.costmodel.layout import SCHEDULES, Layout
from shardplan.hw_profiles.errors import InputError, nearest

LAYOUT_WORDS = tuple(one.name for one in fields(Layout))


def runtime_names() -> tuple[str, ...]:
    """Names of the shipped runtimes."""
    folder = resources.files("shardplan.costmodel") / "runtimes"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def runtime_file(name: str, folder: Path) -> tuple[str, str]:
    """(text, place) of a shipped runtime, or of a TOML file (relative to `folder`)."""
    if name.endswith(".toml"):
        path = folder / name
        if not path.is_file():
            raise InputError("no such runtime file", place=str(path), remedy=f"shipped: {', '.join(runtime_names())}")
        return path.read_text(encoding="utf-8"), str(path)
    if name not in runtime_names():
        raise InputError(f"runtime {name!r} is unknown", place="--runtime", remedy=nearest(name, runtime_names()))
    file = resources.files("shardplan.costmodel") / "runtimes" / f"{name}.toml"
    return file.read_text(encoding="utf-8"), f"{name}.toml"


def runtime_document(text: str, place: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file as tables, laid over its `base` where it has one: a shipped runtime or a file beside it, with or without switches."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as bad:
        raise InputError(f"not valid TOML ({bad})", place=place) from None
    base = document.pop("base", None)
    missing = [word for word in ("name", "version", "source") if word not in document]
    if missing:
        why = "say what this runtime is" if base is None else "its base's is not this runtime's"
        raise InputError(f"{missing[0]} is missing", place=place, remedy=why)
    if base is None:
        return document
    if not isinstance(base, str) or place in above:
        told = f"base = {base!r} is not a runtime" if place not in above else f"base = {base!r} leads back to this file"
        raise InputError(told, place=place, remedy=f"a file, or one of {', '.join(runtime_names())}")
    name, *switches = base.split("+")
    beneath = runtime_document(*runtime_file(name, Path(place).parent), (*above, place))
    kept = {"switches": beneath.get("switches", {}), "base_switches": [*beneath.get("base_switches", []), *switches]}
    beneath["fitted_as"] = beneath.get("fitted_as") or beneath["name"]
    merged = {**switched(beneath, switches, base), **kept}
    for key, value in document.items():
        if isinstance(value, dict):
            _lay_over(merged, key, cast("dict[str, Any]", value))
        else:
            merged[key] = value
    return merged


def switched(document: dict[str, Any], switches: list[str], place: str) -> dict[str, Any]:
    """The document with the tables of each switch laid over it, in the order of the file whatever that of the words; the name tells
    which are on."""
    known: dict[str, dict[str, Any]] = document.pop("switches", {})
    beneath: list[str] = document.pop("base_switches", [])
    for at, word in enumerate(switches):
        if word not in known:
            raise InputError(
                f"switch {word!r} is unknown",
                place=place,
                remedy=nearest(word, known) if known else "this runtime has no switches",
            )
        missing = [need for need in known[word].get("needs", ()) if need not in (*beneath, *switches[:at])]
        if missing:
            raise InputError(
                f"switch {word!r} needs {' and '.join(map(repr, missing))} before it",
                place=place,
                remedy=f"write +{'+'.join([*missing, word])}",
            )
    for word in (word for word in known if word in switches):
        for table, values in known[word].items():
            if table != "needs":
                _lay_over(document, table, values)
    document["name"] = "+".join([document["name"], *switches])
    return document


def _lay_over(document: dict[str, Any], table: str, values: dict[str, Any]) -> None:
    """The table with other values; by how much numbers change is kept, for the constants fitted with the old ones."""
    before, changed = document.get(table, {}), document.setdefault("switched", {})
    for name, value in values.items():
        if _scales(before.get(name), value):
            changed[name] = changed.get(name, 1.0) * value / before[name]
    document[table] = {**before, **{name: _over(before.get(name), value) for name, value in values.items()}}


def _over(before: Any, after: Any) -> Any:
    """A table of a table keeps the keys that the switch leaves out."""
    if isinstance(before, dict) and isinstance(after, dict):
        return cast("dict[str, Any]", before) | cast("dict[str, Any]", after)
    return after


def _scales(before: object, after: object) -> bool:
    """Both are numbers and the first is not 0."""
    return isinstance(before, int | float) and isinstance(after, int | float) and before != 0


def check_values(document: Mapping[str, Any], place: str) -> None:
    """Raises InputError for numbers that no runtime has, and for words and stages that nothing knows."""
    for name, value in _numbers(document):
        most = 1.0 if name.endswith(("overlap", "fraction")) else float("inf")
        if not 0.0 <= value <= most:
            remedy = "use a share from 0 to 1" if most == 1.0 else "use a number of 0 or more"
            raise InputError(f"{name}={value:g} is out of range", place=place, remedy=remedy)
        if name.endswith("_rate") and value == 0.0:  # work is divided by it
            raise InputError(
                f"{name}=0 is out of range", place=place, remedy="use a number above 0; 1 leaves it as it is"
            )
    for word in document.get("warnings", {}):
        if word not in LAYOUT_WORDS:
            raise InputError(
                f"warnings.{word} is no word of a layout", place=place, remedy=nearest(str(word), LAYOUT_WORDS)
            )
    abilities: dict[str, Any] = document.get("abilities", {})
    for name, known in (("schedules", SCHEDULES), ("zero", range(4)), ("precisions", PRECISIONS)):
        for word in abilities.get(name, ()):
            if word not in known:
                raise InputError(
                    f"abilities.{name} has the unknown {word!r}",
                    place=place,
                    remedy=f"use {', '.join(map(str, known))}",
                )
    for word, states in dict(document.get("states", {})).items():
        for stage in abilities.get("zero", ()):
            if isinstance(states, Mapping) and f"zero_{stage}" not in states:
                raise InputError(
                    f"abilities.zero has {stage}, but states.{word} has no zero_{stage}",
                    place=place,
                    remedy=f"say what a rank holds under stage {stage}, or take the stage out of abilities.zero",
                )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a document, with the path of their key."""
    if isinstance(value, Mapping):
        for key, below in cast("Mapping[str, Any]", value).items():
            yield from _numbers(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for below in cast("list[Any]", value):
            yield from _numbers(below, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def state_row(states: dict[str, Any], stage: int) -> dict[str, Any]:
    """Row of one ZeRO stage; one that the runtime does not have repeats the one below."""
    empty: dict[str, Any] = {"whole": {}, "sharded": {}, "accumulating": {}, "stepping": {}}
    for candidate in range(stage, -1, -1):
        row = states.get(f"zero_{candidate}")
        if row is not None:
            return {**empty, **row}
    return empty
