"""Models from outside: preset names, Hugging Face `config.json` files, and the description a plan file embeds.

Defaults and key names are those of transformers' LlamaConfig, GPT2Config and MixtralConfig (4.x and 5.x): a
config.json may omit every key that equals its default. Keys that change no shape (rope_theta, dtype, ...) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.model_document import (
    MOST_LAYERS,
    check_size,
    model_digest,
    model_document,
    model_from_document,
)
from shardplan.costmodel.model_fields import Fields, json_object, shown
from shardplan.costmodel.presets import find_preset, preset_words
from shardplan.hw_profiles.errors import InputError, nearest

__all__ = ["load_model", "model_digest", "model_document", "model_from_config", "model_from_document"]

_MOST_FILE_BYTES = 10_000_000
_ACCEPTED = "give a preset name (`shardplan models list`), a config.json or a folder with one"

_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
    "gpt2": {
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
    "mixtral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 4096 * 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
}
_OTHER_SPELLING: Mapping[str, Mapping[str, str]] = {
    "llama": {},
    "gpt2": {
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    },
    "mixtral": {"num_local_experts": "num_experts"},
}
_LANGUAGE_MODEL = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM"}
_NOT_MODELLED = ("quantization_config", "pruned_heads", "add_cross_attention", "is_encoder_decoder")


def load_model(name_or_path: str | Path) -> Model:
    """The model of a preset name or alias (any case), a Hugging Face config.json, or a folder with one.

    A preset wins over a file or folder of the same name (write `./tiny` for the folder). Raises InputError.
    """
    if isinstance(name_or_path, str):
        preset = find_preset(name_or_path)
        if preset is not None:
            place = f"preset {preset.name}"
            return model_from_config(preset.config, name=preset.name, source=preset.source, place=place)
    path = _config_path(name_or_path)
    return model_from_config(_read_json(path), name=_model_name(path), source=str(path), place=str(path))


def _model_name(path: Path) -> str:
    """`x` for x/config.json, x.json and the Hugging Face cache's models--org--x/snapshots/<revision>/config.json."""
    if path.name != "config.json":
        return path.stem or path.name
    folder = path.parent.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rsplit("--", 1)[-1]
    return folder.name or "model"


