"""Checked reading of one JSON object: every complaint names place, field, value and remedy in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from shardplan.hw_profiles.errors import InputError

LARGEST_COUNT = 2**31 - 1
"""Largest shape that is read."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The values of one JSON object and what to take for the fields it leaves out."""

    place: str
    """File, option or field that holds the object."""
    given: Mapping[str, object]
    defaults: Mapping[str, object]
    spelled: Mapping[str, str] = field(default_factory=dict[str, str])
    """The file's own word for a field, where it differs."""

    def value(self, key: str) -> object:
        """The raw value or its default; a field with neither is missing."""
        word = self.spelled.get(key, key)
        if word in self.given:
            return self.given[word]
        if key in self.defaults:
            return self.defaults[key]
        raise InputError(f"{key} is missing", remedy=f"add {key}", place=self.place)

    def show(self, key: str) -> str:
        """`key=value`, and whether that is a default."""
        word = self.spelled.get(key, key)
        note = "" if word in self.given else " (the default)"
        return f"{word}={shown(self.value(key))}{note}"

    def bad(self, key: str, problem: str, remedy: str) -> InputError:
        """The error that `key` has this problem."""
        return InputError(f"{self.show(key)} {problem}", remedy=remedy, place=self.place)

    def count(self, key: str, *, least: int = 1, most: int = LARGEST_COUNT) -> int:
        """A whole number from `least` to `most`; a boolean or 4096.0 is none."""
        value = self.value(key)
        remedy = f"write an integer from {least} to {most}"
        if type(value) is not int:
            raise self.bad(key, "is not an integer", remedy)
        if not least <= value <= most:
            raise self.bad(key, "is out of range", remedy)
        return value

    def count_or(self, key: str, otherwise: int) -> int:
        """A whole number of 1 or more; null means `otherwise`."""
        return otherwise if self.value(key) is None else self.count(key)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.bad(key, "is not a yes or no", "write true or false")
        return value

    def probability(self, key: str) -> float:
        """A number from 0 to 1; null means 0."""
        value = self.value(key)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.bad(key, "is not a probability", "write a number from 0 to 1")
        return float(value)

    def text(self, key: str, known: tuple[str, ...] = (), *, may_be_empty: bool = False) -> str:
        """A text, one of `known` if given."""
        value = self.value(key)
        if not isinstance(value, str) or not (value or may_be_empty):
            raise self.bad(key, "is not a name", f"write {' or '.join(known) if known else 'a text'}")
        if known and value not in known:
            raise self.bad(key, "is unknown", f"write {' or '.join(known)}")
        return value

    def at_most(self, part: str, whole: str) -> int:
        """The whole number `part`, which may not be larger than `whole`."""
        number, limit = self.count(part), self.count(whole)
        if number > limit:
            raise self.bad(part, f"is more than {self.show(whole)}", f"write an integer from 1 to {limit}")
        return number

    def check_divides(self, part: str, number: int, whole: str, total: int, remedy: str = "") -> None:
        """Refuse a `part` that does not divide `whole`."""
        if total % number:
            divisors = ", ".join(str(n) for n in range(1, min(total, 512) + 1) if total % n == 0)
            problem = f"does not divide {self.show(whole)}"
            raise self.bad(part, problem, f"{remedy}use a divisor of {total}: {divisors}")


def shown(value: object) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def json_object(value: object, place: str, remedy: str) -> Mapping[str, object]:
    """The value as a JSON object; anything else is refused."""
    if not isinstance(value, Mapping):
        raise InputError(f"{shown(value)} is not a JSON object", remedy=remedy, place=place)
    return cast("Mapping[str, object]", value)
