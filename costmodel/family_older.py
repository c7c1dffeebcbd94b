"""Families of 2021 to 2023 with two MLP matrices: GPT-J, StarCoder 1, OPT, Falcon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardplan.costmodel.family import Family, check_even, depth, has_dropout
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.model_document import MOST_LAYERS
from shardplan.costmodel.model_fields import Fields


def _plain(values: Fields, hidden: str, heads: str, *, ffn: int, bias: bool) -> LayerKind:
    """Attention with as many key-value heads as heads, two MLP matrices, layer norms; `bias` on all products; no rotary embedding."""
    width, count = values.count(hidden), values.count(heads)
    values.check_divides(heads, count, hidden, width)
    return LayerKind(
        hidden=width,
        heads=count,
        kv_heads=count,
        head_dim=width // count,
        ffn=ffn,
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        rotary=False,
    )


def _gptj(values: Fields) -> Sequence[LayerKind]:
    """Attention without biases and an MLP with them, side by side behind one norm; rotary on a part of each head."""
    ffn = values.count_or("n_inner", 4 * values.count("n_embd"))
    kind = _plain(values, "n_embd", "n_head", ffn=ffn, bias=False)
    check_even(values, "n_head", kind.head_dim)
    dropout = has_dropout(values, "resid_pdrop", "embd_pdrop", "attn_pdrop")
    kind = replace(kind, mlp_bias=True, rotary=True, norms=1, parallel=True, dropout=dropout)
    return [kind] * values.count("n_layer", most=MOST_LAYERS)


def _gpt_bigcode(values: Fields) -> Sequence[LayerKind]:
    """GPT-2's layer with one head of keys and values for all queries (multi_query)."""
    ffn = values.count_or("n_inner", 4 * values.count("n_embd"))
    kind = _plain(values, "n_embd", "n_head", ffn=ffn, bias=True)
    dropout = has_dropout(values, "resid_pdrop", "embd_pdrop", "attn_pdrop")
    kind = replace(kind, kv_heads=1 if values.flag("multi_query") else kind.heads, dropout=dropout)
    return [kind] * values.count("n_layer", most=MOST_LAYERS)


def _opt(values: Fields) -> Sequence[LayerKind]:
    """Biases everywhere, ReLU, learned positions."""
    hidden = values.count("hidden_size")
    if values.count_or("word_embed_proj_dim", hidden) != hidden:
        problem = f"differs from {values.show('hidden_size')}"
        raise values.bad("word_embed_proj_dim", problem, "projections of word embeddings are not modelled")
    kind = _plain(values, "hidden_size", "num_attention_heads", ffn=values.count("ffn_dim"), bias=True)
    kind = replace(kind, dropout=has_dropout(values, "dropout", "attention_dropout"))
    return [kind] * depth(values)


def _falcon(values: Fields) -> Sequence[LayerKind]:
    """Attention and MLP side by side, behind one norm (7B) or one each (new_decoder_architecture: 40B, 180B); shared or few key-value
    heads; rotary."""
    hidden, new = values.count("hidden_size"), values.flag("new_decoder_architecture")
    ffn = values.count_or("ffn_hidden_size", 4 * hidden)
    kind = _plain(values, "hidden_size", "num_attention_heads", ffn=ffn, bias=values.flag("bias"))
    check_even(values, "num_attention_heads", kind.head_dim)
    kv_heads = kind.heads
    if new:
        kv_heads = values.count_or("num_kv_heads", kind.heads)
        values.check_divides("num_kv_heads", kv_heads, "num_attention_heads", kind.heads)
    elif values.flag("multi_query"):
        kv_heads = 1
    parallel = new or values.flag("parallel_attn")
    norms = values.count_or("num_ln_in_parallel_attn", 2 if new else 1) if parallel else 2
    dropout = has_dropout(values, "hidden_dropout", "attention_dropout")
    kind = replace(kind, kv_heads=kv_heads, rotary=True, parallel=parallel, norms=norms, dropout=dropout)
    return [kind] * depth(values)


_GPT_WORDS = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}

OLDER: Mapping[str, Family] = {
    "gptj": Family(
        architecture="GPTJForCausalLM",
        defaults={
            **{"vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False},
        },
        layers=_gptj,
        spellings=_GPT_WORDS,
        positions="n_positions",
        head_bias=True,
    ),
    "gpt_bigcode": Family(
        architecture="GPTBigCodeForCausalLM",
        defaults={
            **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None},
            **{"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "multi_query": True},
            "tie_word_embeddings": True,
        },
        layers=_gpt_bigcode,
        spellings=_GPT_WORDS,
        positions="n_positions",
        learned_positions=True,
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        defaults={
            **{"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072},
            **{"num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": None},
            **{"dropout": 0.1, "attention_dropout": 0.0, "tie_word_embeddings": True},
        },
        layers=_opt,
        only={"do_layer_norm_before": (True,), "enable_bias": (True,), "_remove_final_layer_norm": (False,)},
        learned_positions=True,
        more_positions=2,
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        defaults={
            **{"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
            **{"num_kv_heads": None, "ffn_hidden_size": None, "num_ln_in_parallel_attn": None, "bias": False},
            **{"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
            **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": True},
            "max_position_embeddings": 2048,
        },
        layers=_falcon,
        only={"alibi": (False,)},
    ),
}
