"""Models with experts of a table of published runs: no column says latent attention, windows or which layers are dense.

A model of the catalog with the widths, heads and experts of the row has them. The columns win where both speak: the number of layers
cuts the catalog's model, and notes say what is left of it. A model that the catalog lacks is made of the row's columns and notes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from shardplan.costmodel.model import LayerKind, Model
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


def expert_model(shape: Shape, layers: int, vocab: int, notes: str, others: Mapping[str, int]) -> Model:
    """The model of these shapes with `layers` layers: the catalog's where one has them, else one made of the row alone (`others`: kv_heads,
    head_dim, ffn, shared_experts, gated_mlp, tied_embeddings). `notes` tell what is left of a cut model (`1 dense + 3 MoE layers`), which
    layers are dense, the ranks of latent attention and whether a multi-token prediction module is trained (`MTP counted`).

    Raises UnknownShapeError.
    """
    model = _models_with_experts().get(shape) or _of_the_row(shape, layers, notes, others)
    model = replace(model, vocab=vocab, mtp_modules=1 if "MTP counted" in notes else 0)
    if layers == model.layer_count:
        return model
    if len(model.layers) == 1:
        return replace(model, layers=((model.layers[0][0], layers),))
    kept = _dense_and_sparse(notes)
    if kept is None or len(model.layers) != 2 or sum(kept) != layers or model.pattern:
        raise UnknownShapeError(f"layers={layers}: the row does not say which of {model.layer_count} layers are left")
    (dense, _), (sparse, _) = model.layers
    return replace(model, layers=((dense, kept[0]), (sparse, kept[1])))


def _dense_and_sparse(notes: str) -> tuple[int, int] | None:
    """Layers without and with experts, where the notes count both."""
    kept = re.search(r"(\d+) dense \+ (\d+) MoE layers", notes)
    return (int(kept[1]), int(kept[2])) if kept else None


def _of_the_row(shape: Shape, layers: int, notes: str, others: Mapping[str, int]) -> Model:
    """A decoder of the row's widths: rotary embedding, RMS norms, no biases; layers are alike but for the dense ones that notes name."""
    hidden, heads, experts, experts_per_token, width = shape
    latent = re.search(r"MLA \(q_lora (\d+), kv_lora (\d+), rope (\d+)\)", notes)
    if "MLA" in notes and latent is None:
        raise UnknownShapeError(
            "the row does not say the ranks of its latent attention, as in MLA (q_lora 1536, kv_lora 512, rope 64)"
        )
    if experts_per_token > experts:
        raise UnknownShapeError(f"experts_per_token={experts_per_token} of experts={experts}")
    sparse = LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=others["kv_heads"],
        head_dim=others["head_dim"],
        ffn=width,
        gated_mlp=bool(others["gated_mlp"]),
        norm="rmsnorm",
        experts=experts,
        experts_per_token=experts_per_token,
        shared_ffn=others["shared_experts"] * width,
    )
    if latent:
        q_rank, kv_rank, rope = (int(rank) for rank in latent.groups())
        nope = others["head_dim"]
        ranks = {"q_lora_rank": q_rank, "kv_lora_rank": kv_rank, "qk_rope_head_dim": rope}
        sparse = replace(sparse, kv_heads=heads, head_dim=nope + rope, v_head_dim=nope, **ranks)
    first = re.search(r"first (\d+) layers dense", notes)
    dense_layers = (
        int(first[1]) if first else 1 if "first layer dense" in notes else (_dense_and_sparse(notes) or (0, 0))[0]
    )
    dense = replace(sparse, ffn=others["ffn"], experts=0, experts_per_token=0, shared_ffn=0)
    runs = ((dense, dense_layers), (sparse, layers - dense_layers)) if dense_layers else ((sparse, layers),)
    return Model(name="", family="", layers=runs, vocab=1, tied_embeddings=bool(others["tied_embeddings"]))
