"""Families of dense models near Llama's: InternLM 2, StarCoder 2, Command R, OLMo 2 and 3, SmolLM 3, Seed-OSS, Granite, ERNIE 4.5,
GLM 4, Nemotron, and the text models of Qwen's with vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardplan.costmodel.family import Family, depth, has_dropout, rotary_heads, windows
from shardplan.costmodel.family_dense import DENSE, gated_rmsnorm, shapes
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.model_fields import Fields


def _internlm2(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer; one key for the biases of attention."""
    bias = values.flag("bias")
    return [replace(gated_rmsnorm(values), qkv_bias=bias, attention_output_bias=bias)] * depth(values)


def _seed_oss(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer; the output of attention has a key of its own for its bias."""
    return [replace(gated_rmsnorm(values), attention_output_bias=values.flag("attention_out_bias"))] * depth(values)


def _smollm3(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer. Every fourth one has no rotary embedding (no_rope_layers): the same shapes, its traffic is counted all the same."""
    kind = gated_rmsnorm(values)
    return [replace(kind, window=size) for size in windows(values, lambda _: False)]


def _olmo2(values: Fields) -> Sequence[LayerKind]:
    """Two norms, after attention and MLP, and norms over all queries and all keys; a window, if any, in three layers of four (OLMo 3)."""
    kind = replace(gated_rmsnorm(values), qk_norm=True, qk_norm_wide=True)
    sizes = windows(values, lambda i: (i + 1) % 4 != 0) if "layer_types" in values.defaults else [0] * depth(values)
    return [replace(kind, window=size) for size in sizes]


def _cohere(values: Fields) -> Sequence[LayerKind]:
    """Attention and a gated MLP side by side behind one norm, which has a weight and no bias, as an rmsnorm."""
    wide = "use_qk_norm" in values.defaults and values.flag("use_qk_norm")
    kind = replace(gated_rmsnorm(values), norms=1, parallel=True, qk_norm=wide, qk_norm_wide=wide)
    if "sliding_window" not in values.defaults:
        return [kind] * depth(values)
    period = values.count("sliding_window_pattern")
    return [replace(kind, window=size) for size in windows(values, lambda i: (i + 1) % period != 0)]


def _starcoder2(values: Fields) -> Sequence[LayerKind]:
    """Layer norms, two MLP matrices, biases everywhere, fewer key-value heads; one window, if any, in all layers."""
    bias = values.flag("use_bias")
    kind = LayerKind(
        **rotary_heads(values)._asdict(),
        ffn=values.count("intermediate_size"),
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        dropout=has_dropout(values, "residual_dropout", "embedding_dropout", "attention_dropout"),
    )
    return [replace(kind, window=size) for size in windows(values, lambda _: True)]


def _one_bias(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer; one key for all its biases."""
    bias = values.flag("use_bias")
    kind = replace(gated_rmsnorm(values), qkv_bias=bias, attention_output_bias=bias, mlp_bias=bias)
    return [kind] * depth(values)


def _glm(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer; biases, if any, on queries, keys and values alone."""
    return [replace(gated_rmsnorm(values), attention_output_bias=False)] * depth(values)


def _glm4(values: Fields) -> Sequence[LayerKind]:
    """As GLM, norms after attention and MLP too."""
    return [replace(kind, norms=4) for kind in _glm(values)]


def _nemotron(values: Fields) -> Sequence[LayerKind]:
    """Layer norms, two MLP matrices with a squared ReLU between them."""
    return [replace(gated_rmsnorm(values), gated_mlp=False, norm="layernorm")] * depth(values)


_NO_BIAS: Mapping[str, object] = {"attention_bias": False, "mlp_bias": False}

_GLM: Mapping[str, object] = {
    **shapes(151552, 4096, 13696, 40, 32, 2, 131072),
    "head_dim": 128,
    "attention_bias": False,
}

MORE: Mapping[str, Family] = {
    "internlm2": Family(
        architecture="InternLM2ForCausalLM",
        defaults={**shapes(103168, 4096, 11008, 32, 32, None, 2048), "bias": True},
        layers=_internlm2,
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        defaults={
            **shapes(155136, 4096, 27648, 64, 80, 8, 524288),
            **_NO_BIAS,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
        },
        layers=_seed_oss,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults={
            **shapes(128256, 2048, 11008, 36, 16, 4, 32768, tied=True),
            **_NO_BIAS,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
        },
        layers=_smollm3,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults={**shapes(50304, 4096, 11008, 32, 32, None, 2048), "attention_bias": False},
        layers=_olmo2,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        defaults={
            **shapes(50304, 4096, 11008, 32, 32, None, 2048),
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
        },
        layers=_olmo2,
    ),
    "cohere": Family(
        architecture="CohereForCausalLM",
        defaults={
            **shapes(256000, 8192, 22528, 40, 64, None, 8192, tied=True),
            "attention_bias": False,
            "use_qk_norm": False,
        },
        layers=_cohere,
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        defaults={
            **shapes(256000, 8192, 22528, 40, 64, None, 8192, tied=True),
            "attention_bias": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        layers=_cohere,
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        defaults={
            **shapes(49152, 3072, 12288, 30, 24, 2, 4096, tied=True),
            "sliding_window": None,
            "use_bias": True,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        },
        layers=_starcoder2,
        only={"layer_types": (None,)},
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults={**shapes(32000, 4096, 11008, 32, 32, None, 2048), **_NO_BIAS},
        layers=DENSE["llama"].layers,
    ),
    "ernie4_5": Family(
        architecture="Ernie4_5ForCausalLM",
        defaults={
            **shapes(103424, 1024, 3072, 18, 16, 2, 131072, tied=True),
            "head_dim": 128,
            "use_bias": False,
        },
        layers=_one_bias,
    ),
    "glm": Family(architecture="GlmForCausalLM", defaults=_GLM, layers=_glm),
    "glm4": Family(architecture="Glm4ForCausalLM", defaults=_GLM, layers=_glm4),
    "nemotron": Family(
        architecture="NemotronForCausalLM",
        defaults={**shapes(256000, 6144, 24576, 32, 48, None, 4096), **_NO_BIAS},
        layers=_nemotron,
    ),
    "qwen2_vl_text": DENSE["qwen2"],
    "qwen2_5_vl_text": DENSE["qwen2"],
    "qwen3_vl_text": DENSE["qwen3"],
}
