"""Chunks of pipelines that `stages.py` cannot cut exactly: ranks with several chunks, of models of several kinds of layer.

They start as even as whole layers allow, by what a chunk takes (`chain.best_cut`), and as the runtime splits them. Then one layer at a
time goes to another chunk, or one more or less is recomputed, as long as that makes the step shorter, or what does not fit need less.
Nothing is proved: a better cut may be two such steps away. The best of the cuts that are exact is `nudged` in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, permutations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import V_PLACED, Layout, LayoutTable, layout_table
from shardplan.costmodel.model import layer_order
from shardplan.costmodel.pipeline import layers_of_chunks
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.stage_trials import StageTrials, Trials
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.chain import best_cut
from shardplan.planner.space import Wishes, allowed
from shardplan.planner.stage_options import Wanted

FloatArray = NDArray[np.float64]
MOST_AROUND = 300
"""Pairs of chunks up to which a layer is moved between any two."""
NEAR = 1.1
"""Of the fastest step, and of the memory of a GPU, within which a start is worth moving from."""
MOST_STEPS = 48
"""Layers moved, or recomputed more or less, of one layout."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A layout, and how it compares."""

    layout: Layout
    worth: tuple[float, float]
    """(how much it needs of the memory there is, 0 where it fits; seconds of its step): less is better."""


def climbed(
    setting: Setting, layouts: LayoutTable, wishes: Wishes, wanted: Wanted, fastest: float
) -> tuple[list[Layout], int]:
    """(pipelines with several chunks a rank, their chunks moved layer by layer from good starts that are NEAR the `fastest` step known and
    the memory there is, and that no rule refuses; layouts estimated for it)."""
    starts = [
        list(_recomputing(setting, layout, start, wanted))
        for layout, even in zip(map(layouts.row, range(len(layouts))), even_chunks(setting, layouts), strict=True)
        for start in _starts(setting, layout, even)
    ]
    known, looked_at = _judged(setting, starts, wishes, wanted)
    best = [min((known[one] for one in some if one in known), key=_worth, default=None) for some in starts]
    most = NEAR * setting.cluster.gpu.memory_bytes, NEAR * fastest
    moving = [
        one for one in best if one and (np.isinf(fastest) or (one.worth[0] <= most[0] and one.worth[1] <= most[1]))
    ]
    found, more = _moved(setting, moving, wishes, wanted)
    return found, looked_at + more


def nudged(setting: Setting, layout: Layout, wishes: Wishes, wanted: Wanted) -> tuple[list[Layout], int]:
    """(what the pipeline `layout`, which no rule refuses, becomes layer by layer; layouts estimated for it)."""
    known, looked_at = _judged(setting, [[layout]], wishes, wanted)
    found, more = _moved(setting, list(known.values()), wishes, wanted)
    return found, looked_at + more


def _moved(setting: Setting, moving: list[_Known], wishes: Wishes, wanted: Wanted) -> tuple[list[Layout], int]:
    """(what each becomes once no step from it is better; layouts estimated for it)."""
    found, looked_at = list[_Known](), 0
    for _ in range(MOST_STEPS):
        if not moving:
            break
        around = [list(_around(setting, one.layout, wanted)) for one in moving]
        known, more = _judged(setting, around, wishes, wanted)
        looked_at += more
        still = list[_Known]()
        for one, neighbours in zip(moving, around, strict=True):
            first = min((known[other] for other in neighbours if other in known), key=_worth, default=one)
            (still if first.worth < one.worth else found).append(first if first.worth < one.worth else one)
        moving = still
    return [one.layout for one in (*found, *moving)], looked_at


