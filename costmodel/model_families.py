"""The families of models whose config.json can be read, by `model_type`; docs/models.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping

from shardplan.costmodel.family import Family
from shardplan.costmodel.family_dense import DENSE
from shardplan.costmodel.family_experts import EXPERTS
from shardplan.costmodel.family_more import MORE
from shardplan.costmodel.family_older import OLDER

FAMILIES: Mapping[str, Family] = {**DENSE, **MORE, **OLDER, **EXPERTS}

TEXT_TYPES: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "kimi_k25": "deepseek_v3",
    "llava": "llama",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
"""What the `text_config` of a model with other inputs is when it does not say (transformers' `sub_configs`)."""

FLAT_TEXT: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl")
"""Models with other inputs whose files may give the text model's keys beside `vision_config` instead of in a `text_config`."""

NOT_READ: Mapping[str, str] = {
    "bloom": "its ALiBi positions and embedding norm are not modelled",
    "mpt": "its ALiBi positions are not modelled",
    "dbrx": "its nested description of attention and experts is not read",
    "phi3small": "its block-sparse attention is not modelled",
    "llama4": "its chunked attention, and layers with and without rotary positions, are not modelled",
    "llama4_text": "its chunked attention, and layers with and without rotary positions, are not modelled",
    "mllama": "its cross-attention layers are not modelled",
    "mllama_text_model": "its cross-attention layers are not modelled",
    "phimoe": "its biased layer norms beside experts are not modelled",
    "qwen3_next": "its linear attention is not modelled",
    "kimi_linear": "its linear attention is not modelled",
    "minimax": "its linear attention is not modelled",
    "gemma3n": "its per-layer embeddings are not modelled",
    "gemma3n_text": "its per-layer embeddings are not modelled",
    "deepseek_v32": "its sparse attention is not modelled",
    **dict.fromkeys(
        ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h", "zamba2"),
        "its state-space layers are not modelled",
    ),
    **dict.fromkeys(("recurrent_gemma", "rwkv"), "its recurrent layers are not modelled"),
    **dict.fromkeys(("t5", "mt5", "bart", "whisper"), "encoder-decoder models are not modelled"),
    **dict.fromkeys(("bert", "roberta", "modernbert", "vit"), "encoders are not modelled"),
}
"""Known schemas that are refused, and why."""
