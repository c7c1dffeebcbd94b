"""Rules about the model's shapes; `rules.py` holds the whole list."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from shardplan.costmodel.model import PART_NAMES, LayerKind, LayerPart, layer_parts
from shardplan.costmodel.recompute import PART_BITS
from shardplan.costmodel.rule import Rule, Setting
from shardplan.costmodel.rule_parts import divides, divides_ffn, use_divisors
from shardplan.costmodel.runtime import Runtime


def widths(setting: Setting, number: Callable[[LayerKind], int]) -> str:
    """The different values of `number` among the layer kinds that have any."""
    return " and ".join(str(value) for value in dict.fromkeys(map(number, setting.kinds)) if value)


def common(setting: Setting, number: Callable[[LayerKind], int]) -> int:
    """The greatest common divisor of `number` over the layer kinds."""
    return math.gcd(*map(number, setting.kinds))


def missing_parts(setting: Setting) -> list[str]:
    """What some layers of the model have and the runtime lacks, in words."""
    return lacking(setting.kinds, setting.runtime, seq=setting.job.seq)


def lacking(kinds: Iterable[LayerKind], runtime: Runtime, *, seq: int | None = None) -> list[str]:
    """The same for any layers, and sequences of `seq` tokens."""
    parts: Iterable[LayerPart] = dict.fromkeys(part for kind in kinds for part in layer_parts(kind, seq))
    return [PART_NAMES[part] for part in parts if part not in runtime.abilities.layer_parts]


MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        id="tp-divides-heads",
        broken=divides(lambda kind: kind.heads),
        detail=lambda s, x: f"tp={x.tp} does not divide heads={widths(s, lambda kind: kind.heads)}",
        remedy=use_divisors(lambda s: common(s, lambda kind: kind.heads)),
    ),
    Rule(
        id="tp-divides-kv-heads",
        broken=divides(lambda kind: kind.kv_heads),
        detail=lambda s, x: f"tp={x.tp} does not divide kv_heads={widths(s, lambda kind: kind.kv_heads)}",
        remedy=use_divisors(lambda s: common(s, lambda kind: kind.kv_heads)),
        evidence="Megatron-Core: num_query_groups % tp == 0; local head counts of DTensor column splits",
    ),
    Rule(
        id="tp-divides-ffn",
        broken=divides_ffn,
        detail=lambda s, x: f"tp={x.tp} does not divide ffn={widths(s, lambda kind: kind.ffn)}",
        remedy=use_divisors(lambda s: common(s, lambda kind: kind.ffn)),
    ),
    Rule(
        id="tp-divides-shared-ffn",
        broken=divides(lambda kind: kind.shared_ffn),
        detail=lambda s, x: f"tp={x.tp} does not divide shared_ffn={widths(s, lambda kind: kind.shared_ffn)}",
        remedy=use_divisors(lambda s: common(s, lambda kind: kind.shared_ffn)),
    ),
    Rule(
        id="mla-up-proj-needs-latents",
        broken=lambda s, t: (
            (t.recompute_parts & PART_BITS["mla_up_proj"] > 0) & (not any(kind.kv_lora_rank for kind in s.kinds))
        ),
        detail=lambda s, x: f"recompute={x.recompute}: {s.model.name} has no latent attention",
        remedy=lambda s, x: "leave mla_up_proj out, or use qkv where the runtime has it",
        evidence="Megatron-Core: mla_up_proj in recompute_modules needs multi_latent_attention",
    ),
    Rule(
        id="sp-needs-tp",
        broken=lambda s, t: (t.sequence_parallel == 1) & (t.tp == 1),
        detail=lambda s, x: "sequence_parallel=true with tp=1 splits nothing",
        remedy=lambda s, x: "drop sequence_parallel or raise tp",
        evidence="Megatron-LM silently switches it off",
    ),
    Rule(
        id="sp-divides-seq",
        broken=lambda s, t: (t.sequence_parallel == 1) & (s.job.seq % (t.tp * t.cp) != 0),
        detail=lambda s, x: f"tp*cp = {x.tp}*{x.cp} does not divide seq={s.job.seq}",
        remedy=lambda s, x: f"use a sequence length that is a multiple of {x.tp * x.cp}",
    ),
    Rule(
        id="seq-within-positions",
        broken=lambda s, t: np.full(len(t), 0 < s.model.learned_positions < s.job.seq),
        detail=lambda s, x: (
            f"seq={s.job.seq} is longer than the {s.model.learned_positions} learned positions of {s.model.name}"
        ),
        remedy=lambda s, x: f"use --seq {s.model.learned_positions} or less",
    ),
)
