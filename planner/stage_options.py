"""What stages a cut could have: contents that consecutive layers can have, what each takes on every stage, and what makes it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.layout import V_PLACED, Layout, LayoutTable
from shardplan.costmodel.model import layer_order
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import RULES
from shardplan.costmodel.stage_trials import StageTrials, Trials

FloatArray = NDArray[np.float64]
WEIGHED_AT_ONCE = 1 << 16
"""Stages of which more numbers of recomputed layers than none are weighed without asking whether all fit with none."""
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive stages on one kind of node; a homogeneous cluster is one part."""

    setting: Setting
    """With a cluster of such nodes alone, as large as the whole."""
    trials: StageTrials
    """Of the layouts whose stages are cut."""
    stages: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the search allows of stages."""

    headroom: float
    partial_recompute: bool
    """Layers may be recomputed where a layout without recompute does not fit."""
    by_stage: bool
    """As many as each stage needs; else the same number of every stage."""
    some_recomputed: bool = False
    """One layer at least, also where a layout without recompute fits: the user forbids that."""
    most_cuts: int = 16
    """Of one layout."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The layers of the model in order, and what consecutive ones can hold."""

    kinds: IntArray
    """Kind of each layer."""
    contents: IntArray
    """Different numbers of layers by kind that consecutive layers have, (C, kinds)."""
    pp: int
    chunks: int
    last: int
    """Stage with head and loss."""
    extra: IntArray
    """Layers by kind that the last stage holds besides: prediction modules."""
    bare_ends: bool
    """The first chunk may hold the embedding alone, the last one head and loss alone."""

    @staticmethod
    def of(setting: Setting, layout: Layout) -> Chain:
        """The layers of the model as pipelines like that of `layout` cut them."""
        model, bare = setting.model, setting.runtime.abilities.ends_without_layers and layout.schedule not in V_PLACED
        kinds = np.asarray(layer_order(model), dtype=np.int64)
        least = layout.virtual_stages - bare
        most = len(kinds) - (layout.pp - 1) * layout.virtual_stages + 2 * bare
        code_of = _Codes.of(kinds, len(model.runs))
        codes, lengths = code_of.between(kinds)
        extra = np.zeros(len(model.runs), dtype=np.int64)
        extra[len(model.layers) :] = model.mtp_modules
        return Chain(
            kinds=kinds,
            contents=code_of.contents(np.unique(codes[(lengths >= least) & (lengths <= most)])),
            pp=layout.pp,
            chunks=layout.virtual_stages,
            last=0 if layout.schedule in V_PLACED else layout.pp - 1,
            extra=extra,
            bare_ends=bare,
        )

    def segments(self, contents: IntArray) -> IntArray:
        """Index into `contents`, some of those of the chain in their order, of layers i to j - 1, (layers + 1, layers + 1); -1 where it
        is none of them."""
        code_of = _Codes.of(self.kinds, contents.shape[1])
        known, (codes, lengths) = contents @ code_of.places, code_of.between(self.kinds)
        at = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        return np.where((known[at] == codes) & (lengths >= 0), at, -1)

    def trials(self, stage: IntArray, layers: IntArray) -> Trials:
        """Stages at positions `stage` with `layers` by kind, none of them recomputed."""
        head = stage == self.last
        return Trials(
            stage=stage,
            layers=layers + head[:, None] * self.extra,
            recomputed=np.zeros(len(stage), dtype=np.int64),
            embedding=stage == 0,
            head=head,
        )


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """Numbers of layers by kind as one number, in the same order."""

    sizes: IntArray
    """Numbers of layers of each kind that there are, (kinds,)."""
    places: IntArray
    """Value of one layer of each kind, (kinds,)."""

    @staticmethod
    def of(kinds: IntArray, count: int) -> _Codes:
        """For stretches of layers of these kinds, of `count`."""
        sizes: list[int] = (np.bincount(kinds, minlength=count) + 1).tolist()
        number = np.int64 if prod(sizes) < 1 << 62 else object  # Python's, where there are dozens of kinds
        places = [prod(sizes[at + 1 :]) for at in range(count)]
        return _Codes(sizes=np.asarray(sizes, dtype=number), places=np.asarray(places, dtype=number))

    def between(self, kinds: IntArray) -> tuple[IntArray, IntArray]:
        """(code, layers) between every two positions of the chain, each (layers + 1, layers + 1); no code of any where the second position
        lies before the first."""
        before = np.concatenate([self.places[:0], [0], self.places[kinds].cumsum()])
        position = np.arange(len(before))
        return before - before[:, None], position - position[:, None]

    def contents(self, codes: IntArray) -> IntArray:
        """Layers by kind of C codes, (C, kinds)."""
        return (codes[:, None] // self.places % self.sizes).astype(np.int64)


def within(chain: Chain, on_parts: Sequence[StageTrials], most_peak_s: FloatArray) -> IntArray:
    """Contents that some layout could have on some stage with all stages below `most_peak_s`."""
    count = len(chain.contents)
    plain = Trials(
        stage=np.full(count, chain.pp - 1),
        layers=chain.contents,
        recomputed=np.zeros(count, dtype=np.int64),
        embedding=np.zeros(count, dtype=bool),
        head=np.zeros(count, dtype=bool),
    )
    least = np.min([trials.seconds(plain) for trials in on_parts], axis=0)
    possible, lengths = (least <= most_peak_s[:, None]).any(axis=0), chain.contents.sum(axis=1)
    most = int(lengths[possible].max(initial=0))
    return chain.contents[possible & (lengths >= len(chain.kinds) - (chain.pp - 1) * most)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every content takes on every stage, for N layouts; O = stages * contents, stage by stage."""

    stage: IntArray
    """Position of each option in the pipeline, (O,)."""
    layers: IntArray
    """Layers of each option, prediction modules included, (O,)."""
    plain_s: FloatArray
    """Seconds of a micro-batch with the layers recomputed that the layout itself says, (N, O)."""
    repeating_s: FloatArray
    """Seconds that recomputing one layer more adds, (N, O); 0 where it was not weighed."""
    fewest: IntArray
    """Fewest more layers to recompute that make it fit, (N, O); -1 where nothing does, or it cannot be in time."""
    parameters: FloatArray
    """Parameters a rank holds, (N, O)."""
    idle_s: FloatArray | None = None
    """Of `plain_s`, seconds in which the GPU waits for launches, (N, O); None where it never does, whatever is recomputed."""
    repeating_idle_s: FloatArray | None = None
    """The same of `repeating_s`."""

    @staticmethod
    def of(
        parts: Sequence[Part],
        on_parts: Sequence[StageTrials],
        chain: Chain,
        contents: IntArray,
        recompute: str,
        wanted: Wanted,
        most_peak_s: FloatArray,
    ) -> Options | None:
        """Timed and weighed on the part of each stage; None where no layout holds all layers with all stages below its `most_peak_s`, (N,).
        What cannot be in a cut below that is not weighed: `fewest` says that it does not fit."""
        grid = np.meshgrid(np.arange(chain.pp), np.arange(len(contents)), indexing="ij")
        stage, which = (axis.ravel() for axis in grid)
        trials = chain.trials(stage, contents[which])
        layers = trials.layers.sum(axis=1)
        if recompute == "full":
            trials = replace(trials, recomputed=layers)
        partly = recompute == "none" and wanted.partial_recompute
        of_part = np.searchsorted(np.cumsum([part.stages for part in parts]), stage, side="right")
        plain = np.empty((len(on_parts[0].layouts), len(stage)))
        for at, tried in enumerate(on_parts):
            plain[:, of_part == at] = tried.seconds(trials.take(of_part == at))
        # step by step, each for what the one before leaves: layouts that hold all layers in time, and options that are in time on one
        in_time = plain <= most_peak_s[:, None]
        rows = np.flatnonzero(holds_all(chain, layers, in_time))
        hopeful = in_time[rows].any(axis=0)
        if not len(rows):
            return None
        fewest, full = np.full(plain.shape, -1), plain.copy()
        band = max(memory_band(part.setting.cluster) for part in parts)
        for at, (part, tried) in enumerate(zip(parts, on_parts, strict=True)):
            some = np.flatnonzero(hopeful & (of_part == at))
            if not len(some):
                continue
            own, its = trials.take(some), tried if len(rows) == len(plain) else tried.take(rows)
            usable = part.setting.cluster.gpu.memory_bytes * (1.0 - wanted.headroom) / (1.0 + band)
            fewest[np.ix_(rows, some)] = _fewest(its, own, layers[some] if partly else own.recomputed, usable)
            if partly:
                full[np.ix_(rows, some)] = its.seconds(replace(own, recomputed=layers[some]))
        if partly:
            fewest[(fewest > 0) & ~may_recompute(parts[0].setting, on_parts[0].layouts)[:, None]] = -1
        inner = (stage != 0) & (stage != chain.pp - 1)
        fewest[:, inner & (contents[which].sum(axis=1) < chain.chunks)] = -1
        repeating = (full - plain) / np.maximum(layers, 1)
        fitting = (fewest >= 0) & (plain + fewest * repeating <= most_peak_s[:, None])
        rows = np.flatnonzero(holds_all(chain, layers, fitting))
        if not len(rows):
            return None
        idle, idle_full = np.zeros(plain.shape), np.zeros(plain.shape)
        for at, tried in enumerate(on_parts):
            some = np.flatnonzero(hopeful & (of_part == at))
            if not len(some):
                continue
            own, its = trials.take(some), tried if len(rows) == len(plain) else tried.take(rows)
            idle[np.ix_(rows, some)] = idle_full[np.ix_(rows, some)] = its.idle_seconds(own)
            if partly:
                idle_full[np.ix_(rows, some)] = its.idle_seconds(replace(own, recomputed=layers[some]))
        waits = bool(idle.any() or idle_full.any())
        return Options(
            stage=stage,
            layers=layers,
            plain_s=plain,
            repeating_s=repeating,
            fewest=fewest,
            parameters=on_parts[0].parameters(trials),
            idle_s=idle if waits else None,
            repeating_idle_s=(idle_full - idle) / np.maximum(layers, 1) if waits else None,
        )

    def seconds(self, row: int, depth: int, repeating: tuple[int, int] | None = None) -> tuple[FloatArray, IntArray]:
        """(seconds, more layers recomputed) of every option, (O,): as few as make it fit, or `depth` of each stage where that is not
        -1; of the stage `repeating[0]` at least `repeating[1]`."""
        fewest = self.fewest[row]
        taken = fewest if depth < 0 else np.minimum(depth, self.layers)
        fits = (fewest >= 0) & (taken >= fewest)
        if repeating is not None:
            its, least = self.stage == repeating[0], repeating[1]
            fits &= ~its | (self.layers >= least)
            taken = np.where(its, np.maximum(taken, least), taken)
        return np.where(fits, self.plain_s[row] + taken * self.repeating_s[row], np.inf), taken

    def idle(self, row: int, taken: IntArray) -> FloatArray | None:
        """Of the seconds of every option, (O,), those in which its GPU waits for launches; None where none does."""
        if self.idle_s is None or self.repeating_idle_s is None:
            return None
        return self.idle_s[row] + taken * self.repeating_idle_s[row]

    def least_peak(self, chain: Chain, most_peak_s: FloatArray) -> FloatArray:
        """Seconds, (N,), of the slowest stage below which no cut of the layers gets: with less, stages that are in time and fit hold too
        few layers, or too many, in all; infinite where that takes more than `most_peak_s`."""
        seconds = np.where(self.fewest >= 0, self.plain_s + self.fewest * self.repeating_s, np.inf)
        caps = np.sort(seconds, axis=1)
        low = np.zeros(len(caps), dtype=np.int64)
        high = (caps <= most_peak_s[:, None]).sum(axis=1) - 1
        every = np.arange(len(caps))
        covered = (high >= 0) & self._cover(chain, seconds, caps[every, np.maximum(high, 0)])
        high = np.where(covered, high, low)
        while (low < high).any():
            middle = (low + high) // 2
            enough = self._cover(chain, seconds, caps[every, middle])
            low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
        return np.where(covered, caps[every, high], np.inf)

    def _cover(self, chain: Chain, seconds: FloatArray, most_peak_s: FloatArray) -> NDArray[np.bool_]:
        """Layouts, (N,), whose stages hold all layers if each takes as many as fit and are in time, and no more than all if each takes
        as few."""
        return self.holds_all(chain, seconds <= most_peak_s[:, None])

    def holds_all(self, chain: Chain, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The same, (N,), where options are `good` or not, (N, O)."""
        return holds_all(chain, self.layers, good)


def holds_all(chain: Chain, layers: IntArray, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Layouts, (N,), whose stages hold all layers of the chain if each holds as many as a `good` option, (N, O), and no more than all if
    each holds as few; options have so many `layers`, (O,), prediction modules included."""
    none, own = 10**6, layers.reshape(chain.pp, -1).copy()
    own[chain.last] -= chain.extra.sum()
    good = good.reshape(len(good), chain.pp, -1)
    most = np.where(good, own, -none).max(axis=2).sum(axis=1)
    least = np.where(good, own, none).min(axis=2).sum(axis=1)
    return (most >= len(chain.kinds)) & (least <= len(chain.kinds))


def may_recompute(setting: Setting, layouts: LayoutTable) -> NDArray[np.bool_]:
    """Layouts, (N,), of which no rule about recompute refuses full recompute: some do beside tensor parallelism or some schedules."""
    full = replace(layouts, recompute=np.full(len(layouts), RECOMPUTE.index("full")))
    broken = [rule.broken(setting, full) for rule in RULES if "recompute" in rule.id]
    return ~np.any([np.zeros(len(full), dtype=bool), *broken], axis=0)


def _fewest(tried: StageTrials, trials: Trials, most: IntArray, usable_bytes: float) -> IntArray:
    """Fewest layers to recompute beyond those of `trials`, up to `most` in all, with which each fits, (N, S); -1 where none do.

    From one layer on, each one more saves as much: where that says how many it takes, that number and the one below are weighed; what
    they do not settle is bisected.
    """
    start = trials.recomputed
    if not (most > start).any():
        return np.where(tried.needed_bytes(trials) <= usable_bytes, 0, -1)
    if len(tried.layouts) * len(start) > WEIGHED_AT_ONCE and (tried.needed_bytes(trials) <= usable_bytes).all():
        return np.zeros((len(tried.layouts), len(start)), dtype=np.int64)
    with_none, with_one, with_all = _needed(tried, trials, start, np.minimum(start + 1, most), most)
    found = np.where(with_none <= usable_bytes, 0, -1)
    fitting = (found < 0) & (with_all <= usable_bytes) & (most > start)
    some = np.flatnonzero(fitting.any(axis=0))
    if not len(some):
        return found
    own, first, fitting = trials.take(some), start[some] + 1, fitting[:, some]
    full = np.broadcast_to(most[some], fitting.shape)
    saving = np.maximum(with_one[:, some] - with_all[:, some], 1.0) / np.maximum(full - first, 1)
    guess = first + np.ceil((with_one[:, some] - usable_bytes) / saving - 1e-9).astype(np.int64)
    guess = np.clip(guess, first, full)
    at_guess, below = _needed(tried, own, guess, np.maximum(guess - 1, first))
    enough, less = at_guess <= usable_bytes, (below <= usable_bytes) & (guess > first)
    low = np.where(enough, np.where(less, first - 1, guess - 1), guess)
    high = np.where(enough, np.where(less, guess - 1, guess), full)
    while ((high - low > 1) & fitting).any():
        middle = (low + high) // 2
        enough = tried.needed_bytes(replace(own, recomputed=middle)) <= usable_bytes
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    found[:, some] = np.where(fitting, high - (first - 1), found[:, some])
    return found


def _needed(tried: StageTrials, trials: Trials, *recomputed: IntArray) -> list[FloatArray]:
    """Bytes on the device, (N, S), with each of some numbers of recomputed layers, in one table."""
    count, wide = len(trials.stage), any(one.ndim > 1 for one in recomputed)
    every = trials.take(np.tile(np.arange(count), len(recomputed)))
    numbers = np.concatenate([np.atleast_2d(one) for one in recomputed], axis=1)
    needed = tried.needed_bytes(replace(every, recomputed=numbers if wide else numbers[0]))
    return np.split(needed, len(recomputed), axis=1)
