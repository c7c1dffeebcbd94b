"""Curves of fused attention from a file of `shardplan bench kernels`: what the cost model takes in place of published ones.

A curve is plateau(head dim) * S / (S + ramp + causal ramp) of the dense peak (`machine.AttentionCurve`). Ramps are shared by the head
dims of a kernel and found on a grid, the plateaus follow from them; least squares of the logarithm of the rates. Where a file has one
length only, or one kind of mask, nothing in it tells the ramp, and `known` or the plain one stays.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from shardplan.hw_profiles.document import as_table
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import PLAIN_CAUSAL_RAMP_TOKENS, PLAIN_RAMP_TOKENS

FloatArray = NDArray[np.float64]

KERNEL_OF = {
    "shardplan": "shardplan",
    "sdpa flash": "flash2",
    "sdpa cudnn": "cudnn",
    "sdpa efficient": "memory_efficient",
}
"""Provider of the file -> kernel of a profile; PyTorch's flash backend is FlashAttention-2."""
PASSES: Mapping[str, Literal["forward", "backward"]] = {
    "attention forward": "forward",
    "attention backward": "backward",
}
COLUMNS = ("kernel", "case", "provider", "metric", "unit", "p50", "device", "torch", "date")
CASE = re.compile(r"D(?P<width>\d+) (?P<mask>causal|full) S(?P<seq>\d+)")
RAMPS = np.arange(0.0, 1001.0, 10.0)
"""Tokens that are tried."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One measured pass of one kernel."""

    kernel: str
    way: Literal["forward", "backward"]
    width: int
    causal: bool
    seq: int
    flop_per_s: float


@dataclass(frozen=True, kw_only=True)
class KernelRates:
    """What a file says of attention."""

    device: str
    source: str
    rates: tuple[Rate, ...]


