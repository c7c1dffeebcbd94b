"""Plans and runs -> tidy tables, one observation a row. Everything a figure or the page shows is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd

from shardplan.costmodel.model import parameter_counts
from shardplan.reports.inputs import PlanInput, RunInput

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers", "allocator_slack", "context")
"""In stacking order: the first five add up to what is allocated, with slack reserved, with context on the device."""

TIME_PARTS = {
    "compute_s": "compute",
    "recompute_s": "recompute",
    "tp_exposed_s": "tensor parallel",
    "cp_exposed_s": "context parallel",
    "ep_exposed_s": "expert parallel",
    "dp_exposed_s": "data parallel",
    "pp_exposed_s": "pipeline transfer",
    "bubble_s": "bubble",
    "offload_exposed_s": "offload",
    "optimizer_s": "optimizer",
    "host_s": "host",
}
"""Key of the prediction -> word on the page; parts of the step that nothing hides."""

_AXES = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
    "dp": "data parallel",
    "pp": "pipeline",
}
LOSS = "loss_metrics/global_avg_loss"
_MEMORY_KINDS = {"rss": "resident set"}
_PREDICTED_MEMORY = {"allocated": "allocated_peak_bytes", "reserved": "reserved_peak_bytes"}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `table` as dictionaries; a missing number is None."""
    rows = cast("list[dict[str, Any]]", table.to_dict("records"))
    return [{key: None if _is_nan(value) else value for key, value in row.items()} for row in rows]


def headline_table(plans: Iterable[PlanInput]) -> pd.DataFrame:
    """One row a plan: what is trained on what, and how fast and how full it gets."""
    return _table([_headline(one) for one in plans])


def _headline(one: PlanInput) -> dict[str, object]:
    plan = one.plan
    peak, capacity = one.number("memory.device_peak_bytes"), one.number("memory.capacity_bytes")
    step_low, step_high = one.band("step_s")
    peak_low, peak_high = one.band("device_peak_bytes")
    return {
        "plan": one.name,
        "model": plan.model.name,
        "parameters": parameter_counts(plan.model)["total"],
        "cluster": str(plan.cluster.get("name", "unnamed")),
        "gpus": plan.gpus,
        "runtime": plan.runtime,
        "layout": plan.layout.words(),
        "seq": plan.job.seq,
        "global_batch": plan.job.global_batch,
        "precision": plan.job.precision,
        "fits": bool(plan.prediction.get("fits", False)),
        "step_s": one.number("time.step_s"),
        "step_s_low": step_low,
        "step_s_high": step_high,
        "tokens_per_s": one.number("throughput.tokens_per_s"),
        "tokens_per_s_per_gpu": one.number("throughput.tokens_per_s_per_gpu"),
        "mfu": one.number("throughput.mfu"),
        "device_peak_bytes": peak,
        "peak_low_bytes": peak_low,
        "peak_high_bytes": peak_high,
        "capacity_bytes": capacity,
        "headroom_fraction": 1 - peak / capacity if peak is not None and capacity else None,
    }


def memory_table(one: PlanInput) -> pd.DataFrame:
    """One row a stage and part: stage, layers, part, bytes, gib, bottom_gib (where its bar starts)."""
    rows: list[dict[str, object]] = []
    for stage in one.stages():
        bottom_bytes = 0.0
        for part in MEMORY_PARTS:
            part_bytes = float(stage.get(f"{part}_bytes") or 0.0)
            rows.append(
                {
                    "stage": int(stage["stage"]),
                    "layers": stage.get("layers"),
                    "part": part.replace("_", " "),
                    "bytes": part_bytes,
                    "gib": part_bytes / 2**30,
                    "bottom_gib": bottom_bytes / 2**30,
                }
            )
            bottom_bytes += part_bytes
    return _table(rows)


