"""Expert parallelism: a layer's experts lie on ep groups of ranks, tokens travel to theirs and back by all-to-all.

As Megatron-Core's alltoall dispatcher does it (megatron/core/transformer/moe/token_dispatcher.py, NVIDIA/Megatron-LM@0014f13): every
rank routes its own tokens, under sequence parallelism its 1/tp of them; copies, one for each chosen expert, are sorted by expert and
exchanged over the ep ranks; ranks that share cut experts (etp) gather what each of them received; the chunks are sorted by local
expert, and all of it is undone after the experts. Expert groups are consecutive ranks of a stage: etp neighbours, ep at stride etp
(where the pipeline lies inside other axes, the ranks that it surrounds: `order_rules.py`).

The busiest rank sets the pace: it computes, keeps and receives `expert_load` times the mean (the imbalance of the job, or its capacity
factor, to which dropping and padding bring every expert: arXiv 2101.03961, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import all_to_all_s, collective_s, sent_once
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.model import LayerKind, Model, layer_parameters
from shardplan.costmodel.op import Op, Shapes, tensor_parallel_collectives
from shardplan.costmodel.operators import expert_ops, routing_ops
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]


def expert_load(job: Job, layouts: LayoutTable) -> FloatArray:
    """Tokens that experts of the busiest rank compute, relative to an even share, (N,): all tokens at most."""
    if job.capacity_factor is not None:
        return np.full(len(layouts), job.capacity_factor)
    return np.minimum(job.expert_imbalance, layouts.ep.astype(np.float64))


def expert_parameters(model: Model, layouts: LayoutTable) -> tuple[FloatArray, FloatArray]:
    """Parameters of a rank in the experts of one layer of each run, (N, runs): as they are spread, and as tensor parallelism would have
    cut them; both 0 where tokens are not dispatched."""
    routed = np.array(
        [layer_parameters(kind)["mlp"] if kind.experts else 0 for kind, _ in model.runs], dtype=np.float64
    )
    spread = layouts.dispatches[:, None]
    held = np.where(spread, routed / (layouts.ep * layouts.expert_tp)[:, None], 0.0)
    return held, np.where(spread, routed / layouts.tp[:, None], 0.0)


def spread_layers(
    model: Model, usual: Sequence[Sequence[Op]], shapes: Shapes, runtime: Runtime
) -> dict[int, tuple[Op, ...]]:
    """Operators of the runs of layers that have experts, by run, with the experts spread; `usual` are those of every run without."""
    return {
        index: dispatched_ops(usual[index], kind, shapes, runtime)
        for index, (kind, _) in enumerate(model.runs)
        if kind.experts
    }


def dispatched_ops(ops: Sequence[Op], kind: LayerKind, shapes: Shapes, runtime: Runtime) -> tuple[Op, ...]:
    """Operators of a layer (`operators.layer_ops`) with its experts spread: what is routed replaced, from the router to the
    combination. Shared experts stay cut over tp, with exchanges of their own."""
    names = [op.name for op in ops]
    router, combine = names.index("router"), names.index("combine")
    entering, leaving = tensor_parallel_collectives(shapes, shapes.element_bytes * shapes.tokens * kind.hidden)
    sides = {"up": entering, "down": leaving}
    shared = [
        replace(op, forward=sides[op.name][0], backward=sides[op.name][1]) if op.name in sides else op
        for op in ops[router + 2 : combine - 3]
    ]
    rows = kind.experts_per_token * shapes.tokens / shapes.sp * shapes.expert_load * shapes.expert_tp
    local = kind.experts / shapes.ep * np.ones_like(shapes.tokens)
    up, activation, down = expert_ops(kind, shapes, runtime, rows, kind.ffn / shapes.expert_tp, local)
    received, ordered = _received(kind, shapes)[1], _ordering_bytes(kind, shapes, runtime)
    kept = received * shapes.expert_tp
    routes, there, back = routing_ops(kind, runtime, shapes.tokens / shapes.sp, ordered, kept)
    sent = (received, float(kind.experts_per_token))
    return (
        *ops[:router],
        routes,
        replace(there, experts=sent),
        *shared,
        up,
        activation,
        replace(down, name=names[combine - 1]),
        replace(back, experts=sent),
        *ops[combine + 1 :],
    )


def _received(kind: LayerKind, shapes: Shapes) -> tuple[FloatArray, FloatArray]:
    """(bytes of the copies of a rank's own tokens, of those that the busiest rank computes)."""
    own = kind.experts_per_token * shapes.element_bytes * shapes.tokens / shapes.sp * kind.hidden
    return own, own * shapes.expert_load


def _ordering_bytes(kind: LayerKind, shapes: Shapes, runtime: Runtime) -> FloatArray:
    """Traffic of one pass to make the copies and order them by expert, or to undo it.

    Copies are written from the tokens, sent, and rewritten by local expert (not with one expert a rank). Where tokens are sent once
    they are kept as they arrive, and the copies written from them.
    """
    own, received = (runtime.expert_parallel.ordering_passes * size for size in _received(kind, shapes))
    there = received * shapes.expert_tp
    if runtime.expert_parallel.tokens_once:
        ranks = np.asarray(shapes.ep, dtype=np.float64)
        return there * (1.0 + sent_once(ranks, kind.experts_per_token))
    several = kind.experts / np.asarray(shapes.ep) > 1
    return own * (1.0 + 1.0 / kind.experts_per_token) + np.where(several, 2.0 * there, 0.0)


def exchange_s(tiers: TierTable, ops: Sequence[Op], shapes: Shapes, runtime: Runtime) -> FloatArray:
    """Seconds of all exchanges of tokens in one pass through a layer, (K,): forward and backward take the same, each all-to-all back the
    other way, each gather over etp as a reduce-scatter."""
    total = np.zeros_like(shapes.tokens)
    for op in ops:
        if op.experts is None:
            continue
        sent, copies = op.experts
        at_once = copies if runtime.expert_parallel.tokens_once else 1.0
        total = total + all_to_all_s(tiers, sent, shapes.ep, shapes.ep_stride, at_once)
        among = (shapes.expert_tp, shapes.expert_tp_stride)
        total = total + collective_s(tiers, "all_gather", sent * shapes.expert_tp, *among)
    return total


def mixed(
    usual: Mapping[str, FloatArray], spread: Mapping[str, FloatArray], rows: NDArray[np.bool_]
) -> dict[str, FloatArray]:
    """Columns of a layer's cost: those of `spread` in `rows`, else `usual`."""
    return {name: np.where(rows, spread[name], column) for name, column in usual.items()}
