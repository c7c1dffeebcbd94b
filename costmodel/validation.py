"""Measured rows -> predictions -> errors, by source: how good the cost model is on runs that others published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.fitted import Fitted
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.published_rows import (
    Case,
    RefusedRowError,
    Row,
    flag,
    is_doubtful,
    names_adapters,
    number,
    row_case,
)
from shardplan.costmodel.published_software import usual_peak
from shardplan.hw_profiles.errors import InputError, nearest

GIB = 2.0**30
SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
"""Columns that make two rows the same model, whatever its name."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row: measured beside predicted; None where there is nothing to compare."""

    case_id: str
    source: str
    precision: str
    fine_tuned: bool
    """LoRA or QLoRA."""
    digitised: bool
    """Read off a figure."""
    doubtful: bool
    """Its notes call it SUSPECT: inputs or result that cannot both be right."""
    experts: bool
    """The model has experts."""
    group: tuple[str, ...]
    """Rows of one group are the same work on the same machine in another layout: model, GPU, count, batch."""
    measured_step_s: float | None
    measured_peak_gib: float | None
    memory_kind: str
    out_of_memory: bool
    compared_with: str | None = None
    """The kind that the software prints, where memory_kind is unknown."""
    memory_stages: int | None = None
    """The measured peak is of the first so many pipeline stages; None: of all."""
    predicted_step_s: float | None = None
    step_band_s: tuple[float, float] | None = None
    predicted_peak_gib: float | None = None
    predicted_fits: bool | None = None
    refused: str | None = None
    parts: Mapping[str, float] | None = None

    @property
    def step_ratio(self) -> float | None:
        """Predicted over measured step time."""
        if self.predicted_step_s is None or self.measured_step_s is None:
            return None
        return self.predicted_step_s / self.measured_step_s

    @property
    def peak_ratio(self) -> float | None:
        """Predicted over measured peak memory."""
        if self.predicted_peak_gib is None or self.measured_peak_gib is None:
            return None
        return self.predicted_peak_gib / self.measured_peak_gib

    def document(self) -> dict[str, Any]:
        """The row of `shardplan validate --json`."""
        low, high = self.step_band_s or (None, None)
        return {
            "case_id": self.case_id,
            "source": self.source,
            "predicted_step_s": self.predicted_step_s,
            "measured_step_s": self.measured_step_s,
            "step_s_low": low,
            "step_s_high": high,
            "predicted_peak_gib": self.predicted_peak_gib,
            "measured_peak_gib": self.measured_peak_gib,
            "memory_kind": self.memory_kind,
            "predicted_fits": self.predicted_fits,
            "refused": self.refused,
        }


def validate_rows(rows: Sequence[Row]) -> list[Outcome]:
    """Predict every row; a row the model does not cover is refused with a reason, never left out."""
    return [_outcome(row) for row in rows]


def _measured(row: Row, name: str) -> float | None:
    if not row[name].strip():
        return None
    value = number(row, name)
    if value == 0:
        raise InputError(f"case {row['case_id']!r}: {name}=0 measures nothing", remedy="leave the cell empty")
    return value


def _memory_kind(row: Row) -> str:
    word = row["memory_kind"] or "unknown"
    if word not in MEMORY_COLUMNS:
        raise InputError(
            f"case {row['case_id']!r}: memory_kind={word!r} is unknown", remedy=nearest(word, MEMORY_COLUMNS)
        )
    return word


def _memory_stages(row: Row) -> int | None:
    if not row.get("memory_stages", "").strip():
        return None
    value = number(row, "memory_stages")
    if value < 1 or value != int(value):
        raise InputError(
            f"case {row['case_id']!r}: memory_stages={row['memory_stages']!r} is no count of pipeline stages",
            remedy="a whole number from 1, or an empty cell for all stages",
        )
    return int(value)


