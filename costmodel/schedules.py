"""Pipeline schedules as action lists: what each pipeline rank runs, in order.

A rank holds v chunks; chunk c of rank r is global stage `stage_of(...)` of pp * v. An action is one pass of one micro-batch
through one chunk: F forward, B full backward, or B split in I (gradient of the input) and W (gradient of the weights).

  gpipe          all forwards, then all backwards                              arXiv 1811.06965
  1f1b           one forward, one backward after p - r - 1 forwards            arXiv 2104.04473, section 2.2 (PipeDream-flush)
  interleaved    depth first: rounds of p micro-batches through all chunks     arXiv 2104.04473, section 2.2
  looped_bfs     breadth first: all micro-batches through a chunk, then next   arXiv 2211.05953
  zero_bubble    ZB-H1: 1F1B with B split, W r micro-batches late              arXiv 2401.10241, section 2
  zero_bubble_v  ZB-V: two chunks, placed down and up again                    arXiv 2401.10241, section 6; 2405.15362
  dualpipe_v     DualPipe cut in half: pairs of F and B, placed as ZB-V        arXiv 2412.19437; deepseek-ai/DualPipe

A list for fewer micro-batches than a pattern needs is the longer list without the surplus ones: what is left depends only on
what is left, so it runs, and never holds more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shardplan.costmodel.layout import SCHEDULES, V_PLACED
from shardplan.hw_profiles.errors import InputError, nearest

Kind = Literal["F", "B", "I", "W"]
"""Forward, full backward, gradient of the input, gradient of the weights."""


class Action(NamedTuple):
    """One pass of one micro-batch through one chunk of a rank."""

    kind: Kind
    micro_batch: int
    chunk: int
    """Local number of the chunk on its rank."""


Phase = tuple[int, tuple[str, ...]]
"""(how often, words): F0, B1, I0 = the next micro-batch of that kind and chunk; W = the oldest I without its W."""


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """The actions of every rank of one pipeline."""

    name: str
    pp: int
    virtual_stages: int
    """Chunks per rank."""
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]
    """In order, by rank."""

    def stage(self, rank: int, chunk: int) -> int:
        """Global stage, 0 = the first layers, of a rank's chunk."""
        return stage_of(rank, chunk, pp=self.pp, v_placed=self.name in V_PLACED)

    def stage_ranks(self) -> list[int]:
        """Rank of each of the pp * virtual_stages global stages."""
        found = [0] * (self.pp * self.virtual_stages)
        for rank in range(self.pp):
            for chunk in range(self.virtual_stages):
                found[self.stage(rank, chunk)] = rank
        return found


def stage_of(rank: int, chunk: int, *, pp: int, v_placed: bool) -> int:
    """Global stage of a chunk: looped chunk * pp + rank; in V placement chunk 1 climbs back, 2 pp - 1 - rank."""
    return (chunk + 1) * pp - 1 - rank if v_placed and chunk % 2 else chunk * pp + rank


def pipeline_schedule(name: str, *, pp: int, micro_batches: int, virtual_stages: int = 1) -> PipelineSchedule:
    """The action lists of a schedule.

    `virtual_stages` is 1 for gpipe, 1f1b and zero_bubble, 2 for zero_bubble_v and dualpipe_v, any number for interleaved and
    looped_bfs (1 makes them 1f1b and gpipe). Interleaved rounds hold m / floor(m / p) micro-batches, p where p divides m.
    InputError for an unknown name, other chunk counts, numbers below 1, and dualpipe_v with fewer than 2 pp micro-batches.
    """
    _check(name, pp, micro_batches, virtual_stages)
    if name == "interleaved" and virtual_stages > 1:
        ranks = _interleaved(pp, micro_batches, virtual_stages)
    elif name == "looped_bfs":
        phases = _breadth_first(micro_batches, virtual_stages)
        ranks = tuple(_played(phases, micro_batches) for _ in range(pp))
    else:
        pattern, fewest = PATTERNS[name]
        count = max(micro_batches, fewest(pp))
        ranks = tuple(_played(pattern(pp, rank, count), micro_batches) for rank in range(pp))
    return PipelineSchedule(name=name, pp=pp, virtual_stages=virtual_stages, micro_batches=micro_batches, ranks=ranks)


def _check(name: str, pp: int, micro_batches: int, virtual_stages: int) -> None:
    """InputError for what no schedule can be made of."""
    place = "schedule"
    if name not in SCHEDULES:
        raise InputError(f"schedule={name!r} is unknown", place=place, remedy=nearest(name, SCHEDULES))
    for word, value in (("pp", pp), ("micro_batches", micro_batches), ("virtual_stages", virtual_stages)):
        if value < 1:
            raise InputError(f"{word}={value} is not a positive whole number", place=place, remedy="use 1 or more")
    chunks = 2 if name in V_PLACED else 1
    if name not in ("interleaved", "looped_bfs") and virtual_stages != chunks:
        detail = f"schedule={name} with virtual_stages={virtual_stages}"
        raise InputError(detail, place=place, remedy=f"use virtual_stages={chunks}")
    if name == "dualpipe_v" and micro_batches < 2 * pp:
        detail = f"dualpipe_v over pp={pp} ranks with {micro_batches} micro-batches"
        raise InputError(detail, place=place, remedy=f"use {2 * pp} micro-batches or more")


