"""No degrees of a number of GPUs are left: which rules and wishes exclude them all, together, and on how many GPUs there are some.

Every dp * tp * pp * cp of the GPUs is held against the batch, against the rules that read degrees alone, and against what is forbidden. The
fewest of these that exclude all are told, each by degrees that it alone excludes; an arbitrary layout breaks others too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import COLUMNS, LayoutTable, layout_table
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.rule_parts import divisors
from shardplan.costmodel.rules import RULES
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.sift import HiddenError, Sifted, sift_space, without
from shardplan.planner.space import Wishes, allowed, context_degrees, fixes_pipeline, runtime_tiers, space_pieces
from shardplan.planner.watch import Watch

BoolArray = NDArray[np.bool_]

DEGREES = ("dp", "tp", "pp", "cp")
READ = (*DEGREES, "virtual_stages")
"""Columns that rules of degrees may read: as few chunks as the wishes allow."""
MOST_SEARCHED = 3
"""Numbers of GPUs whose whole space is looked at, of those that have degrees."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bar:
    """What excludes some degrees."""

    name: str
    broken: BoolArray
    """Of every row, (N,)."""
    word: str | None = None
    """What is forbidden, as it was written; None of rules."""


def why_no_degrees(setting: Setting, wishes: Wishes) -> Rejection | None:
    """Why no degrees of the cluster's GPUs are left, and what to do; None where some are, or where none are as the wishes fix them."""
    if setting.cluster.parts:
        return None
    table = _degrees(setting, wishes)
    bars = list(_bars(setting, wishes, table))
    if not len(table) or not np.any([bar.broken for bar in bars], axis=0).all():
        return None
    chosen = _fewest(bars)
    told = [_example(setting, table, bar, chosen) for bar in chosen if bar.word is None]
    words = [bar.word for bar in chosen if bar.word is not None]
    if words:
        told.append(_are_forbidden(words))
    product = "*".join(DEGREES if (table.cp > 1).any() else DEGREES[:3])
    return Rejection(
        rule="no-degrees",
        detail=f"no {product} = {_factors(setting.cluster.gpus)} is left: {'; '.join(told)}",
        remedy=_remedy(setting, wishes, bars, chosen),
    )


def why_forbidden(setting: Setting, wishes: Wishes) -> Rejection | None:
    """The fewest of the forbidden words that together leave nothing of the space; None where it has something, or nothing without them
    either."""
    if setting.cluster.parts:
        return None
    unbound = replace(wishes, forbidden=())
    if not wishes.forbidden or _is_empty(setting, unbound) or not _is_empty(setting, wishes):
        return None
    kept = wishes.forbidden
    for one in wishes.forbidden:
        fewer = tuple(other for other in kept if other != one)
        if _is_empty(setting, replace(wishes, forbidden=fewer)):
            kept = fewer
    words = [_word(*one) for one in kept]
    return Rejection(
        rule="forbidden",
        detail=f"no layout of {setting.cluster.gpus:,} GPUs is left: {_are_forbidden(words)}",
        remedy=_drop(words),
    )