def _config_path(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    try:
        path = Path(text).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long or not allowed; a null byte; ~nobody
        raise InputError(f"cannot be read ({error})", remedy=_ACCEPTED, place=shown(text)) from error
    if text.strip() and is_folder:
        if not (path / "config.json").is_file():
            raise InputError("the folder has no config.json", remedy=_ACCEPTED, place=text)
        return path / "config.json"
    if text.strip() and exists:
        return path
    near = nearest(text.rsplit("/", 1)[-1], preset_words())
    hint = f"{near} Or " if near.startswith("did you mean") else ""
    if isinstance(name_or_path, Path) or "/" in text or path.suffix == ".json":
        raise InputError("no such file or folder", remedy=hint + _ACCEPTED, place=text)
    raise InputError(f"unknown model {text!r}", remedy=hint + _ACCEPTED)


def _read_json(path: Path) -> object:
    place = str(path)
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise InputError(f"is larger than {_MOST_FILE_BYTES} bytes", remedy=_ACCEPTED, place=place)
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except InputError:
        raise
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        raise InputError(
            problem, remedy="the file may be cut short: write or download it again", place=place
        ) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", remedy=_ACCEPTED, place=place) from error
    except (ValueError, RecursionError) as error:
        raise InputError("is not a JSON text file", remedy=_ACCEPTED, place=place) from error


def model_from_config(config: object, *, name: str, source: str = "", place: str = "config.json") -> Model:
    """The model a Hugging Face config describes; `config` is the parsed JSON, `place` names it in errors."""
    given = json_object(config, place, 'write a Hugging Face config such as {"model_type": "llama", ...}')
    known = ", ".join(_DEFAULTS)
    if "model_type" not in given:
        raise InputError("model_type is missing", remedy=f"add model_type, one of: {known}", place=place)
    model_type = given["model_type"]
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        problem = f"model_type={shown(model_type)} cannot be read"
        raise InputError(problem, remedy=f"model types that can be read: {known}", place=place)
    spelled = _spellings(given, model_type, place)
    values = Fields(place=place, given=given, defaults=_DEFAULTS[model_type], spelled=spelled)
    _refuse_other_shapes(values, model_type)
    gpt2 = model_type == "gpt2"
    kind = _gpt2_layer(values) if gpt2 else _llama_layer(values, moe=model_type == "mixtral")
    positions = values.count("n_positions" if gpt2 else "max_position_embeddings")
    model = Model(
        name=name,
        family=model_type,
        layers=((kind, values.count("n_layer" if gpt2 else "num_hidden_layers", most=MOST_LAYERS)),),
        vocab=values.count("vocab_size"),
        tied_embeddings=values.flag("tie_word_embeddings"),
        learned_positions=positions if gpt2 else 0,
        max_positions=positions,
        source=source,
    )
    return check_size(model, place)


def _spellings(given: Mapping[str, object], model_type: str, place: str) -> Mapping[str, str]:
    """The words the file uses where transformers knows two for one field; two different values are refused."""
    used: dict[str, str] = {}
    for key, other in _OTHER_SPELLING[model_type].items():
        if other not in given:
            continue
        if key in given and given[key] != given[other]:
            problem = f"{key}={shown(given[key])} contradicts {other}={shown(given[other])}"
            raise InputError(problem, remedy="they mean the same: keep one", place=place)
        used[key] = other
    return used


def _refuse_other_shapes(values: Fields, model_type: str) -> None:
    """Refuse by name what would change shapes in a way that is not modelled."""
    given = values.given
    refused = [key for key in _NOT_MODELLED if given.get(key)]
    if model_type == "mixtral" and given.get("sliding_window") is not None:
        refused.append("sliding_window")
    if refused:
        remedy = "set it to null, or use the config.json of a model without it"
        raise values.bad(refused[0], "is not modelled", remedy)
    expected = _LANGUAGE_MODEL[model_type]
    named = given.get("architectures") or [expected]
    words = cast("list[object]", named) if isinstance(named, list) else [named]
    if expected.lower() not in [str(word).lower() for word in words]:
        remedy = f'write "architectures": ["{expected}"] to plan it as a {model_type} language model'
        raise values.bad("architectures", "is not modelled", remedy)


def _llama_layer(values: Fields, *, moe: bool) -> LayerKind:
    """One layer of LlamaForCausalLM or MixtralForCausalLM; `attention_bias` is on q, k, v and the output."""
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    if values.value("head_dim") is None:
        values.check_divides("num_attention_heads", heads, "hidden_size", hidden, "give head_dim, or ")
    kv_heads = values.count_or("num_key_value_heads", heads)
    values.check_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    head_dim = values.count_or("head_dim", hidden // heads)
    if head_dim % 2:
        raise values.bad(
            "head_dim", f"gives heads {head_dim} wide, odd, which rotary embedding cannot pair", "make it even"
        )
    experts = values.count("num_local_experts") if moe else 0
    bias = False if moe else values.flag("attention_bias")
    return LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=values.count("intermediate_size"),
        gated_mlp=True,
        norm="rmsnorm",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=False if moe else values.flag("mlp_bias"),
        dropout=values.probability("attention_dropout") > 0,
        experts=experts,
        experts_per_token=values.at_most("num_experts_per_tok", "num_local_experts") if moe else 0,
    )


def _gpt2_layer(values: Fields) -> LayerKind:
    """One layer of GPT2LMHeadModel: biases everywhere, two MLP matrices, learned positions."""
    hidden, heads = values.count("n_embd"), values.count("n_head")
    values.check_divides("n_head", heads, "n_embd", hidden)
    return LayerKind(
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
        dropout=max(values.probability(key) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")) > 0,
    )
