"""The one list of what is invalid or known bad: the planner runs it on N layouts, the executor and `estimate` on one.

A rule answers, for every row, whether it is broken; its reason and remedy name the values. A broken `structural` rule means that
the layout has no meaning (no number is computed for it); other rules mean the runtime or machine cannot run it.
"""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.attention_time import OWN_HEAD_DIM, OWN_PRECISIONS, takes_own_kernel
from shardplan.costmodel.context_rules import CONTEXT_RULES
from shardplan.costmodel.expert_rules import EXPERT_RULES
from shardplan.costmodel.job import PRECISIONS
from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import (
    ATTENTION,
    Layout,
    LayoutTable,
    layout_table,
)
from shardplan.costmodel.memory import parameter_bytes
from shardplan.costmodel.model_rules import MODEL_RULES, missing_parts
from shardplan.costmodel.offload_rules import OFFLOAD_RULES
from shardplan.costmodel.order_rules import ORDER_RULES
from shardplan.costmodel.recompute import ALL_LAYERS, BY_STAGE, PART_BITS, RECOMPUTE, split_recompute
from shardplan.costmodel.recompute_rules import RECOMPUTE_RULES
from shardplan.costmodel.rule import BoolArray, Rejection, Rule, Setting
from shardplan.costmodel.rule_parts import (
    can,
    codes,
    depth_is_wrong,
    divisors,
    ends_lack_layers,
    gradient_dtypes,
    most_chunks,
    not_in,
    options,
    other_runtime,
    recomputes_more_than_there_is,
    round_up,
    runtime_lacks,
    split_is_wrong,
    use_divisors,
)
from shardplan.costmodel.schedule_rules import SCHEDULE_RULES
from shardplan.costmodel.zeropp_rules import ZEROPP_RULES


def _runs_own_attention(setting: Setting) -> bool:
    gpu, precision = setting.cluster.gpu, setting.job.precision
    return gpu.device == "cuda" and gpu.vendor == "NVIDIA" and takes_own_kernel(precision, _widest_head(setting))


def _widest_head(setting: Setting) -> int:
    return max(kind.head_dim for kind in setting.kinds)


STRUCTURE: tuple[Rule, ...] = (
    Rule(
        id="gpus-product",
        broken=lambda s, t: t.gpus != s.cluster.gpus,
        detail=lambda s, x: (
            f"dp*tp*pp*cp = {x.dp}*{x.tp}*{x.pp}*{x.cp} = {x.gpus}, but there are {s.cluster.gpus} GPUs"
        ),
        remedy=lambda s, x: (
            f"use dp={s.cluster.gpus // (x.tp * x.pp * x.cp)}"
            if s.cluster.gpus % (x.tp * x.pp * x.cp) == 0
            else f"give --gpus {x.gpus}"
        ),
        structural=True,
    ),
    Rule(
        id="batch-divisible",
        broken=lambda s, t: s.job.global_batch % (t.dp * t.micro_batch) != 0,
        detail=lambda s, x: (
            f"global_batch={s.job.global_batch} is not a multiple of dp*micro_batch = {x.dp}*{x.micro_batch}"
        ),
        remedy=lambda s, x: (
            f"use a global batch of {round_up(s.job.global_batch, x.dp * x.micro_batch)} or another dp, micro_batch"
        ),
        structural=True,
    ),
    Rule(
        id="layers-cover-stages",
        broken=lambda s, t: t.pp * t.virtual_stages > most_chunks(s),
        detail=lambda s, x: (
            f"pp*virtual_stages = {x.pp}*{x.virtual_stages} chunks, but only {s.model.layer_count} layers"
        ),
        remedy=lambda s, x: f"use at most {most_chunks(s)} chunks",
        structural=True,
    ),
    Rule(
        id="stage-layers-sum",
        broken=split_is_wrong,
        detail=lambda s, x: (
            f"stage_layers={x.stage_layers} has {len(x.stage_layers or ())} chunks and {sum(x.stage_layers or ())} layers"
        ),
        remedy=lambda s, x: f"give {x.pp * x.virtual_stages} numbers that add up to {s.model.layer_count}",
        structural=True,
    ),
    Rule(
        id="ends-without-layers",
        broken=ends_lack_layers,
        detail=lambda s, x: (
            f"stage_layers={x.stage_layers} has a chunk without layers, which {s.runtime.name!r} does not run"
        ),
        remedy=lambda s, x: "give every chunk a layer, or use --runtime megatron",
        structural=True,
    ),
    Rule(
        id="dp-shard-divides",
        broken=lambda s, t: t.dp % t.dp_shard != 0,
        detail=lambda s, x: f"dp_shard={x.dp_shard} does not divide dp={x.dp}",
        remedy=lambda s, x: "use " + ", ".join(map(str, divisors(x.dp, most=64))),
        structural=True,
    ),
    Rule(
        id="recompute-layers",
        broken=recomputes_more_than_there_is,
        detail=lambda s, x: (
            f"recompute={x.recompute} names more layers than any stage of {s.model.layer_count}/{x.pp} has"
        ),
        remedy=lambda s, x: "use recompute=full, or fewer layers",
        structural=True,
    ),
    Rule(
        id="recompute-by-stage",
        broken=depth_is_wrong,
        detail=lambda s, x: (
            f"recompute={x.recompute} does not name a number of layers for each of pp={x.pp} stages of one chunk"
        ),
        remedy=lambda s, x: f"give {x.pp} numbers with virtual_stages=1, or one for all stages",
        structural=True,
    ),
)

