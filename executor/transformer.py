"""The reference decoder for layers as in Llama and GPT-2, built from a `Model`; it does not know how it is spread.

Shape suffixes: B sequences, S positions, H hidden, N query heads, K key/value heads, D head size, V vocabulary.
Head counts are read off the tensors (`view(..., -1, D)`): under tensor parallelism a rank sees only its own heads.
Dropout is not applied, so that every layout computes the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardplan.costmodel.model import LayerKind, Model, layer_order

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one pipeline chunk holds of a model: layers first <= i < end, and what stands before and after them."""

    first: int
    end: int
    embedding: bool = True
    head: bool = True


def whole(model: Model) -> Part:
    """All of `model`."""
    return Part(first=0, end=model.layer_count)


def layer_kinds(model: Model) -> list[LayerKind]:
    """The kind of every decoder layer in order."""
    return [model.layers[index][0] for index in layer_order(model)]


def make_norm(kind: LayerKind) -> nn.Module:
    """RMSNorm (weight) or LayerNorm (weight and bias) over H."""
    norm = nn.RMSNorm if kind.norm == "rmsnorm" else nn.LayerNorm
    return norm(kind.hidden, eps=NORM_EPSILON)


def rotary_table(seq: int, head_dim: int, device: torch.device, *, base: float = ROTARY_BASE) -> Tensor:
    """cos + i sin of position * frequency, complex (S, D/2); complex so that mixed precision leaves it in fp32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_BSND: Tensor, table: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), halves paired as in Hugging Face's Llama; in fp32."""
    cos, sin = table.real[:, None, :], table.imag[:, None, :]
    low, high = x_BSND.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_BSND.dtype)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of q (B, S, N, D) over k and v (B, S, K, D)."""


def causal_attention(q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
    """(B, S, N, D), torch's own; which of its kernels runs, the context decides (attention_kernel)."""
    grouped = q_BSND.shape[2] != k_BSKD.shape[2]
    out_BNSD = functional.scaled_dot_product_attention(
        q_BSND.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2), is_causal=True, enable_gqa=grouped
    )
    return out_BNSD.transpose(1, 2)


class Attention(nn.Module):
    """Causal multi-head or grouped-query attention."""

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        self.head_dim = kind.head_dim
        self.attend: Attend = causal_attention
        self.wq = nn.Linear(kind.hidden, kind.heads * kind.head_dim, bias=kind.qkv_bias)
        self.wk = nn.Linear(kind.hidden, kind.kv_heads * kind.head_dim, bias=kind.qkv_bias)
        self.wv = nn.Linear(kind.hidden, kind.kv_heads * kind.head_dim, bias=kind.qkv_bias)
        self.wo = nn.Linear(kind.heads * kind.head_dim, kind.hidden, bias=kind.attention_output_bias)

    def forward(self, x_BSH: Tensor, table: Tensor | None) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        batch, seq, _ = x_BSH.shape
        q_BSND = self.wq(x_BSH).view(batch, seq, -1, self.head_dim)
        k_BSKD = self.wk(x_BSH).view(batch, seq, -1, self.head_dim)
        v_BSKD = self.wv(x_BSH).view(batch, seq, -1, self.head_dim)
        if table is not None:
            q_BSND, k_BSKD = rotate(q_BSND, table), rotate(k_BSKD, table)
        return self.wo(self.attend(q_BSND, k_BSKD, v_BSKD).reshape(batch, seq, -1))


class FeedForward(nn.Module):
    """SwiGLU (w2(silu(w1 x) * w3 x)) or a two-matrix MLP with GELU."""

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        self.gated = kind.gated_mlp
        self.w1 = nn.Linear(kind.hidden, kind.ffn, bias=kind.mlp_bias)
        self.w2 = nn.Linear(kind.ffn, kind.hidden, bias=kind.mlp_bias)
        if self.gated:
            self.w3 = nn.Linear(kind.hidden, kind.ffn, bias=kind.mlp_bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        if self.gated:
            return self.w2(functional.silu(self.w1(x_BSH)) * self.w3(x_BSH))
        return self.w2(functional.gelu(self.w1(x_BSH), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        self.attention_norm = make_norm(kind)
        self.attention = Attention(kind)
        self.ffn_norm = make_norm(kind)
        self.ffn = FeedForward(kind)

    def forward(self, x_BSH: Tensor, table: Tensor | None) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        h_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), table)
        return h_BSH + self.ffn(self.ffn_norm(h_BSH))


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the model has them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model.vocab, model.hidden)
        self.positions = nn.Embedding(model.learned_positions, model.hidden) if model.learned_positions else None

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """(B, S) -> (B, S, H)."""
        x_BSH = self.tokens(tokens_BS)
        if self.positions is None:
            return x_BSH
        return x_BSH + self.positions(torch.arange(tokens_BS.shape[1], device=tokens_BS.device))


class Transformer(nn.Module):
    """A decoder, or the part of it that one pipeline chunk holds; parameter names are those of the whole model."""

    def __init__(self, model: Model, *, seq: int, part: Part) -> None:
        super().__init__()
        kinds = layer_kinds(model)
        self.depth = len(kinds)
        self.seq, self.rotary, self.head_dim = seq, kinds[0].rotary, kinds[0].head_dim
        self.tied = model.tied_embeddings and part.embedding and part.head
        self.embedding = Embedding(model) if part.embedding else None
        self.layers = nn.ModuleDict({str(i): Block(kinds[i]) for i in range(part.first, part.end)})
        self.norm = make_norm(kinds[0]) if part.head else None
        self.head = nn.Linear(model.hidden, model.vocab, bias=False) if part.head else None
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, S) or hidden (B, S, H) from the part before -> logits (B, S, V) or hidden for the part after."""
        x_BSH = x if self.embedding is None else self.embedding(x)
        for layer in self.layers.values():
            x_BSH = layer(x_BSH, self.table)
        if self.norm is None or self.head is None:
            return x_BSH
        return self.head(self.norm(x_BSH))

    def tie(self) -> None:
        """Make the head share the embedding's weight, if the model does; needed after parameters were replaced."""
        if self.tied and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.tokens.weight

    def initialise(self, seed: int) -> None:
        """Fill every parameter from `seed` and its own name, so that any part of any layout gets the same values."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                _fill(parameter, name, seed=seed, depth=self.depth)
        if self.rotary:
            device = next(self.parameters()).device
            self.table = rotary_table(self.seq, self.head_dim, device)


def _fill(parameter: Tensor, name: str, *, seed: int, depth: int) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() == 1:  # norms
        parameter.fill_(1.0)
    else:
        # projections back into the residual stream are scaled down by depth (GPT-2 paper, section 2.3)
        std = INIT_STD / math.sqrt(2 * depth) if name.endswith(("wo.weight", "w2.weight")) else INIT_STD
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
        parameter.normal_(0.0, std, generator=generator)


def build_transformer(model: Model, *, seq: int, part: Part, seed: int, device: torch.device) -> Transformer:
    """The part on `device` in fp32 with its initial values; nothing is allocated for the other parts."""
    with torch.device("meta"):
        built = Transformer(model, seq=seq, part=part)
    built.to_empty(device=device)
    built.tie()
    built.initialise(seed)
    return built
