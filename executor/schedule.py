"""Learning rates by step, and what AdamW is told besides; no torch, so that a launcher can check them."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_NORM = 1.0
WARMUP_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine (SGDR, arXiv 1608.03983, equation 5, one period):

    peak * step / warmup_steps up to `warmup_steps`, down to `minimum` at `decay_steps`, `minimum` from there on.
    """

    peak: float
    minimum: float
    warmup_steps: int
    decay_steps: int
    """Last step of the cosine, above `warmup_steps`."""

    def __call__(self, step: int) -> float:
        """The rate of `step`, which counts from 1."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if step >= self.decay_steps:
            return self.minimum
        done = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class AdamWords:
    """What AdamW is told besides the learning rate of a step."""

    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Of every parameter."""
    clip: float = MAX_NORM
    """Largest norm of a step's gradients."""


def peak_learning_rate(hidden: int) -> float:
    """3e-3 up to 128 wide, then falling with the square root of the width (5e-4 at 4096)."""
    return 3e-3 * min(1.0, (128 / hidden) ** 0.5)


def learning_rate(step: int, hidden: int) -> float:
    """Linear warm-up over WARMUP_STEPS, then constant; `step` counts from 1."""
    return peak_learning_rate(hidden) * min(1.0, step / WARMUP_STEPS)
