"""Rules of ZeRO++; `rules.py` holds the whole list."""

from __future__ import annotations

from shardplan.costmodel.layout import Layout, LayoutTable
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import can, other_runtime, runtime_lacks


def _used(_: Setting, t: LayoutTable) -> BoolArray:
    return (t.hpz > 1) | (t.qwz > 0) | (t.qgz > 0)


def _words(x: Layout) -> str:
    """The ZeRO++ words in use."""
    return " ".join(w for w, on in ((f"hpz={x.hpz}", x.hpz > 1), ("qwz=true", x.qwz), ("qgz=true", x.qgz)) if on)


ZEROPP_RULES: tuple[Rule, ...] = (
    Rule(
        id="runtime-zeropp",
        broken=lambda s, t: _used(s, t) & (not can(s, "zeropp")),
        detail=runtime_lacks("ZeRO++ (hpz, qwz, qgz)"),
        remedy=other_runtime,
    ),
    Rule(
        id="zeropp-zero",
        broken=lambda s, t: _used(s, t) & (t.zero != 3),
        detail=lambda s, x: f"{_words(x)} with zero={x.zero}: parameters are not sharded",
        remedy=lambda s, x: f"use zero=3, or drop {_words(x)}",
        evidence="DeepSpeed takes zero_hpz_partition_size and zero_quantized_* with stage 3 only (and ignores them silently below)",
    ),
    Rule(
        id="hpz-divides",
        broken=lambda s, t: (t.dp * t.cp) % t.hpz != 0,
        detail=lambda s, x: f"hpz={x.hpz} does not divide dp*cp = {x.dp * x.cp}",
        remedy=lambda s, x: "use a divisor, usually the GPUs of a node",
        structural=True,
    ),
    Rule(
        id="hpz-or-dp-shard",
        broken=lambda s, t: (t.hpz > 1) & (t.dp_shard != t.dp),
        detail=lambda s, x: f"hpz={x.hpz} and dp_shard={x.dp_shard}: two ways to keep gathers inside groups",
        remedy=lambda s, x: "drop one of them",
    ),
    Rule(
        id="zeropp-offload",
        broken=lambda s, t: ((t.qgz > 0) | (t.hpz > 1)) & (t.offload_params > 0),
        detail=lambda s, x: f"{_words(x)} with offload_params={x.offload_params}",
        remedy=lambda s, x: f"drop {_words(x)}, or use offload_params=none",
        evidence="deepspeedai/DeepSpeed#6889: ZeRO++ with offload is not well tested, a maintainer says",
    ),
)
