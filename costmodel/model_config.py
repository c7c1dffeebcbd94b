"""Models from outside: preset names, Hugging Face `config.json` files, and the description a plan file embeds.

Defaults and key names are those of transformers' config classes (4.x and 5.x): a config.json may omit every key that equals its
default. Keys that change no shape (rope_theta, dtype, ...) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from shardplan.costmodel.family import Family
from shardplan.costmodel.model import Model, runs_of
from shardplan.costmodel.model_document import check_size, model_digest, model_document, model_from_document
from shardplan.costmodel.model_families import FAMILIES, FLAT_TEXT, NOT_READ, TEXT_TYPES
from shardplan.costmodel.model_fields import Fields, json_object, shown
from shardplan.costmodel.presets import find_preset, preset_words
from shardplan.hw_profiles.errors import InputError, nearest

__all__ = ["load_model", "model_digest", "model_document", "model_from_config", "model_from_document"]

_MOST_FILE_BYTES = 10_000_000
_ACCEPTED = "give a preset name (`shardplan models list`), a config.json or a folder with one"
LEAST_LETTERS = 6
"""Shorter keys resemble each other by chance."""
_NOT_MODELLED = ("quantization_config", "pruned_heads", "add_cross_attention", "is_encoder_decoder")
_STORED_QUANTIZED = ("fp8", "mxfp4")
"""quant_method of weights published in fewer bits, of models that are trained in more: shapes are the same."""


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


def model_from_config(
    config: object,
    *,
    name: str,
    source: str = "",
    place: str = "config.json",
    families: Mapping[str, Family] = FAMILIES,
) -> Model:
    """The model a Hugging Face config describes; `config` is the parsed JSON, `place` names it in errors.

    Of a config with a `text_config` (images, sound) that is the model; `source` then says so.
    """
    given = json_object(config, place, 'write a Hugging Face config such as {"model_type": "llama", ...}')
    known = ", ".join(families)
    if "model_type" not in given:
        raise InputError("model_type is missing", remedy=f"add model_type, one of: {known}", place=place)
    model_type = given["model_type"]
    text = (
        _text_config(given, model_type, place) if isinstance(model_type, str) and model_type not in families else None
    )
    if text is not None:
        source = f"{source + '; ' if source else ''}the text model of a {model_type}, without what reads other inputs"
        place = f"{place}: text_config" if "text_config" in given else place
        return model_from_config(text, name=name, source=source, place=place, families=families)
    if not isinstance(model_type, str) or model_type not in families:
        raise _cannot_be_read(model_type, families, place)
    family = families[model_type]
    spelled = _spellings(given, family, place)
    _refuse_mistyped(given, family, place)
    values = Fields(place=place, given=given, defaults=family.defaults, spelled=spelled)
    _refuse_other_shapes(values, family, model_type)
    layers, pattern = runs_of(family.layers(values))
    positions = values.count(family.positions)
    softcap = "final_logit_softcapping" in family.defaults and values.value("final_logit_softcapping") is not None
    model = Model(
        name=name,
        family=model_type,
        layers=layers,
        vocab=values.count("vocab_size"),
        tied_embeddings=values.flag("tie_word_embeddings"),
        learned_positions=positions + family.more_positions if family.learned_positions else 0,
        max_positions=positions,
        source=source,
        pattern=pattern,
        mtp_modules=values.count(family.mtp, least=0, most=100) if family.mtp else 0,
        head_bias=family.head_bias,
        logit_softcap=softcap,
    )
    return check_size(model, place)


def _cannot_be_read(model_type: object, families: Mapping[str, Family], place: str) -> InputError:
    """The error that names a type that is unknown, or known and refused, with the nearest ones."""
    problem = f"model_type={shown(model_type)} cannot be read"
    remedy = f"model types that can be read: {', '.join(families)}"
    if isinstance(model_type, str):
        near = nearest(model_type, families)
        if model_type in NOT_READ:
            problem += f": {NOT_READ[model_type]}"
        elif near.startswith("did you mean"):
            remedy = f"{near} {remedy}"
    return InputError(problem, remedy=remedy, place=place)


def _text_config(given: Mapping[str, object], outer: str, place: str) -> Mapping[str, object] | None:
    """The nested description of the language model, with its type and whether embeddings are tied where only the outer one says so.

    Null is all of its defaults, as in transformers. None where there is no such description.
    """
    nested = given.get("text_config")
    if isinstance(nested, dict):
        text = dict(json_object(given["text_config"], place, "write the text model's config"))
    elif "text_config" in given and nested is None and outer in TEXT_TYPES:
        text = {}
    elif nested is None and outer in FLAT_TEXT:
        return {**given, "model_type": TEXT_TYPES[outer]}
    else:
        return None
    if "model_type" not in text and outer in TEXT_TYPES:
        text["model_type"] = TEXT_TYPES[outer]
    tied, inner = given.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if tied is not None:
        if inner is not None and inner != tied:
            problem = f"tie_word_embeddings={shown(tied)} contradicts {shown(inner)} in text_config"
            raise InputError(problem, remedy="they mean the same: keep one", place=place)
        text["tie_word_embeddings"] = tied
    return text


def _spellings(given: Mapping[str, object], family: Family, place: str) -> Mapping[str, str]:
    """The words the file uses where transformers knows two for one field; two different values are refused."""
    used: dict[str, str] = {}
    for key, other in family.spellings.items():
        if other not in given:
            continue
        if key in given and given[key] != given[other]:
            problem = f"{key}={shown(given[key])} contradicts {other}={shown(given[other])}"
            raise InputError(problem, remedy="they mean the same: keep one", place=place)
        used[key] = other
    return used


def _refuse_mistyped(given: Mapping[str, object], family: Family, place: str) -> None:
    """Refuse a key one or two letters from one that is read and absent: its value would be ignored for the default."""
    read = {*family.defaults, *family.spellings, *family.spellings.values(), *family.only, family.positions}
    spelled = {key for pair in family.spellings.items() if any(word in given for word in pair) for key in pair}
    absent = sorted(key for key in read - spelled if key and key not in given)
    for key in given:
        if key in read or not isinstance(given[key], int | float):
            continue
        near = next((one for one in absent if len(key) > LEAST_LETTERS and letters_apart(key.lower(), one) <= 2), None)
        if near:
            raise InputError(
                f"{key}={shown(given[key])} is not read, and {near} is not given",
                remedy=f"did you mean {near}? Else leave {key} out",
                place=place,
            )


def letters_apart(one: str, other: str) -> int:
    """Letters to insert, drop or replace to make one word of another (Levenshtein 1966); 3 for any more."""
    if abs(len(one) - len(other)) > 2:
        return 3
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        before, row = row, [at]
        for place, wanted in enumerate(other, 1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (letter != wanted)))
    return min(row[-1], 3)


def _refuse_other_shapes(values: Fields, family: Family, model_type: str) -> None:
    """Refuse by name what would change shapes in a way that is not modelled."""
    given = values.given
    refused = [key for key in _NOT_MODELLED if given.get(key) and not _only_stored(given[key])]
    if refused:
        remedy = "set it to null, or use the config.json of a model without it"
        raise values.bad(refused[0], "is not modelled", remedy)
    for key, modelled in family.only.items():
        if key in given and given[key] not in modelled:
            remedy = f"leave it out, or write {' or '.join(shown(value) for value in modelled)}"
            raise values.bad(key, f"is not modelled for {model_type}", remedy)
    expected = family.architecture
    named = given.get("architectures") or [expected]
    words = cast("list[object]", named) if isinstance(named, list) else [named]
    if expected.lower() not in [str(word).lower() for word in words]:
        remedy = f'write "architectures": ["{expected}"] to plan it as a {model_type} language model'
        raise values.bad("architectures", "is not modelled", remedy)


def _only_stored(value: object) -> bool:
    """Whether a quantization_config tells how weights are published, not how the model is trained."""
    return isinstance(value, Mapping) and cast("Mapping[str, object]", value).get("quant_method") in _STORED_QUANTIZED
