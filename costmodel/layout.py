"""How a model is spread over GPUs: `Layout` (one) and `LayoutTable` (N, a column per field).

    gpus = dp * tp * pp * cp          ep * etp divides dp * cp * tp

Words are the fields of `Layout`: "dp=8 tp=8 pp=8 micro_batch=1 zero=1 recompute=selective schedule=interleaved".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.axis_order import DEFAULT_ORDER, ORDERS, axis_stride, read_order
from shardplan.costmodel.columns import constant, is_constant, taken
from shardplan.costmodel.layout_checks import known_word, positive
from shardplan.costmodel.number_runs import numbers_word, read_numbers
from shardplan.costmodel.recompute import RECOMPUTE, layers_code, split_recompute, stored_recompute
from shardplan.hw_profiles.errors import InputError, nearest

IntArray = NDArray[np.int64]

SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zero_bubble", "zero_bubble_v", "dualpipe_v")
CHUNKED = ("interleaved", "looped_bfs")
"""Schedules of any number of looped chunks; with one they are 1f1b and gpipe, which are asked for by name."""
V_PLACED = ("zero_bubble_v", "dualpipe_v")
"""Schedules of two chunks in V placement: rank r holds chunks r and 2 pp - 1 - r, so rank 0 the first and the last."""
SPLIT_BACKWARD = ("zero_bubble", "zero_bubble_v", "dualpipe_v")
"""Schedules that compute the gradient of the input and, later, that of the weights."""
ATTENTION = ("auto", "flash", "unfused", "triton")
"""flash: fused attention of the runtime's libraries; triton: this project's own kernel."""
OFFLOAD = ("none", "cpu", "nvme")
"""Where states, or the inputs of recomputed layers, live: the GPU, host memory, local flash."""
RATIO_STEPS = 1000
"""A share is stored as so many parts of one."""
CP_KINDS = ("ring", "ulysses", "all_gather")
"""How context-parallel ranks meet the keys of the others: ring (zig-zag blocks), all-to-all of heads, gathered keys and values."""
CODES = {
    "schedule": SCHEDULES,
    "attention": ATTENTION,
    "offload_optimizer": OFFLOAD,
    "offload_params": OFFLOAD,
    "offload_activations": OFFLOAD,
    "cp_kind": CP_KINDS,
    "order": ORDERS,
}
"""Words of a closed vocabulary: a column stores the index into it."""
YES_OR_NO = ("sequence_parallel", "qwz", "qgz")
"""Words that are true or false."""
COUNTS = ("dp", "tp", "pp", "cp", "ep", "micro_batch", "zero", "virtual_stages", "hpz")
"""Words whose column is their value."""
TEXT_WORDS = ("recompute", *CODES)
"""Words whose value is a word."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout. Left-out words take these plain defaults."""

    dp: int = 1
    """Data-parallel replicas (sharded or not)."""
    tp: int = 1
    """Tensor-parallel degree."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel degree (splits the sequence)."""
    ep: int = 1
    """Expert-parallel degree, carved out of dp * cp * tp: the experts of a layer lie on so many groups of ranks."""
    etp: int | None = None
    """Tensor-parallel degree of each expert; None = 1 with ep above 1, else tp (experts are cut as dense products are)."""
    micro_batch: int = 1
    """Sequences of one micro-batch of one replica."""
    zero: int = 0
    """ZeRO stage 0-3."""
    dp_shard: int | None = None
    """Data-parallel ranks that ZeRO shards over (HSDP when below dp), times cp; None = dp."""
    sequence_parallel: bool = False
    """Megatron sequence parallelism: norms and dropout split along the sequence over tp."""
    recompute: str = "none"
    """none, selective, full, full:N (N layers per stage), full:4,2,0 (by stage) or selective:core_attn+mlp (`recompute.PARTS`)."""
    schedule: str = "1f1b"
    """One of SCHEDULES (see `schedules.py`); without meaning when pp = 1."""
    virtual_stages: int = 1
    """Model chunks per pipeline rank."""
    stage_layers: tuple[int, ...] | None = None
    """Decoder layers of each of the pp * virtual_stages chunks in model order, 0 in a first of the embedding alone or a last of the head
    alone; None = the runtime's rule."""
    attention: str = "auto"
    """flash, unfused or auto (the runtime's own)."""
    offload_optimizer: str = "none"
    """Where optimizer states live: none (the GPU), cpu or nvme."""
    offload_params: str = "none"
    """Where the shards of 16-bit parameters live: none (the GPU), cpu or nvme."""
    offload_activations: str = "none"
    """Where the inputs of recomputed layers wait for the backward: none (the GPU) or cpu."""
    offload_ratio: float = 1.0
    """Share of the optimizer states that is offloaded (Twin-Flow); without meaning when offload_optimizer=none."""
    cp_kind: str = "ring"
    """ring, ulysses, all_gather; without meaning when cp = 1."""
    hpz: int = 1
    """ZeRO++: ranks that share a second copy of the parameters for the backward; 1 = none."""
    qwz: bool = False
    """ZeRO++: parameters are gathered in 8 bits."""
    qgz: bool = False
    """ZeRO++: gradients are reduced in 4 bits."""
    order: str = DEFAULT_ORDER
    """Mesh axes from the innermost (neighbouring ranks) to the outermost (`axis_order.py`)."""

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "micro_batch", "virtual_stages", "hpz"):
            positive(name, getattr(self, name))
        for name in ("dp_shard", "etp"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in YES_OR_NO:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} is not true or false", place="layout")
        if type(self.zero) is not int or self.zero not in (0, 1, 2, 3):
            raise InputError(f"zero={self.zero} is not a ZeRO stage", place="layout", remedy="use 0, 1, 2 or 3")
        split_recompute(self.recompute)
        for name, known in CODES.items():
            known_word(name, getattr(self, name), known)
        _ratio("offload_ratio", self.offload_ratio)
        for at, layers in enumerate(self.stage_layers or ()):
            if layers != 0 or at not in (0, len(self.stage_layers or ()) - 1):
                positive("stage_layers", layers)

    @property
    def gpus(self) -> int:
        """GPUs the layout occupies."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def shard_ranks(self) -> int:
        """Data-parallel ranks that ZeRO shards states over, without cp (1 when zero = 0)."""
        return (self.dp_shard or self.dp) if self.zero else 1

    def words(self, *, every: bool = False) -> str:
        """The layout as words that `parse_layout` reads; `every` also writes the defaults."""
        default = Layout()
        kept = [
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if every
            or f.name in ("dp", "tp", "pp", "micro_batch", "zero")
            or getattr(self, f.name) != getattr(default, f.name)
        ]
        return " ".join(f"{name}={_word(value)}" for name, value in kept if value is not None)

    def document(self) -> dict[str, object]:
        """Plain JSON-able values by word."""
        values = asdict(self)
        return {**values, "stage_layers": list(self.stage_layers) if self.stage_layers else None}


FIELD_NAMES = tuple(f.name for f in fields(Layout))


def _ratio(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise InputError(f"{name}={value} is not a share", place="layout", remedy="use more than 0, up to 1")
    if abs(value * RATIO_STEPS - round(value * RATIO_STEPS)) > 1e-6:
        raise InputError(
            f"{name}={value} is finer than steps of 1/{RATIO_STEPS}", place="layout", remedy="use three decimals"
        )


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return numbers_word(value)  # pyright: ignore[reportUnknownArgumentType]
    return str(value)


def parse_layout(text: str) -> Layout:
    """Read layout words, separated by spaces; raises InputError naming the word, its value and the remedy."""
    return layout_from_document(_words_to_values(text))


def given_words(text: str) -> frozenset[str]:
    """Names of the words in `text`."""
    return frozenset(_words_to_values(text))


def _words_to_values(text: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for item in text.split():
        name, equals, raw = item.partition("=")
        if not equals or not raw:
            raise InputError(f"{item!r} is not word=value", place="layout", remedy='write for instance "dp=8 tp=8"')
        if name not in FIELD_NAMES:
            raise InputError(f"layout word {name!r} is unknown", place="layout", remedy=nearest(name, FIELD_NAMES))
        if name in values:
            raise InputError(f"layout word {name!r} is given twice", place="layout", remedy="keep one")
        values[name] = _value(name, raw)
    return values


def _value(name: str, raw: str) -> object:
    try:
        if name == "stage_layers":
            return read_numbers(raw)
        if name == "order":
            return read_order(raw)
        if name in TEXT_WORDS:
            return raw.lower()
        if name == "offload_ratio":
            return float(raw)
        if name in YES_OR_NO:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[raw.lower()]
        return int(raw)
    except InputError:
        raise
    except (ValueError, KeyError):
        kind = dict.fromkeys(YES_OR_NO, "true or false")
        kind |= {"stage_layers": "numbers such as 10,12,12,10 or 10,12*2,10", "offload_ratio": "a share such as 0.4"}
        remedy = f"use {kind.get(name, 'a whole number')}" if "=" not in raw else "separate words with spaces"
        raise InputError(f"{name}={raw!r} is malformed", place="layout", remedy=remedy) from None


def layout_from_document(document: Mapping[str, object]) -> Layout:
    """Build a Layout from plain values; unknown words and bad values raise InputError."""
    values = dict(document)
    for name in values:
        if name not in FIELD_NAMES:
            raise InputError(f"layout word {name!r} is unknown", place="layout", remedy=nearest(name, FIELD_NAMES))
    layers = values.get("stage_layers")
    if isinstance(layers, list | tuple):
        values["stage_layers"] = tuple(layers)  # pyright: ignore[reportUnknownArgumentType]
    for name in TEXT_WORDS:
        if name in values and not isinstance(values[name], str):
            raise InputError(f"{name}={values[name]!r} is not a word", place="layout")
    return Layout(**values)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class LayoutTable:
    """N layouts as columns. Words are stored as codes: indices into RECOMPUTE and CODES, shares in RATIO_STEPS."""

    dp: IntArray
    tp: IntArray
    pp: IntArray
    cp: IntArray
    ep: IntArray
    etp: IntArray
    """0 where it was not given. See `expert_tp`."""
    micro_batch: IntArray
    zero: IntArray
    dp_shard: IntArray
    """Data-parallel ranks ZeRO shards over; dp where it was not given. See `zero_ranks`."""
    sequence_parallel: IntArray
    recompute: IntArray
    recompute_layers: IntArray
    """Layers per stage under full recompute; ALL_LAYERS = every one; from BY_STAGE down: see `depths`."""
    recompute_parts: IntArray
    """Sum of `recompute.PART_BITS` that selective runs again; 0 = what the runtime selects."""
    schedule: IntArray
    virtual_stages: IntArray
    split: IntArray
    """Index into `splits`."""
    attention: IntArray
    offload_optimizer: IntArray
    cp_kind: IntArray
    offload_params: IntArray
    offload_activations: IntArray
    offload_ratio: IntArray
    hpz: IntArray
    qwz: IntArray
    qgz: IntArray
    order: IntArray
    splits: tuple[tuple[int, ...] | None, ...] = (None,)
    """Explicit `stage_layers` in use; entry 0 is None, the runtime's rule."""
    depths: tuple[tuple[int, ...], ...] = ()
    """Layers under full recompute of each stage, where stages differ; entry i is meant by recompute_layers = BY_STAGE - i."""

    def __len__(self) -> int:
        return len(self.dp)

    @property
    def gpus(self) -> IntArray:
        """GPUs of each layout."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def v_placed(self) -> NDArray[np.bool_]:
        """Rows whose pipeline places two chunks in a V, (N,)."""
        return (self.pp > 1) & np.asarray([name in V_PLACED for name in SCHEDULES]).take(self.schedule)

    @property
    def zero_ranks(self) -> IntArray:
        """Ranks over which ZeRO shards states, (N,), neighbours at stride tp: dp_shard * cp, 1 without ZeRO.

        Ranks of one context-parallel group hold the same parameters and reduce their gradients with those of dp (Megatron-Core's
        distributed optimizer, torchtitan's dp_shard_cp mesh, DeepSpeed's sequence-data-parallel group).
        """
        return np.where(self.zero > 0, self.dp_shard * self.cp, 1)

    @property
    def expert_tp(self) -> IntArray:
        """Tensor-parallel degree of each expert, (N,): `etp`; where it was not given 1 with expert parallelism, else tp."""
        return np.where(self.etp > 0, self.etp, np.where(self.ep > 1, 1, self.tp))

    @property
    def dispatches(self) -> NDArray[np.bool_]:
        """Rows whose experts are spread otherwise than tensor parallelism cuts dense products, (N,): tokens travel to them."""
        return (self.ep > 1) | ((self.etp > 0) & (self.etp != self.tp))

    @property
    def expert_replicas(self) -> IntArray:
        """Ranks that hold the same expert parameters, (N,), at stride ep * etp inside the dp * cp * tp ranks of a stage."""
        return np.maximum(self.dp * self.cp * self.tp // (self.ep * self.expert_tp), 1)

    @property
    def expert_zero_ranks(self) -> IntArray:
        """Those of them over which ZeRO shards the states of experts, (N,), 1 without ZeRO (torchtitan: dp_shard * cp * tp / ep)."""
        sharing = np.maximum(self.dp_shard * self.cp * self.tp // (self.ep * self.expert_tp), 1)
        return np.where(self.zero > 0, sharing, 1)

    def stride(self, axis: str) -> IntArray:
        """Ranks between neighbours on a mesh axis, (N,)."""
        return axis_stride(axis, self.order, lambda inner: getattr(self, inner))

    def columns(self) -> dict[str, IntArray]:
        """Every column by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> LayoutTable:
        """The rows at `rows` (indices or a mask)."""
        at = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return self._of({name: taken(column, at) for name, column in self.columns().items()})

    def with_constants(self) -> LayoutTable:
        """The same rows; columns of one value keep it once, and are not copied when rows are taken."""
        if not len(self):
            return self
        single = {name: column for name, column in self.columns().items() if is_constant(column)}
        return replace(self, **{name: constant(column, len(column)) for name, column in single.items()})

    def slice(self, start: int, stop: int) -> LayoutTable:
        """The rows from `start` up to `stop`, not copied."""
        return self._of({name: column[start:stop] for name, column in self.columns().items()})

    def _of(self, columns: Mapping[str, IntArray]) -> LayoutTable:
        """All columns anew: quicker than `replace`, which asks for every field."""
        return LayoutTable(**columns, splits=self.splits, depths=self.depths)

    def row(self, index: int) -> Layout:
        """One layout back as words."""
        at = {name: int(column[index]) for name, column in self.columns().items()}
        values: dict[str, Any] = {
            **{name: at[name] for name in COUNTS},
            **{name: bool(at[name]) for name in YES_OR_NO},
            **{word: known[at[word]] for word, known in CODES.items()},
        }
        return Layout(
            **values,
            etp=at["etp"] or None,
            dp_shard=None if at["dp_shard"] == at["dp"] else at["dp_shard"],
            recompute=stored_recompute(at, self.depths).word(),
            stage_layers=self.splits[at["split"]],
            offload_ratio=at["offload_ratio"] / RATIO_STEPS,
        )


