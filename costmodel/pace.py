"""What one micro-batch takes on the slowest stage of N layouts, and what the pipeline adds: fill and drain, transfers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.collectives import point_to_point_s
from shardplan.costmodel.data_parallel import exchange_counts, gathered_ahead, reduces_often
from shardplan.costmodel.job import BYTES_OF, Job
from shardplan.costmodel.layer_cost import BACKWARD_LAUNCHES
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.memory import FULL, exchanges_alone
from shardplan.costmodel.model import Model
from shardplan.costmodel.pipeline import bubble_share, splits_backward, uneven_chunks_s
from shardplan.costmodel.recompute import ALL_LAYERS
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.stage_cost import BlockColumns, BlockRows, StageRows, block_rows
from shardplan.hw_profiles.machine import Cluster, Gpu
from shardplan.hw_profiles.topology import TierTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Share = FloatArray | float

LEAST_PEAK_WEIGHT = 2.0
"""Micro-batches of the slowest stage in a step from which on a bound counts what exchanges cannot hide behind
(`StepTime.hides_at_most_s`)."""
PACE_PARTS = ("forward", "backward", "recompute", "tensor_exposed", "context_exposed", "expert_exposed", "host")
"""They add up to the seconds of one micro-batch on a stage."""


def pipeline_pace(
    model: Model,
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable,
    runtime: Runtime,
    blocks: BlockRows,
    stages: StageRows,
    micro_batches: FloatArray,
) -> dict[str, FloatArray]:
    """Seconds of one micro-batch on the slowest stage by part, and the `bubble` of a step; columns of shape (N,)."""
    gpu = cluster.gpu
    each_micro_batch = _each_micro_batch(job, cluster, layouts, runtime, micro_batches)
    share = _recomputed_share(layouts, stages)
    paces = _block_paces(gpu, runtime, blocks, share, each_micro_batch)
    counts = [*np.moveaxis(stages.layers, 2, 0), stages.embedding, stages.head]
    total = _over_blocks(counts, [_busy(pace) for pace in paces])
    slowest = total.argmax(axis=1)
    there = [_at_stage(count, slowest) for count in counts]
    worst = {part: _over_blocks(there, [_at_stage(pace[part], slowest) for pace in paces]) for part in paces[0]}
    model_layers = sum(count for _, count in model.runs)
    if share.shape[1] > 1:  # the pipeline as a whole recomputes another share than any of its stages
        paces = _block_paces(gpu, runtime, blocks, (stages.recomputed_total / model_layers)[:, None], each_micro_batch)
    whole = _over_blocks([*(float(count) for _, count in model.runs), 1.0, 1.0], [_busy(pace)[:, 0] for pace in paces])
    passes = _passes_of(model, layouts, blocks, paces)
    slowest_s = _at_stage(total, slowest)
    return {**worst, "bubble": bubble_s(layouts, micro_batches, passes, stages.chunks, whole, slowest_s)}


def stage_seconds(
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable,
    runtime: Runtime,
    blocks: BlockRows,
    stages: StageRows,
    micro_batches: FloatArray,
    *,
    idle: bool = False,
) -> FloatArray:
    """Seconds of one micro-batch on each stage, (N, S), or of them those that it is `idle` behind launches."""
    total = stages.layers.sum(axis=2)
    share = np.divide(stages.recomputed, total, out=np.zeros_like(total), where=total > 0)
    each_micro_batch = _each_micro_batch(job, cluster, layouts, runtime, micro_batches)
    paces = _block_paces(cluster.gpu, runtime, blocks, share, each_micro_batch)
    counts = [*np.moveaxis(stages.layers, 2, 0), stages.embedding, stages.head]
    each = [pace["host"] if idle else _busy(pace) for pace in paces]
    return np.broadcast_to(_over_blocks(counts, each), total.shape)


def bubble_s(
    layouts: LayoutTable,
    micro_batches: FloatArray,
    passes: FloatArray | None,
    chunks: FloatArray | None,
    whole_s: FloatArray,
    slowest_s: FloatArray,
) -> FloatArray:
    """Seconds of a step in which ranks wait for each other, (N,), where a micro-batch takes `whole_s` through all stages and `slowest_s` on
    the slowest; `passes` are those of `backward_split`, `chunks` those of `StageRows`. The bubble of
    V-placed ranks goes by their mean chunk: by the longest, as it is where chunks are looped, steps are
    on average 0.2 to 0.3 % longer, which replays are not (tests/test_uneven_chunks.py)."""
    bubble = (whole_s - slowest_s) * fill_weight(layouts, micro_batches, passes)
    if chunks is None:
        return bubble
    return bubble * np.where(layouts.v_placed, 1.0, chunks[:, 0]) + uneven_chunks_s(
        layouts, micro_batches, chunks, whole_s / layouts.pp, slowest_s
    )


def fill_weight(layouts: LayoutTable, micro_batches: FloatArray, passes: FloatArray | None) -> FloatArray:
    """Bubble per second that one micro-batch takes on the other stages, (N,), by the closed form of the schedule (`pipeline.py`);
    `passes` are those of `backward_split`."""
    f, i, w = (1.0, 1.0, 1.0) if passes is None else passes
    share = bubble_share(layouts.schedule, layouts.pp, micro_batches, layouts.virtual_stages, (f, i, w))
    return np.where(layouts.pp > 1, share / np.maximum(layouts.pp - 1, 1) / layouts.virtual_stages, 0.0)


def backward_split(
    setting: Setting, layouts: LayoutTable, recomputed: FloatArray, micro_batches: FloatArray
) -> FloatArray | None:
    """Shares of forward, gradients of inputs and gradients of weights in a micro-batch through the whole model, (3, N); thirds where the
    schedule does not split the backward, None where none does. `recomputed` is the share of layers under full recompute, (N,);
    the setting is at sustained rates."""
    rows = np.flatnonzero(splits_backward(layouts))
    if not len(rows):
        return None
    model, job, cluster, runtime = setting.model, setting.job, setting.cluster, setting.runtime
    some, passes = layouts.take(rows), np.full((3, len(layouts)), 1.0 / 3.0)
    blocks = block_rows(model, job, cluster, some, runtime)
    each_micro_batch = _each_micro_batch(job, cluster, some, runtime, micro_batches[rows])
    paces = _block_paces(cluster.gpu, runtime, blocks, recomputed[rows][:, None], each_micro_batch)
    found = _passes_of(model, some, blocks, paces)
    assert found is not None, "each of these splits its backward"
    passes[:, rows] = found
    return passes


def most_idle_s(setting: Setting, layouts: LayoutTable, blocks: BlockRows, micro_batches: FloatArray) -> FloatArray:
    """Seconds per step, (N,), that GPUs wait for launches if one stage held all layers, with none or all of them recomputed, whichever
    is more; `blocks` are those of the layouts, the setting is at sustained rates."""
    job, cluster, runtime = setting.job, setting.cluster, setting.runtime
    each_micro_batch = _each_micro_batch(job, cluster, layouts, runtime, micro_batches)
    none_and_all = np.tile([0.0, 1.0], (len(layouts), 1))
    paces = _block_paces(cluster.gpu, runtime, blocks, none_and_all, each_micro_batch)
    counts = [*(float(count) for _, count in setting.model.runs), 1.0, 1.0]
    return micro_batches * _over_blocks(counts, [pace["host"].max(axis=1) for pace in paces])


def _passes_of(
    model: Model,
    layouts: LayoutTable,
    blocks: BlockRows,
    paces: Sequence[dict[str, FloatArray]],
) -> FloatArray | None:
    """`backward_split` from the seconds of the blocks.

    Gradients of weights are products, 0.5 to 0.75 of a forward on A100s (arXiv 2401.10241, Table 6); their accumulation, what is run again
    and half of what waits for other ranks is counted with the gradients of the inputs. Idle time behind the host goes to all three alike.
    """
    rows = np.flatnonzero(splits_backward(layouts))
    if not len(rows):
        return None
    counts = [*(float(count) for _, count in model.runs), 1.0, 1.0]
    some = blocks.take(rows)
    forward, later, all_s = np.zeros((3, len(rows)))
    for count, block, pace in zip(counts, (*some.layers, some.embedding, some.head), paces, strict=True):
        busy, idle = _busy(pace)[rows, 0], pace["host"][rows, 0]
        waited = busy - idle - sum(pace[name][rows, 0] for name in ("forward", "backward", "recompute"))
        forward += count * (block["split_forward_s"] + waited / 2.0 + idle / 3.0)
        later += count * (block["split_weight_s"] + idle / 3.0)
        all_s += count * busy
    passes = np.full((3, len(layouts)), 1.0 / 3.0)
    passes[:, rows] = np.stack([forward, all_s - forward - later, later]) / all_s
    return passes


def _each_micro_batch(
    job: Job, cluster: Cluster, layouts: LayoutTable, runtime: Runtime, micro_batches: FloatArray
) -> dict[str, FloatArray]:
    return {
        **_exchange_host(job, cluster.gpu, layouts, runtime, micro_batches),
        "accumulating": _accumulating(layouts, runtime, micro_batches),
        "showing": _tensor_showing(layouts, runtime, cluster),
    }


def _recomputed_share(layouts: LayoutTable, stages: StageRows) -> FloatArray:
    """Share of a stage's layers under full recompute, (N, S), or (N, 1) where all stages of every layout have the same."""
    if (layouts.recompute_layers == ALL_LAYERS).all():
        return (layouts.recompute == FULL).astype(np.float64)[:, None]
    total = stages.layers.sum(axis=2)
    return np.divide(stages.recomputed, total, out=np.zeros_like(total), where=total > 0)


