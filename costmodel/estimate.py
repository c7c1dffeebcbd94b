"""`estimate`: memory and step time of N layouts at once. Costs are computed on the unique keys they depend on, then gathered.

step = m t_max + (sum_i t_i - t_max) / v + exposed communication + optimizer + host,   t_i = one micro-batch on stage i
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.fitted import Fitted, fitted, with_fitted_cluster, with_fitted_runtime
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, LayoutTable, layout_table
from shardplan.costmodel.model import Model, layer_parameters
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import STRUCTURAL
from shardplan.costmodel.runtime import Runtime, load_runtime, without_overlap
from shardplan.costmodel.stage_cost import BlockRows, block_rows, stage_parameters, stage_rows
from shardplan.costmodel.step_memory import stage_activations, stage_memory
from shardplan.costmodel.step_time import pace_keys, pipeline_pace, step_time
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import TierTable, tier_table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ROWS_AT_ONCE = 1 << 17
"""Rows of one pass: enough to share what unique keys cost, few enough to bound memory (about 0.2 GB)."""

TIME_PARTS = (
    "compute_s",
    "recompute_s",
    "tp_exposed_s",
    "cp_exposed_s",
    "ep_exposed_s",
    "dp_exposed_s",
    "pp_exposed_s",
    "bubble_s",
    "offload_exposed_s",
    "optimizer_s",
    "host_s",
)
"""They add up to step_s."""

DEFAULT_HEADROOM = 0.05
TIME_BAND = 0.08
"""Half-width of the step-time band, relative: an uncalibrated machine of a known type."""
MEMORY_BAND = 0.08
"""Half-width of the device-memory band, relative."""
GUESS_BAND = 0.04
"""Added to the time band when the machine's profile contains guesses that enter step time."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Answers for N layouts; columns of shape (N,), memory of shape (N, S) for S stages."""

    layouts: LayoutTable
    time: Mapping[str, FloatArray]
    """Seconds per step by part (TIME_PARTS) and `step_s`."""
    hidden: Mapping[str, FloatArray]
    """Communication seconds hidden behind compute, by axis; not in step_s."""
    stages: Mapping[str, FloatArray]
    """Bytes by part and stage, (N, S): parameters, gradients, optimizer, activations, buffers, allocated, slack, device, host."""
    stage_index: IntArray
    stage_layer_counts: IntArray
    context_bytes: float
    capacity_bytes: float
    host_bytes: FloatArray
    """Host memory per node."""
    host_capacity_bytes: float
    tokens_per_step: int
    model_flop_per_step: float
    """6 FLOP per matrix parameter and token plus full (not halved) attention; no recompute."""
    hardware_flop_per_step: FloatArray
    """The same with recomputed operators."""
    peak_flop_per_s: float
    time_band: float

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def step_s(self) -> FloatArray:
        """Seconds per optimizer step."""
        return self.time["step_s"]

    @property
    def device_peak_bytes(self) -> FloatArray:
        """What nvidia-smi would show on the fullest stage."""
        return self.stages["device"].max(axis=1)

    @property
    def mfu(self) -> FloatArray:
        """Model FLOP utilisation of the dense peak."""
        return self.model_flop_per_step / (self.step_s * self.layouts.gpus * self.peak_flop_per_s)

    @property
    def hfu(self) -> FloatArray:
        """Hardware FLOP utilisation: recomputed operators counted."""
        return self.hardware_flop_per_step / (self.step_s * self.layouts.gpus * self.peak_flop_per_s)

    @property
    def tokens_per_s(self) -> FloatArray:
        """Training throughput of all GPUs."""
        return self.tokens_per_step / self.step_s

    def fits_likely(self) -> NDArray[np.bool_]:
        """The point estimate fits GPU and host memory."""
        on_host = self.host_bytes <= self.host_capacity_bytes
        return (self.device_peak_bytes <= self.capacity_bytes) & on_host

    def fits(self, headroom: float = DEFAULT_HEADROOM) -> NDArray[np.bool_]:
        """The upper edge of the memory band stays `headroom` below the capacity."""
        usable = self.capacity_bytes * (1.0 - headroom)
        on_host = self.host_bytes <= self.host_capacity_bytes * (1.0 - headroom)
        return (self.device_peak_bytes * (1.0 + MEMORY_BAND) <= usable) & on_host


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
    chosen = load_runtime(runtime) if isinstance(runtime, str) else runtime
    used = fitted() if constants is None else constants
    chosen = with_fitted_runtime(chosen, cluster, used)
    cluster = with_fitted_cluster(cluster, used)
    if cluster.gpu.device == "cpu":
        chosen = without_overlap(chosen)
    every = isinstance(layouts, Layout) if every_stage is None else every_stage
    _check_meaning(Setting(model=model, job=job, cluster=cluster, runtime=chosen), table)
    tiers = tier_table(cluster)
    pieces = [
        _estimate_rows(
            model,
            job,
            cluster,
            table.slice(start, start + ROWS_AT_ONCE),
            chosen,
            tiers,
            every,
        )
        for start in range(0, max(len(table), 1), ROWS_AT_ONCE)
    ]
    return pieces[0] if len(pieces) == 1 else _join(pieces, table)


def _check_meaning(setting: Setting, table: LayoutTable) -> None:
    """InputError for an empty table or the first row that has no meaning (a broken structural rule)."""
    if not len(table):
        raise InputError("no layouts to estimate", place="layouts", remedy="give at least one")
    for rule in STRUCTURAL:
        broken = np.flatnonzero(np.broadcast_to(rule.broken(setting, table), len(table)))
        if len(broken):
            layout = table.row(int(broken[0]))
            raise InputError(
                f"{rule.id}: {rule.detail(setting, layout)}", place="layouts", remedy=rule.remedy(setting, layout)
            )


