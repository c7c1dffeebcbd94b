"""Bytes per stage by part: model states under a runtime's conventions, gathered working set, activations, logits, buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import BYTES_OF, GATHERED_BYTES, PAGED, Job
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.model import Model
from shardplan.costmodel.offload import NVME, READ_STATE_BYTES, optimizer_share
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.runtime import Runtime
from shardplan.costmodel.runtime_states import BytesPerParameter
from shardplan.costmodel.zeropp import secondary_bytes
from shardplan.hw_profiles.machine import Node

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
STATE_PARTS = ("parameters", "gradients", "optimizer")
SELECTIVE, FULL = RECOMPUTE.index("selective"), RECOMPUTE.index("full")


@dataclass(frozen=True, kw_only=True)
class StateColumns:
    """Bytes per parameter of one part for each layout: whole on every rank, divided by the ranks ZeRO shards over, and divided for
    the time of the optimizer step only."""

    whole: FloatArray
    sharded: FloatArray
    stepping: FloatArray


def gradient_bytes(runtime: Runtime, job: Job) -> int:
    """Bytes of one gradient element as accumulated and reduced."""
    return BYTES_OF[job.grad_dtype or runtime.states[job.precision].gradient_dtype]


def parameter_bytes(runtime: Runtime, job: Job, *, sent: bool) -> int:
    """Bytes of one gathered parameter as it is `sent` or as it lies in memory."""
    if runtime.working_set.autocast_copies:
        return BYTES_OF["fp32"]
    return GATHERED_BYTES[job.precision] if sent else BYTES_OF[job.precision]


def state_columns(
    runtime: Runtime, job: Job, zero: IntArray, *, accumulates: NDArray[np.bool_]
) -> dict[str, StateColumns]:
    """Bytes per parameter of each part for N layouts (shape (N,)), from the runtime's table of its ZeRO stages."""
    element = gradient_bytes(runtime, job)
    rows = runtime.states[job.precision].zero

    def column(tables: list[Mapping[str, BytesPerParameter]], part: str) -> FloatArray:
        values = [table.get(part, 0.0) for table in tables]
        return np.asarray([element if v == "gradient" else float(v) for v in values])[zero]

    columns: dict[str, StateColumns] = {}
    for part in STATE_PARTS:
        accumulating = column([row.accumulating for row in rows], part)
        columns[part] = StateColumns(
            whole=column([row.whole for row in rows], part) + np.where(accumulates, accumulating, 0.0),
            sharded=column([row.sharded for row in rows], part),
            stepping=column([row.stepping for row in rows], part),
        )
    if job.optimizer != "adamw":
        columns["optimizer"] = _with_moments(
            columns["optimizer"], rows[0].whole["optimizer"], MOMENT_BYTES[job.optimizer]
        )
    return columns


def tied_table_bytes(model: Model, job: Job, layouts: LayoutTable, runtime: Runtime) -> FloatArray:
    """Gradient of a tied embedding that its two copies exchange once a step, (K,): whole, or after ZeRO's reduction."""
    table = model.vocab * model.hidden / layouts.tp
    if runtime.communication.tied_after_reduction:
        return MASTER_BYTES * table / layouts.zero_ranks
    return gradient_bytes(runtime, job) * table


def update_traffic_bytes(runtime: Runtime, job: Job) -> float:
    """Bytes read and written to update one parameter: states read and written, gradient read, the compute copy written.

    For fp32 masters and moments with 16-bit copies 30, for states all in bf16 14; without moments (sgd) 16 and 8 less, with moments in
    8 bits 12 and 4 less.
    """
    row = runtime.states[job.precision].zero[0].whole
    optimizer, parameters = float(row["optimizer"]), float(row["parameters"])
    moments = ADAM_MOMENT_BYTES
    if optimizer < MASTER_AND_MOMENTS_BYTES:  # the parameters are the master copy, of one moment's dtype
        moments, master = optimizer, min(0.5 * optimizer, parameters)
        optimizer, parameters = optimizer + master, parameters - master
    states = optimizer - moments + min(MOMENT_BYTES[job.optimizer], moments)
    return 2.0 * states + gradient_bytes(runtime, job) + parameters


