"""Layer chain to stages: for each layout the cut, and the layers to recompute on each stage, that make its pipeline fastest and fit.

Every stage that a cut could have is timed and weighed once by the cost model (`stage_trials`), embedding, head and loss included, with as
few recomputed layers as make it fit; `chain.best_cut` chooses among all cuts exactly. Where a rank holds several chunks the layers of a
rank are chosen, and its chunks made as equal as they go: exact for models of one kind of layer, others keep the runtime's rule there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimates import MEMORY_BAND
from shardplan.costmodel.layout import V_PLACED, Layout, LayoutTable
from shardplan.costmodel.model import Model, layer_order
from shardplan.costmodel.pace import fill_weight
from shardplan.costmodel.pipeline import split_layers
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import micro_batches
from shardplan.costmodel.stage_trials import StageTrials, Trials
from shardplan.planner.chain import best_cut, bounds_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
FULL, NONE = RECOMPUTE.index("full"), RECOMPUTE.index("none")


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
    most_cuts: int = 16
    """Of one layout."""


def can_cut(model: Model, layout: Layout) -> bool:
    """Whether `cut_stages` chooses among all cuts of such a layout."""
    return layout.pp > 1 and (layout.virtual_stages == 1 or (len(model.runs) == 1 and not model.mtp_modules))


def cut_stages(parts: Sequence[Part], wanted: Wanted, slack_s: FloatArray) -> list[list[Layout]]:
    """The best cuts of each of N layouts that agree in pp, schedule, virtual stages and recompute: that with the fastest pipeline, and
    slower ones whose fullest stage has fewer parameters to exchange and update. None where no cut fits with a step at most `slack_s`,
    (N,), longer than if every stage held 1/pp of everything."""
    layouts, setting = parts[0].trials.layouts, parts[0].setting
    first = layouts.row(0)
    chain = _Chain.of(setting.model, first)
    on_parts = [part.trials for part in parts]
    weights = pipeline_weights(setting, layouts)
    least_s, mean_s = mean_stage_seconds(parts)
    most_peak_s = mean_s + slack_s / np.maximum(weights[:, 0], 1e-9)
    contents = _within(chain, on_parts, most_peak_s)
    if not len(contents):
        return [[] for _ in range(len(layouts))]
    options = _Options.of(parts, on_parts, chain, contents, first.recompute, wanted)
    possible = options.could_cover(chain, most_peak_s)
    if not possible.any():
        return [[] for _ in range(len(layouts))]
    segments = chain.segments(contents)
    most_s = weights[:, 0] * mean_s + weights[:, 1] * chain.pp * least_s + slack_s
    return [
        _cuts(layouts.row(row), chain, segments, options, row, weights[row], wanted, setting, float(most_s[row]))
        if possible[row]
        else []
        for row in range(len(layouts))
    ]


@dataclass(frozen=True, kw_only=True)
class _Chain:
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

    @staticmethod
    def of(model: Model, layout: Layout) -> _Chain:
        kinds = np.asarray(layer_order(model), dtype=np.int64)
        before = _before(kinds, len(model.runs))
        most = len(kinds) - (layout.pp - 1) * layout.virtual_stages
        lengths = range(layout.virtual_stages, most + 1)
        found = np.concatenate([before[n:] - before[:-n] for n in lengths])
        extra = np.zeros(len(model.runs), dtype=np.int64)
        extra[len(model.layers) :] = model.mtp_modules
        return _Chain(
            kinds=kinds,
            contents=np.unique(found, axis=0),
            pp=layout.pp,
            chunks=layout.virtual_stages,
            last=0 if layout.schedule in V_PLACED else layout.pp - 1,
            extra=extra,
        )

    def segments(self, contents: IntArray) -> IntArray:
        """Index into `contents` of layers i to j - 1, (layers + 1, layers + 1); -1 where it is none of them."""
        before = _before(self.kinds, contents.shape[1])
        known = {tuple(row): index for index, row in enumerate(contents.tolist())}
        ends = len(before)
        found = np.full((ends, ends), -1, dtype=np.int64)
        for length in sorted(set(contents.sum(axis=1).tolist())):
            held = (before[length:] - before[:-length]).tolist()
            index = [known.get(tuple(row), -1) for row in held]
            found[np.arange(ends - length), np.arange(length, ends)] = index
        return found

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


def _before(kinds: IntArray, count: int) -> IntArray:
    """Layers of each kind before every position, (layers + 1, kinds)."""
    each = np.eye(count, dtype=np.int64)[kinds]
    return np.concatenate([np.zeros((1, count), dtype=np.int64), each.cumsum(axis=0)])


def mean_stage_seconds(parts: Sequence[Part]) -> tuple[FloatArray, FloatArray]:
    """Seconds of a micro-batch, each (N,), on a stage that holds 1/pp of everything: on the fastest kind of node, and of every stage if
    each holds as much as makes all stages of the `parts` equally long."""
    each = np.stack([part.trials.mean_seconds() for part in parts])
    stages = np.asarray([part.stages for part in parts], dtype=np.float64)
    return each.min(axis=0), stages.sum() / (stages[:, None] / each).sum(axis=0)


def pipeline_weights(setting: Setting, layouts: LayoutTable) -> FloatArray:
    """(peak_weight, sum_weight) of `chain.best_cut` for each layout, (N, 2)."""
    batches = micro_batches(setting, layouts)
    fill = fill_weight(layouts, batches, (layouts.recompute == FULL).astype(np.float64))
    return np.stack([np.maximum(batches - fill, 0.0), fill], axis=1)


def _within(chain: _Chain, on_parts: Sequence[StageTrials], most_peak_s: FloatArray) -> IntArray:
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
class _Options:
    """What every content takes on every stage, for N layouts; O = stages * contents, stage by stage."""

    layers: IntArray
    """Layers of each option, prediction modules included, (O,)."""
    plain_s: FloatArray
    """Seconds of a micro-batch with the layers recomputed that the layout itself says, (N, O)."""
    repeating_s: FloatArray
    """Seconds that recomputing one layer more adds, (N, O)."""
    fewest: IntArray
    """Fewest more layers to recompute that make it fit, (N, O); -1 where nothing does."""
    parameters: FloatArray
    """Parameters a rank holds, (N, O)."""

    @staticmethod
    def of(
        parts: Sequence[Part],
        on_parts: Sequence[StageTrials],
        chain: _Chain,
        contents: IntArray,
        recompute: str,
        wanted: Wanted,
    ) -> _Options:
        """Timed and weighed on the part of each stage."""
        grid = np.meshgrid(np.arange(chain.pp), np.arange(len(contents)), indexing="ij")
        stage, which = (axis.ravel() for axis in grid)
        trials = chain.trials(stage, contents[which])
        layers = trials.layers.sum(axis=1)
        if recompute == "full":
            trials = replace(trials, recomputed=layers)
        partly = recompute == "none" and wanted.partial_recompute
        shape = (len(on_parts[0].layouts), len(stage))
        plain, full, parameters = np.empty(shape), np.empty(shape), on_parts[0].parameters(trials)
        fewest, end = np.empty(shape, dtype=np.int64), 0
        for part, tried in zip(parts, on_parts, strict=True):
            some = (stage >= end) & (stage < end + part.stages)
            end += part.stages
            own = trials.take(some)
            usable = part.setting.cluster.gpu.memory_bytes * (1.0 - wanted.headroom) / (1.0 + MEMORY_BAND)
            plain[:, some] = full[:, some] = tried.seconds(own)
            if partly:
                full[:, some] = tried.seconds(replace(own, recomputed=layers[some]))
            fewest[:, some] = _fewest(tried, own, layers[some] if partly else own.recomputed, usable)
        repeating = (full - plain) / np.maximum(layers, 1)
        return _Options(layers=layers, plain_s=plain, repeating_s=repeating, fewest=fewest, parameters=parameters)

    def seconds(self, row: int, depth: int) -> tuple[FloatArray, IntArray]:
        """(seconds, more layers recomputed) of every option, (O,): as few as make it fit, or `depth` of each stage where that is not
        -1."""
        fewest = self.fewest[row]
        taken = fewest if depth < 0 else np.minimum(depth, self.layers)
        fits = (fewest >= 0) & (taken >= fewest)
        return np.where(fits, self.plain_s[row] + taken * self.repeating_s[row], np.inf), taken

    def could_cover(self, chain: _Chain, most_peak_s: FloatArray) -> NDArray[np.bool_]:
        """Layouts, (N,), whose stages hold all layers if each takes as many as fit and are in time, and no more than all if each takes
        as few."""
        rows, none = len(self.fewest), 10**6
        good = (self.fewest >= 0) & (self.plain_s + self.fewest * self.repeating_s <= most_peak_s[:, None])
        own = self.layers.reshape(chain.pp, -1).copy()
        own[chain.last] -= chain.extra.sum()
        good = good.reshape(rows, chain.pp, -1)
        most = np.where(good, own, -none).max(axis=2).sum(axis=1)
        least = np.where(good, own, none).min(axis=2).sum(axis=1)
        return (most >= len(chain.kinds)) & (least <= len(chain.kinds))


def _fewest(tried: StageTrials, trials: Trials, most: IntArray, usable_bytes: float) -> IntArray:
    """Fewest layers to recompute beyond those of `trials`, up to `most` in all, with which each fits, (N, S); -1 where none do.

    From one layer on, each one more saves as much: where that says how many it takes, that number and the one below are weighed; what
    they do not settle is bisected.
    """
    start = trials.recomputed
    fits_plain = tried.needed_bytes(trials) <= usable_bytes
    found = np.where(fits_plain, 0, -1)
    open_ = np.flatnonzero(~fits_plain.all(axis=0) & (most > start))
    if not len(open_):
        return found
    with_all = tried.needed_bytes(replace(trials.take(open_), recomputed=most[open_]))
    fitting = (with_all <= usable_bytes) & ~fits_plain[:, open_]
    some = fitting.any(axis=0)
    if not some.any():
        return found
    open_, fitting, with_all = open_[some], fitting[:, some], with_all[:, some]
    own, full = trials.take(open_), np.broadcast_to(most[open_], with_all.shape)

    def fits(recomputed: IntArray) -> NDArray[np.bool_]:
        return tried.needed_bytes(replace(own, recomputed=recomputed)) <= usable_bytes

    with_one = tried.needed_bytes(replace(own, recomputed=start[open_] + 1))
    saving = np.maximum(with_one - with_all, 1.0) / np.maximum(full - start[open_] - 1, 1)
    guess = start[open_] + 1 + np.ceil((with_one - usable_bytes) / saving - 1e-9).astype(np.int64)
    guess = np.clip(guess, start[open_] + 1, full)
    enough, less = fits(guess), fits(np.maximum(guess - 1, start[open_] + 1)) & (guess - 1 > start[open_])
    low = np.where(enough, np.where(less, start[open_], guess - 1), guess)
    high = np.where(enough, np.where(less, guess - 1, guess), full)
    while ((high - low > 1) & fitting).any():
        middle = (low + high) // 2
        enough = fits(middle)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    found[:, open_] = np.where(fitting, high - start[open_], found[:, open_])
    return found


def _cuts(
    layout: Layout,
    chain: _Chain,
    segments: IntArray,
    options: _Options,
    row: int,
    weights: FloatArray,
    wanted: Wanted,
    setting: Setting,
    most_s: float,
) -> list[Layout]:
    """The layout with its best cuts, the pipeline of each at most `most_s`: the fastest first, then with ever fewer parameters."""
    found, fewer = list[Layout](), np.inf
    uniform = not wanted.by_stage and options.fewest[row].max() > 0
    depths = range(int(options.fewest[row].max()) + 1) if uniform else (-1,)
    while len(found) < wanted.most_cuts:
        best, chosen, holds = np.inf, None, 0.0
        for depth in depths:
            cut = _fastest(chain, segments, options, row, depth, fewer, weights, most_s)
            if cut is not None and cut.seconds < best:
                best, holds = cut.seconds, cut.parameters
                chosen = _with_stages(layout, chain, cut.counts, cut.repeated, depth, setting)
        if chosen is None:
            break
        found.append(chosen)
        fewer = holds
    return found


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One cut of the layers."""

    counts: tuple[int, ...]
    repeated: list[int]
    """Layers recomputed on each stage beyond those the layout says."""
    seconds: float
    """The slowest stage for all micro-batches, and filling and draining the others."""
    parameters: float
    """Of the stage that holds most."""


