"""Knobs: words that only help some layouts, found where they could make the best one instead of being multiplied into the whole space.

A knob (named parts to recompute, a share of the optimizer off the GPU, activations in host memory, ZeRO++) changes a layout of the space in
a few ways. It starts from the layouts it could help, each with the least a step of it can take whatever this and later knobs do; those
above the best step found so far are left. So nothing that would win is missed, and a space with no use for a knob pays nothing for it.

Recompute comes last: it only adds time, so a layout that fits needs none, and for one that does not the quickest that fits is taken, with
all other words as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, product

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimates import Estimates, joined
from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import OFFLOAD, RATIO_STEPS, Layout, LayoutTable, layout_table
from shardplan.costmodel.layout_join import stacked
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import divisors
from shardplan.planner.at_setting import estimated, unbroken
from shardplan.planner.named_recompute import named_sets, parts_recomputed, with_all_parts
from shardplan.planner.partial_recompute import (
    as_meant,
    only_stands_for_others,
    partly_recomputed,
    recomputes_layers,
    standing_for_others,
    with_all_recomputed,
)
from shardplan.planner.placement import least_step_s, may_take_less
from shardplan.planner.space import Wishes, allowed, asked

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Variant = Mapping[str, int]
"""Columns that a variant sets."""

NONE, SELECTIVE, FULL = (RECOMPUTE.index(word) for word in ("none", "selective", "full"))
CPU = OFFLOAD.index("cpu")
RATIOS = tuple(range(RATIO_STEPS // 10, RATIO_STEPS, RATIO_STEPS // 10))
"""Shares of the optimizer states that are tried: 0.1 to 0.9."""
LAYOUTS_AT_ONCE = 2048
MOST_ROWS = 300_000
"""Variants that one knob estimates at most, the most hopeful layouts first."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One word, or a few that go together."""

    words: tuple[str, ...]
    """The user may fix or forbid them: then the knob is left as it is."""
    variants: tuple[Variant, ...]
    rows: Callable[[LayoutTable], BoolArray]
    """Layouts that it applies to."""
    changes: tuple[str, ...] = ()
    """Time parts that may shrink; all others stay or grow."""
    saves_memory: bool = False
    """It may lower the least memory of the whole space."""


@dataclass(kw_only=True)
class Turned:
    """What was found so far."""

    best_s: float
    """The quickest step that fits."""
    found: list[Estimates] = field(default_factory=list[Estimates])
    """Variants that fit."""
    tried: int = 0
    complete: bool = True
    """All that could win were tried."""


def knobs_of(setting: Setting, wishes: Wishes) -> tuple[Knob, ...]:
    """Those that the runtime has and the user leaves open, in the order they are turned; recompute not among them."""
    runtime = setting.runtime
    whole, partial = runtime.offload.ratio_zero, recomputes_layers(setting, wishes)
    every = (
        Knob(
            words=("offload_activations",),
            variants=tuple(
                {"offload_activations": OFFLOAD.index(tier)} for tier in runtime.offload.activations if tier != "none"
            ),
            rows=lambda t: (t.offload_activations == 0) & ((t.recompute == FULL) | (partial & (t.recompute == NONE))),
            saves_memory=True,
        ),
        Knob(
            words=("offload_ratio",),
            variants=tuple({"offload_ratio": ratio} for ratio in RATIOS) if whole else (),
            rows=lambda t: (t.offload_optimizer == CPU) & one_of(t.zero, whole) & (t.offload_ratio == RATIO_STEPS),
            changes=("offload_exposed_s", "optimizer_s"),
        ),
        Knob(
            words=("hpz", "qwz", "qgz"),
            variants=_zeropp(setting, wishes),
            rows=lambda t: (t.zero == 3) & (t.dp_shard == t.dp) & (t.offload_params == 0) & (t.dp * t.cp > 1),
            changes=("dp_exposed_s",),
        ),
    )
    open_ones = (_without_forbidden(knob, wishes) for knob in every)
    return tuple(knob for knob in open_ones if knob.variants and not any(asked(wishes, word) for word in knob.words))


def _without_forbidden(knob: Knob, wishes: Wishes) -> Knob:
    """The knob without variants that set a forbidden value."""
    mine = tuple((word, value) for word, value in wishes.forbidden if word in knob.words and value is not None)
    if not mine or not knob.variants:
        return knob
    plain = layout_table([Layout()])
    left = [
        one
        for one in knob.variants
        if allowed(replace(plain, **{name: np.asarray([value]) for name, value in one.items()}), mine)[0]
    ]
    return replace(knob, variants=tuple(left))


def named_recompute(setting: Setting, wishes: Wishes) -> tuple[Knob, ...]:
    """The knob of named parts to recompute, where there is one: `turn_knobs` finds the quickest set that fits by itself. They save memory
    beyond the rest where whole layers are not to be recomputed."""
    sets = () if asked(wishes, "recompute", "selective") else named_sets(setting)
    variants = tuple({"recompute": SELECTIVE, "recompute_parts": parts} for parts in sets)
    saving = not recomputes_layers(setting, wishes)
    knob = Knob(words=("recompute",), variants=variants, rows=_recompute_nothing, saves_memory=saving)
    return tuple(one for one in (_without_forbidden(knob, wishes),) if one.variants)