def unscaling_bytes(runtime: Runtime, job: Job) -> float:
    """Bytes read and written to divide the scale of the loss out of one gradient before the update, which fp16 needs (arXiv 1710.03740,
    section 3.2), in a pass of its own."""
    apart = job.precision == "fp16" and not runtime.execution.clip_unscales
    return 2.0 * gradient_bytes(runtime, job) if apart else 0.0


MOMENT_BYTES = {
    "adamw": 8.0,
    "adamw16bit": 4.0,
    "adamw8bit": 2.0,
    "paged_adamw": 8.0,
    "paged_adamw8bit": 2.0,
    "adafactor": 0.0,
    "sgd": 0.0,
}
"""Both moments of a parameter: fp32; 16 or 8 bits (Megatron-Core's precision-aware optimizer in bf16 and fp8; bitsandbytes and torchao,
arXiv 2110.02861, whose constants of blocks of 2,048 are left out); a row and a column of a matrix (arXiv 1804.04235), next to nothing;
none."""
ADAM_MOMENT_BYTES = MOMENT_BYTES["adamw"]
MASTER_AND_MOMENTS_BYTES = 12.0


def _with_moments(optimizer: StateColumns, whole_at_zero_0: BytesPerParameter, moments: float) -> StateColumns:
    """The optimizer part with `moments` bytes of moments instead of Adam's in fp32, or of the runtime's own where those are fewer."""
    rest, own = _rest_and_moments(whole_at_zero_0)
    kept = (rest + min(moments, own)) / (rest + own)
    return StateColumns(
        whole=optimizer.whole * kept, sharded=optimizer.sharded * kept, stepping=optimizer.stepping * kept
    )


def _rest_and_moments(whole_at_zero_0: BytesPerParameter) -> tuple[float, float]:
    """Bytes of the optimizer part of a parameter: (masters, the runtime's own moments: Adam's in fp32, or all where it keeps fewer)."""
    whole = float(whole_at_zero_0)
    moments = min(ADAM_MOMENT_BYTES, whole)
    return whole - moments, moments


