"""Cost and time to result of one layout: USD, joules, days to a token budget, goodput. What nobody says is None, never a guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardplan.costmodel.adapters import trainable_parameters
from shardplan.costmodel.goodput import (
    GPU_HOURS_PER_FAILURE,
    RESTART_S,
    checkpoint_bytes_per_parameter,
    daly_interval_s,
    goodput_fraction,
    mean_time_between_failures_s,
)
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import Model, parameter_counts
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Cluster, Failures
from shardplan.hw_profiles.mixed import as_all

DAY_S = 86400.0
LEAST_GOODPUT = 1e-4
"""A job below it is taken never to finish."""


@dataclass(frozen=True, kw_only=True)
class CheckpointStorage:
    """Where checkpoints go, as all nodes together reach it."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    words: str


def usd_per_s(cluster: Cluster) -> float | None:
    """Price of the cluster; None without a price. A partly used node is paid in full."""
    if cluster.parts:
        return _sum_or_none([usd_per_s(part) for part in cluster.parts])
    price = cluster.node.usd_per_hour
    return None if price is None else price * cluster.nodes / 3600.0


def _sum_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def power_w(cluster: Cluster) -> tuple[float, str] | None:
    """Electric power of the cluster and what it counts: nodes at full power, or else the GPUs alone; None when neither is known.

    Full power is more than training draws: an upper estimate of what it counts. A power cap lowers it by what each GPU loses.
    """
    if cluster.parts:
        each = [power_w(part) for part in cluster.parts]
        total = _sum_or_none([one[0] if one else None for one in each])
        return None if total is None else (total, " and ".join(one[1] for one in each if one))
    node, gpu = cluster.node, cluster.gpu
    cap = gpu.power_cap_w if gpu.power_cap_w is not None else gpu.power_w
    saved = gpu.power_w - cap if gpu.power_w is not None and cap is not None else 0.0
    if node.power_w is not None:
        watts = max(node.power_w - node.gpus * saved, 0.0)
        return (
            watts * cluster.nodes,
            f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} at full power, {watts:,.0f} W each",
        )
    if cap is not None:
        return (
            cap * cluster.gpus,
            f"{cluster.gpus} GPUs alone at full power, {cap:g} W each (hosts and network not counted)",
        )
    return None


def cost_document(cluster: Cluster, job: Job, step_s: float) -> dict[str, float | None]:
    """`cost` of the answer: USD and joules by step and token, None where price or power is unknown."""
    price, power = usd_per_s(cluster), power_w(cluster)
    return {
        "usd_per_step": None if price is None else price * step_s,
        "usd_per_million_tokens": None if price is None else price * step_s / job.tokens_per_step * 1e6,
        "joules_per_token": None if power is None else power[0] * step_s / job.tokens_per_step,
    }


def checkpoint_storage(cluster: Cluster) -> CheckpointStorage | None:
    """The shared storage, as far as all NICs and host links reach; without one the nodes' own flash; None when neither is known."""
    if cluster.parts:  # all parts write their share at once, as fast as the slowest
        each = [one for part in cluster.parts if (one := checkpoint_storage(as_all(cluster, part))) is not None]
        whole = len(each) == len(cluster.parts)
        return min(each, key=lambda one: one.write_bytes_per_s) if whole else None
    node, shared = cluster.node, cluster.storage
    links = [node.gpus * cluster.nodes * node.host.pcie_bytes_per_s]
    if shared is not None and shared.write_bytes_per_s is not None:
        if cluster.network.nics_per_node:
            links.append(cluster.nodes * cluster.network.nics_per_node * cluster.network.nic_bytes_per_s)
        read = shared.read_bytes_per_s if shared.read_bytes_per_s is not None else shared.write_bytes_per_s
        kind = f"shared storage ({shared.kind})" if shared.kind else "shared storage"
        return CheckpointStorage(
            write_bytes_per_s=min(shared.write_bytes_per_s, *links), read_bytes_per_s=min(read, *links), words=kind
        )
    if node.nvme is not None:
        return CheckpointStorage(
            write_bytes_per_s=min(node.nvme.write_bytes_per_s * cluster.nodes, *links),
            read_bytes_per_s=min(node.nvme.read_bytes_per_s * cluster.nodes, *links),
            words="the nodes' own flash, which is lost with a node unless copied elsewhere in the background",
        )
    return None


def gpu_hours_per_failure(cluster: Cluster) -> float:
    """Of the profile, or what Llama 3 405B saw."""
    if cluster.parts:
        return min(gpu_hours_per_failure(part) for part in cluster.parts)
    known = (cluster.failures or Failures()).gpu_hours_per_failure
    return GPU_HOURS_PER_FAILURE if known is None else known


