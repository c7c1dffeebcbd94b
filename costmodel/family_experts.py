"""Families of mixture-of-experts models: Mixtral, Qwen 2 and 3 MoE, OLMoE, gpt-oss, GLM-4.5, DeepSeek's and Kimi K2 (V3's schema)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from shardplan.costmodel.family import Family, check_even, depth, has_dropout, rotary_heads, windows
from shardplan.costmodel.family_dense import QWEN_WINDOWS, shapes
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.model_fields import Fields


def _attention(values: Fields, *, ffn: str, bias: bool) -> LayerKind:
    """A layer with rmsnorm and a gated dense MLP as wide as key `ffn` says; `bias` is on q, k, v and the output."""
    return LayerKind(
        **rotary_heads(values)._asdict(),
        ffn=values.count(ffn),
        gated_mlp=True,
        norm="rmsnorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        dropout=has_dropout(values, "attention_dropout"),
    )


def _with_experts(values: Fields, kind: LayerKind, experts: str) -> LayerKind:
    """The layer with as many experts as key `experts` says."""
    return replace(
        kind, experts=values.count(experts), experts_per_token=values.at_most("num_experts_per_tok", experts)
    )


def _mixtral(values: Fields) -> Sequence[LayerKind]:
    kind = _with_experts(values, _attention(values, ffn="intermediate_size", bias=False), "num_local_experts")
    kind = replace(kind, balance_weight=values.probability("router_aux_loss_coef"))
    return [replace(kind, window=size) for size in windows(values, lambda _: True)]


def _gpt_oss(values: Fields) -> Sequence[LayerKind]:
    """Biases on all products and on the router, attention sinks; every other layer has a window, the first one does."""
    kind = _attention(values, ffn="intermediate_size", bias=values.flag("attention_bias"))
    kind = replace(_with_experts(values, kind, "num_local_experts"), mlp_bias=True, router_bias=True, sinks=True)
    return [replace(kind, window=size) for size in windows(values, lambda i: i % 2 == 0)]


def _sparse(values: Fields, layer: int) -> bool:
    """Whether a layer of Qwen's has experts: every decoder_sparse_step-th one that mlp_only_layers does not name."""
    value = values.value("mlp_only_layers")
    named = cast("list[object]", value) if isinstance(value, list) else ([] if value is None else [value])
    if not all(type(item) is int and item >= 0 for item in named):
        raise values.bad("mlp_only_layers", "is not a list of layers", "write numbers from 0, or []")
    return layer not in named and (layer + 1) % values.count("decoder_sparse_step") == 0


def _with_qwen_router(values: Fields, kind: LayerKind) -> LayerKind:
    return replace(
        _with_experts(values, replace(kind, ffn=values.count("moe_intermediate_size")), "num_experts"),
        raw_scores=not values.flag("norm_topk_prob"),
        balance_weight=values.probability("router_aux_loss_coef"),
    )


def _qwen_moe(values: Fields, dense: LayerKind, sparse: LayerKind, sizes: Sequence[int]) -> Sequence[LayerKind]:
    return [replace(sparse if _sparse(values, layer) else dense, window=size) for layer, size in enumerate(sizes)]


def _qwen3_moe(values: Fields) -> Sequence[LayerKind]:
    """Norms on queries and keys; one window, if any, in all layers."""
    dense = _attention(values, ffn="intermediate_size", bias=values.flag("attention_bias"))
    dense = replace(dense, qk_norm=True)
    return _qwen_moe(values, dense, _with_qwen_router(values, dense), windows(values, lambda _: True))


