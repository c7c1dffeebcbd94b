"""Weights under Hugging Face's names: a Llama-shaped folder (config.json, safetensors) read into a model, and one written from it.

Queries and keys need no reordering: `transformer.rotate` pairs the halves of a head as transformers' Llama does. A checkpoint's rotary
base and norm epsilon, which no shape tells, come with it. Nothing here unpickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shardplan.costmodel.model import LayerKind, Model, layer_order
from shardplan.hw_profiles.errors import InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROTARY_BASE = 10_000.0
"""Where the config does not say; as in `transformer`."""
NORM_EPSILON = 1e-5
LLAMA_EPSILON = 1e-6
"""transformers' default of `rms_norm_eps`."""
ENDS = {
    "embedding.tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An open checkpoint."""

    path: Path
    config: Mapping[str, Any]
    """config.json as it is."""
    files: Mapping[str, Path]
    """Which file holds a tensor, by Hugging Face's name."""
    rotary_base: float
    norm_epsilon: float


def their_name(name: str) -> str:
    """Hugging Face's name of the parameter that `Transformer` calls `name`."""
    if name in ENDS:
        return ENDS[name]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        raise ValueError(f"{name} is no parameter of a Llama-shaped model")
    return f"model.layers.{found[1]}.{IN_LAYER[found[2]]}.{found[3]}"


def check_shape(model: Model) -> None:
    """InputError where `model` is not Llama-shaped, so that its weights have no place in such a folder."""
    for kind, _ in model.layers:
        unlike = [
            what
            for what, differs in (
                ("norms that are not RMSNorm", kind.norm != "rmsnorm" or kind.norms != 2),
                ("an MLP without a SiLU gate", not kind.gated_mlp or kind.gelu_gate),
                ("experts", kind.experts > 0),
                ("learned positions", not kind.rotary or model.learned_positions > 0),
                ("norms on queries and keys", kind.qk_norm),
            )
            if differs
        ]
        if unlike:
            raise InputError(
                f"model {model.name} has {' and '.join(unlike)}",
                place="weights",
                remedy="leave [weights] out: only Llama-shaped models are read and written under Hugging Face's names",
            )


def open_folder(path: str | Path) -> Folder:
    """The checkpoint in the folder `path`; InputError where a file is missing or its rotary embedding is another one."""
    folder = Path(path)
    config = cast("dict[str, Any]", _json(folder / CONFIG))
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(
            f"rope_type={kind!r} is not executed",
            place=str(folder / CONFIG),
            remedy="use a model with plain rotary positions",
        )
    if (folder / INDEX).is_file():
        index = cast("dict[str, Any]", _json(folder / INDEX))
        files = {str(name): folder / str(file) for name, file in index.get("weight_map", {}).items()}
    else:
        files = dict.fromkeys(_headers(folder / SINGLE), folder / SINGLE)
    return Folder(
        path=folder,
        config=config,
        files=files,
        rotary_base=float(rope.get("rope_theta") or config.get("rope_theta") or ROTARY_BASE),
        norm_epsilon=float(config.get("rms_norm_eps") or LLAMA_EPSILON),
    )


def check_weights(model: Model, folder: Folder) -> None:
    """InputError where a tensor of `model` is missing in `folder` or has another shape; reads headers only."""
    check_shape(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(folder.files.values())):
        shapes |= {name: shape for name, shape in _headers(file).items() if folder.files.get(name) == file}
    for name, shape in expected_shapes(model):
        theirs = their_name(name)
        if shapes.get(theirs) != shape:
            told = f"has shape {list(shapes[theirs])}" if theirs in shapes else "is missing"
            raise InputError(
                f"{theirs} {told}, the plan's model {model.name} has {list(shape)}",
                place=str(folder.path),
                remedy=f"plan the model of that folder: shardplan plan {folder.path} …",
            )


def expected_shapes(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of a Llama-shaped `model` by our name."""
    yield "embedding.tokens.weight", (model.vocab, model.hidden)
    for number, which in enumerate(layer_order(model)):
        for name, shape in _layer_shapes(model.layers[which][0]):
            yield f"layers.{number}.{name}", shape
    yield "norm.weight", (model.hidden,)
    if not model.tied_embeddings:
        yield "head.weight", (model.vocab, model.hidden)


def _layer_shapes(kind: LayerKind) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, queries, keys = kind.hidden, kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    yield "attention_norm.weight", (hidden,)
    yield "ffn_norm.weight", (hidden,)
    for name, out, into, bias in (
        ("attention.wq", queries, hidden, kind.qkv_bias),
        ("attention.wk", keys, hidden, kind.qkv_bias),
        ("attention.wv", keys, hidden, kind.qkv_bias),
        ("attention.wo", hidden, queries, kind.attention_output_bias),
        ("ffn.w1", kind.ffn, hidden, kind.mlp_bias),
        ("ffn.w2", hidden, kind.ffn, kind.mlp_bias),
        ("ffn.w3", kind.ffn, hidden, kind.mlp_bias),
    ):
        yield f"{name}.weight", (out, into)
        if bias:
            yield f"{name}.bias", (out,)


def config_of(model: Model, *, seq: int, dtype: str, folder: Folder | None) -> dict[str, Any]:
    """config.json of `model`: that of the `folder` it came from, or one that transformers reads as the same shapes."""
    if folder is not None:
        return {**folder.config, "torch_dtype": dtype, "dtype": dtype}
    kind = model.layers[0][0]
    qwen = kind.qkv_bias and not kind.attention_output_bias
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": kind.ffn,
        "num_hidden_layers": model.layer_count,
        "num_attention_heads": kind.heads,
        "num_key_value_heads": kind.kv_heads,
        "head_dim": kind.head_dim,
        "max_position_embeddings": model.max_positions or seq,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROTARY_BASE,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied_embeddings,
        **({} if qwen else {"attention_bias": kind.qkv_bias, "mlp_bias": kind.mlp_bias}),
        "torch_dtype": dtype,
    }


def _json(path: Path) -> object:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no such file", place=str(path), remedy="give a folder with config.json and safetensors"
        ) from None
    except (OSError, ValueError) as bad:
        raise InputError(f"cannot be read ({bad})", place=str(path), remedy="download it again") from None
    if not isinstance(document, dict):
        raise InputError("is no JSON object", place=str(path), remedy="download it again")
    return cast("dict[str, Any]", document)


def _headers(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError("no such file", place=str(path), remedy="give a folder with config.json and safetensors")
    try:
        with safe_open(str(path), framework="numpy") as file:  # headers only: no type needs to be known
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as bad:
        raise InputError(
            f"is damaged or not safetensors ({bad})", place=str(path), remedy="download it again"
        ) from None
