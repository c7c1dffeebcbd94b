"""Families of dense models: Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, GPT-2, GPT-NeoX, Phi 1 to 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardplan.costmodel.family import Family, depth, has_dropout, rotary_heads, windows
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.model_document import MOST_LAYERS
from shardplan.costmodel.model_fields import Fields


def gated_rmsnorm(values: Fields) -> LayerKind:
    """A layer with rmsnorm and a gated MLP, as Llama's; biases where the family's config knows the keys."""
    heads = rotary_heads(values)
    bias = "attention_bias" in values.defaults and values.flag("attention_bias")
    return LayerKind(
        **heads._asdict(),
        ffn=values.count("intermediate_size"),
        gated_mlp=True,
        norm="rmsnorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias="mlp_bias" in values.defaults and values.flag("mlp_bias"),
        dropout=has_dropout(values, *(key for key in _DROPOUT if key in values.defaults)),
    )


_DROPOUT = ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout")


def _every_layer(kind: LayerKind, sizes: Sequence[int]) -> list[LayerKind]:
    """The kind with the window of each layer."""
    by_size = {size: replace(kind, window=size) for size in dict.fromkeys(sizes)}
    return [by_size[size] for size in sizes]


def _llama(values: Fields) -> Sequence[LayerKind]:
    return [gated_rmsnorm(values)] * depth(values)


def _mistral(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer, one window in all of them."""
    return _every_layer(gated_rmsnorm(values), windows(values, lambda _: True))


def _qwen2(values: Fields) -> Sequence[LayerKind]:
    """Biases on queries, keys and values; a window, if any, from layer max_window_layers on."""
    first = values.count("max_window_layers", least=0)
    return _every_layer(replace(gated_rmsnorm(values), qkv_bias=True), windows(values, lambda i: i >= first))


def _qwen3(values: Fields) -> Sequence[LayerKind]:
    """Norms on queries and keys instead of Qwen2's biases."""
    first = values.count("max_window_layers", least=0)
    return _every_layer(replace(gated_rmsnorm(values), qk_norm=True), windows(values, lambda i: i >= first))


def _gemma(values: Fields) -> Sequence[LayerKind]:
    """Llama's layer with a GELU gate."""
    return [replace(gated_rmsnorm(values), gelu_gate=True)] * depth(values)


def _gemma2(values: Fields) -> Sequence[LayerKind]:
    """Norms before and after attention and MLP; every other layer has a window, the first one does."""
    return _every_layer(replace(gated_rmsnorm(values), gelu_gate=True, norms=4), windows(values, lambda i: i % 2 == 0))


def _gemma3(values: Fields) -> Sequence[LayerKind]:
    """As Gemma 2, norms on queries and keys; every sixth layer (sliding_window_pattern) has no window."""
    period = values.count("sliding_window_pattern")
    kind = replace(gated_rmsnorm(values), gelu_gate=True, norms=4, qk_norm=True)
    return _every_layer(kind, windows(values, lambda i: (i + 1) % period != 0))


def _gpt2(values: Fields) -> Sequence[LayerKind]:
    """Biases everywhere, two MLP matrices, learned positions."""
    hidden, heads = values.count("n_embd"), values.count("n_head")
    values.check_divides("n_head", heads, "n_embd", hidden)
    kind = LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=values.count_or("n_inner", 4 * hidden),
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rotary=False,
        dropout=has_dropout(values, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    return [kind] * values.count("n_layer", most=MOST_LAYERS)


def _gpt_neox(values: Fields) -> Sequence[LayerKind]:
    """Biases everywhere, two MLP matrices; attention and MLP side by side, each with a norm of its own."""
    heads, bias = rotary_heads(values, grouped=False), values.flag("attention_bias")
    kind = LayerKind(
        **heads._asdict(),
        ffn=values.count("intermediate_size"),
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        parallel=values.flag("use_parallel_residual"),
        dropout=has_dropout(values, "hidden_dropout", "attention_dropout"),
    )
    return [kind] * depth(values)


def _phi(values: Fields) -> Sequence[LayerKind]:
    """Biases everywhere, two MLP matrices; attention and MLP side by side behind one norm."""
    kind = LayerKind(
        **rotary_heads(values)._asdict(),
        ffn=values.count("intermediate_size"),
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norms=1,
        parallel=True,
        qk_norm=values.flag("qk_layernorm"),
        dropout=has_dropout(values, "resid_pdrop", "embd_pdrop", "attention_dropout"),
    )
    return [kind] * depth(values)


def shapes(
    vocab: int,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    positions: int,
    *,
    tied: bool = False,
) -> Mapping[str, object]:
    """Defaults that most config classes have."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": None,
        "max_position_embeddings": positions,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
    }


QWEN_WINDOWS: Mapping[str, object] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
CAUSAL: Mapping[str, tuple[object, ...]] = {"use_bidirectional_attention": (False, None)}
_GPT2_WORDS = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}

DENSE: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={**shapes(32000, 4096, 11008, 32, 32, None, 2048), "attention_bias": False, "mlp_bias": False},
        layers=_llama,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "tie_word_embeddings": True,
        },
        layers=_gpt2,
        spellings=_GPT2_WORDS,
        positions="n_positions",
        learned_positions=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={**shapes(32000, 4096, 14336, 32, 32, 8, 131072), "sliding_window": 4096},
        layers=_mistral,
        only={"layer_types": (None,)},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults={**shapes(151936, 4096, 22016, 32, 32, 32, 32768), **QWEN_WINDOWS},
        layers=_qwen2,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={
            **shapes(151936, 4096, 22016, 32, 32, 32, 32768),
            **QWEN_WINDOWS,
            "head_dim": 128,
            "attention_bias": False,
        },
        layers=_qwen3,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults={
            **shapes(256000, 3072, 24576, 28, 16, 16, 8192, tied=True),
            "head_dim": 256,
            "attention_bias": False,
        },
        layers=_gemma,
        only=CAUSAL,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **shapes(256000, 2304, 9216, 26, 8, 4, 8192, tied=True),
            "head_dim": 256,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
            "final_logit_softcapping": 30.0,
        },
        layers=_gemma2,
        only=CAUSAL,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **shapes(262208, 2304, 9216, 26, 8, 4, 131072, tied=True),
            "head_dim": 256,
            "attention_bias": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
            "final_logit_softcapping": None,
        },
        layers=_gemma3,
        only=CAUSAL,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        defaults={
            **shapes(50432, 6144, 24576, 44, 64, None, 2048),
            "hidden_dropout": 0.0,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        layers=_gpt_neox,
    ),
    "phi": Family(
        architecture="PhiForCausalLM",
        defaults={
            **shapes(51200, 2048, 8192, 24, 32, None, 2048),
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "qk_layernorm": False,
        },
        layers=_phi,
        head_bias=True,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={
            **shapes(32064, 3072, 8192, 32, 32, None, 4096),
            "sliding_window": None,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        layers=_mistral,
    ),
}
