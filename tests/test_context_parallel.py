"""Context parallelism: the sequence of one sample spread over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardplan.costmodel.collectives import collective_s
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.topology import tier_table

TIERS = tier_table(load_cluster("h100-ib", gpus=64))


def test_all_to_all_inside_a_node_moves_all_shares_but_ones_own() -> None:
    size, rate = 1e9, TIERS.bandwidth_bytes_per_s[0] * TIERS.efficiency[0].at(1e9)
    assert float(collective_s(TIERS, "all_to_all", size, 8, 1)) == pytest.approx(
        TIERS.latency_s[0] + size * 7 / 8 / rate
    )
    assert float(collective_s(TIERS, "all_to_all", size, 1, 1)) == 0.0


def test_all_to_all_between_nodes_is_paced_by_what_leaves_the_node() -> None:
    """Two nodes of 8: 8 of 16 shares leave (nccl-tests: at most k/(k-1) times the NIC rate for k nodes)."""
    size = 1e9
    outer = TIERS.bandwidth_bytes_per_s[1] * TIERS.efficiency[1].at(8 * size / 2)
    expected = TIERS.latency_s[1] + size / 2 / outer
    assert float(collective_s(TIERS, "all_to_all", size, 16, 1)) == pytest.approx(expected)
    assert collective_s(TIERS, "all_to_all", size, 16, 1) < collective_s(TIERS, "all_to_all", size, 16, 8)


def test_few_members_per_node_meet_the_efficiency_of_as_many_bytes_per_nic() -> None:
    """One member a node passes S through its NIC share, eight pass S / 8 each: same bytes per NIC, same efficiency."""
    full = float(collective_s(TIERS, "all_gather", 8e8, 64, 1))  # 8 members a node, 1e8 bytes a NIC
    one = float(collective_s(TIERS, "all_gather", 1e8, 8, 8))
    assert full == pytest.approx(one * (63 / 64) / (7 / 8), rel=1e-9)


def test_doubling_bandwidth_is_never_slower() -> None:
    faster = replace(TIERS, bandwidth_bytes_per_s=2 * TIERS.bandwidth_bytes_per_s)
    for size in (1e3, 1e6, 1e9):
        for ranks, stride in ((4, 1), (8, 1), (16, 1), (8, 8), (16, 4)):
            assert collective_s(faster, "all_to_all", size, ranks, stride) <= collective_s(
                TIERS, "all_to_all", size, ranks, stride
            )
