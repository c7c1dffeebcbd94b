"""One cut of the layers into stages, and which of them is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import V_PLACED, Layout
from shardplan.costmodel.pipeline import chunk_lengths, layers_of_chunks
from shardplan.costmodel.rule import Setting

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One cut of the layers."""

    counts: tuple[int, ...]
    repeated: list[int]
    """Layers recomputed on each stage beyond those the layout says."""
    depth: int
    """The same of every stage if it has as many; -1: what each needs."""
    seconds: float
    """The slowest stage for all micro-batches, filling and draining the others, and what `Cuttable._penalty_s` adds."""
    parameters: float
    """Of the stage that holds most."""
    idle_s: float
    """Of a micro-batch on the slowest stage, what it waits for launches."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which cuts are asked for."""

    most_s: float
    """Seconds of the pipeline, at most."""
    fewer: float = np.inf
    """Parameters that no stage has as many as."""
    waits_like: float | None = None
    """What the slowest stage waits for launches, seconds of a micro-batch."""
    waits_unlike: tuple[float, ...] = ()
    """What it does not."""
    repeating: tuple[int, int] | None = None
    """(a stage, layers of it that are recomputed at least)."""

    def refuses(self, idle_s: FloatArray) -> NDArray[np.bool_]:
        """Options that are not to be the slowest stage."""
        if self.waits_like is not None:
            return idle_s != self.waits_like
        return np.isin(idle_s, self.waits_unlike)


def counted_in_full(setting: Setting, layout: Layout) -> bool:
    """Whether a pipeline takes what its cut was chosen for: chunks as equal as the layers allow, and no rounds that wait for long ones
    (`pipeline.uneven_chunks_s`), which `chain.best_cut` knows nothing of."""
    pp, chunks, layers = layout.pp, layout.virtual_stages, setting.model.layer_count
    if chunks == 1 or layout.schedule in V_PLACED:
        return True
    split = layers_of_chunks(layout, layers, setting.runtime.stages)
    return _is_as_equal(split, pp, chunks, may_wait=layout.schedule == "interleaved")


@lru_cache(maxsize=4096)
def _is_as_equal(split: tuple[int, ...], pp: int, chunks: int, *, may_wait: bool) -> bool:
    most, least = chunk_lengths(split, pp, chunks)
    waits = may_wait and (pp - 1.0) * (most - least) > most
    return not waits and most <= least_longest(sum(split), chunks) * (1.0 + 1e-9)


def least_longest(layers: int, chunks: int) -> float:
    """What the `most` of `pipeline.chunk_lengths` is at least with so many chunks a rank: layers are whole."""
    return -(-layers // chunks) * chunks / layers


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Cuts of one layout, the fastest pipeline first, then with ever fewer parameters on the fullest stage."""

    layouts: list[Layout]
    more_s: list[float]
    """Seconds that the pipeline of each takes longer than with equal stages."""
    left_s: float
    """The same of cuts that are not among them but may be better, at least; infinite where none is in time."""

    def unsure_s(self, setting: Setting) -> float:
        """Seconds that a pipeline which might be better than its estimate, or is not among the cuts, takes longer at least; infinite where
        there is none."""
        sure = [counted_in_full(setting, layout) for layout in self.layouts]
        return min([self.left_s, *(s for s, known in zip(self.more_s, sure, strict=True) if not known)])
