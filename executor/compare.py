"""Predicted beside measured, term by term, and which term the difference is mostly of.

Times of both sides add up to the step. Measured are those of the busiest rank: what others wait for it, it does not wait itself.
Medians of terms need not add up to the median step, so `rest` closes the sum; it is clocks, bookkeeping and noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from shardplan.executor.measure import RANKS_FOLDER, StepRecord
from shardplan.executor.memory_parts import ROWS
from shardplan.hw_profiles.errors import InputError

BUSY = ("forward_s", "backward_s", "optimizer_s")
AXES = ("tp", "cp", "ep", "dp")
FORWARD_LAUNCHES = 1.0 / 3.0
"""Share of the predicted host time that falls into the forward: a backward launches twice as much."""
AGREES = 0.02
"""Relative difference below which no culprit is looked for."""
MEMORY_ROWS = (*ROWS[:4], ("context", ("context_bytes",)), *ROWS[4:])


@dataclass(frozen=True, kw_only=True)
class Term:
    """One line: seconds or bytes."""

    term: str
    predicted: float | None
    measured: float | None
    part: bool = True
    """Whether it is one of those that add up to the whole."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.measured is not None and self.predicted else None

    def document(self) -> dict[str, Any]:
        """For run.json."""
        return {**asdict(self), "ratio": self.ratio}


