"""Layer chain to stages: for each layout the cut, and the layers to recompute on each stage, that make its pipeline fastest and fit.

Every stage that a cut could have is timed and weighed once by the cost model (`stage_trials`), embedding, head and loss included, with as
few recomputed layers as make it fit; `chain.best_cut` chooses among all cuts exactly. Where a rank holds several chunks the layers of a
rank are chosen, and its chunks made as equal as they go: exact for models of one kind of layer where `counted_in_full`, others keep
the runtime's rule there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.estimate import pipeline_weights
from shardplan.costmodel.layout import V_PLACED, Layout, LayoutTable
from shardplan.costmodel.model import Model
from shardplan.costmodel.pipeline import chunk_lengths, split_layers
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.planner.chain import best_cut, bounds_of
from shardplan.planner.stage_options import Chain, Options, Part, Wanted, within

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
FULL, NONE = RECOMPUTE.index("full"), RECOMPUTE.index("none")


def can_cut(model: Model, layout: Layout) -> bool:
    """Whether `cut_stages` chooses among all cuts of such a layout."""
    return layout.pp > 1 and (layout.virtual_stages == 1 or (len(model.runs) == 1 and not model.mtp_modules))


def counted_in_full(setting: Setting, layout: Layout) -> bool:
    """Whether a pipeline takes what its cut was chosen for: chunks as equal as the layers allow, and no rounds that wait for long ones
    (`pipeline.uneven_chunks_s`), which `chain.best_cut` knows nothing of."""
    pp, chunks, layers = layout.pp, layout.virtual_stages, setting.model.layer_count
    if chunks == 1 or layout.schedule in V_PLACED:
        return True
    split = layout.stage_layers or split_layers(layers, pp * chunks, setting.runtime.stages)
    most, least = chunk_lengths(split, pp, chunks)
    waits = layout.schedule == "interleaved" and (pp - 1.0) * (most - least) > most
    return not waits and most <= _least_longest(layers, chunks) * (1.0 + 1e-9)


def _least_longest(layers: int, chunks: int) -> float:
    """What the `most` of `pipeline.chunk_lengths` is at least with so many chunks a rank: layers are whole."""
    return -(-layers // chunks) * chunks / layers


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Cuts of one layout, the fastest pipeline first, then with ever fewer parameters on the fullest stage."""

    layouts: list[Layout]
    more_s: list[float]
    """Seconds that the pipeline of each takes longer than with equal stages."""
    left_s: float
    """The same of cuts with fewer parameters still that are not among them, at least; infinite where none is in time."""

    def unsure_s(self, setting: Setting) -> float:
        """Seconds that a pipeline which might be better than its estimate, or is not among the cuts, takes longer at least; infinite where
        there is none."""
        sure = [counted_in_full(setting, layout) for layout in self.layouts]
        return min([self.left_s, *(s for s, known in zip(self.more_s, sure, strict=True) if not known)])


@dataclass(frozen=True, kw_only=True)
class Cuttable:
    """N layouts that agree in pp, schedule, virtual stages and kind of recompute, with what each stage of theirs could hold."""

    setting: Setting
    layouts: LayoutTable
    wanted: Wanted
    chain: Chain
    segments: IntArray
    options: Options
    weights: FloatArray
    """(peak_weight, sum_weight) of `chain.best_cut`, (N, 2), with bubbles as much longer as those of any whole layers
    (`_least_longest`)."""
    equal_s: FloatArray
    """Seconds of the pipeline if every stage held 1/pp of everything, (N,)."""
    more_s: FloatArray
    """Seconds that the best cut takes longer at least, (N,); infinite where no cut fits."""

    @staticmethod
    def of(parts: Sequence[Part], wanted: Wanted, slack_s: FloatArray) -> Cuttable | None:
        """What stages of pipelines at most `slack_s`, (N,), longer than equal ones could hold; None where no layout has any."""
        layouts, setting = parts[0].trials.layouts, parts[0].setting
        first = layouts.row(0)
        chain = Chain.of(setting, first)
        on_parts = [part.trials for part in parts]
        peak, fill = pipeline_weights(setting, layouts)
        longest = 1.0 if first.schedule in V_PLACED else _least_longest(len(chain.kinds), chain.chunks)
        longer = np.minimum((longest - 1.0) * fill, peak)
        least_s, mean_s = mean_stage_seconds(parts)
        most_peak_s = mean_s + slack_s / np.maximum(peak, 1e-9)
        contents = within(chain, on_parts, most_peak_s)
        if not len(contents):
            return None
        options = Options.of(parts, on_parts, chain, contents, first.recompute, wanted)
        peak_s = options.least_peak(chain, most_peak_s)
        if not np.isfinite(peak_s).any():
            return None
        return Cuttable(
            setting=setting,
            layouts=layouts,
            wanted=wanted,
            chain=chain,
            segments=chain.segments(contents),
            options=options,
            weights=np.stack([peak - longer, fill + longer], axis=1),
            equal_s=peak * mean_s + fill * chain.pp * least_s,
            more_s=np.maximum(peak, 1e-9) * np.maximum(peak_s - mean_s, 0.0),
        )

    def cuts(self, row: int, slack_s: float) -> Cuts:
        """The best cuts of one layout: that with the fastest pipeline, and slower ones whose fullest stage has fewer parameters to
        exchange and update. None where no cut fits with a pipeline at most `slack_s` longer than with equal stages."""
        if self.more_s[row] > slack_s * (1.0 + 1e-9):
            return Cuts(layouts=[], more_s=[], left_s=np.inf)
        return _cuts(
            self.layouts.row(row),
            self.chain,
            self.segments,
            self.options,
            row,
            self.weights[row],
            self.wanted,
            self.setting,
            float(self.equal_s[row]),
            slack_s,
        )


