"""Rules of ZeRO++; `rules.py` holds the whole list."""

from __future__ import annotations

from shardplan.costmodel.layout import Layout, LayoutTable
from shardplan.costmodel.rule import BoolArray, Rule, Setting
from shardplan.costmodel.rule_parts import can, other_runtime


def _used(_: Setting, t: LayoutTable) -> BoolArray:
    return (t.hpz > 1) | (t.qwz > 0) | (t.qgz > 0)


def _unknown(s: Setting, t: LayoutTable) -> BoolArray:
    """Predicate: a word of ZeRO++ that the runtime does not have."""
    known = s.runtime.abilities.zeropp
    return (
        ((t.hpz > 1) & ("hpz" not in known))
        | ((t.qwz > 0) & ("qwz" not in known))
        | ((t.qgz > 0) & ("qgz" not in known))
    )


def _words(x: Layout) -> str:
    """The ZeRO++ words in use."""
    return " ".join(w for w, on in ((f"hpz={x.hpz}", x.hpz > 1), ("qwz=true", x.qwz), ("qgz=true", x.qgz)) if on)


ZEROPP_RULES: tuple[Rule, ...] = (
    Rule(
        id="runtime-zeropp",
        broken=_unknown,
        detail=lambda s, x: (
            f"{_words(x)}: of ZeRO++ runtime {s.runtime.name!r} ({s.runtime.version}) "
            f"has {' and '.join(s.runtime.abilities.zeropp) or 'nothing'}"
        ),
        remedy=other_runtime,
    ),
    Rule(
        id="hpz-tensor-parallel",
        broken=lambda s, t: (t.hpz > 1) & (t.tp > 1) & (not can(s, "hpz_with_tensor_parallel")),
        detail=lambda s, x: (
            f"hpz={x.hpz} with tp={x.tp}: {s.runtime.name!r} cannot shard a second copy of what tensor parallelism has cut"
        ),
        remedy=lambda s, x: "use tp=1, or drop hpz",
        evidence="torch fully_shard 2.11 and 2.13: an integer reshard_after_forward is not supported for DTensor parameters",
    ),
    Rule(
        id="hpz-pipeline",
        broken=lambda s, t: (t.hpz > 1) & (t.pp > 1) & (not can(s, "hpz_with_pipeline")),
        detail=lambda s, x: f"hpz={x.hpz} with pp={x.pp}: {s.runtime.name!r} shards a second copy over all ranks only",
        remedy=lambda s, x: "use pp=1, or drop hpz",
        evidence="torch fully_shard 2.13: an integer reshard_after_forward makes process groups, one more set for each layer, that "
        "ranks of other stages do not join; seen to hang on 8 ranks",
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
