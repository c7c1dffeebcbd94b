"""Rules of pipeline schedules: chunks, micro-batches, what a runtime gets wrong; `rules.py` holds the whole list."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.keys import one_of
from shardplan.costmodel.layout import CHUNKED, SCHEDULES
from shardplan.costmodel.pipeline import splits_backward
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Rule
from shardplan.costmodel.rule_parts import can, codes, count, micro_batches, options, runtime_lacks, uneven

SCHEDULE_RULES: tuple[Rule, ...] = (
    Rule(
        id="virtual-stages-interleaved",
        broken=lambda s, t: (
            ((t.virtual_stages > 1) != (one_of(t.schedule, codes(CHUNKED, SCHEDULES)) & (t.pp > 1))) & ~t.v_placed
        ),
        detail=lambda s, x: f"schedule={x.schedule} with pp={x.pp} virtual_stages={x.virtual_stages}",
        remedy=lambda s, x: (
            "interleaved and looped_bfs need pp > 1 and virtual_stages > 1; other schedules virtual_stages=1"
        ),
    ),
    Rule(
        id="v-placement-chunks",
        broken=lambda s, t: t.v_placed & (t.virtual_stages != 2),
        detail=lambda s, x: f"schedule={x.schedule} with virtual_stages={x.virtual_stages}",
        remedy=lambda s, x: "use virtual_stages=2",
        structural=True,
        evidence="arXiv 2401.10241 section 6; torch ScheduleZBVZeroBubble and ScheduleDualPipeV: two stages a rank",
    ),
    Rule(
        id="dualpipe-v-micro-batches",
        broken=lambda s, t: (
            (t.pp > 1) & (t.schedule == SCHEDULES.index("dualpipe_v")) & (micro_batches(s, t) < 2 * t.pp)
        ),
        detail=lambda s, x: f"dualpipe_v over pp={x.pp} ranks with {count(s, x):g} micro-batches",
        remedy=lambda s, x: f"use {2 * x.pp} micro-batches or more, or schedule=zero_bubble_v",
        structural=True,
        evidence="torch ScheduleDualPipeV: at least as many micro-batches as stages",
    ),
    Rule(
        id="interleaved-rounds",
        broken=lambda s, t: (
            (t.virtual_stages > 1) & (t.schedule == SCHEDULES.index("interleaved")) & (micro_batches(s, t) % t.pp != 0)
        ),
        detail=lambda s, x: f"interleaved needs a multiple of pp={x.pp} micro-batches, not {count(s, x):g}",
        remedy=lambda s, x: "change micro_batch, dp or pp",
        evidence="Megatron-LM schedules.py: num_microbatches % pipeline_parallel_size == 0",
    ),
    Rule(
        id="zero-bubble-rounds",
        broken=lambda s, t: (
            (t.pp > 1)
            & (t.schedule == SCHEDULES.index("zero_bubble"))
            & (micro_batches(s, t) % np.maximum(micro_batches(s, t) // t.pp, 1.0) != 0)
        ),
        detail=lambda s, x: f"zero_bubble over pp={x.pp} ranks cuts {count(s, x):g} micro-batches into unequal rounds",
        remedy=lambda s, x: f"use a multiple of {x.pp} micro-batches, or fewer than {2 * x.pp}",
        evidence="torch ScheduleInterleavedZeroBubble: micro-batches divisible by max(1, micro_batches // pp) rounds",
    ),
    Rule(
        id="micro-batches-cover-stages",
        broken=lambda s, t: (t.pp > 1) & (micro_batches(s, t) < t.pp) & can(s, "micro_batches_cover_stages"),
        detail=lambda s, x: f"{count(s, x):g} micro-batches do not fill pp={x.pp} stages",
        remedy=lambda s, x: "raise the global batch or lower pp, dp or micro_batch",
        evidence="torch.distributed.pipelining rejects it for single-stage schedules (pytorch/torchtitan#775)",
    ),
    Rule(
        id="runtime-schedule",
        broken=lambda s, t: (t.pp > 1) & ~one_of(t.schedule, codes(s.runtime.abilities.schedules, SCHEDULES)),
        detail=lambda s, x: f"runtime {s.runtime.name!r} has no schedule={x.schedule}",
        remedy=options(lambda r: r.abilities.schedules),
    ),
    Rule(
        id="split-backward-zero",
        broken=lambda s, t: (
            splits_backward(t)
            & ~one_of(t.zero, s.runtime.abilities.split_backward_zero)
            & ((t.zero > 0) | (t.dp * t.cp > 1))
        ),
        detail=lambda s, x: (
            f"schedule={x.schedule} splits the backward, which {s.runtime.name!r} gets wrong with zero={x.zero}: "
            + ("hooks that reduce gradients are skipped" if x.zero == 0 else "resharded parameters get no gradient")
        ),
        remedy=lambda s, x: (
            f"use zero={' or '.join(map(str, s.runtime.abilities.split_backward_zero))}, or schedule=1f1b"
        ),
        evidence="pytorch/pytorch#144530 (DDP); fully_shard with reshard_after_forward, executed with torch 2.11 and 2.13: "
        "parameters without or with too small gradients and no error",
    ),
    Rule(
        id="split-backward-recompute",
        broken=lambda s, t: (
            splits_backward(t) & ~one_of(t.recompute, codes(s.runtime.abilities.split_backward_recompute, RECOMPUTE))
        ),
        detail=lambda s, x: (
            f"schedule={x.schedule} splits the backward, and {s.runtime.name!r} then recomputes a layer "
            f"more than once (recompute={x.recompute})"
        ),
        remedy=lambda s, x: (
            f"use recompute={' or '.join(s.runtime.abilities.split_backward_recompute)}, or schedule=1f1b"
        ),
        evidence="three recomputations a micro-batch instead of one, executed with torch 2.13; out of memory in "
        "pytorch/pytorch#136766; 13 against 128 tokens/s of interleaved in pytorch/torchtitan#773",
    ),
    Rule(
        id="schedule-needs-gpu",
        broken=lambda s, t: (
            (t.pp > 1)
            & one_of(t.schedule, codes(s.runtime.abilities.schedules_on_gpu_only, SCHEDULES))
            & (s.cluster.gpu.device == "cpu")
        ),
        detail=lambda s, x: f"schedule={x.schedule} hangs in {s.runtime.name!r} over gloo, which CPU ranks use",
        remedy=lambda s, x: "use schedule=zero_bubble or interleaved",
        evidence="torch 2.11: receive timeout over gloo with 2 and 4 ranks; torch 2.13 runs (compare pytorch/pytorch#172668)",
    ),
    Rule(
        id="runtime-uneven-stages",
        broken=uneven,
        detail=lambda s, x: (
            f"{s.model.layer_count} layers do not split evenly over {x.pp}*{x.virtual_stages} chunks in {s.runtime.name!r}"
        ),
        remedy=lambda s, x: f"use a pp*virtual_stages that divides {s.model.layer_count}",
    ),
    Rule(
        id="tied-embeddings-across-stages",
        broken=lambda s, t: (
            (t.pp > 1) & ~t.v_placed & s.model.tied_embeddings & (not can(s, "tied_embeddings_across_stages"))
        ),
        detail=runtime_lacks("embedding tied across pipeline stages"),
        remedy=lambda s, x: "use pp=1 or another --runtime",
    ),
)
