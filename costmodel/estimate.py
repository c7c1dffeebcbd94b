"""`estimate`: memory and step time of N layouts at once. Costs are computed on the unique keys they depend on, then gathered.

step = m t_max + (sum_i t_i - t_max) / v + exposed communication + optimizer + host,   t_i = one micro-batch on stage i
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.adapters import trainable_parameters
from shardplan.costmodel.error_band import error_bands
from shardplan.costmodel.estimates import Estimates, joined
from shardplan.costmodel.fitted import Fitted
from shardplan.costmodel.job import Job
from shardplan.costmodel.keys import LazyColumns, in_pieces
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.model import Model, attended_tokens, matrix_parameters
from shardplan.costmodel.node_memory import node_bytes
from shardplan.costmodel.offload import NVME, activation_copies_s
from shardplan.costmodel.owner import Owner, heaviest_owner
from shardplan.costmodel.pace import most_idle_s, pipeline_pace, pipeline_transfers_s, stage_seconds
from shardplan.costmodel.pipeline_weights import sustained_weights
from shardplan.costmodel.recompute import BY_STAGE
from shardplan.costmodel.row_keys import RowKeys, row_keys
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import micro_batches
from shardplan.costmodel.rules import STRUCTURAL
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.costmodel.stage_cost import (
    BlockRows,
    StageParameters,
    StageRows,
    block_rows,
    mean_stage_rows,
    stage_parameters,
    stage_rows,
)
from shardplan.costmodel.step_memory import (
    StepMemory,
    checkpoint_bytes,
    held_bytes,
    micro_batches_in_flight,
    parked_activations,
    stage_activations,
)
from shardplan.costmodel.step_time import (
    StepTime,
    held_times,
    paced_times,
)
from shardplan.costmodel.sustained import prepared
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import TierTable, tier_table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
StageChoice = Literal["worst", "every", "mean", "mean, all hidden"] | slice
"""Stages that are looked at: the few that can be the worst, all, one that holds 1/pp of everything, or some of all."""
Asked = Literal["both", "memory", "time"]

ROWS_AT_ONCE = 1 << 18
"""Rows of one pass: enough to share what unique keys cost, few enough to bound memory (about 0.2 GB)."""


def estimate(
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable | Layout,
    runtime: Runtime | str = "shardplan",
    every_stage: bool | None = None,
    constants: Fitted | None = None,
) -> Estimates:
    """Memory and time of every layout; InputError when one has no meaning here (see `rules.STRUCTURAL`).

    `constants` replaces the shipped fitted constants.
    `every_stage` reports all pipeline stages (default for a single layout) instead of the few that can be the worst.
    """
    table = layout_table([layouts]) if isinstance(layouts, Layout) else layouts
    every = isinstance(layouts, Layout) if every_stage is None else every_stage
    return _estimate_table(model, job, cluster, table, runtime, constants, stages="every" if every else "worst")


def memory_alone(setting: Setting, layouts: LayoutTable, *, stages: StageChoice = "worst") -> Estimates:
    """The estimates, of layouts that have a meaning, without their times: where only what fits is asked for, in half the time."""
    return _of_known(setting, layouts, stages, "memory")


def times_alone(setting: Setting, layouts: LayoutTable, *, stages: StageChoice = "worst") -> Mapping[str, FloatArray]:
    """`Estimates.time`, of layouts that have a meaning, without the memory: where only what is quick enough is asked for."""
    return _of_known(setting, layouts, stages, "time").time


def lower_bounds(
    *, model: Model, job: Job, cluster: Cluster, layouts: LayoutTable, runtime: Runtime
) -> tuple[FloatArray, FloatArray]:
    """(step seconds, bytes on the device), each (N,), below which no cut of the layers into stages gets a layout."""
    found = on_mean_stage(Setting(model=model, job=job, cluster=cluster, runtime=runtime), layouts)
    return found.step_s, found.device_peak_bytes


def on_mean_stage(setting: Setting, layouts: LayoutTable, *, hides_all: bool = False) -> Estimates:
    """The estimates, of layouts that have a meaning, whose step and peak are `lower_bounds`.

    Every stage holds 1/pp of everything (`stage_cost.mean_stage_rows`), of offload all hides that can, exchanges hide as they do at most
    (`StepTime.hides_at_most_s`), or with `hides_all` all that can.
    """
    return _of_known(setting, layouts, "mean, all hidden" if hides_all else "mean", "both")


def _of_known(setting: Setting, layouts: LayoutTable, stages: StageChoice, asked: Asked) -> Estimates:
    """Of layouts that have a meaning, which is not asked again."""
    its = (setting.model, setting.job, setting.cluster, layouts, setting.runtime, None)
    return _estimate_table(*its, stages=stages, asked=asked, known=True)


def on_stages(setting: Setting, layouts: LayoutTable, some: slice) -> Estimates:
    """Estimates of layouts of the same pp as far as `some` of their stages go; the bubble is of a pipeline on this cluster alone."""
    return _estimate_table(setting.model, setting.job, setting.cluster, layouts, setting.runtime, None, stages=some)


def stage_times(setting: Setting, layouts: LayoutTable) -> tuple[FloatArray, FloatArray]:
    """(seconds of one micro-batch, layers under full recompute) of every stage of layouts of the same pp, each (N, pp)."""
    ready = prepared(setting)
    model, cluster, runtime = ready.model, ready.cluster, ready.runtime
    stages = stage_rows(model, layouts, runtime, every_stage=True)
    blocks = block_rows(model, ready.job, cluster, layouts, runtime)
    return (
        stage_seconds(ready.job, cluster, layouts, runtime, blocks, stages, micro_batches(ready, layouts)),
        stages.recomputed,
    )


def _estimate_table(
    model: Model,
    job: Job,
    cluster: Cluster,
    table: LayoutTable,
    runtime: Runtime | str,
    constants: Fitted | None,
    *,
    stages: StageChoice,
    asked: Asked = "both",
    known: bool = False,
) -> Estimates:
    chosen = load_runtime(runtime) if isinstance(runtime, str) else runtime
    if not len(table):
        raise InputError("no layouts to estimate", place="layouts", remedy="give at least one")
    setting = prepared(Setting(model=model, job=job, cluster=cluster, runtime=chosen), constants)
    tiers, chosen = tier_table(setting.cluster), setting.runtime
    if stages == "worst":  # which stage of an uneven pipeline is the worst, nobody knows beforehand
        uneven = (table.split > 0) | (table.recompute_layers <= BY_STAGE)
        if uneven.all():
            stages = "every"
        elif uneven.any():
            at = np.argsort(uneven, kind="stable")
            both = [
                _estimate_table(
                    model,
                    job,
                    cluster,
                    table.take(at[uneven[at] == one]),
                    runtime,
                    constants,
                    stages="worst",
                    asked=asked,
                    known=known,
                )
                for one in (False, True)
            ]
            return joined(both, table.take(at)).take(np.argsort(at, kind="stable"))
    starts = range(0, len(table), ROWS_AT_ONCE)
    pieces = [table.slice(start, start + ROWS_AT_ONCE) if len(starts) > 1 else table for start in starts]
    keys = [row_keys(piece, chosen.communication, job.global_batch) for piece in pieces]
    for its in () if known else keys:
        _check_meaning(setting, table, its)
    found = [_estimate_rows(setting, one, its, tiers, stages, asked) for one, its in zip(pieces, keys, strict=True)]
    return joined(found, table)


def _check_meaning(setting: Setting, table: LayoutTable, keys: RowKeys) -> None:
    """InputError for the first row of `table` that has no meaning (a broken structural rule), if the piece of it with these keys has one.

    Rules are asked about a layout of each key. A rule reads columns of `keys.work` or of `keys.states`, none of them reads both
    (tests/test_row_keys.py), so what breaks a row breaks the layout that stands for its key.
    """
    tables = (keys.work,) if keys.states is keys.work else (keys.work, keys.states)
    if not any(np.any(rule.broken(setting, rows)) for rule in STRUCTURAL for rows in tables):
        return
    for rule in STRUCTURAL:
        broken = np.flatnonzero(np.broadcast_to(rule.broken(setting, table), len(table)))
        if len(broken):
            layout = table.row(int(broken[0]))
            raise InputError(
                f"{rule.id}: {rule.detail(setting, layout)}", place="layouts", remedy=rule.remedy(setting, layout)
            )


def _estimate_rows(
    setting: Setting, layouts: LayoutTable, keys: RowKeys, tiers: TierTable, chosen: StageChoice, asked: Asked
) -> Estimates:
    model, job, cluster, runtime = setting.model, setting.job, setting.cluster, setting.runtime
    blocks = block_rows(model, job, cluster, keys.work, runtime)
    mean, every = chosen in ("mean", "mean, all hidden"), chosen != "worst"
    stages = mean_stage_rows(model, keys.work) if mean else stage_rows(model, keys.work, runtime, every_stage=every)
    if isinstance(chosen, slice):
        stages = stages.some(chosen)
    counts = stages.layers.sum(axis=2).astype(np.int64)
    held = stages.take(keys.work_of_contents)
    parameters = stage_parameters(model, job, keys.contents, runtime, held, of_one_kind=mean)
    parts, hidden, flop = dict[str, FloatArray](), LazyColumns[FloatArray]({}), np.zeros(len(keys.work))
    if asked != "memory":
        owner = heaviest_owner(parameters, held, job, runtime)
        time = _step_time(setting, keys, tiers, blocks, stages, owner, at_least=mean)
        hides_s = np.full(len(keys.work_of_pace), np.inf) if mean else None
        if chosen == "mean":
            hides_s = time.hides_at_most_s(
                keys.pace, micro_batches(setting, keys.pace), sustained_weights(setting, keys.pace)[0]
            )
        parts, hidden = time.parts(hides_s=hides_s), time.hidden()
        flop = _hardware_flop(model, job, keys.work, blocks, stages.recomputed_total)
    nothing = np.full(len(layouts), np.nan)
    peaks, host_bytes, nvme_bytes = dict[str, FloatArray](), nothing, nothing
    of_stages, context_bytes = LazyColumns[FloatArray]({}), 0.0
    if asked != "time":
        memory = stage_memory(
            setting,
            keys.work,
            keys.states,
            blocks,
            stages,
            parameters.take(keys.contents_of_work[keys.work_of_states]),
            states_of=keys.states_of,
            work_of=keys.work_of,
            of_one_kind=mean,
        )
        peaks, of_stages, context_bytes = memory.peaks(), memory.parts(), memory.context_bytes
        known = chosen in ("worst", "every")
        host_bytes, nvme_bytes = (
            node_bytes(memory.off_gpu(part), stages if known else None, keys.work_of, layouts, cluster)
            for part in ("host", "nvme")
        )
    return Estimates(
        layouts=layouts,
        time=parts,
        hidden=hidden,
        peaks=peaks,
        stages=of_stages,
        contents=LazyColumns(
            {
                "stage_index": lambda: stages.stage[keys.work_of],
                "stage_layer_counts": lambda: counts[keys.work_of],
            }
        ),
        context_bytes=context_bytes,
        capacity_bytes=cluster.gpu.memory_bytes,
        host_bytes=host_bytes,
        nvme_bytes=nvme_bytes,
        host_capacity_bytes=cluster.node.host.ram_bytes,
        nvme_capacity_bytes=cluster.node.nvme.capacity_bytes if cluster.node.nvme else 0.0,
        tokens_per_step=job.tokens_per_step,
        model_flop_per_step=job_flop_per_token(model, job) * job.tokens_per_step,
        hardware_flop_per_step=flop.take(keys.work_of),
        peak_flop_per_s=cluster.gpu.peak_flop_per_s[job.precision],
        bands=error_bands(setting),
    )


def stage_memory(
    setting: Setting,
    work: LayoutTable,
    states: LayoutTable,
    blocks: BlockRows,
    stages: StageRows,
    parameters: StageParameters,
    *,
    states_of: IntArray,
    work_of: IntArray,
    of_one_kind: bool = False,
) -> StepMemory:
    """Memory of the `stages` of layouts: `blocks` and `stages` are over the keys of the work, `parameters` over those of the states.

    `of_one_kind` bounds that of stages that may lack any kind of layer.
    """
    model, job, cluster, runtime = setting.model, setting.job, setting.cluster, setting.runtime
    flying = micro_batches_in_flight(work, stages, micro_batches(setting, work))
    frees_loss = runtime.activations.frees_loss
    activations = stage_activations(model, blocks, stages, work, flying, frees_loss=frees_loss, of_one_kind=of_one_kind)
    parked = parked_activations(model, work, blocks, stages, flying)
    outside = runtime.working_set.outside_bytes if cluster.gpus > 1 and cluster.gpu.device == "cuda" else 0.0
    return StepMemory(
        held=held_bytes(job, cluster.gpu, states, runtime, parameters, micro_batches(setting, states)),
        activations=activations if parked is None else activations - parked,
        parked=parked,
        parked_on_flash=work.offload_activations == NVME,
        states_of=states_of,
        work_of=work_of,
        slack_fraction=runtime.allocator_slack_fraction,
        context_bytes=cluster.gpu.context_bytes + outside,
    )


def _step_time(
    setting: Setting,
    keys: RowKeys,
    tiers: TierTable,
    blocks: BlockRows,
    stages: StageRows,
    owner: Owner,
    *,
    at_least: bool,
) -> StepTime:
    """Times on the keys of pace and states; `at_least` as in `data_parallel.one_exchange_s`.

    `blocks` and `stages` are over the keys of the work, `owner` over those of the stage contents.
    """
    model, job, cluster, runtime = setting.model, setting.job, setting.cluster, setting.runtime
    of, batches = keys.work_of_pace, micro_batches(setting, keys.pace)

    def pace_of(some: slice) -> dict[str, FloatArray]:
        rows, at = keys.pace.slice(some.start, some.stop), of[some]
        return pipeline_pace(model, job, cluster, rows, runtime, blocks.take(at), stages.take(at), batches[some])

    pace = in_pieces(len(of), pace_of)
    copies = None
    if keys.work.offload_activations.any():
        moved = np.where(keys.work.offload_activations > 0, checkpoint_bytes(model, blocks, stages).max(axis=1), 0.0)
        copies = activation_copies_s(
            cluster.node,
            runtime.offload,
            keys.work.offload_activations.take(of),
            moved.take(of),
            forward_s=pace["forward"],
            backward_s=pace["backward"] + pace["recompute"],
        )
    transfers_s = pipeline_transfers_s(model, job, keys.work, runtime, tiers, micro_batches(setting, keys.work))
    paced = paced_times(
        keys.pace, runtime, pace, transfers_s.take(of), owner.take(keys.contents_of_work.take(of)), batches, copies
    )
    owner = owner.take(keys.contents_of_work.take(keys.work_of_states))
    held = held_times(model, job, cluster, keys.states, runtime, tiers, owner, at_least=at_least)
    return StepTime(
        job=job,
        cluster=cluster,
        runtime=runtime,
        paced=paced,
        held=held,
        pace_of=keys.pace_of,
        states_of=keys.states_of,
        idle_s=most_idle_s(setting, keys.pace, blocks.take(of), batches) if at_least else None,
    )


def model_flop_per_token(model: Model, seq: int) -> float:
    """Forward and backward FLOP of one token: 6 per matrix parameter it meets (head included, look-ups not) + 12 s H D per layer.

    D is the mean width of keys and values, s at most the window. Attention is counted in full, as in Korthikanti et al. (arXiv
    2205.05198, 72 B s l h^2 (1 + s/6h + V/12lh)), PaLM and torchtitan. A multi-token prediction module is one more layer and head.
    """
    flop = 6.0 * model.vocab * model.hidden * (1 + model.mtp_modules)
    for kind, count in model.runs:
        flop += 6.0 * count * matrix_parameters(kind)
        flop += 12.0 * count * attended_tokens(kind, seq) * kind.heads * kind.attention_dim
    return flop


def job_flop_per_token(model: Model, job: Job) -> float:
    """`model_flop_per_token` of a job: attention within documents; where the matrices are frozen 4 per parameter (no gradient of
    theirs) and 6 per parameter of an adapter."""
    flop = model_flop_per_token(model, job.attended)
    if job.adapters is None:
        return flop
    attention = flop - model_flop_per_token(model, 0)
    return attention + (flop - attention) * 4.0 / 6.0 + 6.0 * trainable_parameters(model, job)


def _hardware_flop(
    model: Model, job: Job, layouts: LayoutTable, blocks: BlockRows, recomputed_layers: FloatArray
) -> FloatArray:
    """Model FLOP plus the operators that recompute repeats, over all ranks and micro-batches of a step."""
    runs = job.global_batch / layouts.micro_batch * layouts.tp * layouts.cp
    repeated = np.zeros(len(layouts))
    total = sum(count for _, count in model.runs)
    for block, (_, count) in zip(blocks.layers, model.runs, strict=True):
        repeated += np.where(
            recomputed_layers > 0,
            block["full_flop"] * recomputed_layers * count / total,
            block["selective_flop"] * blocks.selects * count,
        )
    return job_flop_per_token(model, job) * job.tokens_per_step + repeated * runs