def _recompute_nothing(layouts: LayoutTable) -> BoolArray:
    return (layouts.recompute == NONE) & (layouts.offload_activations == 0)


def _zeropp(setting: Setting, wishes: Wishes) -> tuple[Variant, ...]:
    """A second copy of the parameters among ranks of a node; fewer bits on the wire where the user allows them, as they change results."""
    known = setting.runtime.abilities.zeropp
    copies = divisors(setting.cluster.node.gpus) if "hpz" in known else [1]
    bits = [(0, 1) if word in wishes.allowed and word in known else (0,) for word in ("qwz", "qgz")]
    every = ({"hpz": hpz, "qwz": qwz, "qgz": qgz} for hpz, qwz, qgz in product(copies, *bits))
    return tuple(one for one in every if one != {"hpz": 1, "qwz": 0, "qgz": 0})


def turn_knobs(
    setting: Setting,
    space: Sequence[Estimates],
    wishes: Wishes,
    headroom: float,
    *,
    fastest: float = np.inf,
    least_memory: bool = False,
) -> Turned:
    """Variants of the layouts of the space that fit and may be the fastest, also of `fastest`, seconds of a step of another layout that
    fits, or with `least_memory` the leanest."""
    steps = (float(np.min(one.step_s, where=one.fits(headroom), initial=np.inf)) for one in space)
    state = Turned(best_s=min(fastest, *steps))
    standing = [standing_for_others(batch.layouts, wishes) for batch in space]
    space = [*space, *(estimated(setting, layouts) for layouts in standing if len(layouts))]
    for batch in space:
        _recompute_some(setting, batch, wishes, headroom, state)
    turned, made = knobs_of(setting, wishes), list[Estimates]()
    for at in range(len(turned)):
        every = [
            _turn(setting, batch, turned[at:], wishes, headroom, state, least_memory=least_memory)
            for batch in (*space, *made)
        ]
        more = [one for one in every if one is not None]
        if more:
            made.append(joined(more, stacked([one.layouts for one in more])))
    for batch in made:
        fits = batch.fits(headroom) & ~only_stands_for_others(batch.layouts, wishes)
        state.found.append(batch.take(np.flatnonzero(fits)))
        _recompute_some(setting, batch, wishes, headroom, state)
    state.found = [one for one in state.found if len(one)]
    return state


def least_s_with(
    setting: Setting, estimates: Estimates, wishes: Wishes, later: Sequence[Knob], *, even: bool = False
) -> FloatArray:
    """Seconds that a step of each layout takes at least, whatever `later` knobs do; `even` as in `least_step_s`."""
    least = least_step_s(setting, estimates, wishes, even=even)
    for size in range(1, len(later) + 1):
        for some in combinations(later, size):
            together = np.all([knob.rows(estimates.layouts) for knob in some], axis=0)
            changes = tuple(dict.fromkeys(chain.from_iterable(knob.changes for knob in some)))
            if changes and together.any():
                changed = least_step_s(setting, estimates, wishes, changes, even=even)
                least = np.where(together, np.minimum(least, changed), least)
    return least


def _turn(
    setting: Setting,
    estimates: Estimates,
    turned: Sequence[Knob],
    wishes: Wishes,
    headroom: float,
    state: Turned,
    *,
    least_memory: bool,
) -> Estimates | None:
    """The variants by the first knob that may still be the fastest once the later ones are turned and some layers recomputed."""
    knob, later = turned[0], turned[1:]
    everything = least_memory and knob.saves_memory
    least_s = least_s_with(setting, estimates, wishes, turned)
    usable = knob.rows(estimates.layouts)
    if everything:  # most is saved where every layer is recomputed
        usable &= estimates.layouts.recompute == FULL
    elif not knob.changes:  # it only costs time, but room for what others add
        room = [np.zeros(len(usable), dtype=bool), *(one.rows(estimates.layouts) for one in later)]
        usable = usable & (~estimates.fits(headroom) | np.any(room, axis=0))
    rows = np.flatnonzero(usable & ((least_s < state.best_s) | everything))
    if not knob.saves_memory:
        rows = rows[_may_fit(setting, estimates, rows, wishes, headroom)]
    rows = rows[np.argsort(least_s[rows], kind="stable")]
    spent, kept = 0, list[Estimates]()
    for start in range(0, len(rows), LAYOUTS_AT_ONCE):
        some = rows[start : start + LAYOUTS_AT_ONCE]
        some = some[(least_s[some] < state.best_s) | everything]
        if spent + len(some) * len(knob.variants) > MOST_ROWS:
            state.complete = False
            break
        found = _variants(setting, estimates.layouts.take(some), knob.variants, wishes, headroom)
        spent += len(some) * len(knob.variants)
        if found is None:
            continue
        fits = found.fits(headroom) & ~only_stands_for_others(found.layouts, wishes)
        state.best_s = min(state.best_s, float(np.min(found.step_s, where=fits, initial=np.inf)))
        roomy = fits | (found.layouts.recompute == NONE) | (found.device_peak_bytes <= found.capacity_bytes)
        hopeful = roomy & (least_s_with(setting, found, wishes, later) <= state.best_s)
        kept.append(found.take(np.flatnonzero(hopeful | (fits & everything))))
    state.tried += spent
    kept = [one for one in kept if len(one)]
    return joined(kept, stacked([one.layouts for one in kept])) if kept else None


