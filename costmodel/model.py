"""A model as shapes: ordered runs of (layer kind, count), embedding, head; exact parameter counts by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Width of one head's queries and keys; heads x head_dim need not be `hidden`."""
    ffn: int
    """Width of the MLP, or of each expert."""
    gated_mlp: bool
    """Three matrices (SwiGLU, GeGLU) instead of two."""
    gelu_gate: bool = False
    """A gated MLP's gate is GELU (Gemma), not SiLU: same shapes and work, another function."""
    norm: Literal["rmsnorm", "layernorm"]
    """Kind of every norm; layernorm has weight and bias, rmsnorm a weight."""
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
    shared_ffn: int = 0
    """Width of the MLP beside the experts that every token takes: all shared experts together; 0 = none."""
    shared_gate: bool = False
    """The shared experts are weighed by a sigmoid of one product with the stream (Qwen2-MoE)."""
    router_bias: bool = False
    """One number per expert is added to its score (DeepSeek-V3's balancing correction, gpt-oss)."""
    raw_scores: bool = False
    """The router's scores of a token's chosen experts are not scaled to add up to 1 (norm_topk_prob=false of Qwen-MoE)."""
    balance_weight: float = 0.001
    """Weight in the loss of what keeps routers balanced (router_aux_loss_coef, and transformers' default of it)."""
    norms: int = 2
    """Norms of hidden width: 2 before attention and MLP; 4 after each too (Gemma 2, 3); 1 for both in a parallel block (Phi)."""
    parallel: bool = False
    """Attention and MLP read the same stream and are added to it together (GPT-NeoX, Phi)."""
    qk_norm: bool = False
    """Heads of queries and keys are normalised; one weight of head_dim for all query heads, one for all key heads."""
    qk_norm_wide: bool = False
    """With qk_norm, the weight is as wide as all heads together (OLMo 2, Command R+)."""
    window: int = 0
    """Keys a query sees, itself included (sliding window); 0 = all up to itself."""
    sinks: bool = False
    """One learned logit per head takes part in the softmax (gpt-oss)."""
    kv_lora_rank: int = 0
    """Width of the latent from which every head's keys and values are made (MLA, arXiv 2405.04434, section 2.1); 0 = no MLA."""
    q_lora_rank: int = 0
    """With MLA, width of the latent of the queries; 0 = queries are made from the stream."""
    qk_rope_head_dim: int = 0
    """With MLA, the part of head_dim that carries the position; its key is made from the stream, one for all heads."""
    v_head_dim: int = 0
    """Width of one head's values; 0 = head_dim."""
    mtp: bool = False
    """A multi-token prediction module (DeepSeek-V3, arXiv 2412.19437, equations 21-23): the layer is fed by a 2 hidden x hidden
    product of the normalised stream and the normalised embedding of the next token, and followed by a norm and the model's head."""

    @property
    def qk_nope_head_dim(self) -> int:
        """With MLA, the part of head_dim without position."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's values."""
        return self.v_head_dim or self.head_dim

    @property
    def attention_dim(self) -> float:
        """Mean width of a head in the two products of attention, as large as head_dim where values are as wide as keys."""
        return (self.head_dim + self.value_dim) / 2 if self.v_head_dim else float(self.head_dim)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only transformer.

    `layers` holds how many layers there are of each kind. Their order is that of `layers`, one run after the other, unless
    `pattern` gives it: then layer i is of the kind `layers[pattern[i % len(pattern)]]` (Gemma 3: five with a window, one without).
    """

    name: str
    family: str
    """Schema it was read from: llama, gpt2, mixtral, ... (`model_families.FAMILIES`)."""
    layers: tuple[tuple[LayerKind, int], ...]
    vocab: int
    """As published, unpadded; runtimes pad it."""
    tied_embeddings: bool
    learned_positions: int = 0
    """Rows of a learned position table; 0 = none (rotary)."""
    max_positions: int | None = None
    """Longest sequence the model was made for."""
    source: str = ""
    pattern: tuple[int, ...] = ()
    """Indices into `layers` of the first layers, repeated over the depth; () = run after run."""
    mtp_modules: int = 0
    """Multi-token prediction modules after the last layer, each one more layer of the last kind (`LayerKind.mtp`); embedding and head
    are the model's own."""
    head_bias: bool = False
    """The head adds a bias per word (Phi)."""
    logit_softcap: bool = False
    """Logits pass a tanh before the loss (Gemma 2)."""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.layers[0][0].hidden

    @property
    def layer_count(self) -> int:
        """Number of decoder layers, without multi-token prediction modules."""
        return sum(count for _, count in self.layers)

    @property
    def runs(self) -> tuple[tuple[LayerKind, int], ...]:
        """`layers`, and after them the multi-token prediction modules, if any, as one more run: all that a training step goes through."""
        if not self.mtp_modules:
            return self.layers
        last = self.layers[layer_order(self)[-1]][0]
        return (*self.layers, (replace(last, mtp=True), self.mtp_modules))

    @property
    def norm(self) -> str:
        """Kind of the final norm."""
        return self.layers[0][0].norm


