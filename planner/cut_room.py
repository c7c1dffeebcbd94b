"""Which layouts could fit if their stages were cut in some way: bounds of their memory before any cut is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.estimate import memory_alone
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.planner.knobs import Knob
from shardplan.planner.stage_options import Wanted

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the GPUs of a setting have room for, with what is wanted of stages."""

    setting: Setting
    wanted: Wanted

    def holding(self, bounds: Estimates) -> Estimates:
        """Those whose states and, recomputing every layer, activations fit if they were spread evenly."""
        return bounds.take(np.flatnonzero(self.holds(bounds.layouts))) if len(bounds) else bounds

    def may_hold(self, layouts: LayoutTable, turned: Sequence[Knob]) -> BoolArray:
        """Layouts, (N,), that fit so as they are, or with knobs turned that save memory: most of a space do not, and need no bound of
        their time."""
        if not len(layouts):
            return np.zeros(0, dtype=bool)
        found, saving = self.holds(layouts), [knob for knob in turned if knob.saves_memory]
        together = (some for size in range(1, len(saving) + 1) for some in combinations(saving, size))
        for some in together:
            useful = np.all([knob.rows(layouts) for knob in some], axis=0)
            for variants in product(*(knob.variants for knob in some)):
                at = np.flatnonzero(useful & ~found)
                if len(at):
                    columns = {name: np.full(len(at), value) for words in variants for name, value in words.items()}
                    found[at] = self.holds(replace(layouts.take(at), **columns))
        return found

    def holds(self, layouts: LayoutTable) -> BoolArray:
        """Layouts, (N,), that need no more than there is, however they are cut."""
        usable = self.setting.cluster.gpu.memory_bytes * (1.0 - self.wanted.headroom)
        most = usable / (1.0 + memory_band(self.setting.cluster))
        found = self._mean_bytes(self._recomputing(layouts)) <= most
        at = np.flatnonzero(~found & (layouts.recompute == NONE))
        if self.wanted.partial_recompute and len(at):  # one layer alone needs its input besides where it is run again
            found[at] = self._mean_bytes(layouts.take(at)) <= most
        return found

    def least_bytes(self, layouts: LayoutTable) -> FloatArray:
        """Bytes on the device that each needs at least, (N,), however it is cut."""
        return np.minimum(self._mean_bytes(self._recomputing(layouts)), self._mean_bytes(layouts))

    def _mean_bytes(self, layouts: LayoutTable) -> FloatArray:
        return memory_alone(self.setting, layouts, stages="mean").device_peak_bytes

    def _recomputing(self, layouts: LayoutTable) -> LayoutTable:
        if not self.wanted.partial_recompute:
            return layouts
        return replace(layouts, recompute=np.where(layouts.recompute == NONE, FULL, layouts.recompute))

    def holds_below(self, bounds: Estimates) -> BoolArray:
        """Rows whose states in host memory and on flash fit there if they were spread evenly, with the words as they are: how many
        activations are offloaded depends on how many layers are recomputed."""
        found = bounds.fits_below_gpu(self.wanted.headroom)
        at = np.flatnonzero(~found & (bounds.layouts.offload_activations > 0))
        if len(at):
            states = replace(bounds.layouts.take(at), offload_activations=np.zeros(len(at), dtype=np.int64))
            found[at] = memory_alone(self.setting, states, stages="mean").fits_below_gpu(self.wanted.headroom)
        return found
