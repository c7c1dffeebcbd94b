"""The same cluster with one figure of it changed: GPUs, links inside the node, network between nodes; of a mixed one in every part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster, Gpu, Network, Node


def with_nodes(cluster: Cluster, change: Callable[[Node], Node]) -> Cluster:
    """The cluster with every node changed."""
    runs = tuple((change(node), count) for node, count in cluster.node_runs)
    return replace(cluster, node_runs=runs, parts=tuple(with_nodes(part, change) for part in cluster.parts))


def with_gpus_changed(cluster: Cluster, change: Callable[[Gpu], Gpu]) -> Cluster:
    """The cluster with every GPU changed."""
    return with_nodes(cluster, lambda node: replace(node, gpu=change(node.gpu)))


def with_gpu_memory(cluster: Cluster, memory_bytes: float) -> Cluster:
    """The cluster with this much memory on every GPU."""
    return with_gpus_changed(cluster, lambda gpu: replace(gpu, memory_bytes=memory_bytes))


def with_memory_times(cluster: Cluster, times: float) -> Cluster:
    """The cluster with this many times the memory of every GPU."""
    return with_gpus_changed(cluster, lambda gpu: replace(gpu, memory_bytes=times * gpu.memory_bytes))


def with_network_times(cluster: Cluster, times: float) -> Cluster:
    """The cluster with this many times the rate between nodes."""
    parts = tuple(replace(part, network=_times(part.network, times)) for part in cluster.parts)
    return replace(cluster, network=_times(cluster.network, times), parts=parts)


def _times(network: Network, times: float) -> Network:
    return network.at_rate(times * network.nic_bytes_per_s) if network.nics_per_node else network


def with_network_rate(cluster: Cluster, gbps_per_gpu: float) -> Cluster:
    """The cluster with NICs that give each GPU of a node this many Gbit/s, one direction; of a mixed one what joins its parts has this
    rate, and the networks of the parts change by as many times. Raises InputError without a network."""
    if not 0.0 < gbps_per_gpu < float("inf"):
        raise InputError(
            f"{gbps_per_gpu:g} is not a positive rate", place="--network-gbps", remedy="give Gbit/s per GPU"
        )
    now = exact_gbps_per_gpu(cluster)
    if now is None:
        raise InputError(
            f"cluster {cluster.name!r} has no network between nodes", place="--network-gbps", remedy="leave it out"
        )
    return with_network_times(cluster, gbps_per_gpu / now)


def network_gbps_per_gpu(cluster: Cluster) -> float | None:
    """Gbit/s between full nodes, one direction; None without a network. Of a mixed cluster of what joins its parts, shared by the GPUs of
    its largest node."""
    now = exact_gbps_per_gpu(cluster)
    return None if now is None else round(now, 6)


def exact_gbps_per_gpu(cluster: Cluster) -> float | None:
    """The same, not rounded for people."""
    network = cluster.network
    if not network.nics_per_node:
        return None
    gpus = max(node.gpus for node, _ in cluster.node_runs)
    return 8.0 * network.nics_per_node * network.nic_bytes_per_s / gpus / 1e9
