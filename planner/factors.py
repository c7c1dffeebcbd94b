"""Layouts as products: what a micro-batch computes times how states are spread, block by block of the same mesh.

A block of W ways to compute and S ways to spread stands for W * S layouts. Most rules look at one of the two, and are asked W + S times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.layout_join import stacked

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

SPREADING = ("zero", "dp_shard", "offload_optimizer", "offload_params")
"""Columns of how states are spread that a space has several values of."""
COMPUTING = (
    "micro_batch",
    "sequence_parallel",
    "schedule",
    "virtual_stages",
    "recompute",
    "recompute_layers",
    "recompute_parts",
    "ep",
    "cp_kind",
)
"""Columns of what a micro-batch computes that a space has several values of; those of the mesh belong to both."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Blocks of layouts; every row of `computing` goes with every row of `spreading` of its block."""

    computing: LayoutTable
    """(W,), in the order of blocks; columns of SPREADING say nothing."""
    computing_block: IntArray
    spreading: LayoutTable
    """(S,), likewise."""
    spreading_block: IntArray
    blocks: int

    @classmethod
    def joined(cls, parts: Sequence[Factors]) -> Factors:
        """All blocks of `parts`, in order."""
        first = np.cumsum([0, *(part.blocks for part in parts)])
        return cls(
            computing=stacked([part.computing for part in parts]),
            computing_block=np.concatenate([p.computing_block + n for p, n in zip(parts, first, strict=False)]),
            spreading=stacked([part.spreading for part in parts]),
            spreading_block=np.concatenate([p.spreading_block + n for p, n in zip(parts, first, strict=False)]),
            blocks=int(first[-1]),
        )

    def __len__(self) -> int:
        return int(self.partners().sum())

    def partners(self) -> IntArray:
        """Rows of `spreading` that each row of `computing` goes with, (W,)."""
        return np.bincount(self.spreading_block, minlength=self.blocks)[self.computing_block]

    def with_rows(self, computing: NDArray[np.intp]) -> Factors:
        """Products of some rows of `computing`, given in order."""
        return replace(self, computing=self.computing.take(computing), computing_block=self.computing_block[computing])

    def take(self, computing: BoolArray, spreading: BoolArray) -> Factors:
        """Products of the rows that two masks leave."""
        return Factors(
            computing=self.computing.take(computing),
            computing_block=self.computing_block[computing],
            spreading=self.spreading.take(spreading),
            spreading_block=self.spreading_block[spreading],
            blocks=self.blocks,
        )

    def of_spreading(self, spreading: BoolArray) -> Factors:
        """Products of the rows of `spreading` that a mask leaves."""
        if spreading.all():
            return self
        there = np.bincount(self.spreading_block[spreading], minlength=self.blocks) > 0
        return self.take(there[self.computing_block], spreading)

    def layouts(self) -> LayoutTable:
        """Every layout that they stand for."""
        partners = np.bincount(self.spreading_block, minlength=self.blocks)
        first = partners.cumsum() - partners
        each = partners[self.computing_block]
        rows = np.repeat(np.arange(len(each)), each)
        nth = np.arange(len(rows)) - np.repeat(each.cumsum() - each, each)
        with_row = first[self.computing_block[rows]] + nth
        return replace(
            self.computing.take(rows),
            **{name: getattr(self.spreading, name).take(with_row) for name in SPREADING},
        )

    def one(self, computing: BoolArray, spreading: BoolArray) -> LayoutTable:
        """The first layout whose rows are in both masks."""
        within = np.isin(self.computing_block, self.spreading_block[spreading])
        row = int(np.flatnonzero(computing & within)[0])
        same = spreading & (self.spreading_block == self.computing_block[row])
        pair = np.zeros_like(computing), np.zeros_like(spreading)
        pair[0][row], pair[1][np.flatnonzero(same)[0]] = True, True
        return self.take(*pair).layouts()
