"""Every layout of a model on G GPUs as one table: all factorisations times every option; rules, not loops, decide what is valid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.columns import joined_column
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import (
    CHUNKED,
    COLUMNS,
    CP_KINDS,
    FIELD_NAMES,
    OFFLOAD,
    SCHEDULES,
    V_PLACED,
    Layout,
    LayoutTable,
    given_words,
    layout_table,
    parse_layout,
)
from shardplan.costmodel.model import Model
from shardplan.costmodel.recompute import ALL_LAYERS, RECOMPUTE, RECOMPUTE_COLUMNS
from shardplan.costmodel.rule_parts import divisors
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.planner.factors import SPREADING, Factors

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FORBIDDABLE = {
    "offload": ("offload_optimizer", "offload_params", "offload_activations"),
    "zeropp": ("hpz", "qwz", "qgz"),
    "tensor": ("tp",),
    "pipeline": ("pp",),
    "hsdp": ("dp_shard",),
    "context": ("cp",),
    "experts": ("ep", "etp"),
}
"""Words for --forbid beside the layout words themselves."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user fixed or forbade."""

    fixed: Layout = field(default_factory=Layout)
    fixed_words: frozenset[str] = frozenset()
    forbidden: tuple[tuple[str, str | None], ...] = ()
    """(word, value) pairs; without a value everything but the word's default is forbidden."""
    allowed: frozenset[str] = frozenset()
    """What changes numerical results and is looked at only when asked for: qwz, qgz."""


def asked(wishes: Wishes, word: str, value: str | None = None) -> bool:
    """Whether the user fixed the word, or forbade it, or this value of it."""
    return word in wishes.fixed_words or (word, None) in wishes.forbidden or (word, value) in wishes.forbidden


ALLOWABLE = ("qwz", "qgz")
"""Layout words for --allow."""


def parse_wishes(fix: str = "", forbid: Sequence[str] = (), allow: Sequence[str] = ()) -> Wishes:
    """Read `--fix "tp=8 zero=1"`, `--forbid offload --forbid zero=3` and the layout words of `--allow`; raises InputError for unknown
    words."""
    pairs: list[tuple[str, str | None]] = []
    for item in " ".join(forbid).replace(",", " ").split():
        word, equals, value = item.partition("=")
        for name in FORBIDDABLE.get(word, (word,)):
            if name not in FIELD_NAMES:
                raise InputError(
                    f"{word!r} cannot be forbidden",
                    place="--forbid",
                    remedy=nearest(word, (*FIELD_NAMES, *FORBIDDABLE)),
                )
            if equals:
                _checked(f"{name}={value}")
            pairs.append((name, value.lower() if equals else None))
    try:
        fixed, words = parse_layout(fix), given_words(fix)
    except InputError as bad:
        raise InputError(bad.problem, place="--fix", remedy=bad.remedy) from None
    for word, value in pairs:
        if word in words and not allowed(layout_table([fixed]), ((word, value),))[0]:
            named = word if value is None else f"{word}={value}"
            raise InputError(
                f"{named} is forbidden, but --fix asks for {word}={getattr(fixed, word)}",
                place="--forbid",
                remedy="leave one of them out",
            )
    return Wishes(
        fixed=fixed,
        fixed_words=words,
        forbidden=tuple(pairs),
        allowed=frozenset(word for word in allow if word in ALLOWABLE),
    )


def _checked(words: str) -> None:
    try:
        parse_layout(words)
    except InputError as bad:
        raise InputError(bad.problem, place="--forbid", remedy=bad.remedy) from None


NONE, CPU, NVME = (OFFLOAD.index(tier) for tier in ("none", "cpu", "nvme"))
TIERS = ((NONE, NONE), (CPU, NONE), (NVME, NONE), (CPU, CPU), (NVME, CPU), (CPU, NVME), (NVME, NVME))
"""(optimizer, parameters) off the GPU, in host memory or on flash (ZeRO-Infinity); parameters never without the optimizer."""
ROWS_OF_A_PIECE = 200_000
"""Blocks are joined up to about this many rows, so that sifting one piece at a time bounds the memory."""


