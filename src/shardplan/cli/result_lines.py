"""Cost and time to result in a few lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HOUR_S, DAY_S = 3600.0, 86400.0
NO_PRICE = "cost unknown: no price in the profile (--price USD per GPU and hour)"
NO_POWER = "energy unknown: no power in the profile"


def amount(value: float, unit: str) -> str:
    """A number with the prefix that reads well: 2.47 TB, 31.5 kWh."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def span(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for size, word in ((DAY_S, "days"), (HOUR_S, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {word}"
    return f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Three digits, all of them of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tokens(count: float) -> str:
    """As model cards write it: 15T tokens, 300B tokens."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.4g}{letter} tokens"
    return f"{count:,.0f} tokens"


def usd(value: float) -> str:
    """Dollars: cents below a thousand."""
    return f"{value:,.2f} USD" if value < 1000 else f"{value:,.0f} USD"


def cost_lines(prediction: Mapping[str, Any]) -> list[str]:
    """Cost and energy by token where known, and what the token budget takes where one was given."""
    cost: Mapping[str, float | None] = prediction.get("cost") or {}
    result: Mapping[str, Any] | None = prediction.get("result")
    price, joules = cost.get("usd_per_million_tokens"), cost.get("joules_per_token")
    parts = [] if price is None else [f"{price:.3g} USD per million tokens"]
    parts += [] if joules is None else [f"{joules:.3g} J per token at full power"]
    by_token = [", ".join(parts)] if parts else []
    return by_token + (_result_lines(result) if result else [])


def _result_lines(result: Mapping[str, Any]) -> list[str]:
    """What a token budget takes: days, checkpoints and failures, money and energy."""
    days, longer, goodput = result["days"], result["days_with_failures"], result["goodput"]
    lines = [f"{_tokens(result['tokens'])}: {span(days * DAY_S)} of steps"]
    if goodput is None:
        lines[0] += "; goodput unknown: the profile has neither [storage] write_gb_per_s nor [node.nvme]"
    elif longer is None:
        lines[0] += "; with failures it never finishes"
    else:
        lines[0] += f", {span(longer * DAY_S)} with failures (goodput {goodput:.1%})"
    mean_time = span(result["mean_time_between_failures_s"])
    size = amount(result["checkpoint_bytes"], "B")
    if goodput is None:
        lines.append(f"a failure every {mean_time}; a checkpoint is {size}")
    else:
        lines.append(
            f"a failure every {mean_time}, {span(result['restart_s'])} to restart; a checkpoint of {size} in "
            f"{span(result['checkpoint_write_s'])}, best every {span(result['checkpoint_interval_s'])}"
        )
    price = result["usd"]
    money = NO_PRICE if price is None else usd(price)
    if result["usd_with_failures"] is not None:
        money += f", {usd(result['usd_with_failures'])} with failures"
    energy = result["energy_j"]
    power = NO_POWER if energy is None else f"{amount(energy / HOUR_S, 'Wh')} at full power"
    return [*lines, f"{money}; {power}"]
