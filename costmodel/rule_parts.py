"""What the rules of `rules.py` are made of: predicates over columns, and remedies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.keys import one_of, unique_keys
from shardplan.costmodel.layout import Layout, LayoutTable
from shardplan.costmodel.model import LayerKind
from shardplan.costmodel.pipeline import layers_of_ranks, split_layers
from shardplan.costmodel.recompute import BY_STAGE
from shardplan.costmodel.rule import BoolArray, Setting
from shardplan.costmodel.runtime import Runtime


def divisors(number: int, *, most: int = 4096) -> list[int]:
    """Divisors of `number`, ascending, up to `most`."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def divides(number: Callable[[LayerKind], int]) -> Callable[[Setting, LayoutTable], BoolArray]:
    """Predicate: tp does not divide `number` of some layer kind."""

    def broken(setting: Setting, table: LayoutTable) -> BoolArray:
        return np.any([number(kind) % table.tp != 0 for kind in setting.kinds], axis=0)

    return broken


def divides_ffn(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: tp does not divide the width of some MLP that it cuts, which are not those of experts that tokens travel to."""
    dense = [kind.ffn % table.tp != 0 for kind in setting.kinds if not kind.experts]
    experts = [(kind.ffn % table.tp != 0) & ~table.dispatches for kind in setting.kinds if kind.experts]
    return np.any([*dense, *experts], axis=0)


def use_divisors(number: Callable[[Setting], int]) -> Callable[[Setting, Layout], str]:
    """Remedy: the divisors of `number`."""

    def remedy(setting: Setting, _: Layout) -> str:
        options = divisors(number(setting), most=64)
        return "use " + ", ".join(map(str, options[:-1])) + (" or " if len(options) > 1 else "") + str(options[-1])

    return remedy


def not_in(column: str, known: Callable[[Runtime], tuple[int, ...]]) -> Callable[[Setting, LayoutTable], BoolArray]:
    """Predicate: the column is none of what the runtime knows."""

    def broken(setting: Setting, table: LayoutTable) -> BoolArray:
        return ~one_of(getattr(table, column), known(setting.runtime))

    return broken


def codes(words: tuple[str, ...], known: tuple[str, ...]) -> tuple[int, ...]:
    """Codes of `words` in the vocabulary `known`."""
    return tuple(known.index(word) for word in words if word in known)


def micro_batches(setting: Setting, table: LayoutTable) -> NDArray[np.float64]:
    """Micro-batches per step of each layout; not whole where the batch does not divide."""
    return setting.job.global_batch / (table.dp * table.micro_batch)


def split_is_wrong(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: explicit stage_layers with another number of chunks or layers than the layout and the model have."""
    broken = np.zeros(len(table), dtype=bool)
    for index, split in enumerate(table.splits):
        if split is not None:
            uses = table.split == index
            broken |= uses & (table.pp * table.virtual_stages != len(split))
            broken |= uses & (sum(split) != setting.model.layer_count)
    return broken


def most_chunks(setting: Setting) -> int:
    """Chunks that the layers of the model can be cut into: one each, and two more where the ends may hold none."""
    return setting.model.layer_count + 2 * setting.runtime.abilities.ends_without_layers


def ends_lack_layers(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: explicit stage_layers with a chunk of the embedding or of the head alone in a runtime that has none."""
    broken = np.zeros(len(table), dtype=bool)
    for index, split in enumerate(table.splits):
        if split is not None and 0 in split:
            broken |= table.split == index
    return broken & (not setting.runtime.abilities.ends_without_layers)


def recomputes_more_than_there_is(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: more recomputed layers of every stage than the fullest stage has."""
    broken = table.recompute_layers * table.pp > setting.model.layer_count
    open_ = np.flatnonzero(broken)
    if len(open_):
        columns = (table.pp, table.virtual_stages, table.split, table.v_placed.astype(np.int64))
        keys = [column[open_] for column in columns]
        first, key_of = unique_keys(*keys)
        fullest = [_fullest_stage(setting, table.splits, *(int(key[row]) for key in keys)) for row in first]
        most = np.asarray(fullest)[key_of] + setting.model.mtp_modules
        broken[open_] = table.recompute_layers[open_] > most
    return broken


def _fullest_stage(
    setting: Setting, splits: Sequence[tuple[int, ...] | None], pp: int, virtual_stages: int, split: int, v_placed: int
) -> int:
    """Layers of the stage that holds most of them; none where an explicit split is of another number of chunks."""
    chunks = pp * virtual_stages
    layers = splits[split] or split_layers(setting.model.layer_count, chunks, setting.runtime.stages)
    if len(layers) != chunks:
        return 0
    return int(layers_of_ranks(layers, pp, virtual_stages, v_placed=bool(v_placed)).max())


def depth_is_wrong(_: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: recomputed layers by stage for another number of stages than the layout has, or of stages of several chunks."""
    broken = np.zeros(len(table), dtype=bool)
    for index, depth in enumerate(table.depths):
        broken |= (table.recompute_layers == BY_STAGE - index) & ((table.pp != len(depth)) | (table.virtual_stages > 1))
    return broken


def uneven(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: stages of unequal size in a runtime that only has equal ones."""
    broken = (table.split == 0) & (setting.model.layer_count % (table.pp * table.virtual_stages) != 0)
    for index, split in enumerate(table.splits):
        if split is not None and len(set(split)) > 1:
            broken |= table.split == index
    return broken & (not setting.runtime.abilities.uneven_stages)


def can(setting: Setting, ability: str) -> bool:
    """Whether the runtime has an ability."""
    return bool(getattr(setting.runtime.abilities, ability))


def runtime_lacks(what: str) -> Callable[[Setting, Layout], str]:
    """Detail: the runtime has no `what`."""
    return lambda s, _: f"runtime {s.runtime.name!r} ({s.runtime.version}) has no {what}"


def other_runtime(_: Setting, __: Layout) -> str:
    """Remedy: without it, or elsewhere."""
    return "drop it or choose another --runtime"


def options(words: Callable[[Runtime], tuple[object, ...]]) -> Callable[[Setting, Layout], str]:
    """Remedy: what the runtime can do."""
    return lambda s, _: f"{s.runtime.name!r} can do: {', '.join(map(str, words(s.runtime))) or 'none'}"


def gradient_dtypes(setting: Setting) -> tuple[str, ...]:
    """Gradient dtypes the runtime has for the precision of the job."""
    states = setting.runtime.states.get(setting.job.precision)
    return states.gradient_dtypes if states else ()


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def count(setting: Setting, layout: Layout) -> float:
    """Micro-batches per step of one layout."""
    return setting.job.global_batch / (layout.dp * layout.micro_batch)
