"""Gradient reduction and parameter gathers of data parallelism and ZeRO: volume, frequency, what hides behind compute.

Per rank and step, in elements of the rank's parameters P (ZeRO, arXiv 1910.02054): DDP all-reduces P (2 P on the wire); stages
1 and 2 reduce-scatter and all-gather (2 P); stage 3 gathers in forward and in backward and reduce-scatters (3 P). The runtime
says which of these repeat for every micro-batch. Under HSDP the shards are all-reduced between replicas. Context-parallel ranks
see other tokens with the same parameters, so they reduce and shard like data-parallel ones: groups have dp * cp ranks.

Gradients go in buckets (a layer's, or so many parameters'), and so do parameters gathered after the update; ZeRO-3 gathers layers one
ahead. The last bucket of a backward is ready when nothing is left to compute, the first gather of a forward when nothing has begun:
one message of each pass is always exposed (PyTorch DDP, arXiv 2006.15704, section 3.2.3; FSDP, arXiv 2304.11277, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import collective_s
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.rank_groups import StateGroups, dense_groups, expert_groups
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.runtime import Communication
from shardplan.costmodel.zeropp import gather_s, reduce_s, uses_zeropp
from shardplan.hw_profiles.machine import Gpu
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
FULL = RECOMPUTE.index("full")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Seconds for N layouts, each (N,), before overlap, and the share of them that can hide behind compute."""

    reduce_s: FloatArray
    gather_s: FloatArray
    reduce_share: FloatArray
    gather_share: FloatArray
    replicate_s: FloatArray | float = 0.0
    """Of a reduction, what sums the shards of replicas, where that happens once a step however often gradients are scattered."""


def one_exchange_s(
    tiers: TierTable,
    layouts: LayoutTable,
    communication: Communication,
    *,
    parameters: FloatArray,
    trained: FloatArray,
    units: FloatArray,
    gradient_bytes: int,
    parameter_bytes: int,
    gpu: Gpu,
    experts: FloatArray | None = None,
    at_least: bool = False,
) -> Exchange:
    """One reduction and one gather of all states of a rank that owns `parameters` parameters in `units` equal groups (layers), of which
    it has `trained`: only those are reduced, and gathered after an update; all are gathered ahead of their layers. `experts` of them lie
    in experts that tokens are dispatched to, and are exchanged among the fewer ranks that hold the same ones. With `at_least` as much
    hides as of any number of parameters from there up: one bucket more leaves a smaller last one."""
    parameters = np.where(gathered_ahead(layouts, communication), parameters, trained)
    size = {"gradient_bytes": gradient_bytes, "parameter_bytes": parameter_bytes}
    sent = (tiers, gpu, layouts, communication, at_least)
    everywhere = dense_groups(layouts)
    if experts is None:
        return _group_exchange_s(*sent, everywhere, parameters, trained, units, **size)
    fewer = expert_groups(layouts)
    dense = _group_exchange_s(*sent, everywhere, parameters - experts, trained - experts, units, **size)
    spread = _group_exchange_s(*sent, fewer, experts, experts, units, **size)
    return _together(dense, spread, experts > 0)


