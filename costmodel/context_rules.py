"""Rules of context parallelism; `rules.py` holds the whole list."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.context_parallel import ULYSSES
from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import ATTENTION, CP_KINDS, Layout, LayoutTable
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import can, codes, divisors


def _chunks(cp: int, kind: str) -> int:
    """Equal chunks a sequence is cut into: two per rank where causal work is balanced by pairing them."""
    return cp if kind == "ulysses" else 2 * cp


def _cuts_sequence_unevenly(setting: Setting, table: LayoutTable) -> BoolArray:
    chunks = np.where(table.cp_kind == ULYSSES, table.cp, 2 * table.cp)
    return (table.cp > 1) & (setting.job.seq % chunks != 0)


def _lacks(setting: Setting, layout: Layout) -> str:
    runtime, kinds = setting.runtime, setting.runtime.abilities.context_parallel
    what = f"cp_kind={layout.cp_kind}" if kinds else "cp (context parallelism)"
    return f"runtime {runtime.name!r} ({runtime.version}) lacks {what}"


def _other_kind(setting: Setting, _: Layout) -> str:
    kinds = setting.runtime.abilities.context_parallel
    return f"use cp_kind={' or '.join(kinds)}" if kinds else "use cp=1 or another --runtime"


def _cuts_heads_unevenly(setting: Setting, table: LayoutTable) -> BoolArray:
    parts = table.tp * table.cp
    broken = np.zeros(len(table), dtype=bool)
    for kind in setting.kinds:
        uneven = kind.kv_heads % parts != 0
        if can(setting, "ulysses_copies_heads"):
            uneven &= parts % kind.kv_heads != 0
        broken |= (kind.heads % parts != 0) | uneven
    return broken & (table.cp > 1) & (table.cp_kind == ULYSSES)


def _even_heads(setting: Setting, layout: Layout) -> str:
    kind = setting.kinds[0]
    heads = kind.heads if can(setting, "ulysses_copies_heads") else kind.kv_heads
    options = ", ".join(map(str, divisors(heads // layout.tp, most=64)))
    return f"use cp={options} at tp={layout.tp}" if options else "lower tp"


def _asks_other_blocks(setting: Setting, table: LayoutTable) -> BoolArray:
    words = setting.runtime.abilities.context_attention
    if words is None:
        return np.zeros(len(table), dtype=bool)
    return (table.cp > 1) & (table.cp_kind != ULYSSES) & ~one_of(table.attention, (0, *codes(words, ATTENTION)))


CONTEXT_RULES: tuple[Rule, ...] = (
    Rule(
        id="cp-divides-seq",
        broken=_cuts_sequence_unevenly,
        detail=lambda s, x: (
            f"cp={x.cp} with cp_kind={x.cp_kind} cuts a sequence into {_chunks(x.cp, x.cp_kind)} equal chunks, which do not "
            f"divide seq={s.job.seq}"
        ),
        remedy=lambda s, x: f"use a sequence length that is a multiple of {_chunks(x.cp, x.cp_kind)}",
        structural=True,
        evidence="Megatron-Core and torchtitan cut 2 cp chunks; Llama 3, arXiv 2407.21783, section 3.3.2",
    ),
    Rule(
        id="cp-kind-needs-cp",
        broken=lambda s, t: (t.cp == 1) & (t.cp_kind != 0),
        detail=lambda s, x: f"cp_kind={x.cp_kind} with cp=1 splits nothing",
        remedy=lambda s, x: f"drop cp_kind (that is {CP_KINDS[0]}) or raise cp",
    ),
    Rule(
        id="cp-window-not-modelled",
        broken=lambda s, t: (t.cp > 1) & any(0 < kind.window < s.job.seq for kind in s.kinds),
        detail=lambda s, x: (
            f"cp={x.cp} with layers that see {min(kind.window for kind in s.kinds if kind.window)} of {s.job.seq} tokens is not "
            "modelled: ranks would exchange only the keys inside the window, and share its work unevenly"
        ),
        remedy=lambda s, x: "use cp=1",
        structural=True,
    ),
    Rule(
        id="runtime-context-parallel",
        broken=lambda s, t: (t.cp > 1) & ~one_of(t.cp_kind, codes(s.runtime.abilities.context_parallel, CP_KINDS)),
        detail=_lacks,
        remedy=_other_kind,
    ),
    Rule(
        id="context-parallel-alone",
        broken=lambda s, t: (t.cp > 1) & ((t.tp > 1) | (t.pp > 1)) & can(s, "context_parallel_alone"),
        detail=lambda s, x: f"runtime {s.runtime.name!r} does not combine cp={x.cp} with tp={x.tp} pp={x.pp}",
        remedy=lambda s, x: "use tp=1 pp=1, or cp=1",
        evidence="Megatron-DeepSpeed megatron/core/parallel_state.py: 'DeepSpeed's sequence parallel does not work with tensor parallel "
        "or pipeline parallel'",
    ),
    Rule(
        id="context-attention",
        broken=_asks_other_blocks,
        detail=lambda s, x: (
            f"cp_kind={x.cp_kind} attends block by block and needs each block's log-sum-exp, which {s.runtime.name!r} does not take "
            f"from attention={x.attention}"
        ),
        remedy=lambda s, x: "leave attention=auto, or use cp_kind=ulysses",
    ),
    Rule(
        id="ulysses-divides-heads",
        broken=_cuts_heads_unevenly,
        detail=lambda s, x: (
            f"tp*cp = {x.tp}*{x.cp} does not divide heads={s.kinds[0].heads} and kv_heads={s.kinds[0].kv_heads}"
        ),
        remedy=_even_heads,
        evidence="deepspeed/runtime/sequence_parallel/ulysses_sp.py checks both head counts and copies too few key-value heads",
    ),
)
