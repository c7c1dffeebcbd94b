"""What people call the parts of the catalog: other spellings and names (`catalog/names.toml`), and words that fit several."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from importlib.resources import files


def spelling(word: str) -> str:
    """The word in lower case without separators, but between two digits, where they tell `llama-2-7b` from `llama-27b`."""
    return re.sub(r"(?<!\d)-|-(?!\d)", "", re.sub(r"[-_\s]+", "-", word.strip().lower()))


@cache
def _other_names() -> Mapping[str, str]:
    text = (files("shardplan.hw_profiles") / "catalog" / "names.toml").read_text(encoding="utf-8")
    return {spelling(word): name for word, name in tomllib.loads(text).items()}


def known_as(word: str, known: Collection[str]) -> str | None:
    """The one of the `known` names that is meant; None where it is none of them or may be several."""
    wanted = spelling(word)
    wanted = spelling(_other_names().get(wanted, wanted))
    found = [name for name in known if spelling(name) == wanted]
    return found[0] if len(found) == 1 else None


def may_mean(word: str, known: Collection[str]) -> tuple[str, ...]:
    """Names that begin with the words of it, else those that contain them."""
    asked = _words(word)
    if not asked:
        return ()
    starts = [name for name in known if _words(name)[: len(asked)] == asked]
    return tuple(sorted(starts or [name for name in known if set(asked) <= set(_words(name))]))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-_\s]+", name.strip().lower()) if word]
