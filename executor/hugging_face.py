"""Weights under Hugging Face's names: a folder of Llama's or Mixtral's shape (config.json, safetensors) read into a model, and one
written from it.

Experts are one tensor each there and one stack of all here. Queries and keys need no reordering: `transformer.rotate` pairs the halves
of a head as transformers' Llama does. A checkpoint's rotary base and norm epsilon, which no shape tells, come with it. Nothing here
unpickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shardplan.costmodel.model import LayerKind, Model, layer_order
from shardplan.costmodel.model_config import load_model
from shardplan.hw_profiles.errors import InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROTARY_BASE = 10_000.0
"""Where the config does not say; as in `transformer`."""
NORM_EPSILON = 1e-5
LLAMA_EPSILON = 1e-6
"""transformers' default of `rms_norm_eps`."""
FAMILIES = ("llama", "mistral", "qwen2", "mixtral")
"""Families whose layers `transformer` computes; others have the same tensors and another function (scales, layers without positions)."""
SILU = ("silu", "swish")
"""transformers' words for what `transformer` gates an MLP with."""
SAME = ("heads", "kv_heads", "head_dim", "experts_per_token", "window")
"""Fields of a layer that no shape of a tensor tells."""
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
    "ffn.router": "block_sparse_moe.gate",
}


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a model computes with besides its weights."""

    rotary_base: float = ROTARY_BASE
    norm_epsilon: float = NORM_EPSILON


USUAL_CONSTANTS = Constants()
"""Of models that start from random values."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An open checkpoint."""

    path: Path
    config: Mapping[str, Any]
    """config.json as it is."""
    files: Mapping[str, Path]
    """Which file holds a tensor, by Hugging Face's name."""
    constants: Constants


def their_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Hugging Face's name of the parameter of `shape` that `Transformer` calls `name`; one of each matrix of a stack of experts."""
    if name in ENDS:
        return [ENDS[name]]
    if stack := re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(w[123])", name):
        inside = f"model.layers.{stack[1]}.block_sparse_moe.experts"
        return [f"{inside}.{expert}.{stack[2]}.weight" for expert in range(shape[0])]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        raise ValueError(f"{name} is no parameter of a model of Llama's or Mixtral's shape")
    return [f"model.layers.{found[1]}.{IN_LAYER[found[2]]}.{found[3]}"]


def is_stack(name: str) -> bool:
    """Whether the parameter that `Transformer` calls `name` stacks matrices of experts."""
    return ".experts." in name


def check_shape(model: Model) -> None:
    """InputError where `model` is of neither shape, so that its weights have no place in such a folder."""
    some_dense = any(kind.experts == 0 for kind, _ in model.layers)
    for kind, _ in model.layers:
        biases = kind.qkv_bias or kind.attention_output_bias or kind.mlp_bias or kind.router_bias
        unlike = [
            what
            for what, differs in (
                ("norms that are not RMSNorm", kind.norm != "rmsnorm" or kind.norms != 2),
                ("an MLP without a SiLU gate", not kind.gated_mlp or kind.gelu_gate),
                ("experts in some layers only", kind.experts > 0 and some_dense),
                ("experts and biases", kind.experts > 0 and biases),
                ("experts beside shared ones", kind.shared_ffn > 0),
                ("routers whose scores are not normalised", kind.experts > 0 and kind.raw_scores),
                ("learned positions", not kind.rotary or model.learned_positions > 0),
                ("norms on queries and keys", kind.qk_norm),
            )
            if differs
        ]
        if unlike:
            raise InputError(
                f"model {model.name} has {' and '.join(unlike)}",
                place="weights",
                remedy="leave [weights] out: only models of Llama's and Mixtral's shape are read and written under Hugging Face's names",
            )


def open_folder(path: str | Path) -> Folder:
    """The checkpoint in the folder `path`; InputError where a file is missing or its model computes what is not executed."""
    folder = Path(path)
    config = cast("dict[str, Any]", _json(folder / CONFIG))
    _check_function(config, str(folder / CONFIG))
    if (folder / INDEX).is_file():
        index = cast("dict[str, Any]", _json(folder / INDEX))
        files = {str(name): folder / str(file) for name, file in index.get("weight_map", {}).items()}
    else:
        files = dict.fromkeys(_headers(folder / SINGLE), folder / SINGLE)
    return Folder(path=folder, config=config, files=files, constants=constants_of(config))


def constants_of(config: Mapping[str, Any]) -> Constants:
    """What a config.json says of them, or means by saying nothing."""
    return Constants(
        rotary_base=float(_rope(config)[0] or ROTARY_BASE),
        norm_epsilon=float(config.get("rms_norm_eps") or LLAMA_EPSILON),
    )


