"""The word `recompute`: none, selective, selective:PART+PART, full, full:N, full:N0,N1,…, and the operators that each part stands for.

Parts carry Megatron-Core's names (`--recompute-modules`) where it has one: core_attn, layernorm, mlp, and mla_up_proj, which makes the
heads of latent attention again from the latents. Each part can be rebuilt from what the others keep, so every set of them is sound
(arXiv 2205.05198, section 5, chooses core_attn alone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from shardplan.hw_profiles.errors import InputError, nearest

RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_COLUMNS = ("recompute", "recompute_layers", "recompute_parts")
"""Columns of `LayoutTable` that the word fills."""
ALL_LAYERS = -1
BY_STAGE = -2
"""Of `LayoutTable.recompute_layers`: BY_STAGE - i stands for entry i of its `depths`."""
Part = Literal["core_attn", "layernorm", "qkv", "rope", "proj", "act", "mlp", "mla_up_proj"]
PARTS: Mapping[Part, tuple[str, ...]] = {
    "core_attn": ("attention",),
    "layernorm": ("attention_norm", "mlp_norm"),
    "qkv": ("qkv",),
    "rope": ("rotary",),
    "proj": ("projection", "attention_residual"),
    "act": ("activation",),
    "mlp": ("up", "activation", "down"),
    "mla_up_proj": ("qkv", "rotary"),
}
"""Operators of a layer that each part runs again in the backward pass instead of keeping what they wrote."""
PART_BITS: Mapping[str, int] = {part: 1 << index for index, part in enumerate(PARTS)}


class Recompute(NamedTuple):
    """One value of the word."""

    kind: str
    """One of RECOMPUTE."""
    layers: int = ALL_LAYERS
    """Under full: layers of each stage."""
    parts: int = 0
    """Under selective: sum of PART_BITS; 0 = what the runtime selects."""
    by_stage: tuple[int, ...] | None = None
    """Under full: layers of stage 0, 1, …; None = the same of each."""

    def word(self) -> str:
        """Inverse of `split_recompute`."""
        if self.parts:
            return f"{self.kind}:{'+'.join(part for part, bit in PART_BITS.items() if self.parts & bit)}"
        if self.by_stage is not None:
            return f"{self.kind}:{','.join(map(str, self.by_stage))}"
        return self.kind if self.layers == ALL_LAYERS else f"{self.kind}:{self.layers}"


def split_recompute(word: str) -> Recompute:
    """`full:4` -> ("full", 4), `full:4,2,0` -> 4 layers of stage 0, 2 of stage 1, `selective:core_attn+mlp` -> ("selective", parts of
    that). Raises InputError for anything else."""
    kind, colon, detail = word.partition(":")
    if kind in RECOMPUTE and not colon:
        return Recompute(kind)
    if kind == "full" and detail.isdigit() and int(detail) > 0:
        return Recompute(kind, layers=int(detail))
    numbers = detail.split(",")
    if kind == "full" and len(numbers) > 1 and all(n.isdigit() for n in numbers) and any(map(int, numbers)):
        return Recompute(kind, by_stage=tuple(map(int, numbers)))
    if kind == "selective" and detail:
        names = detail.split("+")
        for name in names:
            if name not in PARTS:
                raise InputError(
                    f"recompute={word!r}: part {name!r} is unknown", place="layout", remedy=nearest(name, tuple(PARTS))
                )
        return Recompute(kind, parts=sum(bit for part, bit in PART_BITS.items() if part in names))
    raise InputError(
        f"recompute={word!r} is unknown",
        place="layout",
        remedy="use none, selective, full, full:N (N layers a stage), full:4,2,0 (by stage) or selective:core_attn+mlp and the like",
    )


def layers_code(recompute: Recompute, depths: list[tuple[int, ...]]) -> int:
    """What `LayoutTable.recompute_layers` stores; depths by stage are added to `depths` where they are new."""
    if recompute.by_stage is None:
        return recompute.layers
    if recompute.by_stage not in depths:
        depths.append(recompute.by_stage)
    return BY_STAGE - depths.index(recompute.by_stage)


def stored_recompute(at: Mapping[str, int], depths: Sequence[tuple[int, ...]]) -> Recompute:
    """Inverse: the word that three columns of a row of a table store."""
    layers = at["recompute_layers"]
    own = depths[BY_STAGE - layers] if layers <= BY_STAGE else None
    return Recompute(RECOMPUTE[at["recompute"]], ALL_LAYERS if own else layers, at["recompute_parts"], own)


def parts_with(operator: str) -> int:
    """Sum of the bits of the parts that hold `operator`."""
    return sum(PART_BITS[part] for part, operators in PARTS.items() if operator in operators)


def part_bits(parts: Sequence[str]) -> int:
    """Sum of the bits of these parts."""
    return sum(PART_BITS[part] for part in parts)
