"""Step time of N layouts by part: the slowest stage sets the pace, the others fill and drain, the rest is added where exposed.

What the step of a row is made of is computed on keys (`row_keys.RowKeys`): `PacedTimes` on those of its pace, `HeldTimes` on those of
its states. `StepTime` gathers both and lets exchanges hide behind compute, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import collective_s
from shardplan.costmodel.data_parallel import (
    Exchange,
    Windows,
    exchange_of_rows,
    exchange_s,
    exchange_windows,
    exposed_exchange_s,
    gathered_ahead,
    one_exchange_s,
    reduces_often,
)
from shardplan.costmodel.job import BYTES_OF, Job
from shardplan.costmodel.kernels_time import state_pass_s
from shardplan.costmodel.keys import ROWS_IN_CACHE, LazyColumns
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import (
    exchanges_alone,
    gradient_bytes,
    paging_s,
    parameter_bytes,
    tied_table_bytes,
    unscaling_bytes,
    update_traffic_bytes,
)
from shardplan.costmodel.model import Model
from shardplan.costmodel.offload import (
    StepWindows,
    TierTimes,
    exposed_tiers_s,
    optimizer_share,
    tier_times,
)
from shardplan.costmodel.owner import Owner
from shardplan.costmodel.pace import LEAST_PEAK_WEIGHT
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TIME_PARTS = (
    "compute_s",
    "recompute_s",
    "tp_exposed_s",
    "cp_exposed_s",
    "ep_exposed_s",
    "dp_exposed_s",
    "pp_exposed_s",
    "bubble_s",
    "offload_exposed_s",
    "optimizer_s",
    "host_s",
)
"""They add up to step_s."""


@dataclass(frozen=True, kw_only=True)
class PacedTimes:
    """What a step takes before its rows' states come into it, columns of shape (K,) over the keys of the pace."""

    parts: Mapping[str, FloatArray]
    """Seconds per step of parts of TIME_PARTS."""
    hidden: Mapping[str, FloatArray]
    host_s: FloatArray
    """That launches take beyond compute."""
    exchanges: Exchange
    """How often the states of a rank are reduced and gathered in a step."""
    windows: Windows
    forward_s: FloatArray
    """Of `compute_s`, what the forward takes."""
    offload: tuple[FloatArray, FloatArray] | None = None
    """(exposed, hidden) seconds of activations on their way to and from host memory; None where none are."""


def paced_times(
    layouts: LayoutTable,
    runtime: Runtime,
    pace: Mapping[str, FloatArray],
    transfers_s: FloatArray,
    owner: Owner,
    micro_batches: FloatArray,
    copies: tuple[FloatArray, FloatArray, FloatArray] | None = None,
) -> PacedTimes:
    """The columns of `pace.pipeline_pace` over the micro-batches of a step; `copies` of activations are `offload.activation_copies_s`."""
    down, up, hidden_copies = copies or (0.0, 0.0, 0.0)
    # while a step waits for keys, other exchanges go on; a third of that is in the forward
    ring = pace.get("context_exposed", 0.0)
    once = np.ones(len(layouts))
    tensor_exposed = micro_batches * pace["tensor_exposed"]
    parts = {
        "compute_s": micro_batches * (pace["forward"] + pace["backward"]),
        "recompute_s": micro_batches * pace["recompute"],
        "tp_exposed_s": tensor_exposed,
        "pp_exposed_s": transfers_s,
        "bubble_s": pace["bubble"],
    }
    hidden = {"tp_s": micro_batches * pace["tensor"] - tensor_exposed}
    if "context_exposed" in pace:
        parts["cp_exposed_s"] = micro_batches * pace["context_exposed"]
        hidden["cp_s"] = micro_batches * pace["context_hidden"]
    if "expert_exposed" in pace:
        parts["ep_exposed_s"] = micro_batches * pace["expert_exposed"]
        hidden["ep_s"] = micro_batches * pace["expert_hidden"]
    return PacedTimes(
        parts=parts,
        hidden=hidden,
        host_s=micro_batches * pace["host"],
        exchanges=exchange_s(
            Exchange(reduce_s=once, gather_s=once, reduce_share=once, gather_share=once),
            layouts,
            runtime.communication,
            micro_batches=micro_batches,
            kept_share=owner.kept_share,
            unit_parameters=owner.parameters / owner.units,
        ),
        windows=exchange_windows(
            layouts,
            runtime.communication,
            micro_batches=micro_batches,
            forward_s=pace["forward"] + down + ring / 3.0,
            backward_s=pace["backward"] + pace["recompute"] + up + ring / 1.5,
        ),
        forward_s=micro_batches * pace["forward"],
        offload=(micro_batches * (down + up), micro_batches * hidden_copies) if copies else None,
    )