def _qwen2_moe(values: Fields) -> Sequence[LayerKind]:
    """Biases on queries, keys and values; a shared expert behind a gate; a window, if any, in every other layer below
    max_window_layers."""
    dense = replace(_attention(values, ffn="intermediate_size", bias=False), qkv_bias=values.flag("qkv_bias"))
    sparse = replace(
        _with_qwen_router(values, dense),
        shared_ffn=values.count("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    last = values.count("max_window_layers", least=0)
    return _qwen_moe(values, dense, sparse, windows(values, lambda i: i % 2 == 0 and i < last))


def _deepseek(values: Fields) -> Sequence[LayerKind]:
    """Multi-head latent attention; the first first_k_dense_replace layers have a dense MLP, the others routed and shared experts."""
    heads, bias = values.count("num_attention_heads"), values.flag("attention_bias")
    if values.count_or("num_key_value_heads", heads) != heads:
        problem = f"differs from {values.show('num_attention_heads')}"
        raise values.bad("num_key_value_heads", problem, "latent attention makes keys for every head: write the same")
    rope = values.count("qk_rope_head_dim")
    check_even(values, "qk_rope_head_dim", rope)
    dense = LayerKind(
        hidden=values.count("hidden_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=values.count("qk_nope_head_dim") + rope,
        ffn=values.count("intermediate_size"),
        gated_mlp=True,
        norm="rmsnorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        dropout=has_dropout(values, "attention_dropout"),
        kv_lora_rank=values.count("kv_lora_rank"),
        q_lora_rank=values.count_or("q_lora_rank", 0),
        qk_rope_head_dim=rope,
        v_head_dim=values.count("v_head_dim"),
    )
    return _dense_then_sparse(values, dense, router_bias=values.value("topk_method") == "noaux_tc")


def _dense_then_sparse(values: Fields, dense: LayerKind, *, router_bias: bool) -> Sequence[LayerKind]:
    """The first first_k_dense_replace layers as they are, the others with routed and shared experts instead of their MLP."""
    first, layers = values.count("first_k_dense_replace", least=0), depth(values)
    if values.value("n_routed_experts") is None or first >= layers:
        return [dense] * layers
    shared = 0 if values.value("n_shared_experts") is None else values.count("n_shared_experts", least=0)
    width = values.count("moe_intermediate_size")
    sparse = replace(
        _with_experts(values, replace(dense, ffn=width), "n_routed_experts"),
        shared_ffn=shared * width,
        router_bias=router_bias,
    )
    return [dense] * first + [sparse] * (layers - first)


def _deepseek_first(values: Fields) -> Sequence[LayerKind]:
    """DeepSeekMoE (arXiv 2401.06066): Llama's attention, and experts as DeepSeek-V2's."""
    dense = _attention(values, ffn="intermediate_size", bias=values.flag("attention_bias"))
    return _dense_then_sparse(values, dense, router_bias=False)


def _glm4_moe(values: Fields) -> Sequence[LayerKind]:
    """Biases on queries, keys and values alone, norms of queries and keys where the file says so; experts as DeepSeek-V3's."""
    dense = _attention(values, ffn="intermediate_size", bias=False)
    dense = replace(dense, qkv_bias=values.flag("attention_bias"), qk_norm=values.flag("use_qk_norm"))
    return _dense_then_sparse(values, dense, router_bias=True)


def _olmoe(values: Fields) -> Sequence[LayerKind]:
    """Norms over all queries and all keys; experts in every layer."""
    kind = _attention(values, ffn="intermediate_size", bias=values.flag("attention_bias"))
    return [_with_experts(values, replace(kind, qk_norm=True, qk_norm_wide=True), "num_experts")] * depth(values)


_QWEN_EXPERTS: Mapping[str, object] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_LATENT: Mapping[str, object] = {
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    defaults={
        **shapes(129280, 7168, 18432, 61, 128, 128, 4096),
        **_LATENT,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
    },
    layers=_deepseek,
    spellings={"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    only={"moe_layer_freq": (1,)},
    mtp="num_nextn_predict_layers",
)

EXPERTS: Mapping[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={
            **shapes(32000, 4096, 14336, 32, 32, 8, 131072),
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        layers=_mixtral,
        spellings={"num_local_experts": "num_experts"},
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        defaults={
            **shapes(151936, 2048, 5632, 24, 16, 16, 32768),
            **QWEN_WINDOWS,
            **_QWEN_EXPERTS,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        layers=_qwen2_moe,
        spellings={"num_experts": "num_local_experts"},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            **shapes(151936, 2048, 6144, 24, 32, 4, 32768),
            **_QWEN_EXPERTS,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "attention_bias": False,
        },
        layers=_qwen3_moe,
        spellings={"num_experts": "num_local_experts"},
    ),
    "qwen3_vl_moe_text": Family(
        architecture="Qwen3VLMoeForConditionalGeneration",
        defaults={
            **shapes(151936, 2048, 5632, 24, 16, 16, 128000),
            **_QWEN_EXPERTS,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "attention_bias": False,
        },
        layers=_qwen3_moe,
        spellings={"num_experts": "num_local_experts"},
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        defaults={
            **shapes(201088, 2880, 2880, 36, 64, 8, 131072),
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
        layers=_gpt_oss,
        spellings={"num_local_experts": "num_experts"},
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        defaults={
            **shapes(102400, 4096, 11008, 32, 32, None, 2048),
            **_LATENT,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": None,
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
        },
        layers=_deepseek,
        spellings={"n_routed_experts": "num_experts"},
        only={"moe_layer_freq": (1,), "mlp_bias": (False,)},
    ),
    "deepseek": Family(
        architecture="DeepseekForCausalLM",
        defaults={
            **shapes(102400, 4096, 11008, 30, 32, None, 2048),
            "attention_bias": False,
            "moe_intermediate_size": 1407,
            "n_routed_experts": None,
            "n_shared_experts": None,
            "num_experts_per_tok": None,
            "first_k_dense_replace": 0,
        },
        layers=_deepseek_first,
        only={"moe_layer_freq": (1,)},
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        defaults={
            **shapes(151552, 4096, 10944, 46, 96, 8, 131072),
            "head_dim": None,
            "attention_bias": False,
            "use_qk_norm": False,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        },
        layers=_glm4_moe,
        spellings={"n_routed_experts": "num_local_experts"},
        mtp="num_nextn_predict_layers",
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        defaults={
            **shapes(50304, 2048, 2048, 16, 16, None, 4096),
            "attention_bias": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        layers=_olmoe,
        spellings={"num_experts": "num_local_experts"},
    ),
}
