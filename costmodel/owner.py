"""Which stage of a pipeline holds most parameters: all others wait for it to exchange and update them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import Job
from shardplan.costmodel.memory import frozen_element_bytes
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import StageParameters, StageRows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The stage with most parameters, (K,): it exchanges and updates most."""

    parameters: FloatArray
    trained: FloatArray
    """Parameters with gradients: all of them, or those of adapters."""
    gathered: FloatArray
    """Parameters as they are gathered ahead of layers, in 16-bit equivalents."""
    units: FloatArray
    """Groups of parameters that are exchanged together: layers, embedding, head."""
    kept_share: FloatArray
    """Share of the parameters that stays gathered after the forward under ZeRO-3."""
    experts: FloatArray | None = None
    """Those of `parameters` in experts that tokens are dispatched to; None where there are none."""

    def take(self, rows: IntArray) -> Owner:
        """The rows at `rows`."""
        return Owner(
            parameters=self.parameters.take(rows),
            trained=self.trained.take(rows),
            gathered=self.gathered.take(rows),
            units=self.units.take(rows),
            kept_share=self.kept_share.take(rows),
            experts=None if self.experts is None else self.experts.take(rows),
        )


def heaviest_owner(parameters: StageParameters, stages: StageRows, job: Job, runtime: Runtime) -> Owner:
    """The stage with most parameters of each key."""
    heaviest = parameters.stage.argmax(axis=1)[:, None]
    units = stages.layers.sum(axis=2) + stages.embedding + stages.head
    adapters = parameters.stage if parameters.adapters is None else parameters.adapters
    owned, root, groups, trained = (
        np.take_along_axis(values, heaviest, axis=1)[:, 0]
        for values in (parameters.stage, parameters.root, units, adapters)
    )
    kept_share = root / owned if runtime.working_set.root_stays_gathered else np.zeros_like(owned)
    of_layers, usual = frozen_element_bytes(runtime, job)
    gathered = owned if of_layers == usual else root + (owned - root) * of_layers / usual
    spread = parameters.experts
    return Owner(
        parameters=owned,
        trained=trained,
        gathered=gathered,
        units=groups,
        kept_share=kept_share,
        experts=None if spread is None else np.take_along_axis(spread, heaviest, axis=1)[:, 0],
    )