def _over_blocks(counts: Sequence[FloatArray | float], seconds: Sequence[FloatArray]) -> FloatArray:
    """Seconds of all blocks, each as often as it is there."""
    total = counts[0] * seconds[0]
    for count, one in zip(counts[1:], seconds[1:], strict=True):
        total = total + count * one
    return total


def _busy(pace: dict[str, FloatArray]) -> FloatArray:
    """Seconds of one block and micro-batch."""
    total = pace[PACE_PARTS[0]]
    for part in PACE_PARTS[1:]:
        if part in pace:
            total = total + pace[part]
    return total


def _at_stage(values: FloatArray, stage: NDArray[np.intp]) -> FloatArray:
    """Entry `stage[n]` of each row n of (N, S) or (N, 1), (N,)."""
    return values[:, 0] if values.shape[1] == 1 else values[np.arange(len(values)), stage]


def _accumulating(layouts: LayoutTable, runtime: Runtime, micro_batches: FloatArray) -> FloatArray:
    """Share of its gradients that a rank adds up per micro-batch, (N,): all, or its shard where every micro-batch reduces."""
    share = np.where(reduces_often(layouts, runtime.communication), 1.0 / layouts.zero_ranks, 1.0)
    return share * (1.0 - 1.0 / micro_batches)


def _tensor_showing(layouts: LayoutTable, runtime: Runtime, cluster: Cluster) -> FloatArray:
    """Share of tensor-parallel communication that nothing hides, (N,): async tensor parallelism cuts the gathers and reductions of
    sequence parallelism into pieces between those of the products, over the links of one node."""
    communication = runtime.communication
    cut = (layouts.sequence_parallel == 1) & (layouts.tp * layouts.stride("tp") <= cluster.node.gpus)
    if cluster.gpu.architecture in communication.one_queue_architectures:
        states = gathered_ahead(layouts, communication) | reduces_often(layouts, communication)
        cut = cut & ~states & ~(layouts.dispatches & runtime.expert_parallel.joins_passes)
    return (1.0 - communication.tensor_overlap) * np.where(cut, 1.0 - communication.async_tensor_overlap, 1.0)


