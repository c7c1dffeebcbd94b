"""What a family of models is to the reader of config.json files, and the parts its readers are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.model_document import MOST_LAYERS
from shardplan.costmodel.model_fields import Fields


@dataclass(frozen=True, kw_only=True)
class Family:
    """How config.json files of one `model_type` are read."""

    architecture: str
    """The language model's class, as `architectures` names it."""
    defaults: Mapping[str, object]
    """Of transformers' config class: a file may omit every key that equals its default."""
    layers: Callable[[Fields], Sequence[LayerKind]]
    """Every decoder layer, first to last."""
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    """The other word transformers knows for a key."""
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    """Keys that change shapes or work, with the values that are modelled; others are refused."""
    positions: str = "max_position_embeddings"
    """The key of the longest sequence."""
    learned_positions: bool = False
    more_positions: int = 0
    """Rows of the table of learned positions beyond the longest sequence (OPT: 2)."""
    head_bias: bool = False
    mtp: str = ""
    """The key that counts multi-token prediction modules."""


class Heads(NamedTuple):
    """Shapes of attention, fields of LayerKind."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def rotary_heads(values: Fields, *, grouped: bool = True) -> Heads:
    """Heads of a rotary attention; null or absent `head_dim` means hidden / heads, null `num_key_value_heads` as many as heads.

    Without `grouped` the family has no key-value heads of their own.
    """
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    if not grouped or values.value("head_dim") is None:
        values.check_divides(
            "num_attention_heads", heads, "hidden_size", hidden, "give head_dim, or " if grouped else ""
        )
    kv_heads, head_dim = heads, hidden // heads
    if grouped:
        kv_heads = values.count_or("num_key_value_heads", heads)
        values.check_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
        head_dim = values.count_or("head_dim", head_dim)
    check_even(values, "head_dim" if grouped else "num_attention_heads", head_dim)
    return Heads(hidden, heads, kv_heads, head_dim)


def check_even(values: Fields, key: str, head_dim: int) -> None:
    """Refuse a width of a rotary head that does not split into pairs."""
    if head_dim % 2:
        problem = f"gives heads {head_dim} wide, odd, which rotary embedding cannot pair"
        raise values.bad(
            key, problem, "make it even" if key.endswith("dim") else "choose a number that gives even ones"
        )


def depth(values: Fields) -> int:
    """Number of decoder layers."""
    return values.count("num_hidden_layers", most=MOST_LAYERS)


def has_dropout(values: Fields, *keys: str) -> bool:
    """Whether any of these probabilities is above 0."""
    return max(values.probability(key) for key in keys) > 0


LAYER_TYPES = ("full_attention", "sliding_attention")


def windows(values: Fields, slides: Callable[[int], bool]) -> list[int]:
    """The window of every layer, 0 where all keys are seen: by `layer_types` where the file lists them, else where `slides(layer)`."""
    layers = depth(values)
    off = "use_sliding_window" in values.defaults and not values.flag("use_sliding_window")
    size = 0 if off else values.count_or("sliding_window", 0)
    listed = values.value("layer_types") if "layer_types" in values.defaults else None
    if listed is None:
        return [size if slides(layer) else 0 for layer in range(layers)]
    names = cast("list[object]", listed) if isinstance(listed, list) else [listed]
    unknown = [name for name in names if name not in LAYER_TYPES]
    if unknown:
        raise values.bad(
            "layer_types", f"has {unknown[0]!r}, which is not modelled", f"write {' or '.join(LAYER_TYPES)}"
        )
    if len(names) != layers:
        problem = f"lists {len(names)} layers, but {values.show('num_hidden_layers')}"
        raise values.bad("layer_types", problem, f"list {layers}, or leave it out")
    if size == 0 and "sliding_attention" in names:
        raise values.bad(
            "sliding_window", "gives no window, but layer_types lists sliding_attention", "give both or neither"
        )
    return [size if name == "sliding_attention" else 0 for name in names]