def _fastest(
    chain: _Chain,
    segments: IntArray,
    options: _Options,
    row: int,
    depth: int,
    fewer: float,
    weights: FloatArray,
    most_s: float,
) -> _Cut | None:
    """The fastest pipeline whose stages hold `fewer` parameters than that."""
    peak_weight, sum_weight = (float(weight) for weight in weights)
    seconds, taken = options.seconds(row, depth)
    seconds = np.where(options.parameters[row] < fewer, seconds, np.inf)
    seconds = np.where(peak_weight * seconds <= most_s, seconds, np.inf)
    table, taken = seconds.reshape(chain.pp, -1), taken.reshape(chain.pp, -1)
    of_cut = np.where(segments >= 0, table[:, segments], np.inf)
    counts = best_cut(of_cut, peak_weight=peak_weight, sum_weight=sum_weight)
    if counts is None:
        return None
    stages, at = np.arange(chain.pp), segments[bounds_of(counts)]
    times = table[stages, at]
    worth = float(peak_weight * times.max() + sum_weight * times.sum())
    if worth > most_s * (1.0 + 1e-9):
        return None
    return _Cut(
        counts=counts,
        repeated=taken[stages, at].tolist(),
        seconds=worth,
        parameters=float(options.parameters[row].reshape(chain.pp, -1)[stages, at].max()),
    )