def comparison(
    folder: Path,
    records: Mapping[int, Sequence[StepRecord]],
    prediction: Mapping[str, Any],
    *,
    step_s: float | None,
    warmup_steps: int,
) -> dict[str, Any]:
    """What run.json holds as `comparison`: `phases` with their spread, `times` and `memory` as terms, a sentence on each."""
    looked = looked_into(records, warmup_steps=warmup_steps)
    phases = phase_spread(*looked) if looked else {}
    times = time_terms(prediction, phase_shares(looked[1]) if looked else {}, step_s=step_s)
    memory = memory_terms(prediction, read_memory(folder))
    return {
        "phases": phases,
        "times": [term.document() for term in times],
        "memory": [term.document() for term in memory],
        "time_culprit": culprit(times, what="step", say=_milliseconds),
        "memory_culprit": culprit(memory, what="peak memory", say=_gibibytes),
    }


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run folder; InputError where it is none, or one without phases."""
    remedy = "give a folder written by `shardplan run`"
    try:
        document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as bad:
        raise InputError(f"run.json cannot be read ({bad})", place=str(folder), remedy=remedy) from None
    if not isinstance(document, dict) or "comparison" not in document:
        raise InputError("run.json has no field 'comparison'", place=str(folder), remedy="run the plan again")
    return cast("dict[str, Any]", document)


def looked_into(
    records: Mapping[int, Sequence[StepRecord]], *, warmup_steps: int
) -> tuple[int, list[StepRecord]] | None:
    """The busiest rank and its steps that were looked into after the warm-up; None where none was."""
    looked: dict[int, list[StepRecord]] = {}
    for rank, steps in records.items():
        first = min((one.step for one in steps), default=0) + warmup_steps
        found = [one for one in steps if one.step >= first and one.forward_s is not None]
        if found:
            looked[rank] = found
    if not looked:
        return None
    busiest = max(looked, key=lambda rank: median(sum(getattr(one, name) for name in BUSY) for one in looked[rank]))
    return busiest, looked[busiest]


def phase_spread(rank: int, steps: Sequence[StepRecord]) -> dict[str, dict[str, float] | float | int]:
    """p20, p50, p80 of each phase and wait over `steps`, with their number and `rank`."""
    spread: dict[str, dict[str, float] | float | int] = {"rank": rank, "steps": len(steps)}
    for name, values in _timed(steps).items():
        spread[name] = dict(zip(("p20", "p50", "p80"), np.percentile(values, (20, 50, 80)).tolist(), strict=True))
    return spread


def phase_shares(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Of TIME_NAMES, the share of the step that each is in the third of `steps` around the median; they add up to 1, as medians of
    phases that vary do not."""
    ranked = sorted(steps, key=lambda one: one.step_s)
    middle = ranked[len(ranked) // 3 : len(ranked) - len(ranked) // 3]
    whole_s = sum(one.step_s for one in middle)
    found = {_short(name): sum(values) / whole_s for name, values in _timed(middle).items()}
    return {**found, "rest": 1.0 - sum(found.values())}


def _timed(steps: Sequence[StepRecord]) -> dict[str, list[float]]:
    """Seconds of each phase and wait that all `steps` tell."""
    names = (*BUSY, *(f"{axis}_exposed_s" for axis in (*AXES, "pp")), "data_s")
    found = {name: [getattr(one, name) for one in steps] for name in names}
    return {name: values for name, values in found.items() if None not in values}


def time_terms(prediction: Mapping[str, Any], shares: Mapping[str, float], *, step_s: float | None) -> list[Term]:
    """The step, then its parts in the order they happen, `shares` of it; without these the step alone."""
    said = predicted_times(prediction)
    terms = [Term(term="step", predicted=said.pop("step", None), measured=step_s, part=False)]
    if not shares or step_s is None:
        return terms
    found = {name: share * step_s for name, share in shares.items()}
    names = [name for name in TIME_NAMES if found.get(name) is not None or said.get(name)]
    return terms + [
        Term(term=TIME_NAMES[name], predicted=said.get(name) if said else None, measured=found.get(name, 0.0))
        for name in names
    ]


TIME_NAMES = {
    "forward": "forward",
    "backward": "backward, recompute",
    "optimizer": "optimizer",
    **{axis: f"exposed {axis}" for axis in AXES},
    "pipeline": "bubble, transfers",
    "offload": "offload",
    "data wait": "data wait",
    "rest": "rest",
}


def predicted_times(prediction: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the terms of TIME_NAMES that the prediction has, and `step`; host time is folded into forward and backward."""
    times = prediction.get("time") or {}
    phases = times.get("phases")
    if not phases:
        return {"step": times["step_s"]} if times.get("step_s") else {}
    return {
        "step": times["step_s"],
        "forward": phases["forward_s"] + FORWARD_LAUNCHES * times["host_s"],
        "backward": phases["backward_s"] + (1.0 - FORWARD_LAUNCHES) * times["host_s"],
        "optimizer": times["optimizer_s"],
        **{axis: times[f"{axis}_exposed_s"] for axis in AXES},
        "pipeline": times["pp_exposed_s"] + times["bubble_s"],
        "offload": times["offload_exposed_s"],
        "data wait": 0.0,
        "rest": 0.0,
    }


def read_memory(folder: Path) -> dict[str, float]:
    """Bytes by part of the fullest rank; empty where the run did not get to its end."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / RANKS_FOLDER).glob("*.memory.json")]
    return max(found, key=lambda parts: parts.get("allocated peak", parts.get("of the device", 0.0)), default={})


def memory_terms(prediction: Mapping[str, Any], found: Mapping[str, float]) -> list[Term]:
    """Bytes of the fullest rank's stage; sums are not parts."""
    stages = (prediction.get("memory") or {}).get("stages") or ()
    said = next((one for one in stages if one.get("stage") == found.get("stage")), None) or {}
    terms: list[Term] = []
    for row, names in MEMORY_ROWS:
        expected = sum(said[name] for name in names) if all(name in said for name in names) else None
        if row in found:
            sums = {"allocated peak", "reserved", "of the device"}
            terms.append(Term(term=row, predicted=expected, measured=found[row], part=row not in sums))
    return terms


def culprit(terms: Sequence[Term], *, what: str, say: Any) -> str | None:
    """One sentence: how far apart both sides are, and the part that has most of it; None where something is missing."""
    both = [t for t in terms if t.predicted is not None and t.measured is not None]
    parts = [term for term in both if term.part]
    whole = next((term for term in both if not term.part), None)
    if whole is None or not whole.predicted or not parts:
        return None
    assert whole.measured is not None and whole.predicted is not None
    total = whole.measured - whole.predicted
    told = f"{what}: {say(whole.measured)} measured, {say(whole.predicted)} predicted ({total / whole.predicted:+.0%})"
    if abs(total) < AGREES * whole.predicted:
        total = 0.0
    sign = np.sign(total)
    most = max(parts, key=lambda t: sign * _off(t) if sign else abs(_off(t)))
    way = "more" if _off(most) > 0 else "less"
    share = f", {_off(most) / total:.0%} of the difference" if total else "; other parts make up for it"
    return f"{told}; mostly {most.term}: {say(abs(_off(most)))} {way} than predicted{share}"


def _off(term: Term) -> float:
    return (term.measured or 0.0) - (term.predicted or 0.0)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def comparison_lines(document: Mapping[str, Any]) -> list[str]:
    """The table of a run.json with a `comparison`."""
    found = document["comparison"]
    lines = [f"{'':<24}{'predicted':>12}{'measured':>12}{'ratio':>8}{'p20':>10}{'p80':>10}"]
    spread = {TIME_NAMES[_short(name)]: one for name, one in found["phases"].items() if isinstance(one, dict)}
    for say, group in ((_milliseconds, found["times"]), (_gibibytes, found["memory"])):
        for term in group:
            ratio = "-" if term["ratio"] is None else f"{term['ratio']:.2f}"
            cells = ["-" if term[side] is None else say(term[side]) for side in ("predicted", "measured")]
            ends = spread.get(term["term"]) if group is found["times"] else None
            tail = "" if ends is None else f"{_milliseconds(ends['p20']):>10}{_milliseconds(ends['p80']):>10}"
            lines.append(f"{term['term']:<24}{cells[0]:>12}{cells[1]:>12}{ratio:>8}{tail}")
    if found["phases"]:
        lines.append(
            f"phases: shares of the median step, p20 and p80 of {found['phases']['steps']} steps of rank "
            f"{found['phases']['rank']}, the busiest"
        )
    else:
        lines.append("phases: no step was looked into (--profile)")
    return [*lines, *(found[name] for name in ("time_culprit", "memory_culprit") if found[name])]


def _short(name: str) -> str:
    """`dp_exposed_s` -> `dp`, as in TIME_NAMES."""
    short = name.removesuffix("_s").removesuffix("_exposed")
    return {"pp": "pipeline", "data": "data wait"}.get(short, short)