def cut_stages(parts: Sequence[Part], wanted: Wanted, slack_s: FloatArray) -> list[Cuts]:
    """The best cuts (`Cuttable.cuts`) of each of N layouts that agree in pp, schedule, virtual stages and kind of recompute."""
    ready, rows = Cuttable.of(parts, wanted, slack_s), range(len(parts[0].trials.layouts))
    if ready is None:
        return [Cuts(layouts=[], more_s=[], left_s=np.inf) for _ in rows]
    return [ready.cuts(row, float(slack_s[row])) for row in rows]


def mean_stage_seconds(parts: Sequence[Part]) -> tuple[FloatArray, FloatArray]:
    """Seconds of a micro-batch, each (N,), on a stage that holds 1/pp of everything: on the fastest kind of node, and of every stage if
    each holds as much as makes all stages of the `parts` equally long."""
    each = np.stack([part.trials.mean_seconds() for part in parts])
    stages = np.asarray([part.stages for part in parts], dtype=np.float64)
    return each.min(axis=0), stages.sum() / (stages[:, None] / each).sum(axis=0)


def _cuts(
    layout: Layout,
    chain: Chain,
    segments: IntArray,
    options: Options,
    row: int,
    weights: FloatArray,
    wanted: Wanted,
    setting: Setting,
    equal_s: float,
    slack_s: float,
) -> Cuts:
    """The layout with its best cuts, the pipeline of each at most `equal_s` and `slack_s`."""
    found, more_s, fewer, most_s, left_s = list[Layout](), list[float](), np.inf, equal_s + slack_s, np.inf
    least = int(wanted.some_recomputed and layout.recompute == "none")
    most = max(int(options.fewest[row].max()), least)
    uniform = (not wanted.by_stage or chain.chunks > 1) and most > 0
    depths = range(least, most + 1) if uniform else (-1,)
    while True:
        best, chosen, holds = np.inf, None, 0.0
        for depth in depths:
            cut = _fastest(chain, segments, options, row, depth, fewer, weights, min(most_s, best))
            if cut is not None and least and not any(cut.repeated):  # on the stage where one layer costs least
                on_each = (
                    _fastest(chain, segments, options, row, depth, fewer, weights, most_s, stage)
                    for stage in range(chain.pp)
                )
                cut = min(filter(None, on_each), key=_pipeline_s, default=None)
            if cut is not None and cut.seconds < best:
                best, holds, repeated = cut.seconds, cut.parameters, cut.repeated
                chosen = _with_stages(layout, chain, cut.counts, repeated, depth, setting)
        if chosen is None:
            break
        if len(found) == wanted.most_cuts:
            left_s = best - equal_s
            break
        found.append(chosen)
        more_s.append(best - equal_s)
        fewer = holds
    return Cuts(layouts=found, more_s=more_s, left_s=left_s)


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


def _pipeline_s(cut: _Cut) -> float:
    return cut.seconds


def _fastest(
    chain: Chain,
    segments: IntArray,
    options: Options,
    row: int,
    depth: int,
    fewer: float,
    weights: FloatArray,
    most_s: float,
    recomputing: int | None = None,
) -> _Cut | None:
    """The fastest pipeline whose stages hold `fewer` parameters than that; a layer at least of the stage `recomputing` is recomputed."""
    peak_weight, sum_weight = (float(weight) for weight in weights)
    seconds, taken = options.seconds(row, depth, recomputing)
    seconds = np.where(options.parameters[row] < fewer, seconds, np.inf)
    seconds = np.where(seconds <= most_s / max(peak_weight, 1e-9), seconds, np.inf)
    if not options.holds_all(chain, np.isfinite(seconds)[None])[0]:
        return None
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
    layout: Layout, chain: Chain, counts: tuple[int, ...], repeated: list[int], depth: int, setting: Setting
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


def _chunks(counts: tuple[int, ...], chain: Chain, layout: Layout) -> tuple[int, ...]:
    """Layers of each chunk in model order from those of each rank."""
    pp, chunks = chain.pp, chain.chunks
    if chunks == 1:
        return counts
    of_rank = [[n // chunks + (turn < n % chunks) for turn in range(chunks)] for n in counts]
    of_rank[0].reverse()  # the chunk with the embedding is the shorter one
    v_placed = layout.schedule in V_PLACED
    order = [(turn, pp - 1 - at if v_placed and turn % 2 else at) for turn in range(chunks) for at in range(pp)]
    return tuple(of_rank[rank][turn] for turn, rank in order)