def _with_stages(
    layout: Layout, chain: _Chain, counts: tuple[int, ...], repeated: list[int], depth: int, setting: Setting
) -> Layout:
    split = _chunks(counts, chain, layout)
    usual = split_layers(len(chain.kinds), layout.pp * layout.virtual_stages, setting.runtime.stages)
    word = layout.recompute
    if word == "none" and any(repeated):
        held = [n + (int(chain.extra.sum()) if k == chain.last else 0) for k, n in enumerate(counts)]
        if repeated == held:
            word = "full"
        elif depth > 0 or len(set(repeated)) == 1:
            word = f"full:{max(repeated)}"
        else:
            word = f"full:{','.join(map(str, repeated))}"
    return replace(layout, stage_layers=None if split == usual else split, recompute=word)


def _chunks(counts: tuple[int, ...], chain: _Chain, layout: Layout) -> tuple[int, ...]:
    """Layers of each chunk in model order from those of each rank."""
    pp, chunks = chain.pp, chain.chunks
    if chunks == 1:
        return counts
    of_rank = [[n // chunks + (turn < n % chunks) for turn in range(chunks)] for n in counts]
    of_rank[0].reverse()  # the chunk with the embedding is the shorter one
    v_placed = layout.schedule in V_PLACED
    order = [(turn, pp - 1 - at if v_placed and turn % 2 else at) for turn in range(chunks) for at in range(pp)]
    return tuple(of_rank[rank][turn] for turn, rank in order)