def _exchange_host(
    job: Job, gpu: Gpu, layouts: LayoutTable, runtime: Runtime, micro_batches: FloatArray
) -> dict[str, FloatArray]:
    """Per micro-batch, each (N,): host seconds that gathers and reductions of the states of a layer take (`exchanging`), of an embedding
    (`embedding_exchanging`: nothing where the head's take it along), and the number of reductions (`reducing`)."""
    reductions, gathers = exchange_counts(layouts, runtime.communication, micro_batches)
    alone = exchanges_alone(runtime, job)
    gathers = np.where((layouts.zero_ranks > 1) | alone, gathers, 0.0)
    each, ahead = runtime.execution.exchange_launches, gathered_ahead(layouts, runtime.communication)
    per_step = ((reductions + gathers) * each + gathers * ahead * runtime.execution.fetch_launches) * gpu.launch_s
    share = np.where((layouts.dp * layouts.cp > 1) | alone, 1.0 / micro_batches, 0.0)
    taken_along = runtime.execution.root_is_one_unit & (layouts.pp == 1)
    exchanging = per_step * share
    return {
        "exchanging": exchanging,
        "embedding_exchanging": np.where(taken_along, 0.0, exchanging),
        "reducing": reductions * share,
    }


def _block_paces(
    gpu: Gpu, runtime: Runtime, blocks: BlockRows, share: FloatArray, each_micro_batch: dict[str, FloatArray]
) -> list[dict[str, FloatArray]]:
    """Seconds of one micro-batch by part of one layer of each run, of the embedding and of the head, shape of `share`: the share of the
    layers that are under full recompute, each wholly or not at all."""
    wide = {name: column[:, None] for name, column in each_micro_batch.items()}
    of_embedding = wide.pop("embedding_exchanging")

    def pace(
        block: BlockColumns, recomputed: Share, selected: Share, *, whole: bool = True, **own: FloatArray
    ) -> dict[str, FloatArray]:
        its = {**wide, **own}
        if whole:
            return _block_pace(gpu, runtime, block, recomputed=recomputed, selects=selected, **its)
        none, every = (_block_pace(gpu, runtime, block, recomputed=one, selects=selected, **its) for one in (0.0, 1.0))
        return {part: none[part] + recomputed * (every[part] - none[part]) for part in none}

    whole = bool(((share == 0.0) | (share == 1.0)).all())
    layers = [pace(block, share, blocks.selects[:, None], whole=whole) for block in blocks.layers]
    embedding = pace(blocks.embedding, 0.0, 0.0, exchanging=of_embedding)
    return [*layers, embedding, pace(blocks.head, 0.0, 0.0)]


