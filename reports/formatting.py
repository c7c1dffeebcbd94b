"""Numbers as people read them. `None` and not-a-number are written as a dash."""

from __future__ import annotations

import math

DASH = "–"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated, never in exponent form: 12,345 · 1.23 · 0.00123."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 12)}f}"


def seconds(value: float | None) -> str:
    """A duration with its unit: 83.1 s · 12.4 ms · 250 µs."""
    if value is None or not math.isfinite(value):
        return DASH
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{significant(value / size)} {unit}"
    return "0 s" if value == 0 else f"{significant(value / 1e-6)} µs"


def gib(value_bytes: float | None) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    if value_bytes is None or not math.isfinite(value_bytes):
        return DASH
    if 0 < abs(value_bytes) < 0.1 * 2**30:
        return f"{significant(value_bytes / 2**20)} MiB"
    return f"{significant(value_bytes / 2**30)} GiB"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.{decimals}f} %" if fraction is not None and math.isfinite(fraction) else DASH


def large(value: float | None) -> str:
    """A count in words: 70.6 B · 8.03 B · 117 M."""
    if value is None or not math.isfinite(value):
        return DASH
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{significant(value / size)} {unit}"
    return significant(value)


def quantity(value: float | None, unit: str) -> str:
    """A value in the unit a comparison table names: s, bytes or tokens/s."""
    if unit == "s":
        return seconds(value)
    if unit == "bytes":
        return gib(value)
    return f"{significant(value, 4)} {unit}" if _known(value) else DASH


def span(low: float | None, high: float | None, unit: str) -> str:
    """An error band, low to high, its unit once where both edges share it: 359 to 425 ms."""
    if not (_known(low) and _known(high)):
        return DASH
    first, last = quantity(low, unit), quantity(high, unit)
    number, _, first_unit = first.partition(" ")
    return f"{number if last.endswith(f' {first_unit}') else first} to {last}"
