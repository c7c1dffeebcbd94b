"""`Plan`: a versioned JSON file that carries model, job, machine, runtime, layout and prediction; the contract with the executor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, layout_from_document
from shardplan.costmodel.model import Model
from shardplan.hw_profiles.errors import InputError

SCHEMA_NAME = "shardplan/plan"
SCHEMA_VERSION = 1


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
    """sha256 of model, cluster and runtime as used."""
    shardplan_version: str

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
            "job": asdict(self.job),
            "model": model_document(self.model),
            "prediction": dict(self.prediction),
            "search": dict(self.search),
            "cluster": dict(self.cluster),
            "digests": dict(self.digests),
        }

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
            return Plan(
                model=model_from_document(document["model"]),
                job=Job(**document["job"]),
                cluster=cast("Mapping[str, Any]", document["cluster"]),
                gpus=document["gpus"],
                runtime=str(document["runtime"]),
                layout=layout_from_document(document["layout"]),
                prediction=cast("Mapping[str, Any]", document["prediction"]),
                search=cast("Mapping[str, Any]", document["search"]),
                digests=cast("Mapping[str, str]", document["digests"]),
                shardplan_version=str(document["shardplan_version"]),
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
