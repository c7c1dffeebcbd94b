"""What to change in a layout that is short of memory: every single change that no rule refuses, estimated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from shardplan.costmodel.layout import Layout
from shardplan.costmodel.mixed import estimate_any, mixed_rejections
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.errors import InputError

GIB = 2.0**30
LEAST_SAVING = 0.05
"""Of device memory: what saves less is no remedy, and no step of a front."""
MOST_CHANGES = 4
"""One after the other."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A change and what it does."""

    words: str
    """To write in the layout."""
    layout: Layout
    step_s: float
    device_bytes: float
    """Of the fullest stage."""
    fits: bool

    def told(self, step_s: float) -> str:
        """In a phrase, beside the step of the layout as it is."""
        return f"{self.words} ({self.device_bytes / GIB:.1f} GiB, step {self.step_s / step_s - 1.0:+.0%})"


def memory_savings(setting: Setting, layout: Layout, headroom: float) -> list[Saving]:
    """Changes of one word (degrees at the cost of dp) that break no rule which the layout keeps, and need at least LEAST_SAVING less
    device memory: those that fit first, the quickest of them first; of the others the leanest first."""
    before = float(estimate_any(setting, layout).device_peak_bytes[0])
    broken = {one.rule for one in mixed_rejections(setting, layout)[0]}
    found: list[Saving] = []
    for words, other in _changes(setting, layout):
        rejected, meaningless = mixed_rejections(setting, other)
        if meaningless or not broken.issuperset(one.rule for one in rejected):
            continue
        one = estimate_any(setting, other)
        peak = float(one.device_peak_bytes[0])
        if peak <= (1.0 - LEAST_SAVING) * before:
            fits = bool(one.fits(headroom)[0])
            found.append(Saving(words=words, layout=other, step_s=float(one.step_s[0]), device_bytes=peak, fits=fits))
    return sorted(found, key=lambda s: (not s.fits, s.step_s if s.fits else s.device_bytes, s.words))


def memory_remedy(setting: Setting, layout: Layout, step_s: float, headroom: float) -> str:
    """What makes a layout fit that does not, whose step takes `step_s`: the two quickest changes, or several made one after the other, each
    time what saves most."""
    savings = memory_savings(setting, layout, headroom)
    fitting = [one for one in savings if one.fits]
    if fitting:
        return "it fits with " + ", or ".join(one.told(step_s) for one in fitting[:2])
    together: list[str] = []
    while savings and not savings[0].fits and len(together) < MOST_CHANGES - 1:
        together.append(savings[0].words)
        savings = memory_savings(setting, savings[0].layout, headroom)
    if savings and savings[0].fits:
        return f"it fits with {' '.join(together)} {savings[0].told(step_s)}"
    return f"no {MOST_CHANGES} changes of one word each make it fit: use more GPUs, or `shardplan plan` for what does"


def first_knob(setting: Setting, layout: Layout, step_s: float, headroom: float) -> str:
    """The change to make when a layout that fits by estimate runs out of memory: the quickest that saves LEAST_SAVING."""
    savings = [one for one in memory_savings(setting, layout, headroom) if one.fits]
    if not savings:
        return f"no change of one word saves {LEAST_SAVING:.0%}: use more GPUs, or less --seq"
    return " or ".join(one.told(step_s) for one in savings[:2])


def _changes(setting: Setting, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """(words, layout) of every change of one word towards less memory."""
    abilities, offload = setting.runtime.abilities, setting.runtime.offload
    options: list[dict[str, Any]] = []
    if layout.micro_batch % 2 == 0:
        options.append({"micro_batch": layout.micro_batch // 2})
    if layout.recompute != "full":
        options += [{"recompute": word} for word in ("selective", "full") if layout.recompute != word]
    options += [{"zero": zero} for zero in range(layout.zero + 1, 4)]
    if layout.zero and layout.dp_shard not in (None, layout.dp):
        options.append({"dp_shard": None})
    if layout.tp > 1 and not layout.sequence_parallel:
        options.append({"sequence_parallel": True})
    if layout.dp % 2 == 0:
        shard = None if layout.dp_shard is None else max(layout.dp_shard // 2, 1)
        half = {"dp": layout.dp // 2, "dp_shard": shard}
        options.append({"tp": layout.tp * 2, **half, "sequence_parallel": True})
        options += [{word: getattr(layout, word) * 2, **half} for word in ("pp", "cp")]
    if layout.offload_optimizer == "none":
        options += [{"offload_optimizer": tier} for tier in abilities.offload_optimizer if tier != "none"]
        both = [tier for tier in offload.parameters if tier != "none" and tier in abilities.offload_optimizer]
        options += [{"offload_optimizer": tier, "offload_params": tier} for tier in both]
    elif layout.offload_ratio < 1.0:
        options.append({"offload_ratio": 1.0})
    if layout.offload_activations == "none" and layout.recompute == "full":
        options += [{"offload_activations": tier} for tier in offload.activations if tier != "none"]
    for option in options:
        changed = {name: value for name, value in option.items() if getattr(layout, name) != value}
        try:
            other = replace(layout, **option, **({"stage_layers": None} if "pp" in changed else {}))
        except InputError:
            continue
        words = " ".join(f"{name}={str(value).lower()}" for name, value in changed.items() if name != "dp_shard")
        yield words or "no dp_shard", other
