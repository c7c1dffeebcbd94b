"""Memory tiers: what optimizer states, parameters and activations outside the GPU cost, and what of it a step waits for.

ZeRO-Offload (arXiv 2101.06840): 2 P bytes of gradients go down as the backward makes them, the CPU updates, 2 P bytes of parameters
come up. ZeRO-Infinity (arXiv 2104.07857): every rank moves its 1/N over its own link (bandwidth-centric), reads and writes of
optimizer states on flash run beside the update (double buffering), parameters are fetched ahead of their gathers. Twin-Flow
(DeepSpeed's ZeRO-Offload++): a share of the update stays on the GPU and runs at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.costmodel.layout import OFFLOAD, RATIO_STEPS, LayoutTable
from shardplan.costmodel.runtime_offload import Offloading
from shardplan.hw_profiles.machine import Node

FloatArray = NDArray[np.float64]
NVME = OFFLOAD.index("nvme")

ADAM_PER_CORE_PER_S = 0.15e9
"""Parameters that one core updates in a second with a vectorised Adam: 0.30e9 on two threads (ISEEKYAN/mbridge#188)."""
FP32_UPDATE_BYTES = 30.0
"""Traffic of an update with fp32 masters, moments and gradient, as `adam_bytes_per_parameter` of a node counts it; states in fewer bits
take their share of the time."""
READ_STATE_BYTES, WRITTEN_STATE_BYTES = 16.0, 12.0
"""Of one parameter per update on flash: fp32 master, both moments and gradient read; all but the gradient written back
(arXiv 2104.07857 section 3 counts 16)."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one GPU gets while all GPUs of its node move, bytes/s one direction; parameters/s for the update."""

    link_bytes_per_s: float
    read_bytes_per_s: float
    """Of flash; 0 without."""
    write_bytes_per_s: float
    adam_parameters_per_s: float


def node_rates(node: Node, offload: Offloading) -> Rates:
    """A GPU's share of the node: copies by its own link or the node's, flash by its link too, the update by memory or by cores."""
    host, flash = node.host, node.nvme
    link = host.pcie_bytes_per_s
    if host.pcie_node_bytes_per_s is not None:
        link = min(link, host.pcie_node_bytes_per_s / node.gpus)
    by_memory = host.memory_bandwidth_bytes_per_s * host.memory_efficiency / host.adam_bytes_per_parameter
    by_cores = host.cores * ADAM_PER_CORE_PER_S
    return Rates(
        link_bytes_per_s=link,
        read_bytes_per_s=min(link, flash.read_bytes_per_s / node.gpus) if flash else 0.0,
        write_bytes_per_s=min(link, flash.write_bytes_per_s / node.gpus) if flash else 0.0,
        adam_parameters_per_s=min(by_memory, by_cores) / node.gpus / offload.adam_slowdown,
    )


def optimizer_share(layouts: LayoutTable) -> FloatArray:
    """Share of the optimizer states that is off the GPU, (N,)."""
    return np.where(layouts.offload_optimizer > 0, layouts.offload_ratio / RATIO_STEPS, 0.0)


@dataclass(frozen=True, kw_only=True)
class TierTimes:
    """Seconds of one rank before overlap, columns of shape (K,)."""

    down_s: FloatArray
    """Gradients of one reduction to where they are kept."""
    update_s: FloatArray
    """On the CPU, or the traffic of flash where that is longer."""
    up_s: FloatArray
    """Updated parameters to where they are kept."""
    fetch_s: FloatArray
    """All parameters of the rank once, ahead of a gather."""

    def take(self, rows: NDArray[np.integer]) -> TierTimes:
        """The rows at `rows`."""
        return TierTimes(
            down_s=self.down_s.take(rows),
            update_s=self.update_s.take(rows),
            up_s=self.up_s.take(rows),
            fetch_s=self.fetch_s.take(rows),
        )


def tier_times(
    node: Node,
    offload: Offloading,
    layouts: LayoutTable,
    parameters: ArrayLike,
    *,
    gradient_bytes: float,
    parameter_bytes: float,
    update_bytes: float = FP32_UPDATE_BYTES,
    fetched: ArrayLike | None = None,
) -> TierTimes:
    """Times of ranks that update `parameters` parameters each (their 1/N), (N,), on the tiers that `layouts` names, and fetch as many
    ahead of a gather, or `fetched` where most are frozen."""
    rates = node_rates(node, offload)
    moved = optimizer_share(layouts) * np.asarray(parameters, dtype=np.float64)
    flash, parked = layouts.offload_optimizer == NVME, layouts.offload_params
    write = np.where(flash, rates.write_bytes_per_s, rates.link_bytes_per_s)
    adam = moved / rates.adam_parameters_per_s * (update_bytes / FP32_UPDATE_BYTES)
    io = np.where(flash, moved, 0.0)
    if flash.any():  # one set of drives reads or writes at a time
        io = io * (READ_STATE_BYTES / rates.read_bytes_per_s + WRITTEN_STATE_BYTES / rates.write_bytes_per_s)
    up = np.where(parked == 0, moved / (rates.link_bytes_per_s * offload.update_copy_rate), 0.0)
    there = np.asarray(parameters if fetched is None else fetched, dtype=np.float64)
    away = np.where(parked > 0, there, 0.0)
    fetch = away / rates.link_bytes_per_s
    if (parked == NVME).any():
        up = np.where(parked == NVME, moved / rates.write_bytes_per_s, up)
        fetch = np.where(parked == NVME, away / rates.read_bytes_per_s, fetch)
    return TierTimes(
        down_s=gradient_bytes * moved / write,
        update_s=np.maximum(adam, io),
        up_s=parameter_bytes * up,
        fetch_s=parameter_bytes * fetch,
    )


@dataclass(frozen=True, kw_only=True)
class StepWindows:
    """What a step has to hide copies behind, (N,), and how often it copies."""

    reductions: FloatArray
    gathers: FloatArray
    backward_s: FloatArray
    """Compute of the backward passes that reduce."""
    compute_s: FloatArray
    """Of the whole step."""
    waiting_s: FloatArray
    """Exposed exchanges over the network and copies of activations."""
    on_gpu_s: FloatArray
    """Update of the share of the optimizer that stays on the GPU."""


def exposed_tiers_s(
    times: TierTimes, windows: StepWindows, offload: Offloading, *, gradient_overlap: float
) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) seconds of a step beyond compute and beyond the update on the GPU.

    Copies of gradients follow their reductions, so as much of them hides (`gradient_overlap`). Fetches and gradients go opposite ways
    over a full-duplex link, beside the collectives of the network: each hides behind the compute, and behind what the step already
    waits for (`waiting_s`, then the fetches), so that a faster GPU never makes a step slower.
    """
    down = windows.reductions * times.down_s
    back = (windows.reductions - 1.0) * times.down_s if offload.accumulates_on_gpu else np.zeros_like(down)
    fetch = windows.gathers * times.fetch_s
    fetch_hidden = np.minimum(offload.fetch_overlap * fetch, windows.compute_s + windows.waiting_s)
    waiting = windows.waiting_s + fetch - fetch_hidden
    down_hidden = np.minimum(gradient_overlap * down, windows.backward_s + waiting)
    waiting = waiting + down - down_hidden + back
    after = times.update_s + times.up_s
    beside = windows.on_gpu_s + (windows.compute_s + waiting if offload.delayed_update else 0.0)
    hidden = fetch_hidden + down_hidden + np.minimum(after, beside)
    return down + back + fetch + after - hidden, hidden


def activation_copies_s(
    node: Node,
    offload: Offloading,
    tiers: NDArray[np.int64],
    checkpoint_bytes: ArrayLike,
    *,
    forward_s: FloatArray,
    backward_s: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(exposed in the forward, exposed in the backward, hidden) seconds of one micro-batch whose checkpoints go down to `tiers`, codes of
    OFFLOAD, in its forward and come up in its backward (ZeRO-Infinity section 5.1.2)."""
    rates, moved = node_rates(node, offload), np.asarray(checkpoint_bytes, dtype=np.float64)
    link = min(rates.link_bytes_per_s, node.host.pcie_bytes_per_s * offload.activation_copy_rate)
    down_s, up_s = moved / link, moved / link
    flash = tiers == NVME
    if flash.any():
        down_s = np.where(flash, moved / min(link, rates.write_bytes_per_s), down_s)
        up_s = np.where(flash, moved / min(link, rates.read_bytes_per_s), up_s)
    down = np.minimum(offload.activation_overlap * down_s, forward_s)
    up = np.minimum(offload.activation_overlap * up_s, backward_s)
    return down_s - down, up_s - up, down + up
