"""What is to be trained: sequence length, batch, precision, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.hw_profiles.errors import InputError, nearest

PRECISIONS = ("bf16", "fp16", "fp32", "fp8")
OPTIMIZERS = ("adamw", "sgd")
GRAD_DTYPES = ("fp32", "bf16", "fp16")
NOT_MODELLED = ("fp4",)
LARGEST = 10**9
"""No sequence or batch is longer."""
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Of what is kept. fp8 is only what products of layers read: parameters and the stream of activations stay in bf16."""
GATHERED_BYTES = {**BYTES_OF, "fp8": 1}
"""Of a gathered parameter: torchao's enable_fsdp_float8_all_gather and Transformer Engine's fp8 parameters send 8 bits."""
OUTSIDE_PRODUCTS = {"fp8": "bf16"}
"""Precision of attention, embedding and head where it is another one than the job's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job; `sequences` are `seq` tokens long."""

    seq: int
    """Tokens per sequence."""
    global_batch: int
    """Sequences per optimizer step."""
    precision: str = "bf16"
    """Of the matrix products: bf16, fp16, fp32, or fp8 for those of layers with bf16 for the rest."""
    optimizer: str = "adamw"
    grad_dtype: str | None = None
    """Of gradient accumulation and reduction; None = the runtime's own for this precision."""
    tokens: float | None = None
    """Token budget of the whole training, if one was given; recorded in the plan."""
    expert_imbalance: float = 1.0
    """Tokens that the busiest rank's experts get, relative to the mean over expert-parallel ranks (1 = even)."""
    capacity_factor: float | None = None
    """Each expert computes this times its even share of the tokens, by dropping and padding; None = dropless."""

    def __post_init__(self) -> None:
        for name, value in (("seq", self.seq), ("global_batch", self.global_batch)):
            place = f"--{name.replace('_', '-')}"
            if type(value) is not int:
                raise InputError(f"{name}={value!r} is not a whole number", place=place)
            if not 1 <= value <= LARGEST:
                raise InputError(
                    f"{name}={value} is not positive" if value < 1 else f"{name}={value} is above {LARGEST}",
                    place=place,
                )
        words: list[tuple[str, str, tuple[str, ...]]] = [
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ]
        if self.grad_dtype is not None:
            words.append(("grad_dtype", self.grad_dtype, GRAD_DTYPES))
        for name, word, known in words:
            if word in NOT_MODELLED:
                raise InputError(
                    f"{name}={word!r} is not modelled yet", place=f"--{name}", remedy=f"use {' or '.join(known)}"
                )
            if word not in known:
                raise InputError(
                    f"{name}={word!r} is unknown", place=f"--{name.replace('_', '-')}", remedy=nearest(word, known)
                )
        if self.tokens is not None and not 0 < self.tokens < float("inf"):
            raise InputError(
                f"tokens={self.tokens:g} is not a positive number",
                place="--tokens",
                remedy="give the tokens of the whole training, for instance 15e12",
            )
        if not 1 <= self.expert_imbalance < float("inf"):
            raise InputError(
                f"expert_imbalance={self.expert_imbalance:g} is not a number of 1 or more",
                place="--expert-imbalance",
                remedy="use 1 for even loads, 1.3 where the busiest rank gets 30 % more",
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise InputError(f"capacity_factor={self.capacity_factor:g} is not positive", place="--capacity-factor")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq * self.global_batch