def _played(phases: Iterable[Phase], micro_batches: int) -> tuple[Action, ...]:
    """Actions of the phases in order, then every W that is left; micro-batches beyond `micro_batches` are dropped."""
    following: dict[str, int] = {}
    late: deque[Action] = deque()
    actions: list[Action] = []
    for count, words in phases:
        for _ in range(count):
            for word in words:
                if word == "W":
                    actions.append(late.popleft())
                    continue
                kind: Kind = "F" if word[0] == "F" else "B" if word[0] == "B" else "I"
                chunk = int(word[1:])
                turn = f"F{chunk}" if kind == "F" else f"B{chunk}"
                at = following.get(turn, 0)
                following[turn] = at + 1
                actions.append(Action(kind, at, chunk))
                if kind == "I":
                    late.append(Action("W", at, chunk))
    return tuple(a for a in (*actions, *late) if a.micro_batch < micro_batches)


def _gpipe(_: int, __: int, m: int) -> list[Phase]:
    return [(m, ("F0",)), (m, ("B0",))]


def _one_f_one_b(p: int, r: int, m: int) -> list[Phase]:
    ahead = p - r - 1
    return [(ahead, ("F0",)), (m - ahead, ("F0", "B0")), (ahead, ("B0",))]


def _zero_bubble(p: int, r: int, m: int) -> list[Phase]:
    """1F1B's order of F and I; W stays r micro-batches behind, so that every rank holds p and fills the drain with W."""
    ahead = p - r - 1
    return [(ahead, ("F0",)), (r, ("F0", "I0")), (m - ahead - r, ("F0", "I0", "W")), (ahead, ("I0", "W"))]


def _zero_bubble_v(p: int, r: int, m: int) -> list[Phase]:
    """Fill the V down and up, one F, I, W of each chunk in turn, drain by I with the W kept for the end."""
    turns = m - 2 * p + r + 1
    return [
        (2 * (p - r) - 1, ("F0",)),
        (r, ("F1", "F0")),
        (p - r, ("F1", "I1", "W")),
        (turns, ("F0", "I0", "W", "F1", "I1", "W")),
        (p - r - 1, ("I0", "W", "F1", "I1", "W")),
        (r, ("I0", "I1")),
        (p - r, ("I0", "W")),
    ]


def _dualpipe_v(p: int, r: int, m: int) -> list[Phase]:
    """F of one chunk beside B of the other; the drain is split in I and W in its second half."""
    above = p - r - 1
    drain = [f"{'B' if turn <= r else 'I'}{(turn + 1) % 2}" for turn in range(2 * (r + 1))]
    return [
        (2 * above, ("F0",)),
        (r + 1, ("F0", "F1")),
        (above, ("I1", "W", "F1")),
        (m - 2 * p + r + 1, ("F0", "B1", "F1", "B0")),
        (above, ("B1", "F1", "B0")),
        (1, tuple(drain)),
        (above, ("W", "I0")),
    ]


Pattern = Callable[[int, int, int], list[Phase]]
"""(pp, rank, micro-batches) -> phases of the rank."""

PATTERNS: Mapping[str, tuple[Pattern, Callable[[int], int]]] = {
    "gpipe": (_gpipe, lambda p: 1),
    "1f1b": (_one_f_one_b, lambda p: p),
    "interleaved": (_one_f_one_b, lambda p: p),
    "zero_bubble": (_zero_bubble, lambda p: p),
    "zero_bubble_v": (_zero_bubble_v, lambda p: 2 * p - 1),
    "dualpipe_v": (_dualpipe_v, lambda p: 2 * p),
}
"""By name: the pattern of one rank and the fewest micro-batches it is made for. `interleaved` here is that of one chunk."""


def _breadth_first(m: int, v: int) -> list[Phase]:
    return [(m, (f"F{chunk}",)) for chunk in range(v)] + [(m, (f"B{chunk}",)) for chunk in reversed(range(v))]


def _interleaved(p: int, m: int, v: int) -> tuple[tuple[Action, ...], ...]:
    """Depth first: rank r runs 2 (p - r - 1) + (v - 1) times a round of forwards ahead, then one forward, one backward."""
    rounds = _rounds(p, m)
    forwards = _depth_first("F", rounds, range(v))
    backwards = _depth_first("B", rounds, range(v - 1, -1, -1))
    ranks: list[tuple[Action, ...]] = []
    for rank in range(p):
        ahead = min(2 * (p - rank - 1) + (v - 1) * len(rounds[0]), m * v)
        pairs = zip(forwards[ahead:], backwards, strict=False)
        paired = [action for pair in pairs for action in pair]
        ranks.append((*forwards[:ahead], *paired, *backwards[m * v - ahead :]))
    return tuple(ranks)


def _rounds(p: int, m: int) -> list[range]:
    """m micro-batches in floor(m / p) rounds as equal as can be, the longer ones first; a single one when m < p."""
    count = max(m // p, 1)
    short, longer = divmod(m, count)
    starts = [i * short + min(i, longer) for i in range(count + 1)]
    return [range(starts[i], starts[i + 1]) for i in range(count)]


def _depth_first(kind: Kind, rounds: Sequence[range], chunks: Sequence[int]) -> list[Action]:
    return [Action(kind, at, chunk) for members in rounds for chunk in chunks for at in members]
