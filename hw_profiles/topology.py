"""The cluster as a graph, and for the hot path the table of its tiers.

    gpu - nvswitch | pcie | host memory | gpu (mesh)        inside a node
    gpu - nic - leaf - spine                                between nodes; on PCIe nodes the NIC hangs below the switch

Edges carry `bandwidth_bytes_per_s` (one direction) and `latency_s`; latencies are spread so that the way from GPU to GPU adds up
to the figure of the link or the network.

A leaf group is the `leaf_nodes` nodes that reach each other below one leaf. On a rail-optimised fabric these are the nodes whose NICs of
one number meet in one leaf switch, so that a strided group (one GPU number on many nodes) stays below it; the graph draws the rails of a
group as one leaf. Traffic from rail to rail is taken to change rails inside a node (NCCL's PXN) and costs no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster, EfficiencyCurve, Network, Node

if TYPE_CHECKING:
    import networkx as nx

    Graph = nx.Graph[str]

_SWITCH_OF_LINK = {"nvswitch": "nvswitch", "pcie": "pcie", "shared_memory": "host_memory"}
_ABOVE_NIC = ("pcie", "shared_memory")
"""Links through which a GPU also reaches the NIC; elsewhere each GPU has its own way there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TierTable:
    """One entry per tier of a homogeneous cluster, nearest first: node, then leaf and spine where there are any."""

    names: tuple[str, ...]
    gpus: NDArray[np.int64]
    """GPUs that reach each other within the tier, cumulative; the last entry is the whole cluster."""
    bandwidth_bytes_per_s: NDArray[np.float64]
    """Per GPU, one direction, when every GPU talks: after NIC sharing and oversubscription; inf in a node of one GPU."""
    latency_s: NDArray[np.float64]
    """Per ring step between two GPUs whose nearest common tier this is, software included."""
    efficiency: tuple[EfficiencyCurve, ...]
    """Fraction of the bandwidth that a ring collective reaches, by bytes; measured, so time = max(latency, bytes / rate)."""
    all_reduce_efficiency: tuple[EfficiencyCurve, ...]
    """The same for all-reduce among all GPUs of a node whose switch reduces (NVLS); elsewhere equal to `efficiency`."""
    point_to_point_fraction: NDArray[np.float64]
    """Fraction of the bandwidth that one large transfer between two GPUs reaches."""
    is_switched: NDArray[np.bool_]
    """Whether any few GPUs reach the full bandwidth among themselves; False in a mesh of direct links."""


def cluster_graph(cluster: Cluster, nodes: int | None = None) -> Graph:
    """The cluster's first `nodes` nodes (default all) as an undirected graph.

    Vertices carry `kind` (gpu, nvswitch, pcie, host_memory, nic, leaf, spine), and `node` or `leaf`, their index; edges carry
    `bandwidth_bytes_per_s` and `latency_s`. One leaf vertex stands for all rails of a leaf group.
    """
    import networkx as nx

    if nodes is not None and not 1 <= nodes <= cluster.nodes:
        raise InputError(
            f"nodes={nodes} is not in 1 to {cluster.nodes}", remedy="give a number of nodes of the cluster"
        )
    boxes = [node for node, count in cluster.node_runs for _ in range(count)][:nodes]
    graph: Graph = nx.Graph()
    for index, node in enumerate(boxes):
        _add_node(graph, node, index)
    if len(boxes) > 1:
        _add_network(graph, boxes, cluster.network)
    return graph


def _edge(graph: Graph, one: str, other: str, bandwidth: float, latency: float) -> None:
    graph.add_edge(one, other, bandwidth_bytes_per_s=bandwidth, latency_s=latency)


def _add_node(graph: Graph, node: Node, index: int) -> None:
    """GPUs of one node and what joins them."""
    link, names = node.intra, [f"node{index}/gpu{gpu}" for gpu in range(node.gpus)]
    for gpu, name in enumerate(names):
        graph.add_node(name, kind="gpu", node=index, gpu=gpu)
    switch = _SWITCH_OF_LINK.get(link.kind)
    if switch:
        hub = f"node{index}/{switch}"
        graph.add_node(hub, kind=switch, node=index)
        for name in names:
            _edge(graph, name, hub, link.bandwidth_bytes_per_s, link.latency_s / 2)
    elif link.kind == "mesh":
        share = link.bandwidth_bytes_per_s / max(node.gpus - 1, 1)
        for first, name in enumerate(names):
            for other in names[first + 1 :]:
                _edge(graph, name, other, share, link.latency_s)


