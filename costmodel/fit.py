"""Fit the constants of `fitted.toml` on measured step times, and say how well they carry over to rows left out.

Minimised: sum over rows of w soft_L1(log(predicted/measured) / noise) + sum over constants of ((x - prior) / deviation)^2, with the
row weight w = 1/sqrt(near-duplicates): close to the mean absolute error that is reported, and outliers do not decide. Noise is 0.02, of
rows read off figures 0.05, so that they weigh less; errors told are of the other rows. Constants that scale (gemm, memory, link, traffic)
are fitted as logarithms, shares as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.fitted import ARCHITECTURE_BOUNDS, RUNTIME_BOUNDS, SHARES, Fitted, fitted
from shardplan.costmodel.published_rows import (
    Case,
    RefusedRowError,
    Row,
    is_doubtful,
    names_adapters,
    number,
    row_case,
)
from shardplan.costmodel.validation import errors, estimate_case
from shardplan.hw_profiles.errors import InputError

FloatArray = NDArray[np.float64]
NOISE = {"exact": 0.02, "derived": 0.02, "digitised": 0.05}
"""By quality, relative error of a row from which on its error counts as it is, below by its square: about what repeated steps differ
by, and how far a figure can be read (3 of some 60 TFLOP/s)."""


@dataclass(frozen=True, kw_only=True)
class FitRow:
    """A measured row that can be predicted."""

    case: Case
    measured_s: float
    source: str
    model: str
    quality: str
    keys: tuple[tuple[str, str], ...]
    """(table, name) of the constants its prediction uses."""


Constant = tuple[str, str, str]
"""(table, entry, constant), for instance ("architecture", "ampere", "gemm")."""


def fit_rows(rows: Sequence[Row]) -> list[FitRow]:
    """Rows with a step time that the model covers, of a quality in NOISE and not marked SUSPECT, of dense models that are trained whole:
    published times of LoRA and QLoRA hold loading and start, runs with experts are left to test what the dense ones say. Recompute is
    settled here once."""
    found: list[FitRow] = []
    for row in rows:
        if not row["step_s"] or row["quality"] not in NOISE or is_doubtful(row):
            continue
        if names_adapters(row) or row["experts"]:
            continue
        try:
            case = row_case(row)
            settled = estimate_case(case).layouts.row(0)
        except (RefusedRowError, InputError):
            continue
        found.append(
            FitRow(
                case=replace(case, layout=settled, recompute_unknown=False),
                measured_s=number(row, "step_s"),
                source=row["source"],
                model=row["model"],
                quality=row["quality"],
                keys=(
                    ("architecture", case.cluster.gpu.architecture),
                    ("runtime", case.runtime.fitted_entry),
                ),
            )
        )
    return found


def row_weights(rows: Sequence[FitRow]) -> FloatArray:
    """1/sqrt(near-duplicates): rows of a source that differ in the micro-batch or not at all."""
    same = [
        (row.source, row.model, row.case.cluster.gpus, row.case.job.seq, replace(row.case.layout, micro_batch=1))
        for row in rows
    ]
    copies = Counter(same)
    return np.asarray([copies[key] ** -0.5 for key in same])


def row_noise(rows: Sequence[FitRow]) -> FloatArray:
    """NOISE of each row."""
    return np.asarray([NOISE[row.quality] for row in rows])


@dataclass(frozen=True, kw_only=True)
class Space:
    """The constants to fit as a vector."""

    names: tuple[Constant, ...]
    low: FloatArray
    high: FloatArray
    prior: FloatArray
    deviation: FloatArray

    def constants(self, x: FloatArray) -> Fitted:
        """The vector as tables."""
        tables: dict[str, dict[str, dict[str, float]]] = {"architecture": {}, "runtime": {}}
        for (table, entry, name), value in zip(self.names, x, strict=True):
            tables[table].setdefault(entry, {})[name] = float(value if name in SHARES else np.exp(value))
        return Fitted(**tables)

    def vector(self, constants: Fitted) -> FloatArray:
        """Tables as a vector, priors where absent."""
        x = self.prior.copy()
        for i, (table, entry, name) in enumerate(self.names):
            value = constants.table(table).get(entry, {}).get(name)
            if value is not None:
                x[i] = value if name in SHARES else np.log(value)
        return np.clip(x, self.low, self.high)


def fit_space(rows: Sequence[FitRow], only: Fitted | None = None) -> Space:
    """Constants of every architecture and runtime that occurs in `rows`; with `only` those that it has."""
    entries = sorted({key for row in rows for key in row.keys})
    names: list[Constant] = []
    bounds: list[tuple[float, float, float, float]] = []
    for table, entry in entries:
        kept = None if only is None else only.table(table).get(entry, {})
        for name, given in (ARCHITECTURE_BOUNDS if table == "architecture" else RUNTIME_BOUNDS).items():
            if kept is not None and name not in kept:
                continue
            low, high, prior, deviation = given
            names.append((table, entry, name))
            if name in SHARES:
                bounds.append(given)
            else:
                bounds.append((np.log(max(low, 1e-3)), np.log(high), np.log(prior), deviation))
    table_of = np.asarray(bounds).T
    return Space(names=tuple(names), low=table_of[0], high=table_of[1], prior=table_of[2], deviation=table_of[3])


INFORMED = 0.05
"""A constant is only fitted when moving it over its deviation moves the rows together by this much (root of the sum of squared
logarithms); the others keep what the runtime's or machine's own file says."""


def informed(space: Space, jacobian: FloatArray) -> Space:
    """The constants that the rows can tell something about."""
    tells = np.sqrt((jacobian**2).sum(axis=0)) * space.deviation >= INFORMED
    return Space(
        names=tuple(name for name, kept in zip(space.names, tells, strict=True) if kept),
        **{field: getattr(space, field)[tells] for field in ("low", "high", "prior", "deviation")},
    )


def log_ratios(rows: Sequence[FitRow], constants: Fitted) -> FloatArray:
    """log(predicted / measured) of each row."""
    return np.asarray([np.log(float(estimate_case(row.case, constants).step_s[0]) / row.measured_s) for row in rows])


def log_ratio_jacobian(rows: Sequence[FitRow], space: Space, x: FloatArray, at: FloatArray) -> FloatArray:
    """Derivatives of `log_ratios` by forward differences; a row is only predicted again for constants it uses."""
    jacobian = np.zeros((len(rows), len(x)))
    for column, (table, entry, _) in enumerate(space.names):
        used = [i for i, row in enumerate(rows) if (table, entry) in row.keys]
        step = 0.02 if x[column] + 0.02 <= space.high[column] else -0.02
        moved = x.copy()
        moved[column] += step
        change = log_ratios([rows[i] for i in used], space.constants(moved))
        jacobian[used, column] = (change - at[used]) / step
    return jacobian


def _weighted_step(
    ratios: FloatArray,
    jacobian: FloatArray,
    weights: FloatArray,
    noise: FloatArray,
    space: Space,
    x: FloatArray,
    damping: float,
) -> FloatArray:
    """One damped Gauss-Newton step of the robust problem inside the bounds."""
    from scipy.optimize import lsq_linear

    scaled = ratios / noise
    robust = np.sqrt(weights / np.sqrt(1.0 + scaled**2))
    rows = [(robust / noise)[:, None] * jacobian, np.diag(1.0 / space.deviation), damping * np.eye(len(x))]
    right = [-robust * scaled, -(x - space.prior) / space.deviation, np.zeros(len(x))]
    found = lsq_linear(np.vstack(rows), np.concatenate(right), bounds=(space.low - x - 1e-9, space.high - x + 1e-9))
    return np.clip(x + found.x, space.low, space.high)


def cost(ratios: FloatArray, weights: FloatArray, noise: FloatArray, space: Space, x: FloatArray) -> float:
    """The minimised sum."""
    data = 2.0 * weights * (np.sqrt(1.0 + (ratios / noise) ** 2) - 1.0)
    return float(data.sum() + (((x - space.prior) / space.deviation) ** 2).sum())


def fit(rows: Sequence[FitRow], space: Space, start: FloatArray, *, passes: int = 4) -> tuple[FloatArray, FloatArray]:
    """(best vector, log ratios there) by Gauss-Newton with damping that grows when a step does not help.

    Derivatives change slowly and cost about as much as a dozen predictions of all rows: a pass takes several steps on the same ones.
    """
    weights, noise, x = row_weights(rows), row_noise(rows), start
    ratios = log_ratios(rows, space.constants(x))
    best, damping = cost(ratios, weights, noise, space, x), 1.0
    for _ in range(passes):
        jacobian, before = log_ratio_jacobian(rows, space, x, ratios), best
        for _ in range(STEPS_A_PASS):
            candidate = _weighted_step(ratios, jacobian, weights, noise, space, x, damping)
            tried = log_ratios(rows, space.constants(candidate))
            reached = cost(tried, weights, noise, space, candidate)
            if reached >= best:
                damping *= 4.0
                continue
            gained = best - reached
            x, ratios, best, damping = candidate, tried, reached, damping / 3.0
            if gained < 1e-3 * best:
                break
        if before - best < 1e-3 * best:
            break
    return x, ratios


STEPS_A_PASS = 6


def left_out_ratios(
    rows: Sequence[FitRow], space: Space, x: FloatArray, ratios: FloatArray, groups: Sequence[tuple[str, ...]]
) -> FloatArray:
    """log(predicted/measured) of each row by constants fitted without its group: the problem linearised at the optimum is solved
    again without the group (three reweighted steps), and the held-out rows are predicted with the full model."""
    weights, noise = row_weights(rows), row_noise(rows)
    jacobian = log_ratio_jacobian(rows, space, x, ratios)
    result = np.empty(len(rows))
    for group in dict.fromkeys(groups):
        out = np.asarray([one == group for one in groups])
        keep, moved = ~out, x
        for _ in range(3):
            linear = ratios + jacobian @ (moved - x)
            moved = _weighted_step(linear[keep], jacobian[keep], weights[keep], noise[keep], space, moved, 0.3)
        result[out] = log_ratios([row for row, o in zip(rows, out, strict=True) if o], space.constants(moved))
    return result


def left_out_errors(rows: Sequence[FitRow]) -> dict[str, dict[str, float | int | None]]:
    """Errors of step time with the shipped constants: in sample, and with each row's source and model, or source, left out; of all
    rows that are not read off figures, and of those not in fp8 where there are both."""
    space = fit_space(rows, only=fitted())
    x = space.vector(fitted())
    ratios = log_ratios(rows, space.constants(x))
    groups: dict[str, list[tuple[str, ...]]] = {
        "left out: source and model": [(row.source, row.model) for row in rows],
        "left out: source": [(row.source,) for row in rows],
    }
    found = {"in sample": ratios}
    found |= {name: left_out_ratios(rows, space, x, ratios, keys) for name, keys in groups.items()}
    printed = np.array([row.quality != "digitised" for row in rows])
    answer = {name: errors(np.exp(values[printed]).tolist()) for name, values in found.items()}
    wide = printed & np.array([row.case.job.precision != "fp8" for row in rows])
    if 0 < wide.sum() < printed.sum():
        answer |= {f"{name}, all but fp8": errors(np.exp(values[wide]).tolist()) for name, values in found.items()}
    return answer


def on_bounds(constants: Fitted) -> list[str]:
    """Constants that stop at the lowest or highest value they may have, `table.entry.name = value`, to the digits that are written."""
    return [
        f"{table}.{entry}.{name} = {value:.3g}"
        for table, bounds in (("architecture", ARCHITECTURE_BOUNDS), ("runtime", RUNTIME_BOUNDS))
        for entry, values in sorted(constants.table(table).items())
        for name, value in values.items()
        if f"{value:.3g}" in {f"{bound:.3g}" for bound in bounds[name][:2]}
    ]


def fitted_text(constants: Fitted, fitted_on: str) -> str:
    """`fitted.toml`."""
    lines = [
        "# Constants fitted on measured step times; written by `shardplan validate --refit`. Meaning and bounds: fitted.py."
    ]
    lines.append(f'fitted_on = "{fitted_on}"')
    held = on_bounds(constants)
    lines += ["# On a bound:"] * bool(held) + [f"#   {one}" for one in held]
    for table, entries in (("architecture", constants.architecture), ("runtime", constants.runtime)):
        for entry in sorted(entries):
            lines += ["", f"[{table}.{entry}]"]
            lines += [f"{name} = {value:.3g}" for name, value in entries[entry].items()]
    return "\n".join(lines) + "\n"
