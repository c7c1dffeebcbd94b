"""`Plan`: a versioned JSON file that carries model, job, machine, runtime, layout and prediction; the contract with the executor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, layout_from_document
from shardplan.costmodel.model import Model
from shardplan.hw_profiles.errors import InputError

SCHEMA_NAME = "shardplan/plan"
SCHEMA_VERSION = 1
WISHES = ("headroom", "fix", "forbid", "allow", "objective")
"""Of `search`: what the user asked for beside the job."""
DIGESTED = {
    "model": "model",
    "cluster": "cluster",
    "job": "job",
    "layout": "layout",
    "asked": "GPUs, runtime or wishes",
    "rank_map": "rank map",
    "prediction": "prediction",
}
"""Parts of the file that have a digest, in words. `runtime` has one too, of a file that is not in the plan."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A chosen layout with everything it was computed from. `prediction` is what `shardplan estimate --json` answers."""

    model: Model
    job: Job
    cluster: Mapping[str, Any]
    """The merged profile document (hw_profiles.load.cluster_document)."""
    gpus: int
    runtime: str
    layout: Layout
    prediction: Mapping[str, Any]
    search: Mapping[str, Any]
    """How many layouts were looked at, how many refused and why, the runners-up."""
    digests: Mapping[str, str]
    """sha256 of model, cluster and runtime as used, and of the other parts of the file (DIGESTED)."""
    shardplan_version: str
    rank_map: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Which rank lies where on every axis (rank_map.py); empty in files from before it was written."""
    edited: tuple[str, ...] = ()
    """Parts, of DIGESTED, of the file it was read from that are not what their digests say: somebody changed them since."""

    def document(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        from dataclasses import asdict

        from shardplan.costmodel.model_config import model_document

        return {
            "schema": SCHEMA_NAME,
            "schema_version": SCHEMA_VERSION,
            "shardplan_version": self.shardplan_version,
            "gpus": self.gpus,
            "runtime": self.runtime,
            "layout": self.layout.document(),
            **({"rank_map": dict(self.rank_map)} if self.rank_map else {}),
            "job": asdict(self.job),
            "model": model_document(self.model),
            "prediction": dict(self.prediction),
            "search": dict(self.search),
            "cluster": dict(self.cluster),
            "digests": dict(self.digests),
        }

    def notes(self) -> list[str]:
        """What a reader has to know of a file that was edited by hand, in sentences; empty for one that is as it was made."""
        inputs = [DIGESTED[part] for part in self.edited if part not in ("prediction", "rank_map")]
        others = [DIGESTED[part] for part in self.edited if part in ("prediction", "rank_map")]
        told: list[str] = []
        if inputs:
            told.append(
                f"its {' and '.join(inputs)} {_were(inputs)} edited since the plan was made, so its prediction is of something else; "
                "plan again with `shardplan plan`"
            )
        if others:
            told.append(
                f"its {' and '.join(others)} {_were(others)} edited since the plan was made; plan again with `shardplan plan`"
            )
        return told

    def write(self, path: str | Path) -> None:
        """Write the plan; the old file stays whole until the new one is complete."""
        target = Path(path)
        if not target.parent.is_dir():
            raise InputError(f"folder {str(target.parent)!r} does not exist", place=str(path), remedy="create it first")
        if target.is_dir():
            raise InputError("is a folder", place=str(path), remedy="name a file")
        text = json.dumps(self.document(), indent=1, allow_nan=False) + "\n"
        part = target.with_name(target.name + ".tmp")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(target)
        except OSError as bad:
            part.unlink(missing_ok=True)
            raise InputError(
                f"cannot be written ({bad.strerror})", place=str(path), remedy="name another file"
            ) from None

    @staticmethod
    def read(path: str | Path) -> Plan:
        """Read a plan; raises InputError (file, field, remedy) for a missing, truncated, newer or foreign file."""
        place = str(path)
        document = _read_json(Path(path))
        _check_schema(document, place)
        from shardplan.costmodel.model_config import model_from_document

        try:
            _check_parts(document)
            model = model_from_document(document["model"])
            return Plan(
                model=model,
                job=Job(**document["job"]),
                cluster=cast("Mapping[str, Any]", document["cluster"]),
                gpus=document["gpus"],
                runtime=str(document["runtime"]),
                layout=layout_from_document(document["layout"]),
                prediction=cast("Mapping[str, Any]", document["prediction"]),
                search=cast("Mapping[str, Any]", document["search"]),
                digests=cast("Mapping[str, str]", document["digests"]),
                shardplan_version=str(document["shardplan_version"]),
                rank_map=cast("Mapping[str, Any]", document.get("rank_map", {})),
                edited=_edited(document, model),
            )
        except KeyError as missing:
            raise InputError(
                f"field {missing.args[0]!r} is missing", place=place, remedy="make the plan again with `shardplan plan`"
            ) from None
        except InputError as bad:
            raise InputError(f"{bad}", place=place, remedy="make the plan again with `shardplan plan`") from None
        except (TypeError, ValueError) as bad:
            raise InputError(
                f"malformed plan ({bad})", place=place, remedy="make it again with `shardplan plan`"
            ) from None


def digest(document: object) -> str:
    """sha256 of the canonical JSON of `document`."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def part_digests(document: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the parts of a plan's document that are not files of their own, by name in DIGESTED. They are of the text, so that
    fields which a later version adds with a default change none."""
    search = document["search"]
    asked = {
        "gpus": document["gpus"],
        "runtime": document["runtime"],
        **{word: search[word] for word in WISHES if word in search},
    }
    parts = {name: document[name] for name in ("job", "layout", "prediction", "rank_map") if name in document}
    return {name: digest(part) for name, part in {**parts, "asked": asked}.items()}


def _edited(document: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """Parts that are not what the file's digests say; what has no digest, as in files of older versions, is not checked."""
    from shardplan.costmodel.model_config import model_digest as shapes_digest

    now = {**part_digests(document), "model": shapes_digest(model), "cluster": digest(document["cluster"])}
    said = document["digests"]
    return tuple(name for name in DIGESTED if name in said and said[name] != now.get(name))


