"""Models with experts of a table of published runs: no column says latent attention, windows or which layers are dense.

A model of the catalog with the widths, heads and experts of the row has them. The columns win where both speak: the number of layers
cuts the catalog's model, and notes say what is left of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.presets import all_presets

Shape = tuple[int, ...]


class UnknownShapeError(Exception):
    """No model of the catalog has the shapes of the row; the text says which."""


def shape_of(model: Model) -> Shape:
    """What a row says of the layers with experts: hidden, heads, experts, experts a token is sent to, their width."""
    kind = model.layers[-1][0]
    return (kind.hidden, kind.heads, kind.experts, kind.experts_per_token, kind.ffn)


@cache
def _models_with_experts() -> Mapping[Shape, Model]:
    """The models of the catalog with experts by shape, the first of each."""
    found: dict[Shape, Model] = {}
    for name in all_presets():
        model = load_model(name)
        if model.layers[-1][0].experts:
            found.setdefault(shape_of(model), model)
    return found


def expert_model(shape: Shape, layers: int, vocab: int, notes: str) -> Model:
    """The model of these shapes with `layers` layers. `notes` tell what is left of a cut model (`1 dense + 3 MoE layers`) and
    whether a multi-token prediction module is trained (`MTP counted`).

    Raises UnknownShapeError.
    """
    model = _models_with_experts().get(shape)
    if model is None:
        words = ("hidden", "heads", "experts", "experts_per_token", "expert_ffn")
        raise UnknownShapeError(
            "no model of the catalog has " + ", ".join(f"{w}={n}" for w, n in zip(words, shape, strict=True))
        )
    model = replace(model, vocab=vocab, mtp_modules=1 if "MTP counted" in notes else 0)
    if layers == model.layer_count:
        return model
    kept = re.search(r"(\d+) dense \+ (\d+) MoE layers", notes)
    if kept is None or len(model.layers) != 2 or int(kept[1]) + int(kept[2]) != layers:
        raise UnknownShapeError(f"layers={layers}: the row does not say which of {model.layer_count} layers are left")
    (dense, _), (sparse, _) = model.layers
    return replace(model, layers=((dense, int(kept[1])), (sparse, int(kept[2]))), pattern=())
