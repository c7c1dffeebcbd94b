"""How a runtime moves states and activations between the GPU and other memory, as data (`[offload]` of runtimes/*.toml)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Offloading:
    """Behaviour of the software; rates and sizes are the machine's. The defaults are those of a pinned, double-buffered engine."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    parameters: tuple[str, ...] = ("none",)
    """Tiers that 16-bit parameters can live in (words of `offload_params`)."""
    activations: tuple[str, ...] = ("none",)
    """Tiers for the inputs of recomputed layers (words of `offload_activations`)."""
    ratio_zero: tuple[int, ...] = ()
    """ZeRO stages with which a share of the optimizer can stay on the GPU (`offload_ratio` below 1)."""
    optimizer_with_parameters: bool = False
    """The optimizer is offloaded only together with the parameters."""
    accumulates_on_gpu: bool = False
    """Gradients accumulated in host memory are fetched, added to on the GPU and sent back by every further micro-batch."""
    update_copy_rate: float = 1.0
    """Rate at which updated parameters come up, relative to pinned copies."""
    activation_copy_rate: float = 1.0
    """The same of activations, both ways."""
    activation_overlap: float = 1.0
    """Share of activation copies that can hide behind compute."""
    fetch_overlap: float = 1.0
    """Share of fetched parameters that can hide behind compute."""
    delayed_update: bool = False
    """The update of one step runs beside the compute of the next (one-step delayed parameter update)."""
    adam_slowdown: float = 1.0
    """Time of the update on the CPU relative to a vectorised, threaded Adam."""
    nvme_group_parameters: float = 0.0
    """Parameters whose optimizer states are in host memory at once on their way from and to flash."""
    nvme_parameter_buffer_bytes: float = 0.0
    """Host buffers of a GPU for parameters on their way from flash."""