LayerPart = Literal[
    "latent_attention",
    "window",
    "qk_norm",
    "post_norms",
    "parallel",
    "sinks",
    "shared_experts",
    "expert_biases",
    "gelu_gate",
    "mtp",
]
PART_NAMES: Mapping[LayerPart, str] = {
    "latent_attention": "latent attention",
    "window": "sliding windows",
    "qk_norm": "norms of queries and keys",
    "post_norms": "norms after attention and MLP",
    "parallel": "attention and MLP side by side",
    "sinks": "attention sinks",
    "shared_experts": "shared experts",
    "expert_biases": "expert biases",
    "gelu_gate": "GELU-gated MLPs",
    "mtp": "multi-token prediction",
}
"""What layers of Llama, GPT-2 and Mixtral do not have, in words."""


def layer_parts(kind: LayerKind, seq: int | None = None) -> tuple[LayerPart, ...]:
    """Which of PART_NAMES a layer has; with sequences of `seq` tokens, a window as long as they are is none."""
    has: Mapping[LayerPart, bool] = {
        "latent_attention": kind.kv_lora_rank > 0,
        "window": kind.window > 0 and (seq is None or kind.window < seq),
        "qk_norm": kind.qk_norm,
        "post_norms": kind.norms == 4,
        "parallel": kind.parallel,
        "sinks": kind.sinks,
        "shared_experts": kind.shared_ffn > 0,
        "expert_biases": kind.experts > 0 and (kind.mlp_bias or kind.router_bias),
        "gelu_gate": kind.gelu_gate,
        "mtp": kind.mtp,
    }
    return tuple(part for part, present in has.items() if present)


def layer_order(model: Model) -> tuple[int, ...]:
    """Index into `model.layers` of every decoder layer, first to last."""
    if model.pattern:
        return tuple(model.pattern[i % len(model.pattern)] for i in range(model.layer_count))
    return tuple(index for index, (_, count) in enumerate(model.layers) for _ in range(count))


def runs_of(kinds: Sequence[LayerKind]) -> tuple[tuple[tuple[LayerKind, int], ...], tuple[int, ...]]:
    """(`layers`, `pattern`) of a model whose decoder layers are `kinds`, first to last; the shortest pattern there is."""
    different = tuple(dict.fromkeys(kinds))
    order = [different.index(kind) for kind in kinds]
    layers = tuple((kind, order.count(index)) for index, kind in enumerate(different))
    if order == sorted(order):
        return layers, ()
    period = next(p for p in range(1, len(order) + 1) if all(order[i] == order[i % p] for i in range(p, len(order))))
    return layers, tuple(order[:period])


def layer_parameters(kind: LayerKind) -> Mapping[str, int]:
    """Parameters of one layer by part: attention, mlp (all routed experts), router, norms; where there are any, shared_experts,
    latent (the products of MLA that make the latents and the shared key, whole on each tensor-parallel rank) and mtp_projection."""
    attention, latent = _attention_parameters(kind)
    up = 2 if kind.gated_mlp else 1
    mlp = (up + 1) * kind.hidden * kind.ffn + (up * kind.ffn + kind.hidden if kind.mlp_bias else 0)
    width = 2 if kind.norm == "layernorm" else 1
    parts = {
        "attention": attention,
        "mlp": mlp * max(kind.experts, 1),
        "router": kind.hidden * kind.experts
        + (kind.experts if kind.router_bias else 0)
        + (kind.hidden if kind.shared_gate else 0),
        "norms": width * (kind.norms * kind.hidden + _head_norm(kind))
        + width * (kind.q_lora_rank + kind.kv_lora_rank + (3 * kind.hidden if kind.mtp else 0)),
    }
    if kind.shared_ffn:
        parts["shared_experts"] = (up + 1) * kind.hidden * kind.shared_ffn
    if latent:
        parts["latent"] = latent
    if kind.mtp:
        parts["mtp_projection"] = 2 * kind.hidden * kind.hidden
    return parts


