"""TOML files to one merged document: a part starts from its base, a file's own words win, every number keeps its source.

A number may stand bare or as { value = x, source = "...", source_kind = "..." }; `source` and `source_kind` of a table hold for
what is below it. After merging, every number and every curve carries both. Two words of any table say what its base's are worth here:
`without = ["nvme"]` takes some away, `borrowed = "why"` makes all of them guesses.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import date
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, cast, get_args

from shardplan.hw_profiles.at_rate import fractions_at
from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.hw_profiles.machine import Source, SourceKind
from shardplan.hw_profiles.names import known_as, may_mean

Document = dict[str, Any]
PartKind = Literal["gpus", "nodes", "networks", "clusters"]
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)
LOCALHOST = "localhost"
"""The cluster that is detected where the command runs; it has no file."""
_SECTIONS: dict[PartKind, dict[str, PartKind]] = {
    "gpus": {},
    "networks": {},
    "nodes": {"gpu": "gpus"},
    "clusters": {"node": "nodes", "gpu": "gpus", "network": "networks"},
}
"""The sections of a file that may start from a part of their own; a node brings its GPU along, so nodes come first."""
_MERGE_WORDS = ("borrowed", "without")
_DEEPEST_BASE = 8
_CURVE_WORDS = {"value", "fraction", "head_dim"}
"""A table with one of these is a number or a curve: it carries its source, and replaces another as a whole."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """One TOML file: its words, what to call it, where its relative bases are."""

    table: Document
    place: str
    stem: str
    folder: Path | None
    default: Source


def catalog_folder(kind: PartKind) -> Traversable:
    """The folder of the catalog that holds parts of one kind."""
    return files("shardplan.hw_profiles") / "catalog" / kind


def part_names(kind: PartKind) -> tuple[str, ...]:
    """Catalog names of one kind, sorted; `localhost` closes the list of clusters."""
    if kind not in PART_KINDS:
        raise InputError(f"unknown kind of part {kind!r}", remedy=nearest(str(kind), PART_KINDS))
    entries = (entry.name for entry in catalog_folder(kind).iterdir())
    names = sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))
    return (*names, LOCALHOST) if kind == "clusters" else tuple(names)


def is_path(name: str | Path) -> bool:
    """Whether `name` means a file and not a catalog part."""
    return isinstance(name, Path) or name.endswith(".toml") or "/" in name


def part_document(kind: PartKind, name: str | Path) -> Document:
    """The merged words of a catalog part or a file, not yet checked against the schema."""
    return _resolve(kind, name, asked_by="", folder=None, depth=0)


def merged_table(kind: PartKind, table: Document, *, name: str, place: str, default: Source) -> Document:
    """The same for a table made by a program (detection, calibration) in place of a file."""
    return _expand(kind, _File(table=table, place=place, stem=name, folder=None, default=default), depth=0)


def _resolve(kind: PartKind, name: object, *, asked_by: str, folder: Path | None, depth: int) -> Document:
    if not isinstance(name, str | Path):
        given = (as_table(name) or {}).get("value", name)
        raise InputError(
            f"base = {given!r} is not a name", place=asked_by, remedy=f"use one of {', '.join(part_names(kind))}"
        )
    if depth > _DEEPEST_BASE:
        raise InputError(
            f"base = {str(name)!r} leads back to itself", place=asked_by, remedy="end the chain at a catalog part"
        )
    if is_path(name):
        return _expand(kind, _user_file((folder or Path()) / Path(name).expanduser()), depth)
    known = part_names(kind)
    name = known_as(str(name), known) or str(name)
    entry = catalog_folder(kind) / f"{name}.toml"
    if name not in known or name == LOCALHOST:
        raise _unknown(kind, str(name), asked_by)
    text = entry.read_text(encoding="utf-8")
    place = f"catalog/{kind}/{name}.toml"
    # Catalog files name a source themselves (a test holds them to it); this one never shows.
    unsaid = Source(kind="guess", text=f"catalog file {name}")
    return _expand(
        kind, _File(table=_parse(text, place), place=place, stem=str(name), folder=None, default=unsaid), depth
    )


def _unknown(kind: PartKind, name: str, asked_by: str) -> InputError:
    """The error for a name that the catalog does not have, or has of another kind."""
    what = kind.removesuffix("s")
    others = {one: known for one in PART_KINDS if one != kind and (known := known_as(name, part_names(one)))}
    if not others:
        return unknown_name(what, name, part_names(kind), asked_by)
    other, name = next(iter(others.items()))
    remedy = "shardplan hardware list names those"
    if kind == "clusters":
        part = other.removesuffix("s")
        users = [one for one in part_names("clusters") if _has_part(one, part, name)]
        written = f'write a cluster with {part} = {{ base = "{name}" }}'
        remedy = f"clusters with it: {', '.join(users)}" if users else written
    return InputError(f"{name!r} is a {other.removesuffix('s')}, not a {what}", place=asked_by, remedy=remedy)


def unknown_name(what: str, name: str, known: Collection[str], place: str = "") -> InputError:
    """The error for a name that fits no entry, or several: then it lists those."""
    entries = may_mean(name, known)
    if entries:
        return InputError(f"{name!r} may mean {', '.join(entries)}", place=place, remedy="name one of them")
    return InputError(f"unknown {what} {name!r}", place=place, remedy=nearest(name, known))


def _has_part(cluster: str, part: str, name: str) -> bool:
    """Whether a catalog cluster takes that node, network or GPU."""
    if cluster == LOCALHOST:
        return False
    return (as_table(part_document("clusters", cluster).get(part)) or {}).get("name") == name


def file_kind(name: str | Path) -> PartKind:
    """What a file describes, by the words that no other kind of part has: a cluster where none of them is there."""
    table = _user_file(Path(name).expanduser()).table
    for kind, words in _OWN_WORDS.items():
        if any(word in table for word in words):
            return kind
    return "clusters"


_OWN_WORDS: dict[PartKind, tuple[str, ...]] = {
    "gpus": ("vendor", "architecture", "memory_mib", "peak_tflops"),
    "networks": ("nics_per_node", "nic_gbit_per_s"),
    "nodes": ("intra", "host", "gpus"),
}


def _user_file(path: Path) -> _File:
    place = str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        remedy = "check the path, or see the names in shardplan hardware list"
        raise InputError("no such file", place=place, remedy=remedy) from None
    except IsADirectoryError:
        raise InputError("is a folder, not a TOML file", place=place, remedy="name the file in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"is not text (byte {error.start})", place=place, remedy="save it as UTF-8 TOML") from None
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise InputError(problem, place=place, remedy="check its permissions") from None
    default = Source(kind="spec", text=f"user profile {path.name}")
    return _File(table=_parse(text, place), place=place, stem=path.stem, folder=path.parent, default=default)


def _parse(text: str, place: str) -> Document:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error).replace("at end of document", f"at line {len(text.splitlines()) or 1}, the end of the file")
        problem = f"is not valid TOML: {said[:1].lower()}{said[1:]}"
        raise InputError(problem, place=place, remedy="correct that line") from None


def _expand(kind: PartKind, file: _File, depth: int) -> Document:
    """The file's words over those of its base and of the parts its sections start from."""
    if kind == "clusters" and "parts" in file.table:
        return _expand_parts(file, depth)
    table = _with_sources(file.table, file.default, file.place)
    base = table.pop("base", None)

    def resolve(part: PartKind, name: object) -> Document:
        return _resolve(part, name, asked_by=file.place, folder=file.folder, depth=depth + 1)

    if kind == "nodes":
        table = _hoist_gpu(table)
    start = resolve(kind, base) if base is not None else {}
    for section, part in _SECTIONS[kind].items():
        words = as_table(table.get(section))
        if words is None or "base" not in words:
            continue
        words = dict(words)
        brought = resolve(part, words.pop("base"))
        start = {**start, **(brought if part == "nodes" else {section: brought})}
        table[section] = words
    merged = merge(start, table, file.place)
    if kind == "nodes":
        return {**merged, "node": _named(merged["node"], table["node"].get("name", file.stem))}
    return _named(merged, table.get("name", file.stem))


