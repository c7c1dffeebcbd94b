"""What a report is made of: plan files and run folders, read and checked; every fault is one line (InputError).

run folder:  run.json (what was measured and predicted), measurements.csv (step, rank, metric, value, unit), plan.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

MEASUREMENT_COLUMNS = ("step", "rank", "metric", "value", "unit")
_TIME = re.compile(r"^\d{8}(T\d{6}Z?)?-")
_REMAKE_PLAN = "make the plan again with `shardplan plan`"
_REMAKE_RUN = "give a folder written by `shardplan run`"


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """One plan file; `name` is unique within a report."""

    name: str
    path: str
    plan: Plan

    def number(self, dotted: str) -> float | None:
        """The number at `dotted` ("time.step_s"); None where the plan says null. A missing one is an InputError."""
        value = self._at(dotted)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"prediction.{dotted}={value!r} is not a number", place=self.path, remedy=_REMAKE_PLAN)
        return float(value)

    def numbers(self, dotted: str) -> dict[str, float]:
        """The numbers directly under `dotted`, by name; empty where there is no such group."""
        group = self._at(dotted, default=None)
        items: Mapping[str, Any] = cast("Mapping[str, Any]", group) if isinstance(group, Mapping) else {}
        return {k: float(v) for k, v in items.items() if isinstance(v, int | float) and not isinstance(v, bool)}

    def band(self, quantity: str) -> tuple[float | None, float | None]:
        """Lower and upper edge of the error band of `quantity` ("step_s"); (None, None) when the plan gives none."""
        band = self._at(f"error_band.{quantity}", default=None)
        if isinstance(band, Sequence) and len(cast("Sequence[object]", band)) == 2:
            low, high = cast("Sequence[float]", band)
            return float(low), float(high)
        return None, None

    def stages(self) -> list[Mapping[str, Any]]:
        """Memory by pipeline stage, in order."""
        value = self._at("memory.stages")
        if not isinstance(value, list) or not value:
            raise InputError("prediction.memory.stages is empty", place=self.path, remedy=_REMAKE_PLAN)
        return cast("list[Mapping[str, Any]]", value)

    def assumptions(self) -> list[str]:
        """What the prediction takes for granted, as sentences."""
        value = self._at("assumptions", default=[])
        return [str(line) for line in cast("Iterable[object]", value)] if isinstance(value, list) else []

    _MISSING = object()

    def _at(self, dotted: str, *, default: object = _MISSING) -> object:
        value: object = self.plan.prediction
        for key in dotted.split("."):
            if not isinstance(value, Mapping) or key not in value:
                if default is not PlanInput._MISSING:
                    return default
                raise InputError(f"field prediction.{dotted} is missing", place=self.path, remedy=_REMAKE_PLAN)
            value = cast("Mapping[str, object]", value)[key]
        return value


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """One run folder; `name` is unique within a report."""

    name: str
    path: str
    record: Mapping[str, Any]
    """run.json."""
    measurements: pd.DataFrame
    """measurements.csv, long format."""
    plan: PlanInput

    def section(self, name: str) -> Mapping[str, Any]:
        """A part of run.json: measured, predicted or versions; empty where it is absent."""
        value = self.record.get(name)
        return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything one report shows, in the order it was given."""

    plans: tuple[PlanInput, ...]
    runs: tuple[RunInput, ...]


def read_inputs(paths: Iterable[str | Path]) -> Inputs:
    """Read plan files, run folders, and folders of run folders; raises InputError for anything else."""
    plans: list[PlanInput] = []
    runs: list[RunInput] = []
    seen: set[Path] = set()
    for path in (found for given in paths for found in _expand(Path(given))):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        if path.is_dir():
            runs.append(_read_run(path, _unique(_run_name(path), [run.name for run in runs])))
        else:
            name = _unique(path.stem, [plan.name for plan in plans])
            plans.append(PlanInput(name=name, path=str(path), plan=Plan.read(path)))
    if not plans and not runs:
        raise InputError("nothing to report on", place="PATH", remedy="give plan files or run folders")
    return Inputs(plans=tuple(plans), runs=tuple(runs))


def _expand(path: Path) -> list[Path]:
    """`path` itself, or the run folders directly inside it."""
    if not path.exists():
        raise InputError("no such file or folder", place=str(path), remedy="give a plan file or a run folder")
    if not path.is_dir() or (path / "run.json").exists():
        return [path]
    inside = sorted(entry for entry in path.iterdir() if (entry / "run.json").is_file())
    if not inside:
        raise InputError("folder without run.json", place=str(path), remedy=_REMAKE_RUN)
    return inside


def _run_name(folder: Path) -> str:
    """The folder's name without the time it starts with."""
    name = folder.resolve().name
    return _TIME.sub("", name) or name


def _unique(name: str, taken: Sequence[str]) -> str:
    number = 2
    fresh = name
    while fresh in taken:
        fresh, number = f"{name} ({number})", number + 1
    return fresh


def _read_run(folder: Path, name: str) -> RunInput:
    record = _read_record(folder / "run.json")
    plan = PlanInput(name=name, path=str(folder / "plan.json"), plan=Plan.read(folder / "plan.json"))
    return RunInput(
        name=name,
        path=str(folder),
        record=record,
        measurements=_read_measurements(folder / "measurements.csv"),
        plan=plan,
    )


def _read_record(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as bad:
        raise InputError(f"cannot be read ({bad})", place=str(path), remedy=_REMAKE_RUN) from None
    if not isinstance(record, dict) or not isinstance(cast("dict[str, Any]", record).get("measured"), dict):
        raise InputError("field 'measured' is missing", place=str(path), remedy=_REMAKE_RUN)
    return cast("dict[str, Any]", record)


def _read_measurements(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as bad:  # pandas' parser errors are ValueErrors
        raise InputError(f"cannot be read ({bad})", place=str(path), remedy=_REMAKE_RUN) from None
    missing = [column for column in MEASUREMENT_COLUMNS if column not in table.columns]
    if missing:
        raise InputError(f"column {missing[0]!r} is missing", place=str(path), remedy=_REMAKE_RUN)
    table["value"] = pd.to_numeric(table["value"], errors="coerce")
    return table
