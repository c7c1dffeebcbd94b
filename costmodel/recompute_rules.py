"""Rules of recomputation beside tensor and context parallelism."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import BoolArray, Rule
from shardplan.costmodel.rule_parts import codes

BY_PARTS = "parts"
"""Beside RECOMPUTE in `Abilities.tensor_parallel_recompute` and `context_parallel_recompute`: parts by choice."""


def _refused_beside(known: tuple[str, ...], table: LayoutTable) -> BoolArray:
    kinds = np.where(table.recompute_parts > 0, len(RECOMPUTE), table.recompute)
    return ~one_of(kinds, codes(known, (*RECOMPUTE, BY_PARTS)))


def _without(axis: str, known: tuple[str, ...]) -> str:
    return f"use {axis}=1, or recompute={' or '.join(known).replace(BY_PARTS, 'selective:PART+PART')}"


RECOMPUTE_RULES: tuple[Rule, ...] = (
    Rule(
        id="recompute-tensor-parallel",
        broken=lambda s, t: (t.tp > 1) & _refused_beside(s.runtime.abilities.tensor_parallel_recompute, t),
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot combine recompute={x.recompute} with tp={x.tp}",
        remedy=lambda s, _: _without("tp", s.runtime.abilities.tensor_parallel_recompute),
        evidence="torch 2.13, a checkpoint compiled with a layer of distributed tensors, which selective recompute needs: AssertionError, "
        "'expected all tensors_saved_with_vc_check to be Tensors', one is a DeviceMesh",
    ),
    Rule(
        id="recompute-context-parallel",
        broken=lambda s, t: (t.cp > 1) & _refused_beside(s.runtime.abilities.context_parallel_recompute, t),
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot combine recompute={x.recompute} with cp={x.cp}",
        remedy=lambda s, _: _without("cp", s.runtime.abilities.context_parallel_recompute),
        evidence="torch 2.13: selective checkpointing chooses operators inside one graph, and what ranks of a sequence send each other in "
        "attention breaks it",
    ),
)