def stage_states(
    runtime: Runtime,
    job: Job,
    layouts: LayoutTable,
    *,
    accumulates: NDArray[np.bool_],
    stage_parameters: FloatArray,
    layer_parameters: FloatArray,
    root_parameters: FloatArray,
    expert_parameters: FloatArray | None = None,
) -> dict[str, FloatArray]:
    """Bytes of parameters, gradients, optimizer, in host memory, on flash (`nvme`), of what the optimizer step makes (`stepping`), and of
    the gradients those that await their reduction when activations are at their peak (`waiting`), each (N, S).

    `stage_parameters` (N, S), the largest layer's `layer_parameters` (N, S) and `root_parameters` (N, S: embedding, final norm,
    head) are per rank, that is after the tensor-parallel split. Under ZeRO-3 the gathered layers are added to the parameters,
    whole gradients of layers awaiting reduction to the gradients. `expert_parameters` of the stage's lie in experts that tokens are
    dispatched to, and are sharded over the fewer ranks that hold the same ones.
    """
    shards = layouts.zero_ranks.astype(np.float64)[:, None]
    spread = stage_parameters
    if expert_parameters is not None:  # as if the experts' share was spread over all `shards`
        spread = stage_parameters + expert_parameters * (shards / layouts.expert_zero_ranks[:, None] - 1.0)
    states = state_columns(runtime, job, layouts.zero, accumulates=accumulates)
    stepping = np.zeros_like(stage_parameters)
    tiers = {"host": np.zeros_like(stage_parameters), "nvme": np.zeros_like(stage_parameters)}
    share = optimizer_share(layouts)[:, None]
    parked = layouts.offload_params[:, None]
    parts: dict[str, FloatArray] = {}
    for part, column in states.items():
        sharded = spread * column.sharded[:, None] / shards
        if part in runtime.working_set.offload_moves:
            _park(tiers, share * sharded, layouts.offload_optimizer[:, None])
            sharded = (1.0 - share) * sharded
        elif part == "parameters":
            _park(tiers, np.where(parked > 0, sharded, 0.0), parked)
            sharded = np.where(parked > 0, 0.0, sharded)
        parts[part] = stage_parameters * column.whole[:, None] + sharded
        if part == "optimizer" and job.optimizer.startswith(PAGED):
            moved = parts[part] * paged_share(runtime, job)
            tiers["host"] += moved
            parts[part] = parts[part] - moved
        stepping += (1.0 - share) * (spread * column.stepping[:, None] / shards)
    held = _held_whole(runtime, layouts)
    parts["gradients"] = parts["gradients"] + stage_parameters * (held * gradient_bytes(runtime, job))[:, None]
    parts["parameters"] = (
        parts["parameters"]
        + stage_parameters * (np.where(layouts.zero == 3, held, 0.0) * BYTES_OF[job.precision])[:, None]
    )
    gathered, waiting = _working_set(
        runtime, job, layouts, states["gradients"].whole == 0, layer_parameters, root_parameters, stage_parameters
    )
    parts["parameters"] = parts["parameters"] + gathered
    if (layouts.hpz > 1).any():
        parts["parameters"] += secondary_bytes(layouts, stage_parameters, BYTES_OF[job.precision])
    parts["gradients"] = parts["gradients"] + waiting
    work = runtime.working_set
    parts["waiting"] = waiting * min(work.waiting_layers / max(work.gradient_layers, 1.0), 1.0)
    parts["host"] = tiers["host"] + _flash_buffers(runtime, layouts, share * stage_parameters / shards)
    parts["nvme"] = tiers["nvme"]
    parts["stepping"] = stepping
    if exchanges_alone(runtime, job):
        once, parts["reducing"] = _last_reduction(
            runtime, job, layouts, parts, stage_parameters, root_parameters, layer_parameters
        )
        held = _held_reduction(
            runtime, job, layouts, accumulates, parts["reducing"] - waiting, gathered, root_parameters
        )
        parts["gradients"] = parts["gradients"] + held
        parts["reducing"] = parts["reducing"] * (1.0 + accumulates)[:, None] - held
        parts["stepping"] = stepping + once - held
    return parts


MASTER_BYTES = 4.0
"""Of an fp32 parameter or gradient."""


def exchanges_alone(runtime: Runtime, job: Job) -> bool:
    """One rank gathers and reduces its states as if there were more."""
    return runtime.working_set.exchanges_alone and BYTES_OF[job.precision] < MASTER_BYTES