def _rope(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """(base, kind) of rotary positions: `rope_parameters` says both, before transformers 5 the config itself and `rope_scaling`."""
    said: list[dict[str, Any]] = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    base = next((one["rope_theta"] for one in (*said, config) if one.get("rope_theta")), None)
    kinds = [one.get("rope_type") or one.get("type") or "default" for one in said]
    return base, next((kind for kind in kinds if kind != "default"), "default")


def unlike_its_config(model: Model) -> list[str]:
    """`key=value` of what the config.json that `model` was read from says and a start from random values does not compute; [] where
    nothing differs, or the file is not there any more."""
    path = Path(model.source)
    if model.family not in FAMILIES or path.suffix != ".json" or not path.is_file():
        return []
    config = cast("dict[str, Any]", _json(path))
    base, kind = _rope(config)
    said = (
        ("hidden_act", config.get("hidden_act"), SILU),
        ("rope_theta", base, (USUAL_CONSTANTS.rotary_base,)),
        ("rope_type", kind, ("default",)),
        ("rms_norm_eps", config.get("rms_norm_eps"), (USUAL_CONSTANTS.norm_epsilon,)),
    )
    return [f"{key}={value}" for key, value, computed in said if value is not None and value not in computed]


def _check_function(config: Mapping[str, Any], place: str) -> None:
    """InputError where the same tensors stand for another function than the one that is executed."""
    _, kind = _rope(config)
    if kind != "default":
        raise InputError(
            f"rope_type={kind!r} is not executed", place=place, remedy="use a model with plain rotary positions"
        )
    activation = config.get("hidden_act") or "silu"
    if activation not in SILU:
        raise InputError(
            f"hidden_act={activation!r} is not executed, these models are gated with silu",
            place=place,
            remedy="use a model with hidden_act=silu",
        )


def check_weights(model: Model, folder: Folder) -> None:
    """InputError where a tensor of `model` is missing in `folder` or has another shape, or its layers are others by the config; reads
    headers only."""
    check_shape(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(folder.files.values())):
        shapes |= {name: shape for name, shape in _headers(file).items() if folder.files.get(name) == file}
    for name, whole in expected_shapes(model):
        shape = whole[1:] if is_stack(name) else whole
        for theirs in their_names(name, whole):
            if shapes.get(theirs) != shape:
                told = f"has shape {list(shapes[theirs])}" if theirs in shapes else "is missing"
                raise InputError(
                    f"{theirs} {told}, the plan's model {model.name} has {list(shape)}",
                    place=str(folder.path),
                    remedy=f"plan the model of that folder: shardplan plan {folder.path} …",
                )
    _check_layers(model, load_model(folder.path / CONFIG), folder.path)


def _check_layers(model: Model, theirs: Model, path: Path) -> None:
    """InputError where equal tensors would be cut into other heads, or sent to another number of experts."""
    if theirs.family not in FAMILIES:
        raise InputError(
            f"model_type={theirs.family!r} is not executed",
            place=str(path / CONFIG),
            remedy=f"use {', '.join(FAMILIES)}",
        )
    for ours, other in zip(layer_order(model), layer_order(theirs), strict=True):
        for name in SAME:
            found, wanted = getattr(theirs.layers[other][0], name), getattr(model.layers[ours][0], name)
            if found != wanted:
                raise InputError(
                    f"{name}={found}, the plan's model {model.name} has {wanted}",
                    place=str(path / CONFIG),
                    remedy=f"plan the model of that folder: shardplan plan {path} …",
                )


def expected_shapes(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of a `model` of either shape by our name."""
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
        *([("ffn.router", kind.experts, hidden, False)] if kind.experts else []),
    ):
        yield f"{name}.weight", (out, into)
        if bias:
            yield f"{name}.bias", (out,)
    for name, out, into in (("w1", kind.ffn, hidden), ("w2", hidden, kind.ffn), ("w3", kind.ffn, hidden)):
        if kind.experts:
            yield f"ffn.experts.{name}", (kind.experts, out, into)
            continue
        yield f"ffn.{name}.weight", (out, into)
        if kind.mlp_bias:
            yield f"ffn.{name}.bias", (out,)


def config_of(
    model: Model, *, seq: int, dtype: str, folder: Folder | None, constants: Constants = USUAL_CONSTANTS
) -> dict[str, Any]:
    """config.json of `model`: that of the `folder` it came from, or one that transformers reads as the same shapes and `constants`."""
    if folder is not None:
        return {**folder.config, "torch_dtype": dtype, "dtype": dtype}
    kind = model.layers[0][0]
    family, its_own = _family(kind)
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": kind.ffn,
        "num_hidden_layers": model.layer_count,
        "num_attention_heads": kind.heads,
        "num_key_value_heads": kind.kv_heads,
        "head_dim": kind.head_dim,
        "max_position_embeddings": model.max_positions or seq,
        "rms_norm_eps": constants.norm_epsilon,
        "rope_theta": constants.rotary_base,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied_embeddings,
        **its_own,
        "torch_dtype": dtype,
    }


def _family(kind: LayerKind) -> tuple[str, dict[str, Any]]:
    """transformers' word for a model of such layers, and what only its config has."""
    if kind.experts:
        numbers = {"num_local_experts": kind.experts, "num_experts_per_tok": kind.experts_per_token}
        return "Mixtral", {**numbers, "router_aux_loss_coef": kind.balance_weight, "sliding_window": None}
    if kind.qkv_bias and not kind.attention_output_bias:
        return "Qwen2", {}
    return "Llama", {"attention_bias": kind.qkv_bias, "mlp_bias": kind.mlp_bias}


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
