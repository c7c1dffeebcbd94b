"""The full description of a model as JSON, as plan files embed it, and the digest that tells two shapes apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields, replace
from itertools import groupby
from typing import Literal, cast

from shardplan.costmodel.model import LayerKind, Model, layer_order, parameter_counts
from shardplan.costmodel.model_fields import Fields, json_object, shown
from shardplan.hw_profiles.errors import InputError, nearest

MOST_LAYERS = 10_000
"""More decoder layers than any model has; guards against slips of a digit."""
MOST_PARAMETERS = 10**15
"""Likewise for parameters (and every count stays exact in 64-bit arrays)."""


_ALWAYS_WRITTEN = {
    *("name", "family", "layers", "vocab", "tied_embeddings", "learned_positions", "max_positions", "source"),
    *("hidden", "heads", "kv_heads", "head_dim", "ffn", "gated_mlp", "norm", "qkv_bias", "attention_output_bias"),
    *("mlp_bias", "rotary", "dropout", "experts", "experts_per_token"),
}
"""Other fields are written where they differ from their default: a new one leaves documents and digests of older models as they are."""


def _written(described: Model | LayerKind) -> dict[str, object]:
    """The fields of a model or layer kind that its document holds."""
    return {
        item.name: getattr(described, item.name)
        for item in fields(described)
        if item.name in _ALWAYS_WRITTEN or getattr(described, item.name) != item.default
    }


def model_document(model: Model) -> dict[str, object]:
    """Everything about the model as JSON values; `model_from_document` gives back an equal model."""
    document = _written(model)
    document["layers"] = [{"count": count, **_written(kind)} for kind, count in model.layers]
    return document


def model_from_document(document: object, *, place: str = "model") -> Model:
    """The model a `model_document` describes; `place` names it in errors. Raises InputError."""
    values = _fields_of(document, Model, place)
    runs = values.value("layers")
    if not isinstance(runs, list | tuple) or not runs:
        raise values.bad(
            "layers", "is not a list of layers", 'write a list such as [{"count": 32, "hidden": 4096, ...}]'
        )
    listed = cast("list[object] | tuple[object, ...]", runs)
    layers = tuple(_layer_run(run, f"{place}: layers[{index}]") for index, run in enumerate(listed))
    for index, (kind, _) in enumerate(layers):
        if kind.hidden != layers[0][0].hidden:
            problem = f"hidden={kind.hidden} differs from layers[0].hidden={layers[0][0].hidden}"
            raise InputError(problem, remedy="write the same width for all layers", place=f"{place}: layers[{index}]")
    count = sum(number for _, number in layers)
    if count > MOST_LAYERS:
        raise InputError(f"layers add up to {count}", remedy=f"write at most {MOST_LAYERS} layers", place=place)
    model = Model(
        name=values.text("name"),
        family=values.text("family"),
        layers=layers,
        vocab=values.count("vocab"),
        tied_embeddings=values.flag("tied_embeddings"),
        learned_positions=values.count("learned_positions", least=0),
        max_positions=None if values.value("max_positions") is None else values.count("max_positions"),
        source=values.text("source", may_be_empty=True),
        pattern=_pattern(values, [number for _, number in layers]),
        mtp_modules=values.count("mtp_modules", least=0, most=MOST_LAYERS),
        head_bias=values.flag("head_bias"),
        logit_softcap=values.flag("logit_softcap"),
    )
    return check_size(model, place)


def _pattern(values: Fields, counts: list[int]) -> tuple[int, ...]:
    """The order of the layers, which has to give each run of `layers` as many layers as it says."""
    value = values.value("pattern")
    listed = cast("list[object] | tuple[object, ...]", value) if isinstance(value, list | tuple) else (None,)
    indices = [index for index in listed if type(index) is int and 0 <= index < len(counts)]
    if len(indices) != len(listed):
        raise values.bad("pattern", "is not a list of places in layers", f"write numbers from 0 to {len(counts) - 1}")
    if indices:
        repeated = [indices[i % len(indices)] for i in range(sum(counts))]
        found = [repeated.count(index) for index in range(len(counts))]
        if found != counts:
            problem = f"gives {', '.join(map(str, found))} layers of each kind"
            raise values.bad("pattern", problem, f"layers says {', '.join(map(str, counts))}")
    return tuple(indices)


def _layer_run(document: object, place: str) -> tuple[LayerKind, int]:
    """One run of equal layers, `{"count": n, ...the fields of LayerKind}`."""
    values = _fields_of(document, LayerKind, place, also=("count",))
    heads, kv_heads, experts = values.count("heads"), values.count("kv_heads"), values.count("experts", least=0)
    values.check_divides("kv_heads", kv_heads, "heads", heads)
    if not experts and values.count("experts_per_token", least=0):
        raise values.bad("experts_per_token", f"needs experts, but {values.show('experts')}", "write 0 for a dense MLP")
    numbers = {word: values.count(word, least=0) for word in _NUMBERS}
    numbers["norms"] = values.count("norms", least=1, most=4)
    if numbers["qk_rope_head_dim"] > values.count("head_dim"):
        raise values.bad("qk_rope_head_dim", f"is more than {values.show('head_dim')}", "it is a part of head_dim")
    for word in ("q_lora_rank", "qk_rope_head_dim", "v_head_dim"):
        if numbers[word] and not numbers["kv_lora_rank"]:
            raise values.bad(word, "needs latent attention, but kv_lora_rank=0", "give kv_lora_rank or write 0")
    if values.flag("qk_norm_wide") and not values.flag("qk_norm"):
        raise values.bad("qk_norm_wide", "needs qk_norm, but qk_norm=false", "write false")
    if numbers["shared_ffn"] and not experts:
        raise values.bad("shared_ffn", f"needs experts, but {values.show('experts')}", "write 0 for a dense MLP")
    kind = LayerKind(
        hidden=values.count("hidden"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=values.count("head_dim"),
        ffn=values.count("ffn"),
        norm=cast("Literal['rmsnorm', 'layernorm']", values.text("norm", ("rmsnorm", "layernorm"))),
        experts=experts,
        experts_per_token=values.at_most("experts_per_token", "experts") if experts else 0,
        balance_weight=values.probability("balance_weight"),
        **numbers,
        **{word: values.flag(word) for word in _FLAGS},
    )
    return kind, values.count("count", most=MOST_LAYERS)


_NUMBERS = ("shared_ffn", "window", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim")
_FLAGS = (
    *("gated_mlp", "qkv_bias", "attention_output_bias", "mlp_bias", "rotary", "dropout"),
    *("shared_gate", "router_bias", "parallel", "qk_norm", "qk_norm_wide", "sinks", "gelu_gate", "raw_scores"),
)
"""Fields of LayerKind that are counts from 0, and that are yes or no."""


def _fields_of(document: object, kind: type[Model] | type[LayerKind], place: str, also: tuple[str, ...] = ()) -> Fields:
    """The document's fields with the dataclass's own defaults; unknown words are refused."""
    given = json_object(document, place, "write what `model_document` gives")
    known = [*also, *(item.name for item in fields(kind) if item.name != "mtp")]  # that follows from mtp_modules
    for word, value in given.items():
        if word not in known:
            raise InputError(f"{word}={shown(value)} is unknown", remedy=nearest(word, known), place=place)
    defaults = {item.name: item.default for item in fields(kind) if item.default is not MISSING}
    return Fields(place=place, given=given, defaults=defaults)


def check_size(model: Model, place: str) -> Model:
    """The same model; refused when its shapes multiply to an absurd number of parameters."""
    total = parameter_counts(model)["total"]
    if total > MOST_PARAMETERS:
        problem = f"shapes make {total:.3g} parameters, more than {MOST_PARAMETERS:.0e}"
        raise InputError(problem, remedy="look for a shape with too many digits", place=place)
    return model


def model_digest(model: Model) -> str:
    """SHA-256 (hex) of the shapes as canonical JSON: equal for equal shapes, whatever their name, family or source.

    Layers count in their order, neighbouring equal ones as one run.
    """
    shapes = model_document(model)
    for word in ("name", "family", "source"):
        del shapes[word]
    kinds = [replace(model.layers[index][0], balance_weight=LayerKind.balance_weight) for index in layer_order(model)]
    shapes["layers"] = [{"count": len(list(run)), **_written(kind)} for kind, run in groupby(kinds)]
    shapes.pop("pattern", None)
    canonical = json.dumps(shapes, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