def _expand_parts(file: _File, depth: int) -> Document:
    """A mixed cluster: every entry of `parts` is a cluster of its own, which inherits source and network."""
    rest: Document = {key: value for key, value in file.table.items() if key != "parts"}
    given: object = file.table["parts"]
    tables = cast("list[object]", given) if isinstance(given, list) else []
    parts = [as_table(table) for table in tables]
    if len(parts) < 2 or None in parts:
        raise InputError(
            "parts is not a list of two tables or more",
            place=file.place,
            remedy="write [[parts]] for each kind of node",
        )
    for word in ("base", "nodes", "node", "gpu"):
        if word in rest:
            raise InputError(
                f"{word!r} stands beside [[parts]]", place=file.place, remedy="move it below the [[parts]] it is of"
            )
    default = _own_source(rest, file.default, file.place)
    whole = _expand("clusters", replace(file, table=rest), depth)
    network = as_table(rest.get("network"))
    found: list[Document] = []
    for index, table in enumerate(parts):
        words = dict(table or {})
        if network is not None and "network" not in words and "base" not in words:
            words["network"] = network
        part = replace(file, table=words, place=f"{file.place}, parts[{index}]", stem="", default=default)
        one = _expand("clusters", part, depth)
        gpu = as_table(one.get("gpu")) or {}
        name = str(words.get("name", gpu.get("name", "part")))
        taken = any(other["name"] == name for other in found)
        found.append(_named(one, f"{name}-{index}" if taken else name))
    return {**whole, "parts": found}


def _named(part: Document, name: object) -> Document:
    return {"name": name, **{key: value for key, value in part.items() if key != "name"}}