def _outcome(row: Row) -> Outcome:
    bare = Outcome(
        case_id=row["case_id"],
        source=row["source"],
        precision=row["precision"],
        fine_tuned=names_adapters(row),
        digitised=row["quality"] == "digitised",
        doubtful=is_doubtful(row),
        experts=bool(row["experts"].strip()),
        group=tuple(
            row[name]
            for name in (*SHAPE, "source", "model", "gpu", "gpus", "seq", "global_batch", "precision", "framework")
        ),
        measured_step_s=_measured(row, "step_s"),
        measured_peak_gib=_measured(row, "peak_memory_gib"),
        memory_kind=_memory_kind(row),
        compared_with=usual_peak(row) if _memory_kind(row) == "unknown" else None,
        out_of_memory=flag(row, "out_of_memory"),
        memory_stages=_memory_stages(row),
    )
    try:
        return predicted(bare, estimate_case(row_case(row)))
    except RefusedRowError as reason:
        return replace(bare, refused=str(reason))
    except InputError as bad:
        if bad.place == "layouts":
            return replace(bare, refused=str(bad))
        raise


def estimate_case(case: Case, constants: Fitted | None = None) -> Estimates:
    """Estimate of one row (with other than the shipped constants when given); where recompute is unknown, of the fastest choice
    that is likely to fit: none, selective, or as few layers in full as it takes."""
    settled = case.layout
    if case.recompute_unknown:
        choices = _recompute_choices(case)
        found = _estimate_of(case, layout_table(choices), constants)
        fitting = np.where(found.fits_likely(), found.step_s, np.inf)
        settled = choices[int(fitting.argmin()) if np.isfinite(fitting).any() else -1]
    return _estimate_of(case, settled, constants)


