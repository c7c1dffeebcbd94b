"""A model as shapes: ordered runs of (layer kind, count), embedding, head; exact parameter counts by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One kind of decoder layer: attention, then MLP (dense or mixture of experts)."""

    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads (equal to `heads`, or fewer: grouped-query attention)."""
    head_dim: int
    """Width of one head; heads x head_dim need not be `hidden`."""
    ffn: int
    """Width of the MLP, or of each expert."""
    gated_mlp: bool
    """Three matrices (SwiGLU, GeGLU) instead of two."""
    norm: Literal["rmsnorm", "layernorm"]
    """Two norms a layer; layernorm has weight and bias, rmsnorm a weight."""
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    rotary: bool = True
    dropout: bool = False
    """Residual and attention dropout masks are kept (GPT-2 and GPT-3 era training)."""
    experts: int = 0
    """0 = dense MLP."""
    experts_per_token: int = 0
    """Experts a token is sent to; 0 = dense MLP."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only transformer."""

    name: str
    family: str
    """Schema it was read from: llama, gpt2, mixtral."""
    layers: tuple[tuple[LayerKind, int], ...]
    vocab: int
    """As published, unpadded; runtimes pad it."""
    tied_embeddings: bool
    learned_positions: int = 0
    """Rows of a learned position table; 0 = none (rotary)."""
    max_positions: int | None = None
    """Longest sequence the model was made for."""
    source: str = ""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.layers[0][0].hidden

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return sum(count for _, count in self.layers)

    @property
    def norm(self) -> str:
        """Kind of the final norm."""
        return self.layers[0][0].norm


def layer_parameters(kind: LayerKind) -> Mapping[str, int]:
    """Parameters of one layer by part: attention, mlp (all experts), router, norms."""
    query = kind.hidden * kind.heads * kind.head_dim
    key_value = 2 * kind.hidden * kind.kv_heads * kind.head_dim
    output = kind.heads * kind.head_dim * kind.hidden
    attention = query + key_value + output
    attention += (kind.heads + 2 * kind.kv_heads) * kind.head_dim if kind.qkv_bias else 0
    attention += kind.hidden if kind.attention_output_bias else 0
    up = 2 if kind.gated_mlp else 1
    mlp = (up + 1) * kind.hidden * kind.ffn + (up * kind.ffn + kind.hidden if kind.mlp_bias else 0)
    norm = kind.hidden * (2 if kind.norm == "layernorm" else 1)
    return {
        "attention": attention,
        "mlp": mlp * max(kind.experts, 1),
        "router": kind.hidden * kind.experts,
        "norms": 2 * norm,
    }


def parameter_counts(model: Model) -> Mapping[str, int]:
    """Exact parameters by part: embedding, positions, attention, mlp, router, norms, final_norm, head; total, active.

    `total` counts a tied embedding once (`head` is 0). `active` are those one token uses: of each expert MLP only
    `experts_per_token` of `experts`. For GPT shapes `total` is eq. 2 of arXiv 2104.04473,
    P = 12 l h^2 (1 + 13/(12h) + (V+s)/(12lh)), plus 2h: the weight and bias of the final norm, which eq. 2 leaves out.
    """
    counts = {"embedding": model.vocab * model.hidden, "positions": model.learned_positions * model.hidden}
    for kind, count in model.layers:
        for part, number in layer_parameters(kind).items():
            counts[part] = counts.get(part, 0) + number * count
    counts["final_norm"] = model.hidden * (2 if model.norm == "layernorm" else 1)
    counts["head"] = 0 if model.tied_embeddings else model.vocab * model.hidden
    counts["total"] = sum(counts.values())
    counts["active"] = counts["total"] - sum(
        count * layer_parameters(kind)["mlp"] * (kind.experts - kind.experts_per_token) // kind.experts
        for kind, count in model.layers
        if kind.experts
    )
    return counts
