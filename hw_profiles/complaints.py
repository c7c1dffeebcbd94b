"""Checks a document against the schema and tells the first complaint in one line: file, field, value, remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.hw_profiles.schema import AttentionPlateaus
from shardplan.hw_profiles.schema_values import Curve, Flag, Sourced

FILE_WORDS = ("base", "source", "source_kind")
"""Words any table of a file may have besides its fields."""

_LIMITS = {"greater_than": "above", "greater_than_equal": "at least", "less_than_equal": "at most"}
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "list_type": "a list",
    "bool_type": "true or false",
}
_Model = TypeVar("_Model", bound=BaseModel)


def parse(model: type[_Model], document: object, place: str) -> _Model:
    """`document` as a `model`; InputError with the first complaint, naming field, value and remedy."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        complaints = [cast(dict[str, Any], one) for one in error.errors(include_url=False)]
        raise _first_complaint(complaints, model, place) from None


def _rank(complaint: dict[str, Any]) -> int:
    """A number in place of a table, then misspelt keys (both also cause missing ones); missing sources follow from the rest."""
    if complaint["type"] == "extra_forbidden":
        return 0 if complaint["loc"][-1] == "value" else 1
    return 3 if complaint["loc"] and complaint["loc"][-1] in ("source", "source_kind") else 2


def _first_complaint(complaints: list[dict[str, Any]], model: type[BaseModel], place: str) -> InputError:
    complaint = min(complaints, key=_rank)
    keys = [key for key in complaint["loc"] if key != "value"]
    path = ".".join(str(key) for key in keys) or "the profile"
    value, kind, limits = _plain(complaint["input"]), str(complaint["type"]), complaint.get("ctx", {})
    if kind == "extra_forbidden" and complaint["loc"][-1] != "value":
        problem = f"unknown key {path}"
        remedy = nearest(str(keys[-1]), {*_fields_at(model, keys[:-1]), *FILE_WORDS})
    elif kind == "missing":
        problem = f"{path} is missing"
        remedy = f'add {keys[-1] if keys else path}, or start from a catalog part with base = "NAME"'
    elif kind == "value_error":
        told, _, advice = str(complaint["msg"]).removeprefix("Value error, ").partition("; ")
        problem, remedy = f"{path} {told}", advice or "correct the field"
    elif kind == "literal_error":
        problem, remedy = f"{path} = {value!r} is not a known word", f"use {limits['expected']}"
    elif kind in _LIMITS:
        limit = f"{_LIMITS[kind]} {next(iter(limits.values())):g}"
        problem, remedy = f"{path} = {value} is not {limit}", f"give a number {limit}"
    elif kind == "finite_number":
        problem, remedy = f"{path} = {value} is not finite", "give a number"
    else:
        wanted = _TYPES.get(kind) or _wanted(model, keys)
        problem, remedy = f"{path} = {value!r} is not {wanted}", f"give {wanted}"
    return InputError(problem, place=place, remedy=remedy)


def _plain(value: object) -> object:
    """What the file gave, without the source that was attached to it."""
    table = cast(dict[str, object], value) if isinstance(value, dict) else {"value": value}
    return table.get("value", table)


def _model_at(model: type[BaseModel], keys: Sequence[object]) -> type[BaseModel] | None:
    """The model of the table at the dotted path `keys`."""
    here: type[BaseModel] | None = model
    for key in keys:
        field = here.model_fields.get(str(key)) if here else None
        choices = (field.annotation, *get_args(field.annotation)) if field else ()
        here = next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return here


def _fields_at(model: type[BaseModel], keys: Sequence[object]) -> tuple[str, ...]:
    here = _model_at(model, keys)
    return tuple(here.model_fields) if here else ()


def _wanted(model: type[BaseModel], keys: Sequence[object]) -> str:
    """What belongs at `keys`, in words."""
    here = _model_at(model, keys)
    if here is None or not issubclass(here, Sourced):
        return "a table"
    if issubclass(here, AttentionPlateaus):
        return "a table of head dims, plateaus and ramps"
    if issubclass(here, Flag):
        return "true or false"
    return "a curve (a table of sizes and fractions)" if issubclass(here, Curve) else "a number"
