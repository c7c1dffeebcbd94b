"""How a runtime runs layers whose experts lie on several ranks, as data (`[expert_parallel]` of runtimes/*.toml)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Behaviour of the software. The defaults are those of one grouped kernel for all experts and one all-to-all of copies."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    separate_products: bool = False
    """Each local expert's product is a kernel of its own, on a few streams, and fills waves of its own."""
    product_rate: float = 1.0
    """Of the kernel that computes the products of experts on a GPU, relative to dense ones of the same shapes."""
    product_launches: float = 0.0
    """Kernels launched for each local expert and product; 0 where one grouped kernel computes them all."""
    cast_launches: float = 0.0
    """Those beyond them where operands are cast to 8 bits."""
    layer_launches: float = 0.0
    """Kernels launched forward to route, order and exchange tokens, the interpreter's time counted as launches."""
    tokens_once: bool = False
    """A token goes once to each rank and once over the network to each node, and is copied for its experts there (DeepEP);
    otherwise one copy for each chosen expert is sent, and ordered by expert before and after."""
    ordering_passes: float = 1.0
    """Traffic of making, ordering and joining copies, relative to one kernel that reads and writes each once."""
    kept_outputs: float = 1.0
    """Copies of what experts return that are kept: 1 where tokens are weighed after the experts, 0 where inside them."""
    activation_traffic: float = 1.0
    """Traffic of the experts' activation relative to a kernel of its own; 0 where the product before it computes it."""
    bias_passes: float = 1.0
    """Traffic of adding the biases of experts, weighed like their outputs, relative to one tensor of those; forward and backward alike."""
    overlap: float = 0.0
    """Share of the exchange of tokens that the compute of another micro-batch can hide."""
    joins_passes: bool = False
    """It hides behind the other pass of another micro-batch, joined operator by operator (Megatron-Core's combined_1f1b.py): only where
    tokens are dispatched, stages of a pipeline have several chunks, and no layer is recomputed in full."""