LAYER_RULES: tuple[Rule, ...] = (
    Rule(
        id="runtime-experts",
        broken=lambda s, t: np.full(len(t), any(k.experts for k in s.kinds) and not can(s, "experts")),
        detail=runtime_lacks("mixture-of-experts layers"),
        remedy=lambda s, x: "choose another --runtime",
    ),
    Rule(
        id="runtime-layer-parts",
        broken=lambda s, t: np.full(len(t), bool(missing_parts(s))),
        detail=lambda s, x: (
            f"runtime {s.runtime.name!r} ({s.runtime.version}) has no {' and no '.join(missing_parts(s))} ({s.model.name})"
        ),
        remedy=lambda s, x: "choose another --runtime or model",
    ),
)
"""What no layout helps against; first, so that a search that finds nothing says so."""


def _adapter_bytes(setting: Setting) -> float:
    """Of a sharded trained parameter."""
    return float(setting.runtime.states[setting.job.precision].zero[3].sharded.get("parameters", 0.0))


def _two_dtypes(setting: Setting, table: LayoutTable) -> BoolArray:
    """Predicate: adapters and the weights sharded with them are stored in different dtypes, which the runtime cannot."""
    job, runtime = setting.job, setting.runtime
    if job.adapters is None or not runtime.tuning.one_dtype or job.precision not in runtime.states:
        return np.zeros(len(table), dtype=bool)
    return (table.zero == 3) & (_adapter_bytes(setting) != parameter_bytes(runtime, job, sent=False))


def _optimizer_stages(setting: Setting) -> tuple[int, ...]:
    """ZeRO stages that the job's optimizer goes with."""
    return setting.runtime.tuning.optimizer_zero.get(setting.job.optimizer, (0, 1, 2, 3))