def _estimate_rows(
    model: Model,
    job: Job,
    cluster: Cluster,
    layouts: LayoutTable,
    runtime: Runtime,
    tiers: TierTable,
    every_stage: bool,
) -> Estimates:
    micro_batches = job.global_batch / (layouts.dp * layouts.micro_batch)
    first, inverse = pace_keys(layouts, runtime)
    keys, batches = layouts.take(first), micro_batches[first]
    blocks = block_rows(model, job, cluster, keys, runtime, tiers)
    stages = stage_rows(model, keys, runtime, every_stage=every_stage)
    parameters = stage_parameters(model, keys, runtime, stages)
    pace = pipeline_pace(model, job, cluster, keys, runtime, tiers, blocks, stages, parameters, batches)
    activations = stage_activations(model, keys, blocks, stages, batches)
    flop = _hardware_flop(model, job, keys, blocks, stages.recomputed_total)
    pace = {name: column[inverse] for name, column in pace.items()}
    memory = stage_memory(job, cluster.gpu, layouts, runtime, parameters, activations, inverse, micro_batches)
    time, hidden = step_time(model, job, cluster, layouts, runtime, tiers, pace, micro_batches)
    allocated = memory.allocated
    slack = runtime.allocator_slack_fraction * allocated
    if memory.late is not None:
        slack += (1.0 + runtime.allocator_slack_fraction) * memory.late
    gpu = cluster.gpu
    in_use = np.minimum(cluster.node.gpus, layouts.gpus)
    return Estimates(
        layouts=layouts,
        time=time,
        hidden=hidden,
        stages={
            **{
                part: getattr(memory, part)
                for part in ("parameters", "gradients", "optimizer", "activations", "buffers", "host")
            },
            "allocated": allocated,
            "slack": slack,
            "device": allocated + slack + gpu.context_bytes,
        },
        stage_index=stages.stage[inverse],
        stage_layer_counts=stages.layers.sum(axis=2).astype(np.int64)[inverse],
        context_bytes=gpu.context_bytes,
        capacity_bytes=gpu.memory_bytes,
        host_bytes=memory.host.max(axis=1) * in_use,
        host_capacity_bytes=cluster.node.host.ram_bytes,
        tokens_per_step=job.tokens_per_step,
        model_flop_per_step=model_flop_per_token(model, job.seq) * job.tokens_per_step,
        hardware_flop_per_step=flop[inverse],
        peak_flop_per_s=gpu.peak_flop_per_s[job.precision],
        time_band=TIME_BAND + (GUESS_BAND if timing_guesses(cluster, job.precision) else 0.0),
    )


TIMED_FIELDS = ("efficiency", "bandwidth", "peak_tflops", "network.latency", "intra.latency", "launch", "nic_")


def timing_guesses(cluster: Cluster, precision: str) -> tuple[str, ...]:
    """Guessed figures of the profile that enter the step time of a job in `precision`."""
    others = {word for word in cluster.gpu.peak_flop_per_s if word != precision}
    return tuple(
        path
        for path in cluster.guesses()
        if not path.startswith("node.host.")
        and any(field in path for field in TIMED_FIELDS)
        and path.rsplit(".", 1)[-1] not in others
    )


def model_flop_per_token(model: Model, seq: int) -> float:
    """Forward and backward FLOP of one token: 6 per matrix parameter it meets (head included, look-ups not) + 12 s H D per layer.

    Attention is counted in full, as in Korthikanti et al. (arXiv 2205.05198, 72 B s l h^2 (1 + s/6h + V/12lh)), PaLM and torchtitan.
    """
    flop = 6.0 * model.vocab * model.hidden
    for kind, count in model.layers:
        parts = layer_parameters(replace(kind, qkv_bias=False, attention_output_bias=False, mlp_bias=False))
        active = kind.experts_per_token / kind.experts if kind.experts else 1.0
        flop += 6.0 * count * (parts["attention"] + parts["router"] + parts["mlp"] * active)
        flop += 12.0 * count * seq * kind.heads * kind.head_dim
    return flop


def _hardware_flop(
    model: Model, job: Job, layouts: LayoutTable, blocks: BlockRows, recomputed_layers: FloatArray
) -> FloatArray:
    """Model FLOP plus the operators that recompute repeats, over all ranks and micro-batches of a step."""
    runs = job.global_batch / layouts.micro_batch * layouts.tp * layouts.cp
    repeated = np.zeros(len(layouts))
    total = model.layer_count
    for block, (_, count) in zip(blocks.layers, model.layers, strict=True):
        repeated += np.where(
            recomputed_layers > 0,
            block["full_flop"] * recomputed_layers * count / total,
            block["selective_flop"] * blocks.selects * count,
        )
    return model_flop_per_token(model, job.seq) * job.tokens_per_step + repeated * runs


def _join(pieces: list[Estimates], table: LayoutTable) -> Estimates:
    """Stack the rows of several passes."""

    def stack(name: str) -> dict[str, FloatArray]:
        maps: list[Mapping[str, FloatArray]] = [getattr(piece, name) for piece in pieces]
        return {key: np.concatenate([one[key] for one in maps]) for key in maps[0]}

    return replace(
        pieces[0],
        layouts=table,
        time=stack("time"),
        hidden=stack("hidden"),
        stages=stack("stages"),
        stage_index=np.concatenate([p.stage_index for p in pieces]),
        stage_layer_counts=np.concatenate([p.stage_layer_counts for p in pieces]),
        host_bytes=np.concatenate([p.host_bytes for p in pieces]),
        hardware_flop_per_step=np.concatenate([p.hardware_flop_per_step for p in pieces]),
    )