def restart_without_load_s(cluster: Cluster) -> float:
    """Of the profile, or the default guess."""
    if cluster.parts:
        return max(restart_without_load_s(part) for part in cluster.parts)
    known = (cluster.failures or Failures()).restart_s
    return RESTART_S if known is None else known


def result_document(
    *, model: Model, job: Job, cluster: Cluster, runtime: Runtime, layout: Layout, step_s: float
) -> dict[str, float | None] | None:
    """`result` of the answer: what the token budget takes; None without one.

    `days`, `usd` and `energy_j` are of the steps alone; `days_with_failures` and `usd_with_failures` are over the goodput.
    """
    if job.tokens is None:
        return None
    cost = cost_document(cluster, job, step_s)
    seconds = job.tokens / job.tokens_per_step * step_s
    found = _goodput(model, job, cluster, runtime, layout, step_s)
    goodput = found["goodput"]
    longer = None if goodput is None or goodput < LEAST_GOODPUT else 1.0 / goodput
    usd, joules = cost["usd_per_million_tokens"], cost["joules_per_token"]
    return {
        "tokens": float(job.tokens),
        "days": seconds / DAY_S,
        "days_with_failures": None if longer is None else seconds / DAY_S * longer,
        **found,
        "usd": None if usd is None else usd * job.tokens / 1e6,
        "usd_with_failures": None if usd is None or longer is None else usd * job.tokens / 1e6 * longer,
        "energy_j": None if joules is None else joules * job.tokens,
    }


def _goodput(
    model: Model, job: Job, cluster: Cluster, runtime: Runtime, layout: Layout, step_s: float
) -> dict[str, float | None]:
    """Checkpoint, failures and the share of the time that is kept, at Daly's interval or one step, whichever is longer."""
    size = float(checkpoint_bytes_per_parameter(runtime, job, layout.zero)) * (
        parameter_counts(model)["total"] if job.adapters is None else trainable_parameters(model, job)
    )
    mean_time = float(mean_time_between_failures_s(layout.gpus, gpu_hours_per_failure(cluster)))
    storage = checkpoint_storage(cluster)
    write = restart = interval = goodput = None
    if storage is not None:
        write = size / storage.write_bytes_per_s
        restart = restart_without_load_s(cluster) + size / storage.read_bytes_per_s
        interval = max(float(daly_interval_s(write, mean_time)), step_s)
        goodput = float(goodput_fraction(interval, write, mean_time, restart))
    return {
        "goodput": goodput,
        "checkpoint_bytes": size,
        "checkpoint_write_s": write,
        "checkpoint_interval_s": interval,
        "mean_time_between_failures_s": mean_time,
        "restart_s": restart,
    }


def cost_assumptions(job: Job, cluster: Cluster) -> list[str]:
    """What cost and, with a token budget, time to result rest on, in sentences."""
    if cluster.parts:
        told = [line for part in cluster.parts for line in cost_assumptions(job, part)]
        return list(dict.fromkeys(told))
    node, said = cluster.node, cluster.provenance
    lines: list[str] = []
    if node.usd_per_hour is not None:
        source = said.get("node.usd_per_hour")
        lines.append(
            f"price {node.usd_per_hour:g} USD per node and hour, whole nodes are paid "
            f"({node.price_date or 'undated'}{': ' + source.text if source else ''})"
        )
    power = power_w(cluster)
    if power is not None:
        lines.append(f"energy: {power[1]}, which is more than training draws")
    if job.tokens is not None:
        lines += _budget_assumptions(cluster)
    return lines


def _budget_assumptions(cluster: Cluster) -> list[str]:
    said = cluster.provenance
    rate = said.get("failures.gpu_hours_per_failure")
    failures = (
        rate.text if rate else "default: 419 unexpected stops of Llama 3 405B, arXiv 2407.21783; others 8,100 to 66,500"
    )
    lines = [f"a failure every {gpu_hours_per_failure(cluster):,g} GPU-hours ({failures})"]
    storage = checkpoint_storage(cluster)
    if storage is None:
        return [*lines, "goodput unknown: the profile has neither [storage] write_gb_per_s nor [node.nvme]"]
    restart = said.get("failures.restart_minutes")
    return [
        *lines,
        f"a restart takes {restart_without_load_s(cluster) / 60.0:g} min ({restart.text if restart else 'a guess'}) and the loading",
        f"checkpoints are written by all nodes while training waits, at {storage.write_bytes_per_s / 1e9:,.4g} GB/s to "
        f"{storage.words}; interval and goodput after Daly 2006",
    ]