RUNTIME_RULES: tuple[Rule, ...] = (
    Rule(
        id="runtime-zero",
        broken=not_in("zero", lambda r: r.abilities.zero),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no zero={x.zero}",
        remedy=options(lambda r: r.abilities.zero),
    ),
    Rule(
        id="runtime-zero-with-pipeline",
        broken=lambda s, t: (t.pp > 1) & ~one_of(t.zero, s.runtime.abilities.zero_with_pipeline),
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot combine zero={x.zero} with pp={x.pp}",
        remedy=options(lambda r: r.abilities.zero_with_pipeline),
    ),
    Rule(
        id="dp-shard-needs-zero",
        broken=lambda s, t: (t.dp_shard != t.dp) & (t.zero == 0),
        detail=lambda s, x: f"dp_shard={x.dp_shard} with zero=0 shards nothing",
        remedy=lambda s, x: "use zero=1, 2 or 3, or drop dp_shard",
    ),
    Rule(
        id="runtime-hsdp",
        broken=lambda s, t: (t.dp_shard != t.dp) & (not can(s, "hsdp")),
        detail=runtime_lacks("sharding over fewer ranks than dp (HSDP)"),
        remedy=other_runtime,
    ),
    Rule(
        id="runtime-tensor-parallel",
        broken=lambda s, t: (t.tp > 1) & (not can(s, "tensor_parallel")),
        detail=runtime_lacks("tensor parallelism"),
        remedy=other_runtime,
    ),
    Rule(
        id="runtime-sequence-parallel",
        broken=lambda s, t: (t.sequence_parallel == 1) & (not can(s, "sequence_parallel")),
        detail=runtime_lacks("sequence parallelism"),
        remedy=other_runtime,
    ),
    Rule(
        id="runtime-pipeline-parallel",
        broken=lambda s, t: (t.pp > 1) & (not can(s, "pipeline_parallel")),
        detail=runtime_lacks("pipeline parallelism"),
        remedy=other_runtime,
    ),
    Rule(
        id="runtime-recompute",
        broken=lambda s, t: ~one_of(t.recompute, codes(s.runtime.abilities.recompute, RECOMPUTE)),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no recompute={split_recompute(x.recompute).kind}",
        remedy=options(lambda r: r.abilities.recompute),
    ),
    Rule(
        id="runtime-recompute-parts",
        broken=lambda s, t: (t.recompute_parts & ~sum(PART_BITS[p] for p in s.runtime.abilities.recompute_parts)) > 0,
        detail=lambda s, x: f"runtime {s.runtime.name!r} cannot run {x.recompute.partition(':')[2]} again by choice",
        remedy=lambda s, x: (
            f"choose from {'+'.join(s.runtime.abilities.recompute_parts)}"
            if s.runtime.abilities.recompute_parts
            else "use recompute=selective (the runtime's own choice), none or full"
        ),
    ),
    Rule(
        id="runtime-partial-recompute",
        broken=lambda s, t: (t.recompute_layers != ALL_LAYERS) & (not can(s, "partial_recompute")),
        detail=runtime_lacks("full recompute of some layers only (full:N)"),
        remedy=lambda s, x: "use recompute=full or none",
    ),
    Rule(
        id="runtime-recompute-by-stage",
        broken=lambda s, t: (t.recompute_layers <= BY_STAGE) & (not can(s, "recompute_by_stage")),
        detail=runtime_lacks("another number of recomputed layers on each stage (full:4,2,0)"),
        remedy=lambda s, x: "use recompute=full:N, the same of every stage",
    ),
    Rule(
        id="runtime-attention",
        broken=lambda s, t: ~one_of(t.attention, (0, *codes(s.runtime.abilities.attention, ATTENTION))),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no attention={x.attention}",
        remedy=options(lambda r: r.abilities.attention),
    ),
    Rule(
        id="own-attention",
        broken=lambda s, t: (t.attention == ATTENTION.index("triton")) & (not _runs_own_attention(s)),
        detail=lambda s, x: (
            f"attention=triton runs on NVIDIA GPUs in {' or '.join(OWN_PRECISIONS)} with heads of at most {OWN_HEAD_DIM}, not on "
            f"{s.cluster.gpu.name} in {s.job.precision} with heads of {_widest_head(s)}"
        ),
        remedy=lambda s, x: "leave attention=auto",
    ),
    Rule(
        id="tp-divides-vocab",
        broken=lambda s, t: (s.model.vocab % t.tp != 0) & (not can(s, "pads_vocabulary")),
        detail=lambda s, x: f"tp={x.tp} does not divide vocab={s.model.vocab}, which {s.runtime.name!r} does not pad",
        remedy=use_divisors(lambda s: s.model.vocab),
    ),
    Rule(
        id="vocabulary-too-small",
        broken=lambda s, t: np.full(len(t), s.model.vocab < s.runtime.abilities.smallest_vocabulary),
        detail=lambda s, x: (
            f"vocab={s.model.vocab} is below the {s.runtime.abilities.smallest_vocabulary} tokens {s.runtime.name!r} trains on"
        ),
        remedy=lambda s, x: "use a model with a larger vocabulary or another --runtime",
    ),
    Rule(
        id="runtime-method",
        broken=lambda s, t: np.full(len(t), s.job.method not in s.runtime.abilities.methods),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no method {s.job.method}",
        remedy=options(lambda r: r.abilities.methods),
        structural=True,
    ),
    Rule(
        id="adapters-dense",
        broken=lambda s, t: np.full(
            len(t), s.job.adapters is not None and any(k.experts or k.kv_lora_rank for k in s.kinds)
        ),
        detail=lambda s, x: f"adapters of experts and of latent attention ({s.model.name}) are not estimated",
        remedy=lambda s, x: "use --method full, or a dense model",
        structural=True,
    ),
    Rule(
        id="lora-one-dtype",
        broken=_two_dtypes,
        detail=lambda s, x: (
            f"runtime {s.runtime.name!r} gathers adapters of {_adapter_bytes(s):g} bytes a parameter together with frozen weights of "
            f"{parameter_bytes(s.runtime, s.job, sent=False)}"
        ),
        remedy=lambda s, x: "use zero=0, or a runtime with all states in 16 bit (fsdp1+bf16_states)",
        evidence="FullyShardedDataParallel: parameters flattened together 'must have uniform dtype'; "
        "AnswerDotAI/fsdp_qlora@05ed9f2: quant_storage equals the FSDP parameter dtype",
    ),
    Rule(
        id="optimizer-zero",
        broken=lambda s, t: ~one_of(t.zero, _optimizer_stages(s)),
        detail=lambda s, x: f"optimizer {s.job.optimizer} does not go with zero={x.zero} in {s.runtime.name!r}",
        remedy=lambda s, x: f"use zero={' or '.join(map(str, _optimizer_stages(s)))}, or --optimizer adamw",
    ),
    Rule(
        id="qlora-tensor-parallel",
        broken=lambda s, t: (t.tp > 1) & (s.job.method == "qlora"),
        detail=lambda s, x: f"tp={x.tp} would cut blocks of a 4-bit base",
        remedy=lambda s, x: "use tp=1, or --method lora",
        evidence="bitsandbytes Params4bit are flat blocks: transformers refuses tensor parallelism for them",
    ),
    Rule(
        id="documents-context-parallel",
        broken=lambda s, t: (t.cp > 1) & (s.job.document_tokens is not None),
        detail=lambda s, x: f"cp={x.cp} with documents of {s.job.document_tokens} tokens is not estimated",
        remedy=lambda s, x: "use cp=1, or leave --document-tokens out",
        structural=True,
    ),
    Rule(
        id="runtime-optimizer",
        broken=lambda s, t: np.full(len(t), s.job.optimizer not in s.runtime.abilities.optimizers),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no optimizer {s.job.optimizer}",
        remedy=options(lambda r: r.abilities.optimizers),
    ),
    Rule(
        id="runtime-gradient-dtype",
        broken=lambda s, t: np.full(len(t), s.job.grad_dtype not in (None, *gradient_dtypes(s))),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no gradients in {s.job.grad_dtype} with {s.job.precision}",
        remedy=lambda s, _: f"{s.runtime.name!r} can do: {', '.join(gradient_dtypes(s))}",
    ),
    Rule(
        id="runtime-precision",
        broken=lambda s, t: np.full(len(t), s.job.precision not in s.runtime.abilities.precisions),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no precision {s.job.precision}",
        remedy=options(lambda r: r.abilities.precisions),
        structural=True,
    ),
    Rule(
        id="gpu-precision",
        broken=lambda s, t: np.full(len(t), s.job.precision not in s.cluster.gpu.peak_flop_per_s),
        detail=lambda s, x: f"GPU {s.cluster.gpu.name} has no {s.job.precision} matrix units",
        remedy=lambda s, x: (
            f"use --precision {' or '.join(word for word in PRECISIONS if word in s.cluster.gpu.peak_flop_per_s)}"
        ),
        structural=True,
    ),
)

