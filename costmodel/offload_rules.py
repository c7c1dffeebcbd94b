"""Rules of memory tiers; `rules.py` holds the whole list."""

from __future__ import annotations

from collections.abc import Callable

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import OFFLOAD, RATIO_STEPS, Layout, LayoutTable
from shardplan.costmodel.memory import FULL
from shardplan.costmodel.offload import NVME
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import codes, options
from shardplan.costmodel.runtime import Runtime


def _lacks(
    word: str, known: tuple[str, ...], tiers: Callable[[Runtime], tuple[str, ...]]
) -> Callable[[Setting, LayoutTable], BoolArray]:
    """Predicate: the runtime does not keep what `word` names in that tier."""
    return lambda s, t: ~one_of(getattr(t, word), (0, *codes(tiers(s.runtime), known)))


def _lacks_detail(word: str) -> Callable[[Setting, Layout], str]:
    return lambda s, x: f"runtime {s.runtime.name!r} has no {word}={getattr(x, word)}"


def _no_flash(setting: Setting, _: Layout) -> str:
    return f"the profile of {setting.cluster.name!r} has no local flash (node.nvme)"


def _other_tier(_: Setting, __: Layout) -> str:
    return "use cpu, or add [nvme] to the node's profile"


OFFLOAD_RULES: tuple[Rule, ...] = (
    Rule(
        id="runtime-offload",
        broken=_lacks("offload_optimizer", OFFLOAD, lambda r: r.abilities.offload_optimizer),
        detail=_lacks_detail("offload_optimizer"),
        remedy=options(lambda r: r.abilities.offload_optimizer),
    ),
    Rule(
        id="offload-zero",
        broken=lambda s, t: (t.offload_optimizer > 0) & ~one_of(t.zero, s.runtime.abilities.offload_zero),
        detail=lambda s, x: (
            f"offload_optimizer={x.offload_optimizer} does not go with zero={x.zero} in {s.runtime.name!r}"
        ),
        remedy=lambda s, x: (
            f"use zero={' or '.join(map(str, s.runtime.abilities.offload_zero))}"
            if s.runtime.abilities.offload_zero
            else "use another --runtime, or offload_optimizer=none"
        ),
    ),
    Rule(
        id="offload-flash-zero",
        broken=lambda s, t: (t.offload_optimizer == NVME) & (t.zero != 3),
        detail=lambda s, x: f"offload_optimizer=nvme with zero={x.zero}",
        remedy=lambda s, x: "use zero=3, or offload_optimizer=cpu",
        evidence="DeepSpeed: NVMe offload is available with stage 3 only",
    ),
    Rule(
        id="runtime-offload-params",
        broken=_lacks("offload_params", OFFLOAD, lambda r: r.offload.parameters),
        detail=_lacks_detail("offload_params"),
        remedy=options(lambda r: r.offload.parameters),
    ),
    Rule(
        id="offload-params-zero",
        broken=lambda s, t: (t.offload_params > 0) & (t.zero != 3),
        detail=lambda s, x: (
            f"offload_params={x.offload_params} with zero={x.zero}: every rank needs its parameters whole"
        ),
        remedy=lambda s, x: "use zero=3",
        evidence="DeepSpeed: offload_param is valid with stage 3 only",
    ),
    Rule(
        id="offload-params-optimizer",
        broken=lambda s, t: (t.offload_params > 0) & (t.offload_optimizer == 0),
        detail=lambda s, x: f"offload_params={x.offload_params} leaves the optimizer, six times as large, on the GPU",
        remedy=lambda s, x: "use offload_optimizer=cpu or nvme too",
        evidence="DeepSpeed's ZeRO-3 memory estimator has parameter offload only together with optimizer offload",
    ),
    Rule(
        id="offload-optimizer-params",
        broken=lambda s, t: (
            (t.offload_optimizer > 0) & (t.offload_params == 0) & s.runtime.offload.optimizer_with_parameters
        ),
        detail=lambda s, x: f"runtime {s.runtime.name!r} offloads the optimizer only together with the parameters",
        remedy=lambda s, x: f"use offload_params={x.offload_optimizer} too",
    ),
    Rule(
        id="runtime-offload-activations",
        broken=_lacks("offload_activations", OFFLOAD, lambda r: r.offload.activations),
        detail=_lacks_detail("offload_activations"),
        remedy=options(lambda r: r.offload.activations),
    ),
    Rule(
        id="offload-activations-recompute",
        broken=lambda s, t: (t.offload_activations > 0) & (t.recompute != FULL),
        detail=lambda s, x: (
            f"offload_activations={x.offload_activations} moves the inputs of recomputed layers, recompute={x.recompute} has none"
        ),
        remedy=lambda s, x: "use recompute=full",
        evidence="DeepSpeed activation_checkpointing.cpu_checkpointing",
    ),
    Rule(
        id="offload-ratio-zero",
        broken=lambda s, t: (t.offload_ratio != RATIO_STEPS) & ~one_of(t.zero, s.runtime.offload.ratio_zero),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no offload_ratio={x.offload_ratio:g} with zero={x.zero}",
        remedy=lambda s, x: (
            f"use zero={' or '.join(map(str, s.runtime.offload.ratio_zero))}, or drop it"
            if s.runtime.offload.ratio_zero
            else "drop it"
        ),
    ),
    Rule(
        id="offload-ratio-optimizer",
        broken=lambda s, t: (t.offload_ratio != RATIO_STEPS) & (t.offload_optimizer == 0),
        detail=lambda s, x: f"offload_ratio={x.offload_ratio:g} of an optimizer that stays on the GPU",
        remedy=lambda s, x: "use offload_optimizer=cpu, or drop offload_ratio",
    ),
    Rule(
        id="offload-needs-flash",
        broken=lambda s, t: (
            ((t.offload_optimizer == NVME) | (t.offload_params == NVME)) & (s.cluster.node.nvme is None)
        ),
        detail=_no_flash,
        remedy=_other_tier,
        structural=True,
    ),
    Rule(
        id="offload-activations-need-flash",
        broken=lambda s, t: (t.offload_activations == NVME) & (s.cluster.node.nvme is None),
        detail=_no_flash,
        remedy=_other_tier,
        structural=True,
    ),
)