def _block_pace(
    gpu: Gpu,
    runtime: Runtime,
    block: BlockColumns,
    *,
    recomputed: Share,
    selects: Share,
    exchanging: FloatArray,
    reducing: FloatArray,
    accumulating: FloatArray,
    showing: FloatArray,
) -> dict[str, FloatArray]:
    """Seconds of one block and micro-batch; `recomputed` is 1 where it is under full recompute, else 0, `showing` the share of its
    tensor-parallel communication that nothing hides."""

    def of(name: str) -> FloatArray:
        return block[name][:, None]

    forward = of("forward_s")
    recompute = recomputed * of("full_s") + selects * of("selective_s")
    tensor = of("tensor_forward_s") + of("tensor_backward_s")
    tensor = tensor + recomputed * of("tensor_full_s") + selects * of("tensor_selective_s")
    exposed = tensor * showing
    backward = of("backward_s") + accumulating * of("accumulate_s")
    busy = forward + backward + recompute + exposed
    context = _context_pace(block, recomputed, selects)
    if context:
        busy = busy + context["context_exposed"]
    experts = _expert_pace(runtime, block, recomputed, forward + backward)
    if experts:
        busy = busy + experts["expert_exposed"]
    launching = of("host_forward_s") * (1.0 + BACKWARD_LAUNCHES + recomputed) + exchanging
    if runtime.execution.reduce_launches:
        launching = launching + reducing * of("reduce_host_s")
    # a CPU runs the operation it dispatches, a GPU only idles when launches come too slowly
    host = launching if gpu.device == "cpu" else np.maximum(launching - busy, 0.0)
    return {
        "forward": forward,
        "backward": backward,
        "recompute": recompute,
        "tensor": tensor,
        "tensor_exposed": exposed,
        "host": host,
        **context,
        **experts,
    }


def _context_pace(block: BlockColumns, recomputed: Share, selects: Share) -> dict[str, FloatArray]:
    """Seconds of context-parallel exchanges of one block and micro-batch, exposed and hidden; none where no layout has any.

    Recomputing attention repeats the exchanges of its forward.
    """
    if "context_forward_exposed_s" not in block:
        return {}
    again = 1.0 + recomputed + selects * block["context_selective"][:, None]
    return {
        f"context_{what}": block[f"context_forward_{what}_s"][:, None] * again
        + block[f"context_backward_{what}_s"][:, None]
        for what in ("exposed", "hidden")
    }


def _expert_pace(
    runtime: Runtime, block: BlockColumns, recomputed: Share, compute: FloatArray
) -> dict[str, FloatArray]:
    """Seconds of the exchanges of tokens with experts of one block and micro-batch, exposed and hidden behind `compute`; none where no
    layout has any. Full recompute repeats those of the forward."""
    if "expert_s" not in block:
        return {}
    exchange = block["expert_s"][:, None] * (2.0 + recomputed)
    hidden = np.minimum(runtime.expert_parallel.overlap * exchange, compute)
    return {"expert_exposed": exchange - hidden, "expert_hidden": hidden}


def boundary_bytes(model: Model, job: Job, layouts: LayoutTable, runtime: Runtime) -> FloatArray:
    """Bytes of the tensor that a rank passes on to the next stage for one micro-batch, (N,)."""
    split = layouts.sequence_parallel == 1
    if runtime.communication.pipeline_scatter:
        split = split | (layouts.tp > 1)
    size = BYTES_OF[job.precision] * layouts.micro_batch * job.seq / layouts.cp * model.hidden
    return size / np.where(split, layouts.tp, 1)


def pipeline_transfers_s(
    model: Model, job: Job, layouts: LayoutTable, runtime: Runtime, tiers: TierTable, micro_batches: FloatArray
) -> FloatArray:
    """Seconds per step, (N,), of the boundary tensors of m micro-batches, forward and backward, v times each, less the share the
    runtime hides."""
    one = point_to_point_s(tiers, boundary_bytes(model, job, layouts, runtime), layouts.pp, layouts.stride("pp"))
    exposed = 2.0 * layouts.virtual_stages * (micro_batches + layouts.pp - 1.0) * one
    return np.where(layouts.pp > 1, exposed * (1.0 - runtime.communication.pipeline_overlap), 0.0)
