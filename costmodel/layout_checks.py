"""Values of layout words that are refused, with the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from shardplan.costmodel.job import LARGEST
from shardplan.hw_profiles.errors import InputError, nearest

FEW = 4
"""Words that are all named."""


def positive(name: str, value: object) -> None:
    """InputError for anything but a whole number from 1 on."""
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise InputError(f"{name}={value} is not a positive whole number", place="layout", remedy="use 1 or more")


def known_word(name: str, word: str, known: Sequence[str]) -> None:
    """InputError for a word that is not among the `known` ones."""
    if word not in known:
        remedy = f"use {' or '.join(known)}" if len(known) <= FEW else nearest(word, known)
        raise InputError(f"{name}={word!r} is unknown", place="layout", remedy=remedy)
