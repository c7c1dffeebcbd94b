"""Rules of recomputation beside tensor parallelism."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import Layout, LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import codes

BY_PARTS = "parts"
"""Beside RECOMPUTE in `Abilities.tensor_parallel_recompute`: parts by choice."""


def _refused_beside_tensor_parallelism(setting: Setting, table: LayoutTable) -> BoolArray:
    kinds = np.where(table.recompute_parts > 0, len(RECOMPUTE), table.recompute)
    known = codes(setting.runtime.abilities.tensor_parallel_recompute, (*RECOMPUTE, BY_PARTS))
    return (table.tp > 1) & ~one_of(kinds, known)


def _without(setting: Setting, _: Layout) -> str:
    words = " or ".join(setting.runtime.abilities.tensor_parallel_recompute)
    return f"use tp=1, or recompute={words.replace(BY_PARTS, 'selective:PART+PART')}"


RECOMPUTE_RULES: tuple[Rule, ...] = (
    Rule(
        id="recompute-tensor-parallel",
        broken=_refused_beside_tensor_parallelism,
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot combine recompute={x.recompute} with tp={x.tp}",
        remedy=_without,
        evidence="torch 2.13, a checkpoint compiled with a layer of distributed tensors, which selective recompute needs: AssertionError, "
        "'expected all tensors_saved_with_vc_check to be Tensors', one is a DeviceMesh",
    ),
)