COLUMNS = tuple(f.name for f in fields(LayoutTable) if f.name not in ("splits", "depths"))


def layout_table(layouts: Sequence[Layout]) -> LayoutTable:
    """Columns of `layouts`, in order."""
    splits: list[tuple[int, ...] | None] = [None]
    depths: list[tuple[int, ...]] = []
    rows: list[tuple[int, ...]] = []
    for one in layouts:
        if one.stage_layers not in splits:
            splits.append(one.stage_layers)
        recompute = split_recompute(one.recompute)
        row = {
            **{name: int(getattr(one, name)) for name in (*COUNTS, *YES_OR_NO)},
            "dp_shard": one.dp_shard or one.dp,
            "etp": one.etp or 0,
            "recompute": RECOMPUTE.index(recompute.kind),
            "recompute_layers": layers_code(recompute, depths),
            "recompute_parts": recompute.parts,
            "split": splits.index(one.stage_layers),
            "offload_ratio": round(one.offload_ratio * RATIO_STEPS),
            **{word: known.index(getattr(one, word)) for word, known in CODES.items()},
        }
        rows.append(tuple(row[name] for name in COLUMNS))
    matrix = np.asarray(rows, dtype=np.int64).reshape(len(rows), len(COLUMNS))
    columns = {name: matrix[:, i].copy() for i, name in enumerate(COLUMNS)}
    return LayoutTable(**columns, splits=tuple(splits), depths=tuple(depths))
