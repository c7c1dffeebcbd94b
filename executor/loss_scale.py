"""Dynamic loss scaling for fp16, whose small gradients would round to zero (arXiv 1710.03740, section 3.2).

The loss is multiplied by the scale before the backward pass, gradients are divided by it before they are clipped. A step with an Inf or
NaN in a gradient of any rank is left out on all of them, and the scale halves; after a window without one it doubles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from shardplan.executor.loss import LossFunction

FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class ScaleWords:
    """How the scale moves. The numbers are DeepSpeed's defaults (`fp16` in its configuration), all but the first Megatron-LM's too."""

    initial: float = 2.0**16
    window: int = 1000
    """Steps without an overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows since it last doubled that it takes to halve the scale; it halves at each one after them."""
    minimum: float = 1.0


USUAL_SCALE = ScaleWords()


class LossScale:
    """The scale, and what moves it; the same on every rank."""

    def __init__(self, words: ScaleWords) -> None:
        self.words = words
        self.value = words.initial
        self.clean_steps, self.patience = 0, words.hysteresis
        self.skipped_steps = 0
        """Since the training began."""

    def update(self, *, overflow: bool) -> None:
        """Take note of a step; raises FloatingPointError where not even the smallest scale keeps gradients finite."""
        if not overflow:
            self.clean_steps += 1
            if self.clean_steps == self.words.window:
                self.value, self.clean_steps, self.patience = self.value * FACTOR, 0, self.words.hysteresis
            return
        self.skipped_steps, self.clean_steps, self.patience = self.skipped_steps + 1, 0, self.patience - 1
        if self.patience > 0:
            return
        if self.value <= self.words.minimum:
            raise FloatingPointError(
                f"gradients are Inf or NaN at the smallest loss scale, {self.value:g}: the training has diverged; "
                "lower learning_rate.peak, or plan with --precision bf16"
            )
        self.value = max(self.value / FACTOR, self.words.minimum)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "value": self.value,
            "clean_steps": self.clean_steps,
            "patience": self.patience,
            "skipped_steps": self.skipped_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind `state`."""
        self.value, self.clean_steps = float(state["value"]), int(state["clean_steps"])
        self.patience, self.skipped_steps = int(state["patience"]), int(state["skipped_steps"])


def scaled(loss: LossFunction, scale: LossScale | None) -> LossFunction:
    """`loss` times the scale of the moment; `loss` itself without one."""
    if scale is None:
        return loss

    def scaled_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return loss(logits, targets) * scale.value

    return scaled_loss


def overflows(norm: Tensor) -> bool:
    """Whether a gradient is Inf or NaN on any rank, told by its norm; all ranks call it together and hear the same.

    The norm of all gradients that a rank holds a part of is finite only if each of them is.
    """
    import torch.distributed as dist

    flag = (~norm.isfinite()).float()
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