def _recompute_choices(case: Case) -> list[Layout]:
    """The row's layout under every choice of recompute that its runtime has, the one that keeps least last."""
    able = case.runtime.abilities
    deepest = -(-case.model.layer_count // case.layout.pp)
    some = [f"full:{layers}" for layers in range(1, deepest)] if able.partial_recompute else []
    words = [word for word in ("none", "selective") if word in able.recompute] + some
    return [replace(case.layout, recompute=word) for word in (*words, "full")]


def _estimate_of(case: Case, layouts: LayoutTable | Layout, constants: Fitted | None) -> Estimates:
    return estimate(
        model=case.model, job=case.job, cluster=case.cluster, layouts=layouts, runtime=case.runtime, constants=constants
    )


MEMORY_COLUMNS = {"allocated": "allocated", "reserved": "reserved", "nvidia-smi": "device", "unknown": "reserved"}


def predicted(bare: Outcome, found: Estimates) -> Outcome:
    """The outcome with what the estimate says."""
    step = float(found.step_s[0])
    column = MEMORY_COLUMNS[bare.compared_with or bare.memory_kind]
    bytes_of = {**found.stages, "reserved": found.stages["allocated"] + found.stages["slack"]}[column]
    return replace(
        bare,
        predicted_step_s=step,
        step_band_s=(step * (1 - found.band_of(0)), step * (1 + found.band_of(0))),
        predicted_peak_gib=float(bytes_of[:, : bare.memory_stages].max()) / GIB,
        predicted_fits=bool(found.fits_likely()[0]),
        parts={name: float(values[0]) for name, values in found.time.items()},
    )


def errors(ratios: Sequence[float]) -> dict[str, float | int | None]:
    """Statistics of predicted/measured - 1, in percent: MAPE, median, 90th percentile, signed bias."""
    if not ratios:
        return {"rows": 0, "mape": None, "median": None, "p90": None, "bias": None}
    signed = 100.0 * (np.asarray(ratios) - 1.0)
    size = np.abs(signed)
    return {
        "rows": len(ratios),
        "mape": float(size.mean()),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "bias": float(signed.mean()),
    }


def _timed_groups(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Rows with a ratio by the work they share."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for one in outcomes:
        if one.step_ratio is not None:
            groups.setdefault(one.group, []).append(one)
    return list(groups.values())


def _pairs(outcomes: Sequence[Outcome], apart: float) -> Iterator[tuple[Outcome, Outcome, bool]]:
    """Pairs of one group whose measured times differ by more than `apart`, relative, and whether the predicted order is right."""
    for members in _timed_groups(outcomes):
        for first, second in combinations(members, 2):
            a, b = first.measured_step_s or 0.0, second.measured_step_s or 0.0
            x, y = first.predicted_step_s or 0.0, second.predicted_step_s or 0.0
            if max(a, b) > (1.0 + apart) * min(a, b) and x != y:
                yield first, second, (a < b) == (x < y)


def ranking(outcomes: Sequence[Outcome], apart: float) -> tuple[int, int]:
    """(pairs in the right order, pairs) among rows of one group whose measured times differ by more than `apart`, relative."""
    found = [right for _, _, right in _pairs(outcomes, apart)]
    return sum(found), len(found)


def misordered(outcomes: Sequence[Outcome], apart: float = 0.03) -> Counter[str]:
    """Case -> pairs of `ranking` it takes part in that are in the wrong order."""
    wrong = [(first, second) for first, second, right in _pairs(outcomes, apart) if not right]
    return Counter(one.case_id for pair in wrong for one in pair)


def best_choice_loss(outcomes: Sequence[Outcome]) -> float | None:
    """How much slower the measured time of the predicted best is than the measured best, mean over groups, in percent."""
    losses = [
        100.0
        * (
            (min(members, key=lambda m: m.predicted_step_s or 0.0).measured_step_s or 0.0)
            / min(m.measured_step_s or 0.0 for m in members)
            - 1.0
        )
        for members in _timed_groups(outcomes)
        if len({m.predicted_step_s for m in members}) > 1
    ]
    return float(np.mean(losses)) if losses else None


def summary(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One line of the table: rows, refused, errors of time and memory, band coverage, order of pairs, fit decisions."""
    ratios = [one.step_ratio for one in outcomes if one.step_ratio is not None]
    inside = [
        one.step_band_s[0] <= one.measured_step_s <= one.step_band_s[1]
        for one in outcomes
        if one.step_band_s and one.measured_step_s is not None
    ]
    width = [
        50.0 * (one.step_band_s[1] - one.step_band_s[0]) / one.predicted_step_s
        for one in outcomes
        if one.step_band_s and one.predicted_step_s
    ]
    ran = [one for one in outcomes if one.predicted_fits is not None and not one.out_of_memory]
    memory = {
        kind: errors([one.peak_ratio for one in outcomes if one.peak_ratio is not None and one.memory_kind == kind])
        for kind in sorted({one.memory_kind for one in outcomes if one.peak_ratio is not None})
    }
    return {
        "source": name,
        "rows": len(outcomes),
        "refused": sum(one.refused is not None for one in outcomes),
        "time": errors(ratios),
        "band_coverage": 100.0 * float(np.mean(inside)) if inside else None,
        "band_half_width": float(np.median(width)) if width else None,
        "memory": memory,
        "pairs_3": ranking(outcomes, 0.03),
        "pairs_10": ranking(outcomes, 0.10),
        "best_choice_loss": best_choice_loss(outcomes),
        "oom_called_fitting": sum(bool(one.predicted_fits) for one in outcomes if one.out_of_memory),
        "ran_called_too_big": sum(not one.predicted_fits for one in ran),
    }


KINDS: Mapping[str, Callable[[Outcome], bool]] = {
    "all marked SUSPECT": lambda one: one.doubtful,
    "all with experts": lambda one: one.experts,
    "all read off figures": lambda one: one.digitised,
    "all LoRA and QLoRA": lambda one: one.fine_tuned,
    "all in fp8": lambda one: one.precision == "fp8",
}
"""Lines over rows of all sources; a row is in the first that it belongs to."""


def summaries(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One summary per source, in order of appearance, one over each kind of row where there are several (marked SUSPECT, with experts,
    read off figures, LoRA and QLoRA, in fp8, the rest), and one over all."""
    sources = dict.fromkeys(one.source for one in outcomes)
    lines = [summary(name, [one for one in outcomes if one.source == name]) for name in sources]
    kinds: dict[str, list[Outcome]] = {name: [] for name in (*KINDS, "all others")}
    for one in outcomes:
        kinds[next((name for name, belongs in KINDS.items() if belongs(one)), "all others")].append(one)
    several = {name: rows for name, rows in kinds.items() if rows and len(rows) < len(outcomes)}
    return [*lines, *(summary(name, rows) for name, rows in several.items()), summary("all", outcomes)]
