"""How a runtime trains adapters beside frozen weights, and with which optimizers, as data (`[tuning]` of runtimes/*.toml)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Behaviour of the software. The constants of 4-bit blocks are by default those of NF4 with double quantisation (arXiv
    2305.14314, section 3): blocks of 64 weights, an 8-bit scale each, an fp32 scale for 256 of them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    optimizer_zero: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """ZeRO stages that an optimizer goes with; all where it is not named."""
    one_dtype: bool = False
    """ZeRO-3: weights that are gathered together are stored in one dtype, so adapters are trained in that of the frozen weights."""
    scale_bytes: float = 1 / 64 + 4 / (64 * 256)
    """Of the constants of 4-bit blocks, per weight: 0.127 bits."""
    scales_sharded: bool = True
    """ZeRO-3 shards the constants too; else every rank has all of them."""
    keeps_inputs: bool = False
    """The product with a 4-bit weight keeps its input for the backward pass, though no weight gradient needs it."""
    dropout: Literal["none", "shared", "each"] = "none"
    """Adapters drop out some of their input: a copy and a mask of one byte an element are kept instead of the input, one for those that
    share it, or one for each of them."""
    logit_bytes: float | None = None
    """Per logit at the peak of the loss where the head is frozen; None = as with a trained one (`activations.logit_bytes`)."""
    loads_whole: bool = False
    """ZeRO-3: each rank makes the whole model on its GPU before it shards it."""