RULES: tuple[Rule, ...] = (
    *LAYER_RULES,
    *STRUCTURE,
    *MODEL_RULES,
    *CONTEXT_RULES,
    *EXPERT_RULES,
    *SCHEDULE_RULES,
    *RUNTIME_RULES,
    *OFFLOAD_RULES,
    *ZEROPP_RULES,
    *ORDER_RULES,
    *RECOMPUTE_RULES,
)
STRUCTURAL: tuple[Rule, ...] = tuple(rule for rule in RULES if rule.structural)


def broken_rules(setting: Setting, table: LayoutTable) -> dict[str, BoolArray]:
    """For each rule that any row breaks: which rows, shape (N,)."""
    found = {rule.id: np.broadcast_to(rule.broken(setting, table), len(table)) for rule in RULES}
    return {rule: rows for rule, rows in found.items() if rows.any()}


def rejections(setting: Setting, layout: Layout) -> tuple[list[Rejection], bool]:
    """(every broken rule of one layout, told with its values; whether any of them is structural)."""
    found = broken_rules(setting, layout_table([layout]))
    broken = [rule for rule in RULES if rule.id in found]
    told = [Rejection(rule=r.id, detail=r.detail(setting, layout), remedy=r.remedy(setting, layout)) for r in broken]
    return told, any(rule.structural for rule in broken)
