"""Writes a hardware profile (nested tables of numbers, words and lists) as TOML that `load` reads back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_profile(document: Mapping[str, Any], path: str | Path) -> None:
    """Write `document` to `path`: a whole profile, or a `cluster_document`; None values are left out.

    Tables become sections, except numbers with their source, which stay on one line.
    """
    Path(path).write_text(profile_text(document), encoding="utf-8")


def profile_text(document: Mapping[str, Any]) -> str:
    """The TOML text of `document`."""
    return "\n".join(_section(document, ())).strip("\n") + "\n"


def _section(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Lines of one table: its own values first, as TOML demands, then the tables below it."""
    below: list[tuple[str, Mapping[str, Any]]] = []
    lines: list[str] = []
    for key, value in table.items():
        inner = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else None
        if inner is not None and "value" not in inner:
            below.append((key, inner))
        elif value is not None:
            lines.append(f"{_key(key)} = {_value(cast(object, value))}")
    if path and (lines or not below):
        yield f"\n[{'.'.join(_key(key) for key in path)}]"
    yield from lines
    for key, inner in below:
        yield from _section(inner, (*path, key))


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(one) for one in cast("list[object]", value)) + "]"
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value).items()
        return "{ " + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in pairs if one is not None) + " }"
    raise TypeError(f"a profile holds tables, lists, texts and numbers, not {type(value).__name__}")
