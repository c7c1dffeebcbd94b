"""The cluster as a graph and its tiers, against figures worked out by hand."""

from dataclasses import replace
from itertools import product

import networkx as nx
import numpy as np
import pytest

from shardplan.costmodel.collectives import all_to_all_s
from shardplan.hw_profiles.document import part_names
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import cluster_graph, tier_table


def changed(name, *, nodes=None, link=None, **network):
    """A catalog cluster with another size, link or network."""
    cluster = load_cluster(name)
    node = replace(cluster.node, intra=replace(cluster.node.intra, **(link or {})))
    runs = ((node, nodes or cluster.nodes),)
    return replace(cluster, node_runs=runs, network=replace(cluster.network, **network))


@pytest.mark.parametrize(
    ("name", "names", "gpus", "gb_per_s", "latency_us"),
    [
        ("selene", ("node", "leaf", "spine"), [8, 160, 4480], [300, 25, 25], [3.1, 14, 15]),
        ("h100-ib", ("node", "leaf", "spine"), [8, 256, 1024], [450, 50, 50], [1.8, 14, 15]),
        ("8x4090", ("node",), [8], [12], [5.7]),
    ],
)
def test_tiers_of_the_catalog(name, names, gpus, gb_per_s, latency_us):
    tiers = tier_table(load_cluster(name))
    assert tiers.names == names
    assert tiers.gpus.tolist() == gpus
    assert tiers.bandwidth_bytes_per_s == pytest.approx(np.asarray(gb_per_s) * 1e9)
    assert tiers.latency_s == pytest.approx(np.asarray(latency_us) * 1e-6)
    assert len(tiers.efficiency) == len(tiers.all_reduce_efficiency) == len(names)
    assert tiers.is_switched.all()


def test_oversubscription_halves_the_spine_alone():
    assert tier_table(changed("h100-ib", oversubscription=2.0)).bandwidth_bytes_per_s.tolist() == [450e9, 50e9, 25e9]


def test_gpus_share_the_nics_of_their_node():
    assert tier_table(changed("h100-ib", nics_per_node=4)).bandwidth_bytes_per_s.tolist() == [450e9, 25e9, 25e9]
    assert tier_table(changed("h100-ib", nics_per_node=1)).bandwidth_bytes_per_s[1] == pytest.approx(6.25e9)
    assert tier_table(changed("h100-ib", nics_per_node=16)).bandwidth_bytes_per_s[1] == pytest.approx(100e9)
    assert tier_table(changed("h100-ib", nics_per_node=3)).bandwidth_bytes_per_s[1] == pytest.approx(150e9 / 8)


def test_a_pcie_node_sends_no_faster_than_its_pcie():
    slow = {"kind": "pcie", "bandwidth_bytes_per_s": 12e9}
    assert tier_table(changed("h100-ib", link=slow)).bandwidth_bytes_per_s.tolist() == [12e9, 12e9, 12e9]
    assert tier_table(changed("h100-ib", link=slow)).latency_s == pytest.approx([1.8e-6, 14e-6, 15e-6])


def test_a_mesh_is_not_switched_and_adds_up_its_links():
    tiers = tier_table(changed("h100-ib", link={"kind": "mesh"}))
    assert tiers.bandwidth_bytes_per_s[0] == pytest.approx(450e9)
    assert tiers.is_switched.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("nodes", "leaf_nodes", "names", "gpus"),
    [
        (1, 32, ("node",), [8]),
        (2, 32, ("node", "leaf"), [8, 16]),
        (32, 32, ("node", "leaf"), [8, 256]),
        (33, 32, ("node", "leaf", "spine"), [8, 256, 264]),
        (3, 1, ("node", "spine"), [8, 24]),
    ],
)
def test_a_tier_is_there_when_the_cluster_reaches_it(nodes, leaf_nodes, names, gpus):
    tiers = tier_table(changed("h100-ib", nodes=nodes, leaf_nodes=leaf_nodes))
    assert (tiers.names, tiers.gpus.tolist()) == (names, gpus)


def test_one_gpu_sends_nothing_so_nothing_limits_it():
    tiers = tier_table(load_cluster("h100-ib", gpus=1))
    assert (tiers.gpus.tolist(), tiers.bandwidth_bytes_per_s.tolist()) == ([1], [float("inf")])


def test_two_thousand_nodes_have_as_many_tiers_as_a_hundred():
    few, many = (tier_table(changed("h100-ib", nodes=nodes)) for nodes in (100, 2048))
    assert few.names == many.names
    assert many.gpus[-1] == 2048 * 8