def _hoist_gpu(table: Document) -> Document:
    """A node file is flat for its reader; merged, it is a `node` beside its `gpu`."""
    gpu = {"gpu": table.pop("gpu")} if "gpu" in table else {}
    return {**gpu, "node": table}


def _with_sources(table: Document, inherited: Source, place: str) -> Document:
    """A copy of `table` in which every number, flag and curve names its source, and tables no longer do."""
    own = _own_source(table, inherited, place)
    words = {key: value for key, value in table.items() if key not in ("source", "source_kind")}
    if _CURVE_WORDS & words.keys() or any(key.startswith("size_") for key in words):
        dated = {key: str(value) for key, value in words.items() if isinstance(value, date)}
        return {**words, **dated, "source": own.text, "source_kind": own.kind}
    done: Document = {}
    for key, value in words.items():
        inner = as_table(value)
        if inner is not None:
            done[key] = _with_sources(inner, own, place)
        elif isinstance(value, int | float):
            done[key] = {"value": value, "source": own.text, "source_kind": own.kind}
        else:
            done[key] = value
    return done


def _own_source(table: Document, inherited: Source, place: str) -> Source:
    text, kind = table.get("source", inherited.text), table.get("source_kind", inherited.kind)
    kinds = get_args(SourceKind)
    if kind not in kinds:
        raise InputError(f"source_kind = {kind!r} is not known", place=place, remedy=f"use {', '.join(kinds)}")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"source = {text!r} is not a text", place=place, remedy="say where the numbers are from")
    return Source(kind=kind, text=text)


def merge(base: Document, over: Document, place: str = "") -> Document:
    """`over` laid on `base`, table by table; a number or a curve replaces the other with its source.

    `without` and `borrowed` of `over` change the table of `base` beneath it first.
    """
    unwanted = _unwanted(base, over, place)
    merged = {key: value for key, value in base.items() if key not in unwanted}
    if "borrowed" in over:
        merged = _guessed(merged, _borrowed_from(over, place))
    for key, value in over.items():
        if key in _MERGE_WORDS:
            continue
        old, new = as_table(merged.get(key)) or {}, as_table(value)
        is_leaf = new is None or "source" in new
        merged[key] = value if is_leaf else merge({} if "source" in old else old, new or {}, place)
    return merged if "efficiency" in over else _at_its_rate(base, merged, place)


def _at_its_rate(base: Document, merged: Document, place: str) -> Document:
    """A network with as many NICs as its base's but of another rate, and no curve of its own: the base's, where what is not the link's
    takes as long (`at_rate.fractions_at`)."""
    curve = as_table(merged.get("efficiency")) or {}
    before, now = (
        {word: (as_table(table.get(word)) or {}).get("value") for word in ("nics_per_node", "nic_gbit_per_s")}
        for table in (base, merged)
    )
    old, new, fractions = before["nic_gbit_per_s"], now["nic_gbit_per_s"], curve.get("fraction")
    if old == new or before["nics_per_node"] != now["nics_per_node"] or not _is_positive(old, new):
        return merged
    if not isinstance(fractions, list) or not _is_positive(*cast("list[object]", fractions)):
        return merged  # the schema says what is wrong with it
    text = f"{curve.get('source')}; at {new:g} Gbit/s steps take as long as at {old:g} ({place})"
    scaled = list(fractions_at(cast("list[float]", fractions), float(cast(float, new)) / float(cast(float, old))))
    return {**merged, "efficiency": {**curve, "fraction": scaled, "source": text}}


def _is_positive(*values: object) -> bool:
    return all(isinstance(one, int | float) and 0 < one < float("inf") for one in values)


def _unwanted(base: Document, over: Document, place: str) -> list[str]:
    """What `over` says that the base's table holds and it does not."""
    words: object = over.get("without", [])
    if not isinstance(words, list):
        given = (as_table(words) or {}).get("value", words)
        raise InputError(f"without = {given!r} is not a list", place=place, remedy='name fields of the base: ["nvme"]')
    names = [str(word) for word in cast("list[object]", words)]
    unknown = [name for name in names if name not in base]
    if unknown:
        raise InputError(
            f"without names {unknown[0]!r}, which the base does not have", place=place, remedy=nearest(unknown[0], base)
        )
    return names


def _borrowed_from(over: Document, place: str) -> str:
    text: object = over["borrowed"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"borrowed = {text!r} is not a text", place=place, remedy='say why, as in "as the A100"')
    return text


def _guessed(table: Document, why: str) -> Document:
    """The table with every number and curve a guess."""
    if "source" in table:
        return {**table, "source": why, "source_kind": "guess"}
    inner = {key: as_table(value) for key, value in table.items()}
    return {key: _guessed(below, why) if below is not None else table[key] for key, below in inner.items()}


def as_table(value: object) -> Document | None:
    """`value` when it is a table."""
    return cast(Document, value) if isinstance(value, dict) else None
