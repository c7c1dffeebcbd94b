"""One cut of the layers into stages, and which of them is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