def _may_fit(
    setting: Setting, estimates: Estimates, rows: NDArray[np.intp], wishes: Wishes, headroom: float
) -> BoolArray:
    """Which of the `rows` GPUs hold as they are or once something is recomputed."""
    found = estimates.fits_gpu(headroom)[rows]
    at = np.flatnonzero(~found & (estimates.layouts.recompute[rows] == NONE))
    if len(at):
        by_layers, by_parts, _ = _room(setting, estimates.layouts.take(rows[at]), wishes, headroom)
        found[at] = by_layers | by_parts
    return found


def _recompute_some(setting: Setting, estimates: Estimates, wishes: Wishes, headroom: float, state: Turned) -> None:
    """Where nothing is recomputed and the layout does not fit, or only stands for others: the fewest layers, and the quickest set of named
    parts, that make it.

    Recompute only adds time, so what takes longer than the best without it, in whatever order of axes, is left.
    """
    may_win = least_step_s(setting, estimates, wishes) < state.best_s
    open_rows = may_win & (estimates.layouts.recompute == NONE) & estimates.fits_below_gpu(headroom)
    has_to = only_stands_for_others(estimates.layouts, wishes)
    rows = np.flatnonzero(open_rows & (has_to | ~estimates.fits_gpu(headroom)))
    if not len(rows):
        return
    by_layers, by_parts, least_bytes = _room(setting, estimates.layouts.take(rows), wishes, headroom)
    state.tried += 2 * len(rows)
    there = np.flatnonzero(by_layers | by_parts)
    some = estimates.take(rows[there])
    quick = may_take_less(setting, some, wishes, state.best_s)
    at = np.flatnonzero(quick & by_layers[there])
    more, tried = partly_recomputed(setting, some.take(at), least_bytes[there[at]], headroom)
    _keep(setting, more, tried, wishes, headroom, state)
    at = np.flatnonzero(quick & by_parts[there])
    more, tried, complete = parts_recomputed(setting, some.take(at), wishes, headroom, best_s=state.best_s)
    _keep(setting, more, tried, wishes, headroom, state)
    state.complete &= complete


def _room(
    setting: Setting, layouts: LayoutTable, wishes: Wishes, headroom: float
) -> tuple[BoolArray, BoolArray, FloatArray]:
    """(layouts without recompute that GPUs hold with all layers recomputed, with all parts, bytes on the device of the first), each (N,).
    Of most it is neither, which settles them before anything is timed."""
    by_layers, least_bytes = with_all_recomputed(setting, layouts, wishes, headroom)
    by_parts, whole = np.zeros(len(layouts), dtype=bool), np.flatnonzero(layouts.offload_activations == 0)
    by_parts[whole] = with_all_parts(setting, layouts.take(whole), wishes, headroom)
    return by_layers, by_parts, least_bytes


def _keep(
    setting: Setting, more: LayoutTable | None, tried: int, wishes: Wishes, headroom: float, state: Turned
) -> None:
    """Add layouts that fit, as far as the user lets them."""
    state.tried += tried
    if more is not None:
        more = more.take(allowed(more, wishes.forbidden))
    if more is not None and len(more):
        found = estimated(setting, more)
        state.found.append(found.take(np.flatnonzero(found.fits(headroom))))
        state.best_s = min(state.best_s, float(np.min(state.found[-1].step_s, initial=np.inf)))


def _variants(
    setting: Setting, layouts: LayoutTable, variants: Sequence[Variant], wishes: Wishes, headroom: float
) -> Estimates | None:
    """Estimates of `variants_of` the layouts; of those that only stand for others, of what has room with every layer recomputed."""
    good = variants_of(setting, layouts, variants, wishes)
    if good is None:
        return None
    stand = np.flatnonzero(only_stands_for_others(good, wishes) & (good.offload_activations > 0))
    if len(stand):
        keep = np.ones(len(good), dtype=bool)
        keep[stand] = with_all_recomputed(setting, good.take(stand), wishes, headroom)[0]
        good = good.take(np.flatnonzero(keep))
    return estimated(setting, good) if len(good) else None


def variants_of(
    setting: Setting, layouts: LayoutTable, variants: Sequence[Variant], wishes: Wishes
) -> LayoutTable | None:
    """Every variant of every layout that breaks no rule, `as_meant`; None where there is none."""
    count = len(layouts)
    if not count:
        return None
    whole = layouts.take(np.tile(np.arange(count), len(variants)))
    names = {name for variant in variants for name in variant}
    table = replace(whole, **{name: np.repeat([variant[name] for variant in variants], count) for name in names})
    good = table.take(np.flatnonzero(unbroken(setting, as_meant(table, wishes))))
    return good if len(good) else None