def test_the_graph_has_every_part_and_joins_them():
    graph = cluster_graph(load_cluster("h100-ib"), nodes=33)
    kinds = [words["kind"] for _, words in graph.nodes(data=True)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        **{"gpu": 264, "nvswitch": 33, "nic": 264, "leaf": 2, "spine": 1},
    }
    assert nx.is_connected(graph)
    assert graph.edges["node0/gpu0", "node0/nvswitch"]["bandwidth_bytes_per_s"] == 450e9
    assert graph.edges["leaf0", "spine"]["bandwidth_bytes_per_s"] == pytest.approx(32 * 400e9)
    assert nx.shortest_path_length(graph, "node0/gpu0", "node32/gpu0", weight="latency_s") == pytest.approx(15e-6)


def test_a_graph_may_mix_nodes_and_a_tier_table_may_not():
    h100, h200 = load_cluster("h100-ib"), load_cluster("h200-ib")
    mixed = Cluster(name="mixed", node_runs=((h100.node, 1), (h200.node, 2)), network=h100.network)
    assert sum(words["kind"] == "gpu" for _, words in cluster_graph(mixed).nodes(data=True)) == 24
    with pytest.raises(InputError, match="mixes 2 node types"):
        tier_table(mixed)


def test_a_graph_of_more_nodes_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"nodes=9 is not in 1 to 1"):
        cluster_graph(load_cluster("8x4090"), nodes=9)


def flow(graph, senders, receivers):
    """Largest flow from all senders together to the receivers, bytes/s."""
    open_ended = graph.copy()
    open_ended.add_edges_from(("sender", name) for name in senders)
    open_ended.add_edges_from((name, "receiver") for name in receivers)
    return nx.maximum_flow_value(open_ended, "sender", "receiver", capacity="bandwidth_bytes_per_s")


def tiers_of_graph(cluster):
    """(bandwidth of a GPU, latency) of each tier as the graph has them: of at most three nodes, in leaf groups of at most two, which show
    every tier."""
    below = min(cluster.network.leaf_nodes, 2)
    nodes = min(cluster.nodes, below if cluster.nodes <= cluster.network.leaf_nodes else below + 1)
    network = replace(cluster.network, leaf_nodes=below)
    graph = cluster_graph(replace(cluster, node_runs=((cluster.node, nodes),), network=network))
    first, *others = (f"node0/gpu{gpu}" for gpu in range(cluster.node.gpus))
    node = flow(cluster_graph(cluster, 1), [first], others) if others else float("inf")
    found = [(node, cluster.node.intra.latency_s)]
    for there, hub, boxes in (("node1", "leaf0", 1), (f"node{below}", "spine", below)):
        if hub in graph and f"{there}/gpu0" in graph and (hub == "spine" or below > 1):
            tier = [f"node{box}/gpu{gpu}" for box in range(boxes) for gpu in range(cluster.node.gpus)]
            way = nx.shortest_path_length(graph, first, f"{there}/gpu0", weight="latency_s")
            found.append((flow(graph, tier, [hub]) / len(tier), way))
    return found


def agree(cluster):
    tiers = tier_table(cluster)
    bandwidth, latency = zip(*tiers_of_graph(cluster), strict=True)
    assert tiers.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=1e-12)
    assert tiers.latency_s == pytest.approx(latency, rel=1e-12)


@pytest.mark.parametrize("name", part_names("clusters"))
def test_closed_forms_of_tiers_are_what_the_graph_says(name):
    agree(load_cluster(name))


@pytest.mark.parametrize(
    "link", [{}, {"kind": "mesh"}, {"kind": "pcie", "bandwidth_bytes_per_s": 12e9, "latency_s": 4e-5}]
)
@pytest.mark.parametrize("nics_per_node", [1, 3, 8, 16])
def test_closed_forms_hold_for_other_links_and_networks(link, nics_per_node):
    for leaf_nodes, oversubscription in product((1, 2, 32), (1.0, 1.7)):
        network = {"leaf_nodes": leaf_nodes, "oversubscription": oversubscription, "nics_per_node": nics_per_node}
        agree(changed("h100-ib", nodes=3, link=link, **network))


def test_only_what_leaves_the_leaf_passes_the_thin_spine() -> None:
    """16 nodes in two leaves, 4:1: each node sends to 15 others, 8 of them across the spine, so 4 * 8/15 of the time at full bisection."""
    cluster = load_cluster("h100-ib", gpus=128)
    thin, full = (
        tier_table(replace(cluster, network=replace(cluster.network, leaf_nodes=8, oversubscription=ratio)))
        for ratio in (4.0, 1.0)
    )
    ratio = all_to_all_s(thin, 1e10, [64, 128, 16], [1, 1, 8]) / all_to_all_s(full, 1e10, [64, 128, 16], [1, 1, 8])
    assert ratio == pytest.approx([1.0, 4 * 8 / 15, 4 * 8 / 15], rel=1e-3)
    one_each = replace(cluster, network=replace(cluster.network, leaf_nodes=1, oversubscription=4.0))
    every = all_to_all_s(tier_table(one_each), 1e10, 128, 1)
    assert float(every / all_to_all_s(full, 1e10, 128, 1)) == pytest.approx(4.0, rel=1e-3), "no two nodes share a leaf"