def layout_space(
    model: Model,
    job: Job,
    gpus: int,
    wishes: Wishes | None = None,
    cp_kinds: Sequence[str] = (),
    *,
    schedules: Sequence[str] = SCHEDULES,
    bare_ends: bool = False,
) -> LayoutTable:
    """All layouts of `model` on `gpus` GPUs within the wishes; may be empty. Order is deterministic."""
    found = space_pieces(model, job, gpus, wishes, cp_kinds, schedules=schedules, bare_ends=bare_ends)
    return join_tables([piece.layouts() for _, piece in found], wishes or Wishes())


def join_tables(pieces: Sequence[LayoutTable], wishes: Wishes) -> LayoutTable:
    """Rows of all pieces of one space, in order."""
    empty = layout_table([wishes.fixed]).take(np.zeros(0, dtype=np.int64))
    columns = {name: joined_column([getattr(piece, name) for piece in (empty, *pieces)]) for name in COLUMNS}
    return LayoutTable(**columns, splits=empty.splits, depths=empty.depths).with_constants()


def runtime_tiers(runtime: Runtime) -> tuple[tuple[int, int], ...]:
    """TIERS that the runtime has: what none of its options names is not looked at."""
    states = [OFFLOAD.index(tier) for tier in runtime.abilities.offload_optimizer]
    parameters = [OFFLOAD.index(tier) for tier in runtime.offload.parameters]
    alone = not runtime.offload.optimizer_with_parameters
    return tuple(
        (state, parameter)
        for state, parameter in TIERS
        if state in states and parameter in parameters and (alone or (state > 0) == (parameter > 0))
    )


