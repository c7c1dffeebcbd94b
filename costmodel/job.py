"""What is to be trained: sequence length, batch, precision, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.hw_profiles.errors import InputError, nearest

PRECISIONS = ("bf16", "fp16", "fp32", "fp8")
OPTIMIZERS = ("adamw", "adamw16bit", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor", "sgd")
"""adamw16bit and adamw8bit keep their moments in 16 and in 8 bits, paged ones in memory that CUDA moves to the host and back."""
PAGED = "paged_"
GRAD_DTYPES = ("fp32", "bf16", "fp16")
METHODS = ("full", "lora", "qlora")
"""What is trained: every parameter, or adapters beside frozen matrices in 16 bits, or in 4 (adapters.py)."""
LORA_TARGETS = {
    "all": ("q", "k", "v", "o", "up", "down"),
    "attention": ("q", "k", "v", "o"),
    "qv": ("q", "v"),
}
"""Products of a layer that get an adapter."""
_TARGET_WORDS = (*LORA_TARGETS["all"], *LORA_TARGETS)
NOT_MODELLED = ("fp4",)
MOST_RANK = 4096
LARGEST = 10**9
"""No sequence or batch is longer."""
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Of what is kept. fp8 is only what products of layers read: parameters and the stream of activations stay in bf16."""
GATHERED_BYTES = {**BYTES_OF, "fp8": 1}
"""Of a gathered parameter: torchao's enable_fsdp_float8_all_gather and Transformer Engine's fp8 parameters send 8 bits."""
OUTSIDE_PRODUCTS = {"fp8": "bf16"}
"""Precision of attention, embedding and head where it is another one than the job's."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters of a job."""

    rank: int
    products: tuple[str, ...]
    """Those of LORA_TARGETS["all"] that have one."""
    quantised: bool
    """The base lies in 4 bits."""


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
    method: str = "full"
    """full, lora or qlora."""
    lora_rank: int = 16
    """Without meaning when method = full."""
    lora_targets: str = "all"
    """all, attention (queries, keys, values, output), qv, or products by name: q+k+v+up+down (up: the gate too); without meaning when
    method = full."""
    document_tokens: int | None = None
    """Tokens of one document when several are packed into a sequence and attend to themselves only; None = one document a sequence."""
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
                    remedy="give 1 or more" if value < 1 else "give less",
                )
        words: list[tuple[str, str, tuple[str, ...]]] = [
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("method", self.method, METHODS),
            *(("lora_targets", name, _TARGET_WORDS) for name in self._targets),
        ]
        if type(self.lora_rank) is not int or not 1 <= self.lora_rank <= MOST_RANK:
            raise InputError(
                f"lora_rank={self.lora_rank} is not a rank", place="--lora-rank", remedy=f"use 1 to {MOST_RANK}"
            )
        document = self.document_tokens
        if document is not None and (type(document) is not int or not 1 <= document <= self.seq):
            raise InputError(
                f"document_tokens={document} is not a length within a sequence of {self.seq}",
                place="--document-tokens",
                remedy=f"use 1 to {self.seq}, or leave it out for one document a sequence",
            )
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
            raise InputError(
                f"capacity_factor={self.capacity_factor:g} is not positive",
                place="--capacity-factor",
                remedy="use 1.25 for a quarter more than an even share, or leave it out for dropless experts",
            )

    @property
    def _targets(self) -> tuple[str, ...]:
        """Products of a layer that adapters stand beside."""
        return LORA_TARGETS.get(self.lora_targets) or tuple(dict.fromkeys(self.lora_targets.split("+")))

    @property
    def adapters(self) -> Adapters | None:
        """None where every parameter is trained."""
        if self.method == "full":
            return None
        return Adapters(rank=self.lora_rank, products=self._targets, quantised=self.method == "qlora")

    @property
    def attended(self) -> int:
        """Tokens of one document."""
        return self.document_tokens or self.seq

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq * self.global_batch
