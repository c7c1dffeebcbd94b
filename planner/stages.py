"""Layer chain to stages: for each layout the cut, and the layers to recompute on each stage, that make its pipeline fastest and fit.

Every stage that a cut could have is timed and weighed once by the cost model (`stage_trials`), embedding, head and loss included, with as
few recomputed layers as make it fit; `chain.best_cut` chooses among all cuts exactly. Where a rank holds several chunks the layers of a
rank are chosen, and its chunks made as equal as they go: exact for models of one kind of layer where `counted_in_full`, others keep
the runtime's rule there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import V_PLACED, Layout, LayoutTable
from shardplan.costmodel.model import Model
from shardplan.costmodel.pace import LEAST_PEAK_WEIGHT
from shardplan.costmodel.pipeline import split_layers
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import micro_batches
from shardplan.planner.chain import AS_LONG, best_cut, bounds_of, every_cut, slowest
from shardplan.planner.cut import Asked, Cut, Cuts, least_longest
from shardplan.planner.cut_bounds import waiting
from shardplan.planner.even_stages import Even
from shardplan.planner.stage_options import Chain, Options, Part, Wanted, within

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Written = tuple[list[tuple[int, ...]], IntArray | None]
MOST_WAITS = 8
"""Different times that slowest stages wait for launches of which the best cuts of a layout are written out."""
MOST_WRITTEN_OUT = 256
"""Cuts of a layout that are all written out where its micro-batches are too few for the fastest pipeline to be the fastest step."""


def can_cut(model: Model, layout: Layout) -> bool:
    """Whether `Cuttable` chooses among all cuts of such a layout."""
    return layout.pp > 1 and (layout.virtual_stages == 1 or (len(model.runs) == 1 and not model.mtp_modules))


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
    (`cut.least_longest`)."""
    equal_s: FloatArray
    """Seconds of the pipeline if every stage held 1/pp of everything, (N,)."""
    waits_s: FloatArray | None
    """(what a step waits for links if every stage held that, what of it may hide behind launches), (N, 2); None where the bounds of the
    layouts leave that out."""
    more_s: FloatArray
    """Seconds that the best cut takes longer at least, (N,); infinite where no cut fits."""
    least_peak_s: FloatArray
    """Seconds of a micro-batch on the slowest stage, (N,), at least."""
    whole_s: FloatArray
    """The same of all stages together."""
    batches: FloatArray
    """Micro-batches of a step, (N,)."""
    written_out: dict[bytes, Written] = field(default_factory=dict[bytes, "Written"], compare=False)
    """What `_every_cut` knows."""

    @staticmethod
    def of(
        parts: Sequence[Part],
        wanted: Wanted,
        slack_s: FloatArray,
        waits_s: FloatArray | None = None,
        even: Even | None = None,
    ) -> Cuttable | None:
        """What stages of pipelines at most `slack_s`, (N,), longer than equal ones could hold; None where no layout has any.
        `even`, those equal ones, is computed where it is not known."""
        layouts, setting = parts[0].trials.layouts, parts[0].setting
        first = layouts.row(0)
        chain = Chain.of(setting, first)
        on_parts = [part.trials for part in parts]
        even = even or Even.of(parts)
        peak, fill, least_s, mean_s = even.peak, even.fill, even.least_s, even.mean_s
        longest = 1.0 if first.schedule in V_PLACED else least_longest(len(chain.kinds), chain.chunks)
        longer = np.minimum((longest - 1.0) * fill, peak)
        most_peak_s = mean_s + slack_s / np.maximum(peak, 1e-9)
        contents = within(chain, on_parts, most_peak_s)
        if not len(contents):
            return None
        options = Options.of(parts, on_parts, chain, contents, first.recompute, wanted, most_peak_s)
        if options is None:
            return None
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
            waits_s=waits_s,
            more_s=np.maximum(peak, 1e-9) * np.maximum(peak_s - mean_s, 0.0),
            least_peak_s=peak_s,
            whole_s=chain.pp * least_s,
            batches=micro_batches(setting, layouts),
        )

    def cuts(self, row: int, slack_s: float) -> Cuts:
        """The best cuts of one layout: that with the fastest pipeline, and slower ones whose fullest stage has fewer parameters to
        exchange and update. None where no cut fits with a pipeline at most `slack_s` longer than with equal stages."""
        if self.more_s[row] > slack_s * (1.0 + 1e-9):
            return Cuts(layouts=[], more_s=[], left_s=np.inf)
        wanted, layout = self.wanted, self.layouts.row(row)
        least = int(wanted.some_recomputed and layout.recompute == "none")
        most = max(int(self.options.fewest[row].max()), least)
        each_its_own = wanted.by_stage and self.chain.chunks == 1
        depths = range(-1, 0) if each_its_own or most == 0 else range(least, most + 1)
        most_s = float(self.equal_s[row]) + slack_s
        few = bool(self.weights[row, 0] < LEAST_PEAK_WEIGHT)
        more = layout.recompute == "none" and wanted.partial_recompute
        found, left_s = self._written_out(row, depths, least, most_s, more=more) if few else None, np.inf
        if found is None:
            hiding_s = self._repeating_s(row) if more else np.inf
            more &= hiding_s <= most_s
            if more and not each_its_own:
                depths = range(least, int(self.options.layers.max()) + 1)
                every = [self._fastest_ones(row, range(depth, depth + 1), least, most_s) for depth in depths]
            else:
                every = [self._fastest_ones(row, depths, least, most_s)]
            if more and each_its_own:
                repeating = self._repeating_ones(row, most_s)
                every += [([], hiding_s)] if repeating is None else repeating
            found, left_s = [cut for some, _ in every for cut in some], min(left for _, left in every)
            found.sort(key=_pipeline_s)
            if found and (few or (self.waits_s is None and self.options.idle_s is not None)):
                left_s = min(found[0].seconds, float(self.equal_s[row]))
        best = {
            (cut.counts, tuple(cut.repeated)): cut for cut in sorted(found, key=_pipeline_s) if cut.seconds <= most_s
        }
        return Cuts(
            layouts=[_with_stages(layout, self.chain, cut, self.setting) for cut in best.values()],
            more_s=[cut.seconds - float(self.equal_s[row]) for cut in best.values()],
            left_s=left_s - float(self.equal_s[row]),
        )

    def _repeating_ones(self, row: int, most_s: float) -> list[tuple[list[Cut], float]] | None:
        """`_fastest_ones` with every number of recomputed layers of every one stage, others as few as they need; None where those are more
        than MOST_WRITTEN_OUT."""
        longest = int(self.options.layers.max())
        if self.chain.pp * longest > MOST_WRITTEN_OUT:
            return None
        return [
            self._fastest_ones(row, range(-1, 0), 0, most_s, (stage, count))
            for stage in range(self.chain.pp)
            for count in range(1, longest + 1)
        ]

    def _fastest_ones(
        self, row: int, depths: range, least: int, most_s: float, repeating: tuple[int, int] | None = None
    ) -> tuple[list[Cut], float]:
        """(the fastest pipeline, and slower ones with ever fewer parameters on the fullest stage, `most_cuts` of them; seconds of the
        next); each takes `most_s` at most, and recomputes `least` layers or more, with `repeating` as `Options.seconds` has it.

        The same again for slowest stages that wait for launches as long as none of the others': more of their exchanges may hide.
        """
        found, known, left_s = list[Cut](), list[float](), np.inf
        while True:
            first = self._fastest_of(
                row, depths, least, Asked(most_s=most_s, waits_unlike=tuple(known), repeating=repeating)
            )
            if first is None or len(known) == MOST_WAITS:
                left_s = left_s if first is None else min(left_s, first.seconds)
                return sorted(found, key=_pipeline_s), left_s
            best: Cut | None = first
            count = 0
            while best is not None and count < self.wanted.most_cuts:
                found.append(best)
                count += 1
                asked = Asked(most_s=most_s, fewer=best.parameters, waits_like=first.idle_s, repeating=repeating)
                best = self._fastest_of(row, depths, least, asked)
            left_s = left_s if best is None else min(left_s, best.seconds)
            known.append(first.idle_s)

    def _fastest_of(self, row: int, depths: range, least: int, asked: Asked) -> Cut | None:
        """The fastest pipeline with any of the numbers of recomputed layers, `least` layers or more in all."""
        best: Cut | None = None
        for depth in depths:
            its = asked if best is None else replace(asked, most_s=best.seconds)
            cut = self._fastest(row, depth, its)
            if cut is not None and least and not any(cut.repeated):  # on the stage where one layer costs least
                stages = range(self.chain.pp)
                on_each = (self._fastest(row, depth, replace(its, repeating=(stage, 1))) for stage in stages)
                cut = min(filter(None, on_each), key=_pipeline_s, default=None)
            if cut is not None and (best is None or cut.seconds < best.seconds):
                best = cut
        return best

    def _fastest(self, row: int, depth: int, asked: Asked) -> Cut | None:
        """The fastest pipeline with so many recomputed layers of each stage."""
        options, most_s = self.options, asked.most_s
        seconds, taken = options.seconds(row, depth, asked.repeating)
        seconds = np.where(options.parameters[row] < asked.fewer, seconds, np.inf)
        seconds = np.where(seconds <= most_s / max(float(self.weights[row, 0]), 1e-9), seconds, np.inf)
        penalty_s, idle_s = self._penalty_s(row, taken), options.idle(row, taken)
        if penalty_s is not None and idle_s is not None:
            penalty_s = np.where(asked.refuses(idle_s), np.inf, penalty_s)
        elif asked.waits_unlike:
            return None
        counts = self._best_cut(row, seconds, penalty_s)
        cut = None if counts is None else self._cut(row, depth, counts, seconds, taken, penalty_s)
        return cut if cut is not None and np.isfinite(cut.seconds) and cut.seconds <= most_s * (1.0 + 1e-9) else None

    def _repeating_s(self, row: int) -> float:
        """Seconds of a pipeline, at least, whose slowest stage recomputes more than it needs to fit, and so waits longer for launches,
        behind which exchanges hide; infinite where none does."""
        options, (peak_weight, sum_weight) = self.options, self.weights[row].tolist()
        if options.repeating_idle_s is None or not (options.repeating_idle_s[row] > 0).any():
            return np.inf
        fewest, found = options.fewest[row], np.inf
        for count in range(1, int(options.layers.max()) + 1):
            taken = np.minimum(count, options.layers)
            penalty_s, more_s = self._penalty_s(row, taken), taken * options.repeating_s[row]
            if penalty_s is None:
                break
            seconds = options.plain_s[row] + more_s
            least_s = peak_weight * seconds + sum_weight * (float(self.whole_s[row]) + more_s) + penalty_s
            slowest_one = seconds >= float(self.least_peak_s[row]) * (1.0 - AS_LONG)
            found = min(found, float(least_s[slowest_one & (fewest >= 0) & (taken > fewest)].min(initial=np.inf)))
        return found

    def _best_cut(self, row: int, seconds: FloatArray, penalty_s: FloatArray | None) -> tuple[int, ...] | None:
        """`chain.best_cut` of options that take so many `seconds`, (O,)."""
        if not self.options.holds_all(self.chain, np.isfinite(seconds)[None])[0]:
            return None
        peak_weight, sum_weight = self.weights[row].tolist()
        return best_cut(
            self._of_cuts(seconds, np.inf),
            peak_weight=peak_weight,
            sum_weight=sum_weight,
            penalty_s=None if penalty_s is None else self._of_cuts(penalty_s, 0.0),
        )

    def _of_cuts(self, of_options: FloatArray, otherwise: float) -> FloatArray:
        """A figure of each option, (O,), as one of each stage with layers i to j - 1, (pp, layers + 1, layers + 1)."""
        table = of_options.reshape(self.chain.pp, -1)
        return np.where(self.segments >= 0, table[:, self.segments], otherwise)

    def _cut(
        self,
        row: int,
        depth: int,
        counts: tuple[int, ...],
        seconds: FloatArray,
        taken: IntArray,
        penalty_s: FloatArray | None,
    ) -> Cut:
        """The cut with so many layers of each stage, where options take so many `seconds`."""
        pp, idle_s, stages = self.chain.pp, self.options.idle(row, taken), np.arange(self.chain.pp)
        at = self.segments[bounds_of(counts)]
        worth, worst = self._worth_s(row, at[None], seconds, penalty_s)
        return Cut(
            counts=counts,
            repeated=taken.reshape(pp, -1)[stages, at].tolist(),
            depth=depth,
            seconds=float(worth[0]),
            parameters=float(self.options.parameters[row].reshape(pp, -1)[stages, at].max()),
            idle_s=0.0 if idle_s is None else float(idle_s.reshape(pp, -1)[worst[0], at[worst[0]]]),
        )

    def _worth_s(
        self, row: int, at: IntArray, seconds: FloatArray, penalty_s: FloatArray | None
    ) -> tuple[FloatArray, IntArray]:
        """(`Cut.seconds`, slowest stage) of cuts whose stages are the options `at`, (C, pp), each (C,)."""
        pp, (peak_weight, sum_weight) = self.chain.pp, self.weights[row].tolist()
        times = seconds.reshape(pp, -1)[np.arange(pp), at]
        penalties = np.zeros_like(times) if penalty_s is None else penalty_s.reshape(pp, -1)[np.arange(pp), at]
        worst, cuts = slowest(times, penalties), np.arange(len(at))
        return peak_weight * times.max(axis=1) + sum_weight * times.sum(axis=1) + penalties[cuts, worst], worst

    def _penalty_s(self, row: int, taken: IntArray) -> FloatArray | None:
        """Seconds of pipeline, (O,), that a step with each option as its slowest stage takes beyond its bound and its pipeline: of what it
        waits for links less hides behind launches than if that stage had all layers. None where nothing does."""
        idle_s = self.options.idle(row, taken)
        if idle_s is None or self.waits_s is None or not self.waits_s[row, 1]:
            return None
        (waits_s, most_s), batches = self.waits_s[row].tolist(), float(self.batches[row])
        return waiting(self.weights[row, 0]) * np.maximum(most_s - np.minimum(batches * idle_s, waits_s), 0.0)

    def _written_out(self, row: int, depths: range, least: int, most_s: float, *, more: bool) -> list[Cut] | None:
        """All cuts that fit and take `most_s` at most, each with as few recomputed layers as make it, `least` or more, on any stage, and
        with `more` of any one stage (of all, where they recompute as many); None where there are more than MOST_WRITTEN_OUT."""
        fewest, options, pp = self.options.fewest[row], self.options, self.chain.pp
        every, at = self._every_cut(fewest >= 0)
        if at is None:
            return None
        longest = int(options.layers.max()) if more else least
        found = list[Cut]()
        needed = np.maximum(fewest.reshape(pp, -1)[np.arange(pp), at].max(axis=1, initial=0), least)
        asked: list[tuple[int, tuple[int, int] | None, NDArray[np.bool_]]]
        if depths.start < 0 and self.wanted.by_stage and self.chain.chunks == 1:
            on_each = [(stage, count) for stage in range(pp) for count in range(1, longest + 1)]
            asked = [(-1, None, (needed > least) | (least == 0)), *((-1, one, needed >= 0) for one in on_each)]
        else:
            deepest = max(int(needed.max(initial=0)), longest)
            asked = [
                (depth, None, needed <= depth if depth <= longest else needed == depth)
                for depth in range(least, deepest + 1)
            ]
        for depth, repeating, which in asked:
            seconds, taken = options.seconds(row, depth, repeating)
            penalty_s, of = self._penalty_s(row, taken), np.flatnonzero(which)
            worth, _ = self._worth_s(row, at[of], seconds, penalty_s)
            found += [
                self._cut(row, depth, every[int(one)], seconds, taken, penalty_s)
                for one in of[np.isfinite(worth) & (worth <= most_s)]
            ]
        return found

    def _every_cut(self, possible: NDArray[np.bool_]) -> Written:
        """(layers of each stage of all cuts that options allow, option of each stage, (C, pp)); None where they are too many."""
        key = np.packbits(possible).tobytes()
        if key not in self.written_out:
            every = every_cut(self._of_cuts(possible.astype(np.float64), 0.0) > 0, MOST_WRITTEN_OUT)
            at = None
            if every is not None:
                at = np.asarray([self.segments[bounds_of(counts)] for counts in every], dtype=np.int64)
                at = at.reshape(len(every), self.chain.pp)
            self.written_out[key] = every or [], at
        return self.written_out[key]


def _pipeline_s(cut: Cut) -> float:
    return cut.seconds


def _with_stages(layout: Layout, chain: Chain, cut: Cut, setting: Setting) -> Layout:
    counts, repeated = cut.counts, cut.repeated
    split = _chunks(counts, chain, layout)
    usual = split_layers(len(chain.kinds), layout.pp * layout.virtual_stages, setting.runtime.stages)
    word = layout.recompute
    if word == "none" and any(repeated):
        held = [n + (int(chain.extra.sum()) if k == chain.last else 0) for k, n in enumerate(counts)]
        if repeated == held:
            word = "full"
        elif cut.depth > 0 or len(set(repeated)) == 1:
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
