"""The ranks that hold the same states, by the order of mesh axes: over which ZeRO shards, and which repeat the shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.axis_order import is_bound
from shardplan.costmodel.layout import Layout, LayoutTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A group of each row, (N,): `ranks` ranks `stride` apart, and that `sets` times (None = once), `set_stride` apart."""

    ranks: FloatArray
    stride: FloatArray
    sets: FloatArray | None = None
    set_stride: FloatArray | float = 1.0

    @property
    def size(self) -> FloatArray:
        """All its ranks."""
        return self.ranks if self.sets is None else self.ranks * self.sets

    @property
    def shape(self) -> tuple[FloatArray, FloatArray, FloatArray | None, FloatArray | float]:
        """The last arguments of `collectives.collective_s`."""
        return self.ranks, self.stride, self.sets, self.set_stride


@dataclass(frozen=True, kw_only=True)
class StateGroups:
    """Ranks that hold the same parameters."""

    shards: Ranks
    """Over which ZeRO shards states; one rank without ZeRO."""
    replicas: Ranks
    """One rank of each set of shards."""
    ranks: FloatArray
    """All of them."""


def dense_groups(layouts: LayoutTable) -> StateGroups:
    """Data-parallel ranks together with context-parallel ones; dp_shard neighbours of dp share shards with all of cp."""
    ranks = (layouts.dp * layouts.cp).astype(np.float64)
    if not layouts.order.any():  # dp right outside cp: one even group
        return _even(layouts.tp.astype(np.float64), layouts.zero_ranks.astype(np.float64), ranks)
    if is_bound(layouts.order):
        shards, beside = layouts.zero_ranks.astype(np.float64), np.ones_like(ranks)
        return StateGroups(
            shards=Ranks(ranks=shards, stride=beside), replicas=Ranks(ranks=ranks / shards, stride=beside), ranks=ranks
        )
    cp, dp, shard = (column.astype(np.float64) for column in (layouts.cp, layouts.dp, layouts.dp_shard))
    of_cp, of_dp = (layouts.stride(axis).astype(np.float64) for axis in ("cp", "dp"))
    one, sharded = np.ones_like(ranks), layouts.zero > 0
    return StateGroups(
        shards=_both(np.where(sharded, cp, one), of_cp, np.where(sharded, shard, one), of_dp),
        replicas=_both(
            np.where(sharded, one, cp),
            of_cp,
            np.where(sharded, dp / shard, dp),
            np.where(sharded, of_dp * shard, of_dp),
        ),
        ranks=ranks,
    )


def expert_groups(layouts: LayoutTable) -> StateGroups:
    """The ranks of a stage that hold the same experts."""
    step = stage_stride(layouts, layouts.ep * layouts.expert_tp).astype(np.float64)
    shards = layouts.expert_zero_ranks.astype(np.float64)
    return _even(step, shards, layouts.expert_replicas.astype(np.float64))


def _even(step: FloatArray, shards: FloatArray, ranks: FloatArray) -> StateGroups:
    """Groups of `ranks` ranks `step` apart, of which neighbours share shards."""
    return StateGroups(
        shards=Ranks(ranks=shards, stride=step),
        replicas=Ranks(ranks=ranks / shards, stride=step * shards),
        ranks=ranks,
    )


def _both(one: FloatArray, one_stride: FloatArray, other: FloatArray, other_stride: FloatArray) -> Ranks:
    """The ranks of two axes: an even group where one lies right outside the other or has one rank, else sets of the inner one."""
    swapped = ((other_stride < one_stride) & (other > 1)) | (one == 1)
    inner, outer = np.where(swapped, other, one), np.where(swapped, one, other)
    stride, apart = np.where(swapped, other_stride, one_stride), np.where(swapped, one_stride, other_stride)
    even = (outer == 1) | (apart == inner * stride)
    return Ranks(
        ranks=np.where(even, inner * outer, inner),
        stride=stride,
        sets=np.where(even, 1.0, outer),
        set_stride=apart,
    )


def stage_stride(layouts: LayoutTable, step: IntArray) -> IntArray:
    """Ranks between two of one stage that are `step` apart among its ranks, (N,): a pipeline inside other axes lies between them
    (`order_rules.py` leaves only steps inside what it surrounds, or whole ones)."""
    if not layouts.order.any() or is_bound(layouts.order):
        return step
    inside = layouts.stride("pp")
    return np.where((layouts.pp > 1) & (step % inside == 0), step * layouts.pp, step)


def rank_coordinates(layout: Layout) -> dict[str, IntArray]:
    """Coordinate of every rank on every axis, each of shape (gpus,); in the default order rank = ((pp * dp + d) * cp + c) * tp + t."""
    axes = layout.order.split("-")[::-1]
    grid = np.indices([getattr(layout, axis) for axis in axes]).reshape(len(axes), -1)
    return dict(zip(axes, grid, strict=True))