def _last_reduction(
    runtime: Runtime,
    job: Job,
    layouts: LayoutTable,
    parts: Mapping[str, FloatArray],
    stage: FloatArray,
    root: FloatArray,
    layer: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Bytes, each (N, S), of the reduction that ends the backward: (beyond the states, at that time; in blocks of its own).

    fully_shard reduces embedding, final norm and head (or the last layer) together, after everything else. By then 16-bit parameters
    are dropped, so the first may be negative; beside the reduced gradients there is what is reduced. Gradients that were accumulated
    whole fill blocks of their own, and both buffers stay beside them.
    """
    buffer = gradient_bytes(runtime, job) * np.maximum(root, layer)
    masters = MASTER_BYTES * stage / layouts.zero_ranks[:, None]
    copies = np.maximum(parts["parameters"] - masters, 0.0)
    return buffer - copies, buffer


def _held_reduction(
    runtime: Runtime,
    job: Job,
    layouts: LayoutTable,
    accumulates: NDArray[np.bool_],
    beyond: FloatArray,
    gathered: FloatArray,
    root: FloatArray,
) -> FloatArray:
    """Bytes by which the input of a micro-batch's last reduction, `beyond` the waiting gradients of layers, is more than what is live of
    layers when the next one's activations are at their peak, (N, S): fully_shard keeps it until its next reduction, and by then neither
    gradients of layers wait nor are layers gathered (reports/measured/h200-2026-11-27/later/memory_at_peak.csv)."""
    keeps = runtime.working_set.reduction_held & accumulates & (layouts.zero >= 2) & (layouts.pp == 1)
    layers = np.maximum(gathered - parameter_bytes(runtime, job, sent=False) * root, 0.0)
    return np.where(keeps[:, None], np.maximum(beyond - layers, 0.0), 0.0)


def paged_share(runtime: Runtime, job: Job) -> float:
    """Share of a paged optimizer's states that can lie in host memory, and count there: its moments."""
    rest, own = _rest_and_moments(runtime.states[job.precision].zero[0].whole["optimizer"])
    moments = min(MOMENT_BYTES[job.optimizer], own)
    return moments / (rest + moments)


def frozen_bytes(
    runtime: Runtime,
    job: Job,
    layouts: LayoutTable,
    *,
    stage_parameters: FloatArray,
    layer_parameters: FloatArray,
    root_parameters: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """(on the GPU, in host memory) bytes of parameters that are not trained, each (N, S): whole, or under ZeRO-3 a shard, which may be
    offloaded, and the gathered layers, as they are stored. Constants of 4-bit blocks that nothing shards are on every rank."""
    work = runtime.working_set
    of_layers, of_root = frozen_element_bytes(runtime, job)
    scales = unsharded_scale_bytes(runtime, job) * (stage_parameters - root_parameters)
    whole = of_layers * (stage_parameters - root_parameters) + of_root * root_parameters
    gathered = work.gathered_layers * of_layers * layer_parameters
    gathered = np.minimum(gathered + (of_root * root_parameters if work.root_stays_gathered else 0.0), whole)
    shards = layouts.zero_ranks.astype(np.float64)[:, None]
    sharded = (layouts.zero == 3)[:, None] & ((shards > 1) | (layouts.offload_params > 0)[:, None])
    away = sharded & (layouts.offload_params > 0)[:, None]
    cached = _autocast_copies(runtime, job, layouts, stage_parameters)
    on_gpu = np.where(away, 0.0, whole / shards) + gathered + cached
    return np.where(sharded, on_gpu, whole + cached) + scales, np.where(away, whole / shards, 0.0)


def frozen_element_bytes(runtime: Runtime, job: Job) -> tuple[float, float]:
    """Bytes of a frozen parameter as ZeRO-3 shards and gathers it: (of the matrices of layers, of everything else)."""
    usual = float(parameter_bytes(runtime, job, sent=False))
    in_four_bits = CODE_BYTES + (runtime.tuning.scale_bytes if runtime.tuning.scales_sharded else 0.0)
    return (in_four_bits if job.method == "qlora" else usual), usual


def unsharded_scale_bytes(runtime: Runtime, job: Job) -> float:
    """Of the constants of a 4-bit weight that every rank has whole."""
    return 0.0 if job.method != "qlora" or runtime.tuning.scales_sharded else runtime.tuning.scale_bytes


CODE_BYTES = 0.5
"""Of a 4-bit weight, without its share of the constants of its block (`runtime_tuning.Tuning.scale_bytes`)."""


def dequantised_bytes(job: Job, matrix: FloatArray) -> FloatArray | float:
    """Bytes of the widest `matrix` of a layer, dequantised, while it is multiplied; 0 without a 4-bit base."""
    return BYTES_OF[job.precision] * matrix if job.method == "qlora" else 0.0


def _park(tiers: dict[str, FloatArray], moved: FloatArray, tier: IntArray) -> None:
    """Add what was `moved` off the GPU, (N, S), to the memory that `tier` (codes of OFFLOAD) names."""
    tiers["nvme"] += np.where(tier == NVME, moved, 0.0)
    tiers["host"] += np.where(tier == NVME, 0.0, moved)


def _flash_buffers(runtime: Runtime, layouts: LayoutTable, updated: FloatArray) -> FloatArray:
    """Host memory that states pass through between flash and CPU or GPU, bytes per GPU."""
    group = np.minimum(updated, runtime.offload.nvme_group_parameters)
    states = np.where(layouts.offload_optimizer[:, None] == NVME, READ_STATE_BYTES * group, 0.0)
    return states + np.where(layouts.offload_params[:, None] == NVME, runtime.offload.nvme_parameter_buffer_bytes, 0.0)


def _held_whole(runtime: Runtime, layouts: LayoutTable) -> FloatArray:
    """1 where a pipeline keeps gradients (and under ZeRO-3 parameters) whole until the end of the step, (N,)."""
    inside = (layouts.pp > 1) & (layouts.zero >= 2) & (layouts.zero_ranks > 1)
    return (inside & runtime.communication.pipeline_reduces_once).astype(np.float64)


def _working_set(
    runtime: Runtime,
    job: Job,
    layouts: LayoutTable,
    waits: NDArray[np.bool_],
    layer: FloatArray,
    root: FloatArray,
    stage: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """(gathered parameters and autocast's copies under ZeRO-3, gradients awaiting reduction in the rows that keep none whole) in bytes."""
    work = runtime.working_set
    element = parameter_bytes(runtime, job, sent=False)
    away = (layouts.offload_optimizer > 0) & ("gradients" in work.offload_moves)  # gradients on their way to the host
    spread = (layouts.zero_ranks > 1) | (layouts.offload_params > 0) | exchanges_alone(runtime, job)
    spread &= _held_whole(runtime, layouts) == 0
    gathered = work.gathered_layers * layer + (root if work.root_stays_gathered else 0.0)
    gathered = np.where(((layouts.zero == 3) & spread)[:, None], np.minimum(gathered, stage), 0.0)
    waiting = np.where((waits & (spread | away))[:, None], np.minimum(work.gradient_layers * layer, stage), 0.0)
    cached = _autocast_copies(runtime, job, layouts, stage)
    return element * gathered + cached, BYTES_OF[job.precision] * waiting


def _autocast_copies(runtime: Runtime, job: Job, layouts: LayoutTable, stage: FloatArray) -> FloatArray:
    """Bytes of the 16-bit copies of `stage` parameters that torch.autocast keeps under ZeRO-3, (N, S)."""
    copied = (layouts.zero == 3)[:, None] & runtime.working_set.autocast_copies
    return BYTES_OF[job.precision] * np.where(copied, stage, 0.0)


def activation_bytes(
    *,
    recompute: IntArray,
    full_layers: FloatArray,
    layers: FloatArray,
    flying: FloatArray,
    kept: FloatArray,
    selective: FloatArray,
    entering: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """(stored, rebuilt) activations of the decoder layers of N layouts and S stages, each (N, S).

    Of `layers` layers `full_layers` keep only their input (`entering` bytes each), the others `kept` bytes (less `selective`
    bytes under selective recompute), for `flying` micro-batches; one layer at a time is rebuilt while it runs backward.
    """
    chosen = (recompute == SELECTIVE)[:, None]
    per_layer = kept[:, None] - np.where(chosen, selective[:, None], 0.0)
    rebuilt = np.where(chosen, np.maximum(selective, 0.0)[:, None], 0.0)
    rebuilt = np.where(full_layers > 0, (kept - entering)[:, None], rebuilt)
    stored = (layers - full_layers) * per_layer + full_layers * entering[:, None]
    return flying * stored, np.where(layers > 0, rebuilt, 0.0)


def paging_s(job: Job, node: Node, updated: FloatArray) -> FloatArray | float:
    """Seconds that moments of a paged optimizer take from the host and back, (K,): all of them each step, as when memory is short."""
    if not job.optimizer.startswith(PAGED):
        return 0.0
    return 2.0 * MOMENT_BYTES[job.optimizer] * updated / node.host.pcie_bytes_per_s