def _degrees(setting: Setting, wishes: Wishes) -> LayoutTable:
    """All degrees of the GPUs that agree with the fixed words, with one chunk a stage where none is fixed."""
    gpus, kinds = setting.cluster.gpus, setting.runtime.abilities.context_parallel
    rows = np.asarray(
        [
            (gpus // cp // tp // pp, tp, pp, cp)
            for cp in context_degrees(setting.job, gpus, wishes, kinds)
            for tp in divisors(gpus // cp, most=gpus)
            for pp in divisors(gpus // cp // tp, most=gpus)
            if pp > 1 or not fixes_pipeline(wishes)
        ],
        dtype=np.int64,
    ).reshape(-1, len(DEGREES))
    fixed = [
        rows[:, at] == getattr(wishes.fixed, word) for at, word in enumerate(DEGREES) if word in wishes.fixed_words
    ]
    rows = rows[np.all(fixed, axis=0)] if fixed else rows
    plain = layout_table([wishes.fixed])
    columns = {name: np.repeat(getattr(plain, name), len(rows)) for name in COLUMNS}
    columns |= {word: rows[:, at] for at, word in enumerate(DEGREES)}
    return LayoutTable(**{**columns, "dp_shard": rows[:, 0]}, splits=plain.splits, depths=plain.depths)


def _bars(setting: Setting, wishes: Wishes, table: LayoutTable) -> Iterator[_Bar]:
    """What excludes degrees: the batch, rules, forbidden words."""
    yield _Bar(name="batch", broken=setting.job.global_batch % table.dp != 0)
    half = without(table, [name for name in COLUMNS if name not in READ])
    for rule in RULES:
        try:
            broken = np.broadcast_to(rule.broken(setting, half), len(table))
        except HiddenError:
            continue
        yield _Bar(name=rule.id, broken=broken)
    for word, value in wishes.forbidden:
        if word in DEGREES:
            yield _Bar(name="forbidden", broken=~allowed(table, ((word, value),)), word=_word(word, value))


def _fewest(bars: Sequence[_Bar]) -> list[_Bar]:
    """Bars that exclude every row together, none of which the others make needless: the one that excludes most of the rest, again and
    again."""
    chosen: list[_Bar] = []
    left = np.ones(len(bars[0].broken), dtype=bool)
    while left.any():
        chosen.append(max(bars, key=lambda bar: int((bar.broken & left).sum())))
        left &= ~chosen[-1].broken
    for bar in list(chosen):
        others = [other.broken for other in chosen if other is not bar]
        if others and np.any(others, axis=0).all():
            chosen = [other for other in chosen if other is not bar]
    return sorted(chosen, key=bars.index)


def _example(setting: Setting, table: LayoutTable, bar: _Bar, chosen: Sequence[_Bar]) -> str:
    """The reason of the smallest degrees that this bar alone excludes."""
    others = [other.broken for other in chosen if other is not bar]
    alone = bar.broken & ~np.any(others, axis=0) if others else bar.broken
    size = table.dp if bar.name == "batch" else table.tp + table.pp + table.cp
    row = table.row(int(np.where(alone, size, np.iinfo(np.int64).max).argmin()))
    if bar.name == "batch":
        return f"dp={row.dp} does not divide global_batch={setting.job.global_batch}"
    return next(rule for rule in RULES if rule.id == bar.name).detail(setting, row)


def _remedy(setting: Setting, wishes: Wishes, bars: Sequence[_Bar], chosen: Sequence[_Bar]) -> str:
    """What to change: a forbidden word that alone excludes some degrees, else GPUs, the batch or fixed degrees as they matter."""
    words = [bar.word for bar in chosen if bar.word is not None]
    count = np.sum([bar.broken for bar in bars], axis=0)
    freeing = [bar.word for bar in bars if bar.word is not None and (bar.broken & (count == 1)).any()]
    if freeing or words:
        return _drop(freeing or words)
    gpus = fewer_gpus(setting, wishes)
    ways = ["other GPUs" if gpus is None else f"{gpus:,} GPUs, the nearest number below that has layouts,"]
    ways += ["another global batch"] if any(bar.name == "batch" for bar in chosen) else []
    ways += ["fewer fixed degrees"] if wishes.fixed_words & set(DEGREES) else []
    return f"use {' or '.join(ways)}".removesuffix(",")


def fewer_gpus(setting: Setting, wishes: Wishes) -> int | None:
    """The most GPUs below those of the cluster, whole nodes or part of one, on which some layout breaks no rule."""
    gpus, node = setting.cluster.gpus, setting.cluster.node.gpus
    searched = 0
    for fewer in (*range(gpus - node, 0, -node), *range(node - 1, 0, -1)):
        try:
            at = replace(setting, cluster=setting.cluster.with_gpus(fewer))
        except InputError:
            continue
        table = _degrees(at, wishes)
        if not len(table) or np.any([bar.broken for bar in _bars(at, wishes, table)], axis=0).all():
            continue
        sifted = Sifted()
        sift_space(at, wishes, sifted, Watch())
        if any(map(len, sifted.kept)) or sifted.waiting:
            return fewer
        searched += 1
        if searched == MOST_SEARCHED:
            return None
    return None


def _is_empty(setting: Setting, wishes: Wishes) -> bool:
    abilities = setting.runtime.abilities
    pieces = space_pieces(
        setting.model,
        setting.job,
        setting.cluster.gpus,
        wishes,
        abilities.context_parallel,
        runtime_tiers(setting.runtime),
        schedules=abilities.schedules,
        bare_ends=abilities.ends_without_layers,
    )
    return not any(len(piece) for _, piece in pieces)


def _word(word: str, value: str | None) -> str:
    return word if value is None else f"{word}={value}"


def _are_forbidden(words: Sequence[str]) -> str:
    return f"{', '.join(words)} {'is' if len(words) == 1 else 'are'} forbidden"


def _drop(words: Sequence[str]) -> str:
    return f"drop --forbid {words[0]}" if len(words) == 1 else f"drop one of --forbid {', '.join(words)}"


def _factors(number: int) -> str:
    """A number with its prime factors: 4,480 (2^7*5*7)."""
    found: dict[int, int] = {}
    rest, prime = number, 2
    while rest > 1:
        while rest % prime == 0:
            found[prime], rest = found.get(prime, 0) + 1, rest // prime
        prime += 1
    words = [f"{prime}^{power}" if power > 1 else str(prime) for prime, power in found.items()]
    return f"{number:,} ({'*'.join(words)})" if len(words) > 1 else f"{number:,}"
