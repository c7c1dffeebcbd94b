"""Rules of recomputation beside tensor parallelism."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import Layout, LayoutTable
from shardplan.costmodel.recompute import RECOMPUTE, part_bits
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
        broken=_refused_beside_tensor_parallelism,
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot combine recompute={x.recompute} with tp={x.tp}",
        remedy=_without,
        evidence="torch 2.13, a compiled checkpoint around a layer of distributed tensors: AssertionError, 'expected all "
        "tensors_saved_with_vc_check to be Tensors', one is a DeviceMesh",
    ),
)