def read_kernel_rates(path: Path) -> KernelRates:
    """The attention rates of a file of `shardplan bench kernels`; InputError for a file that is none, or holds none of one device."""
    place = str(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", place=place, remedy="check the path") from None
    except (UnicodeDecodeError, csv.Error):
        raise InputError("is no CSV text", place=place, remedy="give a file of `shardplan bench kernels -o`") from None
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        remedy = "give a file of `shardplan bench kernels -o`"
        raise InputError(f"has no column {missing[0]!r}" if rows else "is empty", place=place, remedy=remedy)
    torn = next((at for at, row in enumerate(rows) if any(row[name] is None for name in COLUMNS)), None)
    if torn is not None:
        raise InputError(f"is cut off at line {torn + 2}", place=place, remedy="copy or measure it again")
    chosen = [
        row for row in rows if row["kernel"] in PASSES and row["metric"] == "rate" and CASE.fullmatch(row["case"])
    ]
    rates = tuple(rate for row in chosen if row["provider"] in KERNEL_OF and (rate := _rate(row, place)))
    devices = sorted({row["device"] for row in chosen})
    if not rates or len(devices) != 1:
        problem = f"is of several devices: {', '.join(devices)}" if devices[1:] else "holds no rates of attention"
        raise InputError(
            problem, place=place, remedy="run `shardplan bench kernels --only attention -o FILE` on one GPU"
        )
    first = chosen[0]
    source = f"{path.name} of shardplan bench kernels, {first['device']}, torch {first['torch']}, {first['date'][:10]}"
    return KernelRates(device=devices[0], source=source, rates=rates)


def _rate(row: Mapping[str, str], place: str) -> Rate:
    case = CASE.fullmatch(row["case"])
    assert case is not None
    try:
        rate = float(row["p50"])
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < float("inf") or row["unit"] != "TFLOP/s":
        raise InputError(
            f"rate {row['p50']!r} {row['unit']} of {row['kernel']}, {row['case']} is not positive TFLOP/s",
            place=place,
            remedy="measure again",
        )
    return Rate(
        kernel=KERNEL_OF[row["provider"]],
        way=PASSES[row["kernel"]],
        width=int(case["width"]),
        causal=case["mask"] == "causal",
        seq=int(case["seq"]),
        flop_per_s=rate * 1e12,
    )


def attention_tables(
    found: KernelRates, peak_flop_per_s: float, known: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Kernel -> its table of a profile, for kernels with both passes; `known` are tables whose ramps stay where the file tells none."""
    tables: dict[str, dict[str, Any]] = {}
    for kernel in dict.fromkeys(rate.kernel for rate in found.rates):
        rates = [rate for rate in found.rates if rate.kernel == kernel]
        widths = [
            width
            for width in sorted({rate.width for rate in rates})
            if {rate.way for rate in rates if rate.width == width} == {"forward", "backward"}
        ]
        if widths:
            before: Mapping[str, Any] = (known or {}).get(kernel) or {}
            tables[kernel] = {
                **_fitted([rate for rate in rates if rate.width in widths], widths, peak_flop_per_s, before),
                "source": found.source,
                "source_kind": "measured",
            }
    return tables


def _number(given: object) -> float:
    """A bare number, or one of a merged document."""
    table = as_table(given)
    return float(cast("float", given if table is None else table["value"]))


def _fitted(rates: list[Rate], widths: list[int], peak_flop_per_s: float, before: Mapping[str, Any]) -> dict[str, Any]:
    """Ramps and plateaus."""
    causal_known = _number(before.get("causal_ramp_tokens", PLAIN_CAUSAL_RAMP_TOKENS))
    masks = {rate.causal for rate in rates}
    causal_ramps = RAMPS if len(masks) > 1 else np.asarray([causal_known])
    ways = {way: [rate for rate in rates if rate.way == way] for way in ("forward", "backward")}
    errors: list[FloatArray] = []
    ramps: dict[str, FloatArray] = {}
    for way, some in ways.items():
        told = len({rate.seq for rate in some}) > 1
        ramps[way] = RAMPS if told else np.asarray([_number(before.get(f"{way}_ramp_tokens", PLAIN_RAMP_TOKENS))])
        errors.append(
            np.asarray(
                [[_error(some, peak_flop_per_s, ramp, causal) for ramp in ramps[way]] for causal in causal_ramps]
            )
        )
    at = int(np.argmin(np.sum([error.min(axis=1) for error in errors], axis=0)))
    causal = float(causal_ramps[at])
    table: dict[str, Any] = {"head_dim": [float(width) for width in widths]}
    best = {way: float(ramps[way][int(error[at].argmin())]) for way, error in zip(ways, errors, strict=True)}
    for way, some in ways.items():
        plateaus = _plateaus(some, peak_flop_per_s, best[way], causal)
        table[way] = [round(float(plateaus[width]), 4) for width in widths]
    return {
        **table,
        **{f"{way}_ramp_tokens": ramp for way, ramp in best.items()},
        "causal_ramp_tokens": causal,
    }


def _logarithms(rates: Iterable[Rate], peak_flop_per_s: float, ramp: float, causal: float) -> dict[int, list[float]]:
    """Head dim -> logarithms of the plateau that each rate speaks for."""
    found: dict[int, list[float]] = {}
    for rate in rates:
        reached = rate.seq / (rate.seq + ramp + causal * rate.causal)
        found.setdefault(rate.width, []).append(float(np.log(rate.flop_per_s / peak_flop_per_s / reached)))
    return found


def _error(rates: Iterable[Rate], peak_flop_per_s: float, ramp: float, causal: float) -> float:
    """Sum of squares that the plateaus leave."""
    return float(sum(np.var(one) * len(one) for one in _logarithms(rates, peak_flop_per_s, ramp, causal).values()))


def _plateaus(rates: Iterable[Rate], peak_flop_per_s: float, ramp: float, causal: float) -> dict[int, float]:
    return {
        width: float(np.exp(np.mean(one))) for width, one in _logarithms(rates, peak_flop_per_s, ramp, causal).items()
    }