def _together(one: Exchange, other: Exchange, both: NDArray[np.bool_]) -> Exchange:
    """One, where `both` followed by the other; shares that hide are means by seconds."""
    other = replace(
        other,
        reduce_s=np.where(both, other.reduce_s, 0.0),
        gather_s=np.where(both, other.gather_s, 0.0),
        replicate_s=np.where(both, other.replicate_s, 0.0),
    )

    def share(first_s: FloatArray, second_s: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
        total = first_s + second_s
        return np.divide(first_s * first + second_s * second, total, out=first.copy(), where=total > 0)

    return Exchange(
        reduce_s=one.reduce_s + other.reduce_s,
        gather_s=one.gather_s + other.gather_s,
        reduce_share=share(one.reduce_s, other.reduce_s, one.reduce_share, other.reduce_share),
        gather_share=share(one.gather_s, other.gather_s, one.gather_share, other.gather_share),
        replicate_s=one.replicate_s + other.replicate_s,
    )


def _group_exchange_s(
    tiers: TierTable,
    gpu: Gpu,
    layouts: LayoutTable,
    communication: Communication,
    at_least: bool,
    group: StateGroups,
    parameters: FloatArray,
    trained: FloatArray,
    units: FloatArray,
    *,
    gradient_bytes: int,
    parameter_bytes: int,
) -> Exchange:
    shards = group.shards.size
    reduced, gathered = _messages(layouts, communication, group.ranks, parameters, trained, units)
    message = trained * gradient_bytes / reduced
    reduce = collective_s(tiers, "reduce_scatter", message, *group.shards.shape)
    replicate = reduced * collective_s(tiers, "all_reduce", message / shards, *group.replicas.shape)
    gather = collective_s(tiers, "all_gather", parameters * parameter_bytes / gathered, *group.shards.shape)
    reduce, gather = reduced * reduce, gathered * gather
    if not communication.replicas_reduce_once:
        reduce, replicate = reduce + replicate, np.zeros_like(reduce)
    if uses_zeropp(layouts):
        reduce = reduce_s(tiers, gpu, layouts, parameters=trained, messages=reduced, plain_s=reduce)
        replicate = np.where(layouts.qgz > 0, 0.0, replicate)
        gather = gather_s(
            tiers,
            gpu,
            layouts,
            parameters=parameters,
            messages=gathered,
            element_bytes=parameter_bytes,
            plain_s=gather,
        )
    bucket = _bucket(communication, group.ranks)

    def last_share(messages: FloatArray, held: FloatArray) -> FloatArray:
        """Of the exchange, what its last message takes."""
        if not at_least or not communication.bucket_parameters:
            return 1.0 / messages
        after_one_more = bucket * messages / (messages + 1.0)
        return np.minimum(1.0 / messages, np.divide(after_one_more, held, out=np.ones_like(held), where=held > 0))

    hiding = np.where(
        gathered_ahead(layouts, communication), communication.prefetch_overlap, communication.gather_overlap
    )
    return Exchange(
        reduce_s=reduce,
        gather_s=gather,
        reduce_share=communication.reduce_overlap * (1.0 - last_share(reduced, trained)),
        gather_share=hiding * (1.0 - last_share(gathered, parameters)),
        replicate_s=replicate,
    )


def _bucket(communication: Communication, ranks: FloatArray) -> FloatArray:
    """Parameters that are exchanged together; 0 where that is by layer."""
    return np.maximum(communication.bucket_parameters, communication.bucket_parameters_per_rank * ranks)


def _messages(
    layouts: LayoutTable,
    communication: Communication,
    ranks: FloatArray,
    parameters: FloatArray,
    trained: FloatArray,
    units: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """(reductions, gathers) that all states of a rank take: by buckets, or so many for each layer."""
    reduced, gathered = units * communication.reduce_messages, units * communication.gather_messages
    if not communication.bucket_parameters:
        return reduced, gathered
    bucket = _bucket(communication, ranks)
    reduced, buckets = (np.maximum(np.ceil(count / bucket), 1.0) for count in (trained, parameters))
    return reduced, np.where(gathered_ahead(layouts, communication), gathered, buckets)


def exchange_s(
    one: Exchange,
    layouts: LayoutTable,
    communication: Communication,
    *,
    micro_batches: FloatArray,
    kept_share: FloatArray | float = 0.0,
    unit_parameters: FloatArray | float = 0.0,
) -> Exchange:
    """All exchanges of a step, each as long as `one`; `kept_share` of the parameters stay gathered after the forward under ZeRO-3,
    those of layers of `unit_parameters` may be released between a full recompute and its backward."""
    reductions, gathers = exchange_counts(layouts, communication, micro_batches)
    # what the forward leaves whole is gathered once a micro-batch, inside such a pipeline once a step
    kept = np.where(inside_pipeline(layouts, communication), 1.0, 0.5 * gathers)
    again = gathered_ahead(layouts, communication)
    gathers = np.where(again, gathers + kept_share * (kept - gathers), gathers)
    released = released_share(unit_parameters, communication.reuse_distance)
    gathers = np.where(again & (layouts.recompute == FULL), gathers * (1.0 + 0.5 * released), gathers)
    return replace(
        one, reduce_s=one.reduce_s * reductions + one.replicate_s, gather_s=one.gather_s * gathers, replicate_s=0.0
    )


def exchange_of_rows(one: Exchange, of: IntArray, counts: Exchange, at: IntArray) -> Exchange:
    """All exchanges of a step of rows with `one` at `of` and the numbers of reductions and gathers at `at` of `counts`."""
    once = np.broadcast_to(one.replicate_s, one.reduce_s.shape)
    return Exchange(
        reduce_s=one.reduce_s.take(of) * counts.reduce_s.take(at) + once.take(of),
        gather_s=one.gather_s.take(of) * counts.gather_s.take(at),
        reduce_share=one.reduce_share.take(of),
        gather_share=one.gather_share.take(of),
    )


def released_share(unit_parameters: FloatArray | float, reuse_distance: float) -> FloatArray:
    """Share of a layer of `unit_parameters` (of a rank, whole) that is released between its recomputation and its backward.

    A matrix is kept when the parameters used between its two uses, those behind it in the layer twice, are fewer than the distance
    (DeepSpeed runtime/zero/partitioned_param_coordinator.py, `__params_to_release`). Attention and the two halves of the MLP are about
    a third of a layer each: the last third is always kept.
    """
    third = np.asarray(unit_parameters, dtype=np.float64) / 3.0
    return ((2.0 * third >= reuse_distance) + (4.0 * third >= reuse_distance).astype(np.float64)) / 3.0


def exchange_counts(
    layouts: LayoutTable, communication: Communication, micro_batches: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(reductions, gathers) of each group of parameters per step, whatever the group sizes."""
    zero = layouts.zero
    reductions = np.where(reduces_often(layouts, communication), micro_batches, 1.0)
    gathers = np.where(gathered_ahead(layouts, communication), 2.0 * micro_batches, 1.0)
    # parameters that stay whole after a backward are only gathered again after the next forward dropped them: once more than there
    # are forwards, in whatever order a schedule runs them
    once = inside_pipeline(layouts, communication)
    return reductions, np.where(once & (zero == 3), micro_batches + 1.0, gathers)


def inside_pipeline(layouts: LayoutTable, communication: Communication) -> NDArray[np.bool_]:
    """Rows whose pipeline reduces once a step whatever the ZeRO stage."""
    return np.asarray(layouts.pp > 1) & communication.pipeline_reduces_once


def reduces_often(layouts: LayoutTable, communication: Communication) -> NDArray[np.bool_]:
    """Rows that reduce gradients after every micro-batch."""
    every = _among(layouts.zero, communication.reduce_every_micro_batch)
    return every & ~inside_pipeline(layouts, communication)


def gathered_ahead(layouts: LayoutTable, communication: Communication) -> NDArray[np.bool_]:
    """Rows that gather the parameters of each layer for every micro-batch."""
    return _among(layouts.zero, communication.gather_every_micro_batch)


def _among(zero: NDArray[np.int64], stages: tuple[int, ...]) -> NDArray[np.bool_]:
    """Rows whose ZeRO stage is one of `stages`."""
    return np.asarray([stage in stages for stage in range(4)]).take(zero)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Compute of a step that exchanges can hide behind, (N,)."""

    reducing_s: FloatArray
    gathering_s: FloatArray
    shared: FloatArray
    """1 where gathers and reductions both repeat: they share the same backward compute."""

    def take(self, rows: NDArray[np.integer]) -> Windows:
        """The rows at `rows`."""
        return Windows(
            reducing_s=self.reducing_s.take(rows),
            gathering_s=self.gathering_s.take(rows),
            shared=self.shared.take(rows),
        )


def exchange_windows(
    layouts: LayoutTable,
    communication: Communication,
    *,
    micro_batches: FloatArray,
    forward_s: FloatArray,
    backward_s: FloatArray,
) -> Windows:
    """What hides exchanges; `forward_s` and `backward_s` are compute of one micro-batch that can.

    What repeats hides behind all micro-batches, what happens once behind one of them.
    """
    reducing = np.where(reduces_often(layouts, communication), micro_batches, 1.0) * backward_s
    every = gathered_ahead(layouts, communication)
    gathering = np.where(every, micro_batches * (forward_s + backward_s), forward_s)
    return Windows(reducing_s=reducing, gathering_s=gathering, shared=every.astype(np.float64))


def exposed_exchange_s(exchange: Exchange, windows: Windows) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) seconds per step."""
    hidden_reduce = np.minimum(exchange.reduce_share * exchange.reduce_s, windows.reducing_s)
    left = np.maximum(windows.gathering_s - windows.shared * hidden_reduce, 0.0)
    hidden_gather = np.minimum(exchange.gather_share * exchange.gather_s, left)
    hidden = hidden_reduce + hidden_gather
    return exchange.reduce_s + exchange.gather_s - hidden, hidden