def time_table(one: PlanInput) -> pd.DataFrame:
    """One row a part of the step that takes time: part, seconds, start_s (in a stacked bar), fraction of the step."""
    step_s = one.number("time.step_s") or 0.0
    found = one.numbers("time")
    rows: list[dict[str, object]] = []
    start_s = 0.0
    others = {key: _words(key.removesuffix("_s")) for key in found if key not in {"step_s", *TIME_PARTS}}
    for key, part in (TIME_PARTS | others).items():
        part_s = found.get(key, 0.0)
        if part_s > 0:
            rows.append(
                {"part": part, "seconds": part_s, "start_s": start_s, "fraction": part_s / step_s if step_s else None}
            )
            start_s += part_s
    return _table(rows, columns=("part", "seconds", "start_s", "fraction"))


def hidden_table(one: PlanInput) -> pd.DataFrame:
    """One row a kind of work that runs behind compute and costs no time: part, seconds."""
    rows = [
        {"part": _words(key.removesuffix("_s").removesuffix("_hidden")), "seconds": value}
        for key, value in one.numbers("time.hidden").items()
        if value > 0
    ]
    return _table(rows, columns=("part", "seconds"))


def runner_up_table(one: PlanInput) -> pd.DataFrame:
    """One row a ranked layout: rank, layout, slower_fraction (than the best), and the planner's numbers."""
    ranked = _mappings(one.plan.search.get("ranked"))
    best_s = ranked[0].get("step_s") if ranked else None
    rows: list[dict[str, object]] = []
    for number, row in enumerate(ranked, start=1):
        step_s = row.get("step_s")
        slower = step_s / best_s - 1 if step_s and best_s else None
        rows.append({"rank": number, **row, "slower_fraction": slower})
    return _table(rows)


def refused_table(one: PlanInput) -> pd.DataFrame:
    """One row a rule that refused layouts during the search, most refusals first: rule, count, reason."""
    refused = one.plan.search.get("refused")
    rules = cast("dict[str, Mapping[str, Any]]", refused) if isinstance(refused, dict) else {}
    rows: list[dict[str, object]] = [
        {"rule": rule, "count": int(what.get("count", 0)), "reason": str(what.get("reason", ""))}
        for rule, what in rules.items()
    ]
    rows.sort(key=lambda row: (-cast("int", row["count"]), cast("str", row["rule"])))
    return _table(rows, columns=("rule", "count", "reason"))


def assumption_table(one: PlanInput) -> pd.DataFrame:
    """One row an assumption: kind (guess or assumption), text; guesses first, because they widen the band."""
    rows = [{"kind": "guess" if "guess" in text.lower() else "assumption", "text": text} for text in one.assumptions()]
    rows.sort(key=lambda row: row["kind"] != "guess")
    return _table(rows, columns=("kind", "text"))


def run_table(runs: Iterable[RunInput]) -> pd.DataFrame:
    """One row a run: what ran where, and what was measured."""
    rows: list[dict[str, object]] = []
    for run in runs:
        measured = run.section("measured")
        rows.append(
            {
                "run": run.name,
                "model": run.plan.plan.model.name,
                "layout": run.plan.plan.layout.words(),
                "device": run.record.get("device"),
                "world_size": run.record.get("world_size"),
                "steps": run.record.get("steps"),
                "steps_done": run.record.get("steps_done", run.record.get("steps")),
                "error": run.record.get("error"),
                **{key: measured.get(key) for key in ("step_s", "step_s_p20", "step_s_p80", "tokens_per_s")},
                **{key: measured.get(key) for key in ("peak_memory_bytes", "memory_kind", "first_loss", "last_loss")},
            }
        )
    return _table(rows)


def loss_table(runs: Iterable[RunInput]) -> pd.DataFrame:
    """One row a run and step: run, step, loss (mean over the ranks that report it)."""
    parts: list[pd.DataFrame] = []
    for run in runs:
        wanted = run.measurements[run.measurements["metric"] == LOSS].dropna(subset=["value"])
        mean = wanted.groupby("step")["value"].mean()
        parts.append(pd.DataFrame({"run": run.name, "step": mean.index, "loss": mean.to_numpy()}))
    return pd.concat(parts, ignore_index=True) if parts else _table([], columns=("run", "step", "loss"))