def space_pieces(
    model: Model,
    job: Job,
    gpus: int,
    wishes: Wishes | None = None,
    cp_kinds: Sequence[str] = (),
    tiers: Sequence[tuple[int, int]] | None = None,
    *,
    schedules: Sequence[str] = SCHEDULES,
    bare_ends: bool = False,
) -> Iterator[tuple[float, Factors]]:
    """(share of the factorisations behind it, piece of the space of about ROWS_OF_A_PIECE rows); `cp_kinds` are the kinds of context
    parallelism to look at, `tiers` the pairs of TIERS (all when left out), `schedules` those to look at beside a fixed one; with
    `bare_ends` the first and the last chunk may lack layers. Either all layouts of a piece have cp > 1 or none."""
    wanted = wishes or Wishes()
    looked_at = tuple(dict.fromkeys((*schedules, wanted.fixed.schedule)))
    blocks: list[_Block] = []
    rows = 0
    degrees = [
        (tp, pp, gpus // cp // tp // pp, cp)
        for cp in context_degrees(job, gpus, wanted, cp_kinds)
        for tp in divisors(gpus // cp, most=gpus)
        for pp in divisors(gpus // cp // tp, most=model.layer_count + 2 * bare_ends)
        if pp > 1 or not fixes_pipeline(wanted)
    ]
    for at, (tp, pp, dp, cp) in enumerate(degrees):
        if job.global_batch % dp == 0 and _agrees(wanted, tp=tp, pp=pp, dp=dp):
            piped = _schedules(model, pp, looked_at, bare_ends)
            blocks.append(_block(model, job, tp, pp, dp, cp, wanted, cp_kinds, tiers or TIERS, piped))
            rows += len(blocks[-1][0]["dp"]) * len(blocks[-1][1]["dp"])
        last = at + 1 == len(degrees) or (cp == 1) != (degrees[at + 1][3] == 1)
        if blocks and (last or rows >= ROWS_OF_A_PIECE):
            yield (at + 1) / len(degrees), _piece(blocks, wanted)
            blocks, rows = [], 0


def context_degrees(job: Job, gpus: int, wishes: Wishes, cp_kinds: Sequence[str]) -> list[int]:
    """The fixed cp; else 1, and all that divide the sequence where there are `cp_kinds` or the user fixed one of them."""
    if "cp" in wishes.fixed_words:
        return [wishes.fixed.cp] if gpus % wishes.fixed.cp == 0 else []
    if not cp_kinds and "cp_kind" not in wishes.fixed_words:
        return [1]
    return [cp for cp in divisors(gpus, most=job.seq) if job.seq % cp == 0]


def fixes_pipeline(wishes: Wishes) -> bool:
    """Whether the user fixed a schedule that only a pipeline has, and nothing that says there is none."""
    fixed = "schedule" in wishes.fixed_words and wishes.fixed.schedule != Layout().schedule
    return fixed and not ("pp" in wishes.fixed_words and wishes.fixed.pp == 1)


_Block = tuple[dict[str, IntArray], dict[str, IntArray]]
"""Columns of what computes and of what spreads states, with those of the mesh in both."""


def _piece(blocks: Sequence[_Block], wishes: Wishes) -> Factors:
    """Blocks with the columns they leave out taken from the fixed words, forbidden rows dropped."""
    (computing, computing_block), (spreading, spreading_block) = (
        _rows_of([block[part] for block in blocks], wishes) for part in (0, 1)
    )
    whole = Factors(
        computing=computing,
        computing_block=computing_block,
        spreading=spreading,
        spreading_block=spreading_block,
        blocks=len(blocks),
    )
    spread = {(word, value) for word, value in wishes.forbidden if word in SPREADING}
    rest = tuple(one for one in wishes.forbidden if one not in spread)
    return whole.take(allowed(computing, rest), allowed(spreading, tuple(spread)))


def _rows_of(blocks: Sequence[dict[str, IntArray]], wishes: Wishes) -> tuple[LayoutTable, IntArray]:
    """(all rows, the block of each)."""
    fixed, names = layout_table([wishes.fixed]), blocks[0].keys()
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in names}
    rows = len(columns["dp"])
    others = {name: np.repeat(getattr(fixed, name), rows) for name in COLUMNS if name not in columns}
    table = LayoutTable(**columns, **others, splits=fixed.splits, depths=fixed.depths)
    return table, np.repeat(np.arange(len(blocks)), [len(block["dp"]) for block in blocks])


def _agrees(wishes: Wishes, **degrees: int) -> bool:
    return all(getattr(wishes.fixed, word) == value for word, value in degrees.items() if word in wishes.fixed_words)


def _block(
    model: Model,
    job: Job,
    tp: int,
    pp: int,
    dp: int,
    cp: int,
    wishes: Wishes,
    cp_kinds: Sequence[str],
    tiers: Sequence[tuple[int, int]],
    schedules: list[tuple[int, ...]],
) -> _Block:
    """All options of one (tp, pp, dp, cp): the cross product of the option groups, those of computing and those of spreading apart."""
    computing: _Groups = (
        (("micro_batch",), [(size,) for size in divisors(job.global_batch // dp)]),
        (("sequence_parallel",), [(0,), (1,)] if tp > 1 else [(0,)]),
        (("schedule", "virtual_stages"), schedules),
        (RECOMPUTE_COLUMNS, [(code, ALL_LAYERS, 0) for code in range(len(RECOMPUTE))]),
        (("ep",), _expert_degrees(model, dp * cp * tp)),
        (("cp_kind",), [(CP_KINDS.index(kind),) for kind in cp_kinds if cp > 1] or [(0,)]),
    )
    spreading: _Groups = (
        (("zero", "dp_shard"), _sharding(dp, cp)),
        (("offload_optimizer", "offload_params"), list(tiers)),
    )
    mesh = {"tp": tp, "pp": pp, "dp": dp, "cp": cp}
    return _crossed(computing, mesh, wishes), _crossed(spreading, mesh, wishes)


_Groups = tuple[tuple[tuple[str, ...], list[tuple[int, ...]]], ...]
"""Words that go together, with the values they may have."""


def _crossed(groups: _Groups, mesh: dict[str, int], wishes: Wishes) -> dict[str, IntArray]:
    """The cross product of the groups as columns."""
    chosen = [(names, _restricted(names, options, wishes)) for names, options in groups]
    index = np.indices([len(options) for _, options in chosen]).reshape(len(chosen), -1)
    columns: dict[str, IntArray] = {name: np.full(index.shape[1], degree) for name, degree in mesh.items()}
    for (names, options), at in zip(chosen, index, strict=True):
        values = np.asarray(options, dtype=np.int64).reshape(len(options), len(names))[at]
        columns.update({name: values[:, i] for i, name in enumerate(names)})
    return columns


def _expert_degrees(model: Model, ranks: int) -> list[tuple[int, ...]]:
    """Expert-parallel degrees: divisors of the ranks of a stage that also divide the experts of every layer; 1 without experts."""
    experts = gcd(*(kind.experts for kind, _ in model.runs if kind.experts)) or 1
    return [(ep,) for ep in divisors(gcd(experts, ranks), most=ranks)]


def _sharding(dp: int, cp: int) -> list[tuple[int, ...]]:
    """(zero, dp_shard): stage 0, and stages 1-3 over every divisor of dp that, times cp, is above 1. On one rank they cut nothing, but
    runtimes offload only what one of them owns."""
    if dp * cp == 1:
        return [(zero, 1) for zero in (0, 1, 2, 3)]
    return [(0, dp), *((zero, shard) for zero in (1, 2, 3) for shard in divisors(dp, most=dp) if shard * cp > 1)]


def _schedules(model: Model, pp: int, names: Sequence[str], bare_ends: bool) -> list[tuple[int, ...]]:
    """(schedule, virtual stages): of looped chunks every number that divides the layers, with `bare_ends` also the layers and one each for
    embedding and head, and powers of two."""
    if pp == 1:
        return [(SCHEDULES.index("1f1b"), 1)]
    even = (model.layer_count, model.layer_count + 2) if bare_ends else (model.layer_count,)
    chunks = [v for v in range(2, even[-1] // pp + 1) if v & (v - 1) == 0 or any(n % (pp * v) == 0 for n in even)]
    whole = [(SCHEDULES.index(name), 2 if name in V_PLACED else 1) for name in names if name not in CHUNKED]
    return whole + [(SCHEDULES.index(name), v) for name in names if name in CHUNKED for v in chunks]


def _restricted(names: tuple[str, ...], options: list[tuple[int, ...]], wishes: Wishes) -> list[tuple[int, ...]]:
    """Options that agree with the fixed words; a fixed value outside the usual ones is taken as it is."""
    said = [name for name in names if name in wishes.fixed_words]
    if not said:
        return options
    row = layout_table([wishes.fixed])
    if "recompute" in said:
        said += [name for name in RECOMPUTE_COLUMNS if name not in said]
    fixed = {name: int(getattr(row, name)[0]) for name in said}
    agreeing = [o for o in options if all(o[names.index(name)] == value for name, value in fixed.items())]
    if agreeing:
        return agreeing
    first = options[0]
    return [tuple(fixed.get(name, first[i]) for i, name in enumerate(names))]


def allowed(table: LayoutTable, forbidden: Sequence[tuple[str, str | None]]) -> BoolArray:
    """Rows without a forbidden word. A kind of recompute (full, selective) forbids every number of layers and set of parts."""
    left = np.ones(len(table), dtype=bool)
    for word, value in forbidden:
        if word == "dp_shard":  # only sharding over fewer ranks than dp is a dp_shard at all
            hybrid = table.dp_shard != table.dp
            left &= ~(hybrid if value is None else hybrid & (table.dp_shard == int(value)))
            continue
        text = value if value is not None else getattr(Layout(), word)
        target = layout_table([parse_layout(f"{word}={text}") if text is not None else Layout()])
        recompute = ("recompute",) if value in RECOMPUTE else RECOMPUTE_COLUMNS
        names = {"stage_layers": ("split",), "recompute": recompute}.get(word, (word,))
        same = np.all([getattr(table, name) == int(getattr(target, name)[0]) for name in names], axis=0)
        without = (table.cp == 1) if word == "cp_kind" else False  # rows with nothing of that kind
        left &= (same if value is None else ~same) | without
    return left
