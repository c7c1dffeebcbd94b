"""Rules of expert parallelism; `rules.py` holds the whole list."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import numpy as np

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import can, divisors, options, other_runtime, runtime_lacks

FULL = RECOMPUTE.index("full")


def expert_count(setting: Setting) -> int:
    """Largest number of ranks over which the experts of every layer spread evenly; 0 without experts."""
    return gcd(*(kind.experts for kind in setting.kinds))


def _spread(table: LayoutTable) -> BoolArray:
    return (table.ep > 1) | (table.etp > 0)


def _if_spread(broken: Callable[[Setting, LayoutTable], BoolArray]) -> Callable[[Setting, LayoutTable], BoolArray]:
    """The predicate, not computed for tables without a word of expert parallelism."""
    return lambda s, t: broken(s, t) if _spread(t).any() else np.zeros(len(t), dtype=bool)


def _no_experts(setting: Setting, table: LayoutTable) -> BoolArray:
    return _spread(table) & (not expert_count(setting))


def _splits_experts(setting: Setting, table: LayoutTable) -> BoolArray:
    return (table.ep > 1) & (expert_count(setting) % table.ep != 0)


def _splits_ranks(setting: Setting, table: LayoutTable) -> BoolArray:
    return _spread(table) & (table.dp * table.cp * table.tp % (table.ep * table.expert_tp) != 0)


def _splits_shards(setting: Setting, table: LayoutTable) -> BoolArray:
    ranks = table.dp_shard * table.cp * table.tp
    return table.dispatches & (table.zero > 0) & (ranks % (table.ep * table.expert_tp) != 0)


def _cuts_experts(setting: Setting, table: LayoutTable) -> BoolArray:
    widths = [kind.ffn for kind in setting.kinds if kind.experts]
    return table.dispatches & np.any([width % table.expert_tp != 0 for width in (*widths, 0)], axis=0)


def _needs_sequence_parallel(setting: Setting, table: LayoutTable) -> BoolArray:
    needed = table.dispatches & (table.tp > 1) & (table.sequence_parallel == 0)
    return needed & can(setting, "expert_parallel_splits_sequence")


def _second_copy_of_cut_experts(setting: Setting, table: LayoutTable) -> BoolArray:
    if "hpz" not in setting.runtime.abilities.experts_without or not any(kind.experts for kind in setting.kinds):
        return np.zeros(len(table), dtype=bool)
    return (table.hpz > 1) & (table.dispatches | _cut_experts(setting, table))


def _why_cut(layout: Layout) -> str:
    return f"ep={layout.ep}" if layout.ep > 1 else f"dp*cp = {layout.dp * layout.cp}, which cuts experts"


def _ranks(layout: Layout) -> str:
    return f"dp*cp*tp = {layout.dp}*{layout.cp}*{layout.tp}"


def _group(layout: Layout) -> int:
    """Ranks that hold all experts of a layer once."""
    return layout.ep * int(layout_table([layout]).expert_tp[0])


def _joined(
    word: str, *, broken: Callable[[LayoutTable], BoolArray], what: Callable[[Layout], str], remedy: str
) -> Rule:
    """The rule that exchanges of tokens hidden behind another micro-batch do not go with what `broken` describes (`joins_passes`)."""
    return Rule(
        id=f"joined-passes-{word}",
        broken=lambda s, t: broken(t) & s.runtime.expert_parallel.joins_passes,
        detail=lambda s, x: f"{what(x)}: {s.runtime.name!r} with a2a_overlap does not start",
        remedy=lambda s, x: f"{remedy}, or leave the switch a2a_overlap out",
        evidence="megatron/core/transformer/transformer_config.py: assertions on overlap_moe_expert_parallel_comm",
    )


def _cut_experts(setting: Setting, table: LayoutTable) -> BoolArray:
    """ZeRO gives a rank parts of experts, not whole ones."""
    return np.any([kind.experts % (table.dp * table.cp) != 0 for kind in setting.kinds if kind.experts], axis=0)


EXPERT_RULES: tuple[Rule, ...] = (
    Rule(
        id="ep-needs-experts",
        broken=_if_spread(_no_experts),
        detail=lambda s, x: f"ep={x.ep}: {s.model.name} has layers without experts only",
        remedy=lambda s, x: "drop ep and etp",
        structural=True,
    ),
    Rule(
        id="ep-divides-experts",
        broken=_if_spread(_splits_experts),
        detail=lambda s, x: f"ep={x.ep} does not divide experts={expert_count(s)}",
        remedy=lambda s, x: "use " + ", ".join(map(str, divisors(max(expert_count(s), 1)))),
        structural=True,
        evidence="Megatron-Core: num_moe_experts % expert_model_parallel_size == 0",
    ),
    Rule(
        id="ep-divides-ranks",
        broken=_if_spread(_splits_ranks),
        detail=lambda s, x: f"ep*etp = {_group(x)} does not divide {_ranks(x)} ranks of a stage",
        remedy=lambda s, x: "use an ep of " + ", ".join(map(str, divisors(x.dp * x.cp * x.tp, most=64))),
        structural=True,
    ),
    Rule(
        id="ep-divides-shards",
        broken=_if_spread(_splits_shards),
        detail=lambda s, x: f"ep*etp = {_group(x)} does not divide dp_shard*cp*tp = {x.dp_shard or x.dp}*{x.cp}*{x.tp}",
        remedy=lambda s, x: "use a larger dp_shard or a smaller ep",
        evidence="torchtitan: efsdp = dp_shard * cp * tp / ep is whole",
    ),
    Rule(
        id="etp-divides-ffn",
        broken=_if_spread(_cuts_experts),
        detail=lambda s, x: (
            f"etp={x.etp or 1} does not divide the experts' ffn={max(k.ffn for k in s.kinds if k.experts)}"
        ),
        remedy=lambda s, x: "use etp=1",
    ),
    Rule(
        id="ep-needs-sequence-parallel",
        broken=_if_spread(_needs_sequence_parallel),
        detail=lambda s, x: f"ep={x.ep} with tp={x.tp}: {s.runtime.name!r} dispatches tokens split along the sequence",
        remedy=lambda s, x: "add sequence_parallel=true or use tp=1",
        evidence="megatron/training/arguments.py: MoE with tensor parallelism requires --sequence-parallel",
    ),
    Rule(
        id="runtime-expert-parallel",
        broken=_if_spread(lambda s, t: (t.ep > 1) & (not can(s, "expert_parallel"))),
        detail=runtime_lacks("expert parallelism"),
        remedy=other_runtime,
    ),
    Rule(
        id="runtime-expert-parallel-zero",
        broken=_if_spread(lambda s, t: (t.ep > 1) & ~one_of(t.zero, s.runtime.abilities.expert_parallel_zero)),
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot combine zero={x.zero} with ep={x.ep}",
        remedy=options(lambda runtime: runtime.abilities.expert_parallel_zero),
    ),
    Rule(
        id="runtime-expert-tensor-parallel",
        broken=_if_spread(
            lambda s, t: (t.expert_tp != np.where(t.ep > 1, 1, t.tp)) & (not can(s, "expert_tensor_parallel"))
        ),
        detail=runtime_lacks("experts cut over other ranks than dense products (etp)"),
        remedy=other_runtime,
    ),
    _joined("dispatch", broken=lambda t: ~t.dispatches, what=lambda x: "no tokens are dispatched", remedy="use ep > 1"),
    _joined(
        "chunks",
        broken=lambda t: (t.pp > 1) & (t.virtual_stages == 1),
        what=lambda x: f"pp={x.pp} with one chunk of layers a stage",
        remedy="use schedule=interleaved virtual_stages=2 or more",
    ),
    _joined(
        "full-recompute",
        broken=lambda t: t.recompute == FULL,
        what=lambda x: f"recompute={x.recompute}",
        remedy="use recompute=none or selective",
    ),
    Rule(
        id="experts-without-hpz",
        broken=_second_copy_of_cut_experts,
        detail=lambda s, x: (
            f"runtime {s.runtime.name!r} does not run layers with experts with hpz={x.hpz} and {_why_cut(x)}"
        ),
        remedy=lambda s, x: "drop hpz, or use ep=1 and a dp*cp that divides the experts of a layer",
        evidence="torch 2.13, FSDPParam.to_sharded_post_forward: the second copy is cut by Shard(0) whatever dimension the first one is "
        "cut along, and experts fewer than ranks are cut inside",
    ),
)
