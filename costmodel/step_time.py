"""Step time of N layouts by part: the slowest stage sets the pace, the others fill and drain, the rest is added where exposed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import collective_s, point_to_point_s
from shardplan.costmodel.data_parallel import (
    exchange_counts,
    exchange_s,
    exposed_exchange_s,
    one_exchange_s,
    reduces_often,
)
from shardplan.costmodel.job import BYTES_OF, Job
from shardplan.costmodel.kernels_time import memory_bound_s
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layer_cost import BACKWARD_LAUNCHES
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import gradient_bytes, parameter_bytes, update_traffic_bytes
from shardplan.costmodel.model import Model
from shardplan.costmodel.offload import optimizer_offload_s
from shardplan.costmodel.pipeline import bubble_hops, hop_share
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import BlockColumns, BlockRows, StageParameters, StageRows
from shardplan.hw_profiles.machine import Cluster, Gpu
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def pace_keys(layouts: LayoutTable, runtime: Runtime) -> tuple[IntArray, IntArray]:
    """(first, inverse) of the rows that differ in what `pipeline_pace` or the activations depend on."""
    shared = np.where(
        reduces_often(layouts, runtime.communication), layouts.zero_ranks, np.minimum(layouts.zero_ranks, 2)
    )
    others = ("dp_shard", "offload_optimizer", "ep")
    return unique_keys(shared, *(column for name, column in layouts.columns().items() if name not in others))


def pipeline_pace(
    model: Model,
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable,
    runtime: Runtime,
    tiers: TierTable,
    blocks: BlockRows,
    stages: StageRows,
    parameters: StageParameters,
    micro_batches: FloatArray,
) -> dict[str, FloatArray]:
    """What does not depend on the ranks that ZeRO shards over, columns of shape (N,).

    Seconds of one micro-batch on the slowest stage by part, the `bubble` and `transfers` of a step, and of the stage with most
    parameters the number it `owned`, the `units` (layers) and the share that stays gathered (`kept_share`).
    """
    exchanging = _exchange_host_s(cluster.gpu, layouts, runtime, micro_batches)
    accumulating = _accumulating(layouts, runtime, micro_batches)
    showing = _tensor_showing(layouts, runtime, cluster.node.gpus)
    pace = _pace(model, cluster.gpu, runtime, blocks, stages, exchanging, accumulating, showing)
    total = sum((pace[part] for part in PACE_PARTS if part in pace), np.zeros_like(stages.embedding))
    slowest = total.argmax(axis=1)[:, None]
    worst = {part: np.take_along_axis(values, slowest, axis=1)[:, 0] for part, values in pace.items()}
    whole = _whole_pipeline(model, cluster.gpu, runtime, blocks, stages, exchanging, accumulating, showing)
    fill = whole - total.max(axis=1)
    heaviest = parameters.stage.argmax(axis=1)[:, None]
    owned = np.take_along_axis(parameters.stage, heaviest, axis=1)[:, 0]
    root = np.take_along_axis(parameters.root, heaviest, axis=1)[:, 0]
    units = np.take_along_axis(stages.layers.sum(axis=2) + stages.embedding + stages.head, heaviest, axis=1)[:, 0]
    return {
        **worst,
        "bubble": _bubble_s(layouts, micro_batches, fill, worst),
        "transfers": _pipeline_transfers(model, job, layouts, runtime, tiers, micro_batches),
        "owned": owned,
        "units": units,
        "kept_share": root / owned if runtime.working_set.root_stays_gathered else np.zeros_like(owned),
    }


def step_time(
    model: Model,
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable,
    runtime: Runtime,
    tiers: TierTable,
    pace: dict[str, FloatArray],
    micro_batches: FloatArray,
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """(seconds by part with `step_s`, hidden seconds by axis), columns of shape (N,), from the columns of `pipeline_pace`."""
    dp_exposed, dp_hidden = _data_parallel(model, job, layouts, runtime, tiers, pace, micro_batches)
    updated = pace["owned"] / layouts.zero_ranks
    optimizer = memory_bound_s(cluster.gpu, update_traffic_bytes(runtime, job) * updated)
    offloaded = layouts.offload_optimizer > 0
    offload, offload_hidden = optimizer_offload_s(
        cluster.node,
        updated,
        gradient_bytes=gradient_bytes(runtime, job),
        parameter_bytes=BYTES_OF[job.precision],
        backward_s=pace["backward"],
    )
    zero = np.zeros(len(layouts))
    tensor_exposed = micro_batches * pace["tensor_exposed"]
    waiting = micro_batches * pace["host"]
    if cluster.gpu.device != "cpu":  # while a GPU waits for its links, the host launches ahead
        waiting = np.maximum(waiting - dp_exposed, 0.0)
    parts = {
        "compute_s": micro_batches * (pace["forward"] + pace["backward"]),
        "recompute_s": micro_batches * pace["recompute"],
        "tp_exposed_s": tensor_exposed,
        "cp_exposed_s": micro_batches * pace.get("context_exposed", zero),
        "ep_exposed_s": zero,
        "dp_exposed_s": dp_exposed,
        "pp_exposed_s": pace["transfers"],
        "bubble_s": pace["bubble"],
        "offload_exposed_s": np.where(offloaded, offload, 0.0),
        "optimizer_s": np.where(offloaded, 0.0, optimizer),
        "host_s": waiting + runtime.execution.step_overhead_s,
    }
    hidden = {
        "tp_s": micro_batches * pace["tensor"] - tensor_exposed,
        "cp_s": micro_batches * pace.get("context_hidden", zero),
        "dp_s": dp_hidden,
        "offload_s": np.where(offloaded, offload_hidden, 0.0),
    }
    return {**parts, "step_s": sum(parts.values(), zero)}, hidden


def _bubble_s(
    layouts: LayoutTable, micro_batches: FloatArray, fill: FloatArray, worst: dict[str, FloatArray]
) -> FloatArray:
    """Seconds of fill and drain, (N,): `fill` = one micro-batch through the other stages, by the schedule's closed form.

    Half of the backward operators are taken for the gradient of the weights; recompute comes before the gradient of the input;
    launches are spread over F, I and W alike.
    """
    around = 0.5 * (worst["tensor_exposed"] + worst.get("context_exposed", 0.0))
    launching = worst["host"] / (1.0 + BACKWARD_LAUNCHES)
    weight_grad = 0.5 * worst["backward"]
    share = hop_share(
        layouts.schedule,
        worst["forward"] + around + launching,
        weight_grad + worst["recompute"] + around + launching,
        weight_grad + launching,
    )
    hops = bubble_hops(layouts.schedule, layouts.pp, micro_batches, layouts.virtual_stages)
    filled = fill / layouts.virtual_stages * share * (hops / np.maximum(layouts.pp - 1, 1))
    return np.where(layouts.pp > 1, filled, 0.0)


PACE_PARTS = ("forward", "backward", "recompute", "tensor_exposed", "context_exposed", "host")


def _accumulating(layouts: LayoutTable, runtime: Runtime, micro_batches: FloatArray) -> FloatArray:
    """Share of its gradients that a rank adds up per micro-batch, (N,): all, or its shard where every micro-batch reduces."""
    share = np.where(reduces_often(layouts, runtime.communication), 1.0 / layouts.zero_ranks, 1.0)
    return share * (1.0 - 1.0 / micro_batches)


def _tensor_showing(layouts: LayoutTable, runtime: Runtime, node_gpus: int) -> FloatArray:
    """Share of tensor-parallel communication that nothing hides, (N,): async tensor parallelism cuts the gathers and reductions of
    sequence parallelism into pieces between those of the products, over the links of one node."""
    cut = (layouts.sequence_parallel == 1) & (layouts.tp <= node_gpus)
    communication = runtime.communication
    return (1.0 - communication.tensor_overlap) * np.where(cut, 1.0 - communication.async_tensor_overlap, 1.0)


def _exchange_host_s(gpu: Gpu, layouts: LayoutTable, runtime: Runtime, micro_batches: FloatArray) -> FloatArray:
    """Host seconds per layer and micro-batch that gathers and reductions of its states take, (N,)."""
    reductions, gathers = exchange_counts(layouts, runtime.communication, micro_batches)
    gathers = np.where(layouts.zero_ranks > 1, gathers, 0.0)
    per_step = (reductions + gathers) * runtime.execution.exchange_launches * gpu.launch_s
    return np.where(layouts.dp * layouts.cp > 1, per_step / micro_batches, 0.0)


def _block_pace(
    gpu: Gpu,
    runtime: Runtime,
    block: BlockColumns,
    *,
    recomputed: FloatArray,
    selects: FloatArray,
    repeated: FloatArray,
    exchanging: FloatArray,
    accumulating: FloatArray,
    showing: FloatArray,
) -> dict[str, FloatArray]:
    """Seconds of one block and micro-batch; `recomputed` is the share of it under full recompute, `repeated` the share of its
    forward tensor-parallel communication that full recompute repeats, `showing` the share of that communication nothing hides."""
    recompute = recomputed * block["full_s"] + selects * block["selective_s"]
    tensor = block["tensor_forward_s"] * (1.0 + repeated) + block["tensor_backward_s"]
    tensor = tensor + selects * block["tensor_selective_s"]
    exposed = tensor * showing
    backward = block["backward_s"] + accumulating * block["accumulate_s"]
    busy = block["forward_s"] + backward + recompute + exposed
    context = _context_pace(block, recomputed, selects)
    if context:
        busy = busy + context["context_exposed"]
    launching = block["host_forward_s"] * (1.0 + BACKWARD_LAUNCHES + recomputed) + exchanging
    # a CPU runs the operation it dispatches, a GPU only idles when launches come too slowly
    host = launching if gpu.device == "cpu" else np.maximum(launching - busy, 0.0)
    return {
        "forward": block["forward_s"],
        "backward": backward,
        "recompute": recompute,
        "tensor": tensor,
        "tensor_exposed": exposed,
        "host": host + np.zeros_like(busy),
        **context,
    }


def _context_pace(block: BlockColumns, recomputed: FloatArray, selects: FloatArray) -> dict[str, FloatArray]:
    """Seconds of context-parallel exchanges of one block and micro-batch, exposed and hidden; none where no layout has any.

    Recomputing attention repeats the exchanges of its forward.
    """
    if "context_forward_exposed_s" not in block:
        return {}
    again = 1.0 + recomputed + selects * block["context_selective"]
    return {
        f"context_{what}": block[f"context_forward_{what}_s"] * again + block[f"context_backward_{what}_s"]
        for what in ("exposed", "hidden")
    }


def _pace(
    model: Model,
    gpu: Gpu,
    runtime: Runtime,
    blocks: BlockRows,
    stages: StageRows,
    exchanging: FloatArray,
    accumulating: FloatArray,
    showing: FloatArray,
) -> dict[str, FloatArray]:
    """Seconds of one micro-batch on each stage by part, (N, S)."""
    total = stages.layers.sum(axis=2)
    share = np.divide(stages.recomputed, total, out=np.zeros_like(total), where=total > 0)
    selects = blocks.selects[:, None]
    repeats = share * blocks.full_repeats[:, None]
    none = np.zeros_like(share)
    contents = [(blocks.layers[i], stages.layers[:, :, i], share, selects, repeats) for i in range(len(model.layers))]
    contents += [(blocks.embedding, stages.embedding, none, none, none), (blocks.head, stages.head, none, none, none)]
    pace: dict[str, FloatArray] = {}
    for block, count, recomputed, selected, repeated in contents:
        wide = {name: column[:, None] for name, column in block.items()}
        blocked = _block_pace(
            gpu,
            runtime,
            wide,
            recomputed=recomputed,
            selects=selected,
            repeated=repeated,
            exchanging=exchanging[:, None],
            accumulating=accumulating[:, None],
            showing=showing[:, None],
        )
        for part, seconds in blocked.items():
            pace[part] = pace.get(part, 0.0) + count * seconds
    return pace


def _whole_pipeline(
    model: Model,
    gpu: Gpu,
    runtime: Runtime,
    blocks: BlockRows,
    stages: StageRows,
    exchanging: FloatArray,
    accumulating: FloatArray,
    showing: FloatArray,
) -> FloatArray:
    """Seconds of one micro-batch through all stages, (N,)."""
    share = stages.recomputed_total / model.layer_count
    repeats = share * blocks.full_repeats
    none = np.zeros_like(share)
    contents = [
        (block, float(count), share, blocks.selects, repeats)
        for block, (_, count) in zip(blocks.layers, model.layers, strict=True)
    ]
    contents += [(blocks.embedding, 1.0, none, none, none), (blocks.head, 1.0, none, none, none)]
    seconds = none
    for block, count, recomputed, selected, repeated in contents:
        pace = _block_pace(
            gpu,
            runtime,
            block,
            recomputed=recomputed,
            selects=selected,
            repeated=repeated,
            exchanging=exchanging,
            accumulating=accumulating,
            showing=showing,
        )
        seconds = seconds + count * sum((pace[part] for part in PACE_PARTS if part in pace), none)
    return seconds


def _data_parallel(
    model: Model,
    job: Job,
    layouts: LayoutTable,
    runtime: Runtime,
    tiers: TierTable,
    pace: dict[str, FloatArray],
    micro_batches: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) seconds of gradient reduction and parameter gathers, with the slowdown of compute they hide behind.

    One exchange is timed once per unique (ranks, stage contents).
    """
    element = gradient_bytes(runtime, job)
    content = (layouts.pp, layouts.virtual_stages, layouts.split, layouts.v_placed.astype(np.int64))
    gathers_layers = (layouts.zero == 3).astype(np.int64)
    first, inverse = unique_keys(layouts.tp, *content, layouts.dp * layouts.cp, layouts.zero_ranks, gathers_layers)
    one = one_exchange_s(
        tiers,
        layouts.take(first),
        runtime.communication,
        parameters=pace["owned"][first],
        units=pace["units"][first],
        gradient_bytes=element,
        parameter_bytes=parameter_bytes(runtime, job, sent=True),
    )
    exchange = exchange_s(
        one.take(inverse),
        layouts,
        runtime.communication,
        micro_batches=micro_batches,
        kept_share=pace["kept_share"],
        unit_parameters=pace["owned"] / pace["units"],
    )
    exposed, hidden = exposed_exchange_s(
        exchange,
        layouts,
        runtime.communication,
        micro_batches=micro_batches,
        forward_s=pace["forward"],
        backward_s=pace["backward"] + pace["recompute"],
    )
    if model.tied_embeddings:
        table = element * model.vocab * model.hidden / layouts.tp
        between = collective_s(
            tiers, "all_reduce", table, 2.0, layouts.gpus / layouts.pp * np.maximum(layouts.pp - 1, 1)
        )
        exposed = exposed + np.where((layouts.pp > 1) & ~layouts.v_placed, between, 0.0)
    return exposed + runtime.execution.compute_slowdown * hidden, hidden


def _pipeline_transfers(
    model: Model, job: Job, layouts: LayoutTable, runtime: Runtime, tiers: TierTable, micro_batches: FloatArray
) -> FloatArray:
    """Boundary tensors of m micro-batches, forward and backward, v times each, less the share the runtime hides."""
    split = layouts.sequence_parallel == 1
    if runtime.communication.pipeline_scatter:
        split = split | (layouts.tp > 1)
    size = BYTES_OF[job.precision] * layouts.micro_batch * job.seq / layouts.cp * model.hidden
    size = size / np.where(split, layouts.tp, 1)
    one = point_to_point_s(tiers, size, layouts.pp, layouts.tp * layouts.cp * layouts.dp)
    exposed = 2.0 * layouts.virtual_stages * (micro_batches + layouts.pp - 1.0) * one
    return np.where(layouts.pp > 1, exposed * (1.0 - runtime.communication.pipeline_overlap), 0.0)