def _add_network(graph: Graph, boxes: list[Node], network: Network) -> None:
    """NICs of every node, leaf groups above them, one spine above those."""
    leaves = -(-len(boxes) // network.leaf_nodes)
    node_rate = network.nics_per_node * network.nic_bytes_per_s
    for leaf in range(leaves):
        graph.add_node(f"leaf{leaf}", kind="leaf", leaf=leaf)
    if leaves > 1:
        graph.add_node("spine", kind="spine")
        uplink = network.leaf_nodes * node_rate / network.oversubscription
        for leaf in range(leaves):
            _edge(graph, f"leaf{leaf}", "spine", uplink, (network.spine_latency_s - network.latency_s) / 2)
    for index, node in enumerate(boxes):
        shared = node.intra.kind in _ABOVE_NIC
        inside = node.intra.latency_s / 2 if shared else 0.0
        for nic in range(network.nics_per_node):
            name = f"node{index}/nic{nic}"
            graph.add_node(name, kind="nic", node=index)
            up = max(network.latency_s / 2 - inside, 0.0)
            _edge(graph, name, f"leaf{index // network.leaf_nodes}", network.nic_bytes_per_s, up)
            below = (
                [_SWITCH_OF_LINK[node.intra.kind]] if shared else _gpus_of_nic(node.gpus, network.nics_per_node, nic)
            )
            for neighbour in below:
                _edge(graph, name, f"node{index}/{neighbour}", network.nic_bytes_per_s, 0.0)


def _gpus_of_nic(gpus: int, nics: int, nic: int) -> list[str]:
    """GPUs next to a NIC: neighbours share one when there are fewer NICs, a GPU has several when there are more."""
    if nics >= gpus:
        return [f"gpu{nic * gpus // nics}"]
    return [f"gpu{gpu}" for gpu in range(gpus) if gpu * nics // gpus == nic]


def tier_table(cluster: Cluster) -> TierTable:
    """Tiers of a homogeneous cluster, in closed form: importing networkx and asking the graph takes as long as estimating a hundred
    thousand layouts. The graph says the same (tests/test_hw_profiles_topology.py): bandwidth is the largest flow out of a full tier over
    its GPUs, latency the shortest way to the next such tier.
    """
    node, network = cluster.node, cluster.network
    shared = node.intra.kind in _ABOVE_NIC
    inside = node.intra.bandwidth_bytes_per_s if node.gpus > 1 else float("inf")  # a GPU alone sends nothing
    wire = network.nics_per_node * network.nic_bytes_per_s / node.gpus
    out = min(wire, node.intra.bandwidth_bytes_per_s) if shared else wire
    way = max(network.latency_s, node.intra.latency_s) if shared else network.latency_s
    tiers = [("node", node.gpus, inside, node.intra.latency_s)]
    if cluster.nodes > 1 and network.leaf_nodes > 1:
        tiers.append(("leaf", min(network.leaf_nodes, cluster.nodes) * node.gpus, out, way))
    if cluster.nodes > network.leaf_nodes:
        uplink, longer = wire / network.oversubscription, network.spine_latency_s - network.latency_s
        tiers.append(("spine", cluster.gpus, min(out, uplink), way + longer))
    names, gpus, bandwidth, latency = zip(*tiers, strict=True)
    outer = len(tiers) - 1
    return TierTable(
        names=names,
        gpus=np.asarray(gpus, dtype=np.int64),
        bandwidth_bytes_per_s=np.asarray(bandwidth),
        latency_s=np.asarray(latency),
        efficiency=(node.intra.efficiency, *[network.efficiency] * outer),
        all_reduce_efficiency=(
            node.intra.all_reduce_efficiency or node.intra.efficiency,
            *[network.efficiency] * outer,
        ),
        point_to_point_fraction=np.asarray(
            [node.intra.point_to_point_fraction, *[network.point_to_point_fraction] * outer]
        ),
        is_switched=np.asarray([node.intra.kind != "mesh", *[True] * outer]),
    )
