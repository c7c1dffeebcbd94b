"""The reference decoder for layers as in Llama, GPT-2 and Mixtral, built from a `Model`; it does not know how it is spread.

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
from shardplan.executor.experts import MixtureOfExperts

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-5
INIT_STD = 0.02
TABLE, HEAD = "embedding.tokens.weight", "head.weight"
"""Names of the two ends of the vocabulary, one parameter where embeddings are tied."""


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
    """Rotary position embedding (RoFormer, arXiv 2104.09864), halves paired as in Hugging Face's Llama; in fp32.

    `table` is (S, D/2), or (B, S, D/2) where sequences differ in their positions."""
    cos, sin = table.real[..., None, :], table.imag[..., None, :]
    low, high = x_BSND.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_BSND.dtype)


Attend = Callable[..., Tensor]
"""Causal attention of q (B, S, N, D) over k and v (B, S, K, D), inside each document where a fourth tensor tells them apart."""


def takes_grouped(q_BSND: Tensor) -> bool:
    """Whether torch's fused attention on the device of q has several queries of one key; its kernel of fp32 on a GPU has not."""
    return not (q_BSND.is_cuda and q_BSND.dtype == torch.float32)


def causal_attention(q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
    """(B, S, N, D), torch's own; which of its kernels runs, the context decides (attention_kernel)."""
    grouped = q_BSND.shape[2] != k_BSKD.shape[2]
    if grouped and not takes_grouped(q_BSND):
        each = q_BSND.shape[2] // k_BSKD.shape[2]
        k_BSKD, v_BSKD = (x_BSKD.repeat_interleave(each, dim=2) for x_BSKD in (k_BSKD, v_BSKD))
        grouped = False
    out_BNSD = functional.scaled_dot_product_attention(
        q_BSND.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask_B1SS,
        is_causal=mask_B1SS is None,
        enable_gqa=grouped,
    )
    return out_BNSD.transpose(1, 2)


def document_mask(positions_BS: Tensor) -> Tensor:
    """(B, 1, S, S), true where a query may see a key: of its own document, which begins at position 0, and not behind it."""
    documents_BS = (positions_BS == 0).cumsum(1)
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril()[:, None]


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

    def forward(self, x_BSH: Tensor, table: Tensor | None, documents: Tensor | None = None) -> Tensor:
        """(B, S, H) -> (B, S, H); `documents` is what `attend` takes to tell them apart."""
        batch, seq, _ = x_BSH.shape
        q_BSND = self.wq(x_BSH).view(batch, seq, -1, self.head_dim)
        k_BSKD = self.wk(x_BSH).view(batch, seq, -1, self.head_dim)
        v_BSKD = self.wv(x_BSH).view(batch, seq, -1, self.head_dim)
        if table is not None:
            q_BSND, k_BSKD = rotate(q_BSND, table), rotate(k_BSKD, table)
        apart = () if documents is None else (documents,)
        return self.wo(self.attend(q_BSND, k_BSKD, v_BSKD, *apart).reshape(batch, seq, -1))


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

    def __init__(self, kind: LayerKind, *, routers: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(kind)
        self.attention = Attention(kind)
        self.ffn_norm = make_norm(kind)
        self.ffn = MixtureOfExperts(kind, routers=routers) if kind.experts else FeedForward(kind)

    def forward(self, x_BSH: Tensor, table: Tensor | None, documents: Tensor | None = None) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        h_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), table, documents=documents)
        return h_BSH + self.ffn(self.ffn_norm(h_BSH))


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the model has them."""

    places: Tensor | None
    """Positions of the tokens this rank holds; None: from 0 on."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model.vocab, model.hidden)
        self.positions = nn.Embedding(model.learned_positions, model.hidden) if model.learned_positions else None
        self.register_buffer("places", None, persistent=False)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """(B, S) -> (B, S, H); positions count from the start of the sequence unless given."""
        x_BSH = self.tokens(tokens_BS)
        if self.positions is None:
            return x_BSH
        if positions_BS is None:
            positions_BS = (
                torch.arange(tokens_BS.shape[1], device=tokens_BS.device) if self.places is None else self.places
            )
        return x_BSH + self.positions(positions_BS)


class Transformer(nn.Module):
    """A decoder, or the part of it that one pipeline chunk holds; parameter names are those of the whole model."""

    def __init__(self, model: Model, *, seq: int, part: Part) -> None:
        super().__init__()
        kinds = layer_kinds(model)
        self.depth = len(kinds)
        self.seq, self.rotary, self.head_dim = seq, kinds[0].rotary, kinds[0].head_dim
        self.ties = model.tied_embeddings
        self.tied = model.tied_embeddings and part.embedding and part.head
        self.embedding = Embedding(model) if part.embedding else None
        routers = sum(kind.experts > 0 for kind in kinds)
        self.layers = nn.ModuleDict({str(i): Block(kinds[i], routers=routers) for i in range(part.first, part.end)})
        self.norm = make_norm(kinds[0]) if part.head else None
        self.head = nn.Linear(model.hidden, model.vocab, bias=False) if part.head else None
        self.register_buffer("table", None, persistent=False)
        self.tell_apart: Callable[[Tensor], Tensor] = document_mask
        """Positions (B, S) -> what attention takes to keep documents apart."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, S) or hidden (B, S, H) from the part before -> logits (B, S, V) or hidden for the part after.

        `positions` (B, S) count each token from the start of its document, beyond which it then sees nothing.
        """
        x_BSH = x if self.embedding is None else self.embedding(x, positions)
        table, documents = self.table, None
        if positions is not None:
            table, documents = None if table is None else table[positions], self.tell_apart(positions)
        for layer in self.layers.values():
            x_BSH = layer(x_BSH, table, documents=documents)
        if self.norm is None or self.head is None:
            return x_BSH
        return self.head(self.norm(x_BSH))

    def tie(self) -> None:
        """Make the head share the embedding's weight, if the model does; needed after parameters were replaced."""
        if self.tied and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.tokens.weight

    def whole_name(self, name: str) -> str:
        """The name in the whole model of this part's parameter `name`: a tied head apart from its embedding is a copy of that."""
        return TABLE if self.ties and name == HEAD else name

    def compute_with(self, *, rotary_base: float, norm_epsilon: float) -> None:
        """Take these in place of `ROTARY_BASE` and `NORM_EPSILON`; before the part is spread."""
        for module in self.modules():
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.eps = norm_epsilon
        if self.table is not None:
            self.table = rotary_table(self.seq, self.head_dim, self.table.device, base=rotary_base)

    def initialise(self, seed: int) -> None:
        """Fill every parameter from `seed` and its own name, so that any part of any layout gets the same values."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                _fill(parameter, self.whole_name(name), seed=seed, depth=self.depth)
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
        std = INIT_STD / math.sqrt(2 * depth) if name.endswith(("wo.weight", "w2.weight", "experts.w2")) else INIT_STD
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