def _were(parts: list[str]) -> str:
    return "were" if len(parts) > 1 or parts[0].startswith("GPUs") else "was"


def model_digest(model: Model) -> str:
    """Digest of a model's description: equal for plans whose tensors mean the same."""
    from shardplan.costmodel.model_config import model_document

    return digest(model_document(model))


def _read_json(path: Path) -> dict[str, Any]:
    place = str(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no such plan file", place=place, remedy="make one with `shardplan plan … -o plan.json`"
        ) from None
    except (IsADirectoryError, PermissionError, OSError) as bad:
        raise InputError(f"cannot be read ({bad.strerror})", place=place, remedy="give a plan file") from None
    except UnicodeDecodeError:
        raise InputError("is not text", place=place, remedy="give a plan file") from None
    except json.JSONDecodeError as bad:
        raise InputError(
            f"truncated or not JSON (line {bad.lineno}, column {bad.colno}: {bad.msg})",
            place=place,
            remedy="make the plan again with `shardplan plan`",
        ) from None
    if not isinstance(document, dict):
        raise InputError(
            "is not a plan (no JSON object)", place=place, remedy="give a file made by `shardplan plan -o`"
        )
    return cast("dict[str, Any]", document)


def _check_parts(document: Mapping[str, Any]) -> None:
    """Types of what is not validated elsewhere; raises TypeError naming the field."""
    for name in ("cluster", "prediction", "search", "digests", "job", "layout"):
        if not isinstance(document[name], dict):
            raise TypeError(f"{name} is not an object")
    if not isinstance(document.get("rank_map", {}), dict):
        raise TypeError("rank_map is not an object")
    if type(document["gpus"]) is not int:
        raise TypeError(f"gpus={document['gpus']!r} is not a whole number")
    headroom = document["search"].get("headroom", 0.0)
    if not isinstance(headroom, int | float) or not 0.0 <= headroom < 1.0:
        raise TypeError(f"search.headroom={headroom!r} is not a fraction")
    for name in ("memory", "time", "throughput"):
        if not isinstance(document["prediction"].get(name), dict):
            raise TypeError(f"prediction.{name} is missing or not an object")
    step_s = document["prediction"]["time"].get("step_s")
    if not isinstance(step_s, int | float) or not step_s > 0:
        raise TypeError(f"prediction.time.step_s={step_s!r} is not a positive number")


def _check_schema(document: Mapping[str, Any], place: str) -> None:
    if document.get("schema") != SCHEMA_NAME:
        raise InputError(
            f"schema={document.get('schema')!r} is not {SCHEMA_NAME!r}",
            place=place,
            remedy="give a file made by `shardplan plan -o`",
        )
    version = document.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise InputError(f"schema_version={version!r} is not a version", place=place)
    if version > SCHEMA_VERSION:
        raise InputError(
            f"schema_version={version} is newer than {SCHEMA_VERSION}, the newest this shardplan reads "
            f"(written by shardplan {document.get('shardplan_version')})",
            place=place,
            remedy="upgrade shardplan or make the plan again",
        )
