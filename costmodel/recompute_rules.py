"""Rules of recomputation beside tensor and context parallelism."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE, part_bits
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import codes

BY_PARTS = "parts"
"""Beside RECOMPUTE in `Abilities.tensor_parallel_recompute` and `context_parallel_recompute`: parts by choice."""


def _refused_beside(known: tuple[str, ...], table: LayoutTable) -> BoolArray:
    kinds = np.where(table.recompute_parts > 0, len(RECOMPUTE), table.recompute)
    return ~one_of(kinds, codes(known, (*RECOMPUTE, BY_PARTS)))


def _without(axis: str, known: tuple[str, ...]) -> str:
    return f"use {axis}=1, or recompute={' or '.join(known).replace(BY_PARTS, 'selective:PART+PART')}"


def usable_parts(setting: Setting) -> tuple[str, ...]:
    """Parts that the runtime runs again in some layer of the model, in its order."""
    can, idle = setting.runtime.abilities, _idle_parts(setting)
    latents = any(kind.kv_lora_rank for kind in setting.kinds)
    return tuple(part for part in can.recompute_parts if part not in idle and (latents or part != "mla_up_proj"))


def _idle_parts(setting: Setting) -> tuple[str, ...]:
    """Parts that the runtime only runs again in layers that the model does not have."""
    can, experts = setting.runtime.abilities, [bool(kind.experts) for kind in setting.kinds]
    of_dense = can.recompute_parts_of_dense_layers if all(experts) else ()
    return of_dense + (() if any(experts) else can.recompute_parts_of_expert_layers)


RECOMPUTE_RULES: tuple[Rule, ...] = (
    Rule(
        id="recompute-part-of-no-layer",
        broken=lambda s, t: (t.recompute_parts & part_bits(_idle_parts(s))) > 0,
        detail=lambda s, x: (
            f"recompute={x.recompute}: {s.runtime.name!r} runs {' and '.join(_idle_parts(s))} again only in layers "
            f"{'without' if all(kind.experts for kind in s.kinds) else 'with'} experts, which {s.model.name} does not have"
        ),
        remedy=lambda s, x: f"choose from {'+'.join(usable_parts(s))}",
        evidence="megatron/core/transformer/transformer_config.py: recompute_modules mlp (dense MLP) and moe_act",
    ),
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
