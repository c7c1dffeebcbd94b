"""What the executing software holds in memory, as data (`[states.*]` and `[working_set]` of runtimes/*.toml)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

BytesPerParameter = float | Literal["gradient"]
"""A number, or "gradient": the bytes of the gradient dtype in use."""


class _FromFile:
    """Unknown keys in the file are errors."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class StateBytes(_FromFile):
    """Model-state bytes per parameter at one ZeRO stage."""

    whole: Mapping[str, BytesPerParameter]
    """Held in full on every rank: keys parameters, gradients, optimizer."""
    sharded: Mapping[str, BytesPerParameter]
    """Divided by the ranks ZeRO shards over."""
    accumulating: Mapping[str, BytesPerParameter]
    """Held in full too, while more than one micro-batch accumulates."""
    stepping: Mapping[str, BytesPerParameter]
    """Divided too, made for the optimizer step, when activations are gone, and dropped after it."""


@dataclass(frozen=True, kw_only=True)
class States(_FromFile):
    """States of one precision by ZeRO stage."""

    gradient_dtype: str
    """Of accumulation and reduction unless the job says otherwise."""
    gradient_dtypes: tuple[str, ...]
    """What the job may ask for."""
    zero: tuple[StateBytes, ...]
    """Index = ZeRO stage; stages the runtime lacks are absent from `abilities.zero` and repeat the stage below."""


@dataclass(frozen=True, kw_only=True)
class WorkingSet(_FromFile):
    """Transient memory beside states and activations."""

    gathered_layers: float
    """ZeRO-3: layers whose parameters are whole at the same time, in the compute dtype."""
    gradient_layers: float
    """ZeRO-2/3: layers whose gradients are whole before they are reduced."""
    root_stays_gathered: bool
    """ZeRO-3: embedding, final norm and head stay whole through forward and backward."""
    buffer_bytes: float
    """Communication buckets and workspaces of a GPU rank that has any peer."""
    workspace_bytes: float = 0.0
    """Workspaces of cuBLAS in torch's allocator, on any GPU; counted as buffers."""
    outside_bytes: float = 0.0
    """Of such a rank outside torch's allocator, beside the context of the device: NCCL channels."""
    offload_moves: tuple[str, ...]
    """Parts whose sharded bytes live in host memory when the optimizer is offloaded: parameters, gradients, optimizer."""
    tied_twice_in_v: bool = False
    """In V placement, where one rank holds both ends of the model, a tied embedding and its head are two tables all the same."""
    gradients_freed: bool = False
    """Without accumulation gradients appear as the backward makes them, when activations are at their peak there are none but those of
    `waiting_layers`: freed after each step and kept in no buckets (FSDP, or one rank)."""
    waiting_layers: float = 0.0
    """Of `gradient_layers`, those whose whole gradients are still there when activations are at their peak."""
    autocast_copies: bool = False
    """Under torch.autocast fp32 parameters are gathered, and their 16-bit copies live until the forward ends (its weight cache)."""
    exchanges_alone: bool = False
    """A 16-bit group of one rank gathers and reduces into buffers of its own all the same (fully_shard): its last reduction holds the
    gradients of embedding and head twice, when activations and 16-bit parameters are gone, and leaves blocks of its own behind."""
    reduction_held: bool = False
    """What a micro-batch reduces last, embedding and head, stays whole until the next one's first reduction (fully_shard where the
    backward is not said to be the last)."""
    matrix_gradient_bytes: float = 0.0
    """Bytes per parameter of a layer's largest matrix while its gradient is added to the accumulated one; counted as buffers."""
