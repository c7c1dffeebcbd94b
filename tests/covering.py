"""Pairwise covering arrays under rules: every two values of two words meet in some combination that is run, or a rule says why not.

A word given where it means nothing (a schedule without a pipeline) would hide what it does elsewhere, so such pairs are left out.
Everything is deterministic: the same words give the same combinations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

Row = tuple[str, ...]
"""A value of each factor, in order."""
Pair = tuple[int, str, int, str]
"""(factor, value, later factor, value)."""

TRIES = 40
"""Completions, all refused, after which a pair counts as impossible."""
CANDIDATES = 12
"""Completions of which the one that covers most is taken."""
NEUTRAL = 0.6
"""How often a completion takes a factor's first value, which goes with most others."""


@dataclass
class Array:
    """What `covering_array` found."""

    rows: list[Row] = field(default_factory=list)
    """Combinations to run."""
    covered: set[Pair] = field(default_factory=set)
    impossible: dict[Pair, frozenset[str]] = field(default_factory=dict)
    """Pairs that no combination may hold; the rules that refused every one tried, or where no rule did alone, all that refused some."""
    refused: dict[Row, frozenset[str]] = field(default_factory=dict)
    """Combinations that were tried and refused, with their rules."""


def pairs_of(row: Row) -> list[Pair]:
    """Every two values of a combination."""
    return [(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)]


def covering_array(
    factors: Mapping[str, Sequence[str]],
    rules: Callable[[dict[str, str]], frozenset[str]],
    means_nothing: Callable[[dict[str, str]], bool],
) -> Array:
    """`rules` names those that refuse a combination, `means_nothing` tells of a partial one that two of its values do not go together."""
    return _Search(factors, rules, means_nothing).run()


class _Search:
    def __init__(self, factors, rules, means_nothing) -> None:
        self.names, self.values = list(factors), [list(values) for values in factors.values()]
        self.rules, self.means_nothing = rules, means_nothing
        self.random = random.Random(0)
        self.array = Array()
        self.known: dict[Row, frozenset[str]] = {}
        self.nothing: dict[Pair, bool] = {}
        self.witness: dict[Pair, Row] = {}

    def run(self) -> Array:
        pairs = [
            (i, a, j, b)
            for i, j in combinations(range(len(self.names)), 2)
            for a in self.values[i]
            for b in self.values[j]
            if not self._nothing((i, a, j, b))
        ]
        for pair in pairs:
            if pair not in self.witness:
                self._judge(pair)
        wanted = dict.fromkeys(pair for pair in pairs if pair in self.witness)
        while wanted:
            row = self._best(next(iter(wanted)), wanted)
            self.array.rows.append(row)
            self.array.covered.update(pairs_of(row))
            for pair in pairs_of(row):
                wanted.pop(pair, None)
        return self.array

    def _nothing(self, pair: Pair) -> bool:
        if pair not in self.nothing:
            i, a, j, b = pair
            self.nothing[pair] = self.means_nothing({self.names[i]: a, self.names[j]: b})
        return self.nothing[pair]

    def _broken(self, row: Row) -> frozenset[str]:
        """Rules that refuse it; what a good one holds is possible."""
        if row not in self.known:
            self.known[row] = self.rules(dict(zip(self.names, row, strict=True)))
            if self.known[row]:
                self.array.refused[row] = self.known[row]
            else:
                for pair in pairs_of(row):
                    self.witness.setdefault(pair, row)
        return self.known[row]

    def _judge(self, pair: Pair) -> None:
        """Find a combination that may run, or the rules that refuse all."""
        found: list[frozenset[str]] = []
        for excluding in (
            True,
            False,
        ):  # without what is known to be impossible, so that there are rows to ask rules about
            for _ in range(TRIES):
                row = self._completed(pair, lambda _at, _chosen, options: self._usual(options), excluding=excluding)
                if row is None:
                    break
                found.append(self._broken(row))
                if not found[-1]:
                    return
            if found:
                break
        self.array.impossible[pair] = frozenset.intersection(*found) or frozenset.union(*found)

    def _usual(self, options: list[str]) -> str:
        return options[0] if self.random.random() < NEUTRAL else self.random.choice(options)

    def _best(self, pair: Pair, wanted: Mapping[Pair, None]) -> Row:
        """Of a few completions that may run, the one with most pairs that are still wanted."""

        def most(at: int, chosen: dict[int, str], options: list[str]) -> str:
            gain = {b: sum(_ordered(at, b, i, a) in wanted for i, a in chosen.items()) for b in options}
            top = max(gain.values())
            return self._usual([b for b in options if gain[b] == top])

        rows = [self.witness[pair]]
        for _ in range(CANDIDATES):
            row = self._completed(pair, most)
            if row is not None and not self._broken(row):
                rows.append(row)
        return max(rows, key=lambda row: sum(one in wanted for one in pairs_of(row)))

    def _completed(
        self, pair: Pair, choose: Callable[[int, dict[int, str], list[str]], str], *, excluding: bool = True
    ) -> Row | None:
        """The pair with values for all other factors that go with each other; None where none is left."""
        i, a, j, b = pair
        chosen = {i: a, j: b}
        others = [at for at in range(len(self.names)) if at not in chosen]
        self.random.shuffle(others)
        for at in others:
            options = [
                value
                for value in self.values[at]
                if not any(self._excluded(_ordered(at, value, i, a), excluding) for i, a in chosen.items())
            ]
            if not options:
                return None
            chosen[at] = choose(at, chosen, options)
        return tuple(chosen[at] for at in range(len(self.names)))

    def _excluded(self, pair: Pair, excluding: bool) -> bool:
        return self._nothing(pair) or (excluding and pair in self.array.impossible)


def _ordered(i: int, a: str, j: int, b: str) -> Pair:
    return (i, a, j, b) if i < j else (j, b, i, a)
