"""What a power cap takes from matrix products: the one formula for clocks under a cap."""

from __future__ import annotations

from dataclasses import replace

from shardplan.hw_profiles.machine import EfficiencyCurve

POWER_EXPONENT = 0.5
"""Rate of matrix products ~ power^0.5. Dynamic power is C V^2 f, and products of large matrices run into the power limit (thonking.ai,
"strangely matrix multiplications", A100 and H100). A voltage that rises half as fast as the clock gives f^2; the ends are 1 (fixed
voltage) and 1/3 (voltage as the clock). Checked on torchtitan's 17 published runs of an H100 at 500 W, from the curves of 700 W: the mean
error of the step time is -1 % in bf16 and +1 % in fp8, +9 % and +8 % with 1, -4 % and -1 % with 1/3. Not on others: an RTX 3090 keeps
95 % at 280 of 350 W (pugetsystems.com labs 1974), so that estimates of consumer cards are too slow."""


def clock_fraction(cap_w: float, power_w: float) -> float:
    """Rate of matrix products under a cap over that at the board's full power: (cap / power)^0.5."""
    return (cap_w / power_w) ** POWER_EXPONENT


def capped_curve(curve: EfficiencyCurve, fraction: float) -> EfficiencyCurve:
    """The curve with its plateau times `fraction`. A product takes as much longer as its math at the plateau does: small ones, which
    wait for launches and memory, hardly."""
    highest = max(curve.fractions)
    longer = (1.0 / fraction - 1.0) / highest
    return replace(curve, fractions=tuple(1.0 / (1.0 / reached + longer) for reached in curve.fractions))


def cap_in_words(cap_w: float, power_w: float) -> str:
    """Where the multiplier is from, for provenance."""
    return (
        f"capped at {cap_w:g} of {power_w:g} W: plateaus times (cap/power)^{POWER_EXPONENT:g} = "
        f"{clock_fraction(cap_w, power_w):.3f}, as dynamic power C V^2 f with a voltage that rises half as fast as the clock"
    )