def _head_norm(kind: LayerKind) -> int:
    """Width of the norms of queries and keys."""
    if not kind.qk_norm:
        return 0
    return ((kind.heads + kind.kv_heads) if kind.qk_norm_wide else 2) * kind.head_dim


def _attention_parameters(kind: LayerKind) -> tuple[int, int]:
    """(products and biases that tensor parallelism splits by heads, products of MLA it does not split)."""
    output = kind.heads * kind.value_dim * kind.hidden + (kind.hidden if kind.attention_output_bias else 0)
    sinks = kind.heads if kind.sinks else 0
    if not kind.kv_lora_rank:
        width = kind.heads * kind.head_dim + kind.kv_heads * (kind.head_dim + kind.value_dim)
        return (kind.hidden + (1 if kind.qkv_bias else 0)) * width + output + sinks, 0
    query = (kind.q_lora_rank or kind.hidden) * kind.heads * kind.head_dim
    key_value = kind.kv_lora_rank * kind.heads * (kind.qk_nope_head_dim + kind.value_dim)
    latents = kind.q_lora_rank + kind.kv_lora_rank + kind.qk_rope_head_dim
    return query + key_value + output + sinks, (kind.hidden + (1 if kind.qkv_bias else 0)) * latents


def split_parameters(kind: LayerKind) -> tuple[int, int]:
    """Parameters of one layer that tensor parallelism (divides, keeps whole on every rank): norms, routers, MLA's latents and biases of
    sums over the ranks (of the output of attention and of a dense MLP) are whole."""
    parts = layer_parameters(kind)
    summed = int(kind.attention_output_bias) + int(kind.mlp_bias and not kind.experts)
    whole = parts["norms"] + parts["router"] + parts.get("latent", 0) + summed * kind.hidden
    return sum(parts.values()) - whole, whole


def matrix_parameters(kind: LayerKind) -> float:
    """Parameters of the matrix products one token goes through in one layer: no biases, no norms, only the chosen experts."""
    bare = replace(kind, qkv_bias=False, attention_output_bias=False, mlp_bias=False, router_bias=False, sinks=False)
    parts = layer_parameters(bare)
    active = kind.experts_per_token / kind.experts if kind.experts else 1.0
    extra = sum(parts.get(part, 0) for part in ("shared_experts", "latent", "mtp_projection"))
    return parts["attention"] + parts["router"] + extra + parts["mlp"] * active


def attended_tokens(kind: LayerKind, keys: int) -> int:
    """Keys counted for one query of a sequence of `keys` tokens: all of them, or the window; the causal mask is not taken off."""
    return min(keys, kind.window) if kind.window else keys


def _unused_parameters(kind: LayerKind) -> int:
    """Parameters of the experts of one layer that a token is not sent to."""
    if not kind.experts:
        return 0
    return layer_parameters(kind)["mlp"] * (kind.experts - kind.experts_per_token) // kind.experts


def parameter_counts(model: Model) -> Mapping[str, int]:
    """Exact parameters by part: embedding, positions, attention, mlp, router, norms, final_norm, head; total, active; where there
    are any, shared_experts, latent and mtp (multi-token prediction modules, without the embedding and head they share).

    `total` counts a tied embedding once (`head` is 0). `active` are those one token uses: of each expert MLP only
    `experts_per_token` of `experts`. For GPT shapes `total` is eq. 2 of arXiv 2104.04473,
    P = 12 l h^2 (1 + 13/(12h) + (V+s)/(12lh)), plus 2h: the weight and bias of the final norm, which eq. 2 leaves out.
    """
    counts = {"embedding": model.vocab * model.hidden, "positions": model.learned_positions * model.hidden}
    for kind, count in model.layers:
        for part, number in layer_parameters(kind).items():
            counts[part] = counts.get(part, 0) + number * count
    norm = model.hidden * (2 if model.norm == "layernorm" else 1)
    for kind, count in model.runs[len(model.layers) :]:
        counts["mtp"] = count * sum(layer_parameters(kind).values())
    counts["final_norm"] = norm
    counts["head"] = 0 if model.tied_embeddings else model.vocab * model.hidden
    counts["head"] += model.vocab if model.head_bias else 0
    counts["total"] = sum(counts.values())
    counts["active"] = counts["total"] - sum(count * _unused_parameters(kind) for kind, count in model.runs)
    return counts