def comparison_table(runs: Iterable[RunInput]) -> pd.DataFrame:
    """One row a run and quantity: predicted, measured, ratio (measured / predicted), band, and whether it holds."""
    rows: list[dict[str, object]] = []
    for run in runs:
        rows.extend(_comparison(run))
    columns = ("run", "quantity", "unit", "predicted", "measured", "ratio", "low", "high", "low_ratio", "high_ratio")
    return _table(rows, columns=(*columns, "inside"))


def _comparison(run: RunInput) -> list[dict[str, object]]:
    measured, predicted = run.section("measured"), run.section("predicted")
    step_band = run.plan.band("step_s")
    tokens = run.plan.plan.job.tokens_per_step
    rate_band = tuple(tokens / edge if edge else None for edge in reversed(step_band))
    rows = [
        _compared("step time", "s", predicted.get("step_s"), measured.get("step_s"), step_band),
        _compared("throughput", "tokens/s", predicted.get("tokens_per_s"), measured.get("tokens_per_s"), rate_band),
    ]
    kind = str(measured.get("memory_kind", ""))
    device, peak = predicted.get("device_peak_bytes"), predicted.get("peak_memory_bytes")
    if peak is None:
        peak = run.plan.number(f"memory.{_PREDICTED_MEMORY[kind]}") if kind in _PREDICTED_MEMORY else device
    # The band is given for the device's peak; what is allocated or reserved shares its relative width.
    band = tuple(
        edge * peak / device if edge and peak and device else None for edge in run.plan.band("device_peak_bytes")
    )
    name = f"peak memory ({_MEMORY_KINDS.get(kind, kind)})" if kind else "peak memory"
    rows.append(_compared(name, "bytes", peak, measured.get("peak_memory_bytes"), band))
    return [{"run": run.name, **row} for row in rows if row["measured"] is not None]


def _compared(
    name: str, unit: str, predicted: float | None, measured: float | None, band: Sequence[float | None]
) -> dict[str, object]:
    low, high = band
    return {
        "quantity": name,
        "unit": unit,
        "predicted": predicted,
        "measured": measured,
        "ratio": _ratio(measured, predicted),
        "low": low,
        "high": high,
        "low_ratio": _ratio(low, predicted),
        "high_ratio": _ratio(high, predicted),
        "inside": None if measured is None or low is None or high is None else low <= measured <= high,
    }


def version_table(plans: Iterable[PlanInput], runs: Iterable[RunInput]) -> pd.DataFrame:
    """One row a fact about what made the inputs: of, name, value."""
    rows: list[dict[str, object]] = []
    for one in plans:
        rows.append({"of": one.name, "name": "shardplan", "value": one.plan.shardplan_version})
        rows.extend({"of": one.name, "name": f"sha256 of {k}", "value": str(v)} for k, v in one.plan.digests.items())
    for run in runs:
        rows.append({"of": run.name, "name": "folder", "value": run.path})
        rows.extend({"of": run.name, "name": k, "value": str(v)} for k, v in run.section("versions").items())
    return _table(rows, columns=("of", "name", "value"))


def _words(key: str) -> str:
    """A key of the prediction as words: dp_gather -> data parallel gather."""
    return " ".join(_AXES.get(part, part) for part in key.split("_"))


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _mappings(value: object) -> list[Mapping[str, Any]]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("Mapping[str, Any]", item) for item in items if isinstance(item, Mapping)]


def _table(rows: Sequence[Mapping[str, object]], *, columns: Sequence[str] | None = None) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(columns) if columns else None)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value  # noqa: PLR0124 - the definition of NaN