@dataclass(frozen=True, kw_only=True)
class HeldTimes:
    """What the states of a row take, columns of shape (K,) over the keys of the states."""

    exchange: Exchange
    """One reduction and one gather of all states of a rank."""
    tied_s: FloatArray | None
    """All-reduce between the two copies of a tied embedding; None where the model ties none."""
    optimizer_s: FloatArray
    """Of the update on the GPU: of what is not offloaded."""
    reduce_copy_s: FloatArray
    """Copies of gradients into the buffer of one reduction, between products."""
    gather_copy_s: FloatArray
    """The same of parameters out of the buffer of one gather."""
    launching_s: FloatArray
    """Host time that clipping and updating take beyond that."""
    tiers: TierTimes | None
    """Of states outside the GPU; None where no key has any."""


def held_times(
    model: Model,
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable,
    runtime: Runtime,
    tiers: TierTable,
    owner: Owner,
    *,
    at_least: bool = False,
) -> HeldTimes:
    """Exchange and update of the states of each key; `at_least` as in `one_exchange_s`."""
    element = gradient_bytes(runtime, job)
    updated, share = owner.trained / layouts.zero_ranks, optimizer_share(layouts)
    if owner.experts is not None:
        updated = updated + owner.experts * (1.0 / layouts.expert_zero_ranks - 1.0 / layouts.zero_ranks)
    each = update_traffic_bytes(runtime, job) + unscaling_bytes(runtime, job)
    traffic = each * updated * np.where(share < 1, 1.0 - share, 1.0)
    execution, on_gpu = runtime.execution, cluster.gpu.device == "cuda"
    update_s = np.where(share < 1, state_pass_s(cluster, traffic + execution.clip_bytes * updated), 0.0)
    update_s = (execution.update_slowdown if on_gpu else 1.0) * update_s + paging_s(job, cluster.node, updated)
    copied = np.where((layouts.dp * layouts.cp > 1) | exchanges_alone(runtime, job), 1.0, 0.0)
    gather_bytes = execution.gather_copy_bytes + execution.gather_input_bytes / layouts.zero_ranks
    tiers_used = bool((share > 0).any() or layouts.offload_params.any())
    tied = None
    if model.tied_embeddings:
        table = tied_table_bytes(model, job, layouts, runtime)
        apart = layouts.stride("pp") * np.maximum(layouts.pp - 1, 1)
        between = collective_s(tiers, "all_reduce", table, 2.0, apart)
        tied = np.where((layouts.pp > 1) & ~layouts.v_placed, between, 0.0)
    return HeldTimes(
        exchange=one_exchange_s(
            tiers,
            layouts,
            runtime.communication,
            parameters=owner.gathered,
            trained=owner.trained,
            experts=owner.experts,
            units=owner.units,
            gradient_bytes=element,
            parameter_bytes=parameter_bytes(runtime, job, sent=True),
            gpu=cluster.gpu,
            at_least=at_least,
        ),
        tied_s=tied,
        optimizer_s=update_s,
        reduce_copy_s=copied * state_pass_s(cluster, execution.reduce_copy_bytes * owner.trained),
        gather_copy_s=copied * state_pass_s(cluster, gather_bytes * owner.gathered),
        launching_s=np.maximum(execution.update_launches * cluster.gpu.launch_s * owner.units - update_s, 0.0)
        if on_gpu
        else np.zeros_like(update_s),
        tiers=tier_times(
            cluster.node,
            runtime.offload,
            layouts,
            updated,
            gradient_bytes=element,
            parameter_bytes=BYTES_OF[job.precision],
            update_bytes=update_traffic_bytes(runtime, job),
            fetched=None if job.adapters is None else owner.gathered / layouts.zero_ranks,
        )
        if tiers_used
        else None,
    )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Step time of N layouts: row n has the `paced` times at `pace_of[n]` and the `held` times at `states_of[n]`."""

    job: Job
    cluster: Cluster
    runtime: Runtime
    paced: PacedTimes
    held: HeldTimes
    pace_of: IntArray
    states_of: IntArray
    idle_s: FloatArray | None = None
    """Of a lower bound: seconds per step, (K,) over the keys of the pace, that GPUs wait for launches at most (`pace.most_idle_s`)."""

    def parts(self, *, hides_s: FloatArray | None = None) -> Mapping[str, FloatArray]:
        """Seconds by part (TIME_PARTS), `step_s` and, of compute, `forward_s`, (N,). What a row has from its keys alone is gathered when
        it is read.

        With `hides_s`, (K,) over the keys of the pace, a lower bound: of exchanges so many seconds hide if they can, of copies to other
        tiers all that can; copies of activations cost nothing, and a stage that waits longest for launches hides most of its exchanges
        behind them: `behind_host_s` (`host_s` may be below zero).
        """
        rows, paced = len(self.pace_of), self.paced
        own = ("dp_exposed_s", "offload_exposed_s", "host_s", "step_s")
        if self.idle_s is not None:
            own = (*own, "behind_host_s")
        time = {name: np.empty(rows) for name in own}
        together = np.sum(list(paced.parts.values()), axis=0)
        for start in range(0, rows, ROWS_IN_CACHE):
            some = slice(start, start + ROWS_IN_CACHE)
            at, of = self.pace_of[some], self.states_of[some]
            behind = np.zeros(len(at))
            exposed, _ = self._data_parallel(at, of, hides_s)
            offload, _ = self._offload(at, of, exposed, endless=hides_s is not None)
            host = paced.host_s.take(at)
            if self.cluster.gpu.device != "cpu":  # while a GPU waits for its links, the host launches ahead
                behind = np.minimum(host if self.idle_s is None else self.idle_s.take(at), exposed + offload)
                host -= behind
            host += self.held.launching_s.take(of) + self.runtime.execution.step_overhead_s
            step = together.take(at) + exposed + offload + self.held.optimizer_s.take(of) + host
            for name, column in zip(own, (exposed, offload, host, step, behind)[: len(own)], strict=True):
                time[name][some] = column
        makers = {name: partial(self._of_pace, paced.parts.get(name)) for name in TIME_PARTS}
        makers["forward_s"] = partial(self._of_pace, paced.forward_s)
        makers["optimizer_s"] = partial(self.held.optimizer_s.take, self.states_of)
        return LazyColumns({**makers, **{name: partial(_as_it_is, column) for name, column in time.items()}})

    def hidden(self) -> Mapping[str, FloatArray]:
        """Seconds of communication that hide behind compute by axis, (N,), made when they are read."""
        makers = {name: partial(self._of_pace, self.paced.hidden.get(name)) for name in ("tp_s", "cp_s", "ep_s")}
        return LazyColumns(
            {
                **makers,
                "dp_s": lambda: self._data_parallel(self.pace_of, self.states_of)[1],
                "offload_s": lambda: self._offload(
                    self.pace_of, self.states_of, self._data_parallel(self.pace_of, self.states_of)[0]
                )[1],
            }
        )

    def hides_at_most_s(self, pace: LayoutTable, micro_batches: FloatArray, peak_weight: FloatArray) -> FloatArray:
        """Seconds of exchanges per step, (K,) over the keys of the pace, that hide at most if the slowest stage goes at this pace: behind
        one micro-batch where none repeats, whatever blocks it has; else without bound. A slower stage hides at most as much more as one
        micro-batch takes longer: no step gets shorter by that if it has two (`peak_weight`) of the slowest stage or more."""
        repeats = reduces_often(pace, self.runtime.communication) | gathered_ahead(pace, self.runtime.communication)
        bounded = ~repeats & (peak_weight >= LEAST_PEAK_WEIGHT) & (self.paced.offload is None)
        busy = [seconds for part, seconds in self.paced.parts.items() if part not in ("pp_exposed_s", "bubble_s")]
        return np.where(bounded, (np.sum(busy, axis=0) + self.paced.host_s) / micro_batches, np.inf)

    def _of_pace(self, column: FloatArray | None) -> FloatArray:
        """A column over the keys of the pace for every row; None stands for zeros."""
        return np.zeros(len(self.pace_of)) if column is None else column.take(self.pace_of)

    def _data_parallel(
        self, at: IntArray, of: IntArray, hides_s: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """(exposed, hidden) seconds of gradient reduction and parameter gathers of the rows with keys `at` and `of`, with the slowdown
        of compute they hide behind; with `hides_s` see `parts`."""
        paced, held = self.paced, self.held
        exchange = exchange_of_rows(held.exchange, of, paced.exchanges, at)
        windows = paced.windows.take(at)
        if hides_s is not None:
            endless = np.full(len(at), np.inf)
            windows = replace(windows, reducing_s=endless, gathering_s=endless, shared=np.zeros(len(at)))
        exposed, hidden = exposed_exchange_s(exchange, windows)
        if hides_s is not None:
            too_much = np.maximum(hidden - hides_s.take(at), 0.0)
            exposed, hidden = exposed + too_much, hidden - too_much
        if held.tied_s is not None:
            exposed += held.tied_s.take(of)
        exposed = exposed + held.reduce_copy_s.take(of) * paced.exchanges.reduce_s.take(at)
        exposed += held.gather_copy_s.take(of) * paced.exchanges.gather_s.take(at)
        return exposed + self.runtime.execution.compute_slowdown * hidden, hidden

    def _offload(
        self, at: IntArray, of: IntArray, exchange_s: FloatArray, *, endless: bool = False
    ) -> tuple[FloatArray, FloatArray]:
        """(exposed, hidden) seconds of what lives outside the GPU, of the rows with keys `at` and `of`, beside the `exchange_s` that
        the step waits for data parallelism; with `endless` compute to hide states behind, and without copies of activations."""
        paced, held = self.paced, self.held
        exposed, hidden = np.zeros(len(of)), np.zeros(len(of))
        if paced.offload is not None and not endless:
            exposed, hidden = paced.offload[0].take(at), paced.offload[1].take(at)
        if held.tiers is not None:
            windows = StepWindows(
                reductions=paced.exchanges.reduce_s.take(at),
                gathers=paced.exchanges.gather_s.take(at),
                backward_s=paced.windows.reducing_s.take(at) + (np.inf if endless else 0.0),
                compute_s=(paced.parts["compute_s"] + paced.parts["recompute_s"]).take(at)
                + (np.inf if endless else 0.0),
                waiting_s=exchange_s + exposed,
                on_gpu_s=held.optimizer_s.take(of),
            )
            of_tiers, behind = exposed_tiers_s(
                held.tiers.take(of),
                windows,
                self.runtime.offload,
                gradient_overlap=self.runtime.communication.reduce_overlap,
            )
            exposed, hidden = exposed + of_tiers, hidden + behind
        return exposed, hidden


def _as_it_is(column: FloatArray) -> FloatArray:
    return column
