"""What a link reaches of another rate than the one it was measured at."""

from __future__ import annotations

from collections.abc import Sequence


def fractions_at(fractions: Sequence[float], times: float) -> tuple[float, ...]:
    """Shares of its rate that collectives reach on a link of `times` the rate, where what is not the link's takes as long."""
    highest = max(fractions)
    return tuple(1.0 / (1.0 / highest + (1.0 / one - 1.0 / highest) * times) for one in fractions)