def even_chunks(setting: Setting, layouts: LayoutTable) -> list[tuple[int, ...]]:
    """Layers of each chunk of N layouts, in model order, so that the slowest chunk takes as little as it can."""
    model, kinds = setting.model, np.asarray(layer_order(setting.model), dtype=np.int64)
    count = len(model.runs)
    units = np.zeros((count + 2, count), dtype=np.int64)
    units[:count] = np.eye(count, dtype=np.int64)
    ends = np.arange(count + 2)
    trials = Trials(
        stage=np.zeros(count + 2, dtype=np.int64),
        layers=units,
        recomputed=np.zeros(count + 2, dtype=np.int64),
        embedding=ends == count,
        head=ends == count + 1,
    )
    found = list[tuple[int, ...]]()
    for seconds, layout in zip(
        StageTrials.of(setting, layouts).seconds(trials), map(layouts.row, range(len(layouts))), strict=True
    ):
        chunks, before = layout.pp * layout.virtual_stages, np.concatenate([[0.0], seconds[kinds].cumsum()])
        longest = len(kinds) - chunks + 2
        held = np.arange(len(before)) - np.arange(len(before))[:, None]
        each = before - before[:, None]
        each = np.where((held >= 1) & (held <= longest), each, np.inf)
        table = np.repeat(each[None], chunks, axis=0)
        if _has_bare_ends(setting, layout):
            table[[0, -1]] = np.where((held == 0)[None], 0.0, table[[0, -1]])
        table[0] += seconds[count]
        table[-1] += seconds[count + 1] + model.mtp_modules * seconds[count - 1]
        cut = best_cut(table, peak_weight=1.0, sum_weight=0.0)
        found.append(cut or layers_of_chunks(layout, len(kinds), setting.runtime.stages))
    return found


def _starts(setting: Setting, layout: Layout, even: tuple[int, ...]) -> list[tuple[int, ...] | None]:
    """Cuts to start from: the runtime's, the `even` one, and with bare ends."""
    found = [None, even]
    inner, layers = layout.pp * layout.virtual_stages - 2, setting.model.layer_count
    if _has_bare_ends(setting, layout) and 0 < inner <= layers:
        each, more = divmod(layers, inner)
        found.append((0, *(each + (at < more) for at in range(inner)), 0))
    return list(dict.fromkeys(found))


def _recomputing(setting: Setting, layout: Layout, cut: tuple[int, ...] | None, wanted: Wanted) -> Iterator[Layout]:
    """The layout with that cut and every number of recomputed layers that it stands for."""
    one = replace(layout, stage_layers=cut)
    yield one
    if layout.recompute == "none" and wanted.partial_recompute:
        most = -(-setting.model.layer_count // layout.pp) + layout.virtual_stages
        yield from (replace(one, recompute=f"full:{count}") for count in range(1, most + 1))


def _around(setting: Setting, layout: Layout, wanted: Wanted) -> Iterator[Layout]:
    """One layer moved to any chunk (of many: to the next, or to one of a neighbour's), or one recomputed more or less."""
    split = layers_of_chunks(layout, setting.model.layer_count, setting.runtime.stages)
    bare = {0, len(split) - 1} if _has_bare_ends(setting, layout) else set[int]()
    everywhere = len(split) ** 2 <= MOST_AROUND
    for giving, taking in permutations(range(len(split)), 2):
        near = abs(giving - taking) in (1, layout.pp)
        if split[giving] > (giving not in bare) and (near or everywhere):
            moved = list(split)
            moved[giving] -= 1
            moved[taking] += 1
            yield replace(layout, stage_layers=tuple(moved))
    word, _, number = layout.recompute.partition(":")
    if wanted.partial_recompute and (layout.recompute == "none" or (word == "full" and number.isdigit())):
        count = int(number or 0)
        yield replace(layout, recompute=f"full:{count + 1}")
        if count:
            yield replace(layout, recompute=f"full:{count - 1}" if count > 1 else "none")


def _has_bare_ends(setting: Setting, layout: Layout) -> bool:
    """Whether the first chunk may hold the embedding alone, and the last the head."""
    return setting.runtime.abilities.ends_without_layers and layout.schedule not in V_PLACED


def _judged(
    setting: Setting, layouts: Iterable[Sequence[Layout]], wishes: Wishes, wanted: Wanted
) -> tuple[dict[Layout, _Known], int]:
    """(those that no rule refuses; how many are estimated)."""
    table = layout_table(list(dict.fromkeys(chain.from_iterable(layouts))))
    table = table.take(unbroken(setting, table) & allowed(table, wishes.forbidden))
    if not len(table):
        return {}, 0
    found = estimated(setting, table)
    fits, peak, step_s = found.fits(wanted.headroom), found.device_peak_bytes, found.step_s
    rows = map(table.row, range(len(table)))
    worth = zip(np.where(fits, 0.0, peak).tolist(), step_s.tolist(), strict=True)
    return {row: _Known(layout=row, worth=its) for row, its in zip(rows, worth, strict=True)}, len(table)


def _worth(known: _Known) -> tuple[float, float]:
    return known.worth
