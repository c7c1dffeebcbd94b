"""What must hold for every collective and every pipeline schedule: what is sent is received, more work never takes less."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.collectives import Collective, collective_s, members_per_node, point_to_point_s, wire_factor
from shardplan.costmodel.layout import SCHEDULES
from shardplan.costmodel.pipeline import bubble_fraction
from shardplan.costmodel.schedules import pipeline_schedule
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import EfficiencyCurve
from shardplan.hw_profiles.topology import TierTable, tier_table

CLUSTERS = ("h100-ib", "selene", "jean-zay", "b200-ib", "dgx2-edr", "mi325x-ib")
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def tiers_of(cluster: str) -> TierTable:
    """Eight nodes whose links reach the same share of their rate at every size: measured curves have dips."""
    machine = load_cluster(cluster)
    tiers = tier_table(machine.with_gpus(8 * machine.node.gpus))
    flat = tuple(EfficiencyCurve(sizes=(1.0, 2.0), fractions=(0.8, 0.8)) for _ in tiers.names)
    return replace(tiers, efficiency=flat, all_reduce_efficiency=flat)


Message = tuple[int, int, float]
"""From rank, to rank, bytes."""


def ring(n: int, size: float, passes: int) -> list[Message]:
    """A ring that passes 1/n of the buffer to the next rank n - 1 times, `passes` times over."""
    return [(rank, (rank + 1) % n, size / n) for _ in range(passes * (n - 1)) for rank in range(n)]


@given(st.integers(1, 64), st.floats(1.0, 1e12))
def test_every_byte_sent_is_received(n: int, size: float) -> None:
    """Messages of ring all-reduce, all-gather, reduce-scatter and of an all-to-all: each rank sends and receives what the wire
    factor says; a tree all-reduce moves as many bytes in all, up and down its n - 1 edges."""
    to_all = [(one, other, size / n) for one in range(n) for other in range(n) if one != other]
    messages: dict[Collective, list[Message]] = {
        "all_reduce": ring(n, size, 2),
        "all_gather": ring(n, size, 1),
        "reduce_scatter": ring(n, size, 1),
        "all_to_all": to_all,
    }
    for kind, sent in messages.items():
        out, into = np.zeros(n), np.zeros(n)
        for one, other, number in sent:
            out[one] += number
            into[other] += number
        assert out == pytest.approx(into)
        assert out == pytest.approx(np.full(n, size * float(wire_factor(kind, n))))
    edges = [((rank - 1) // 2, rank) for rank in range(1, n)]
    tree = [(one, other, size) for up, down in edges for one, other in ((up, down), (down, up))]
    assert sum(number for *_, number in tree) == pytest.approx(n * size * float(wire_factor("all_reduce", n)))


@given(st.sampled_from(SCHEDULES), st.integers(1, 6), st.integers(12, 20), st.integers(2, 3))
def test_every_send_of_a_pipeline_has_its_receive(name: str, p: int, m: int, chunks: int) -> None:
    """Each F passes its result on, each B or I its gradient back; what crosses ranks is sent as often as it is received."""
    v = chunks if name in ("interleaved", "looped_bfs") else 2 if name in ("zero_bubble_v", "dualpipe_v") else 1
    schedule = pipeline_schedule(name, pp=p, micro_batches=m, virtual_stages=v)
    owner = schedule.stage_ranks()
    sent, received = Counter[tuple[str, int, int, int]](), Counter[tuple[str, int, int, int]]()
    for rank, actions in enumerate(schedule.ranks):
        for kind, at, chunk in actions:
            stage, step = schedule.stage(rank, chunk), 1 if kind == "F" else -1
            word = "forward" if kind == "F" else "backward"
            if kind != "W" and 0 <= stage + step < len(owner):
                sent[word, at, rank, owner[stage + step]] += rank != owner[stage + step]
            if kind != "W" and 0 <= stage - step < len(owner):
                received[word, at, owner[stage - step], rank] += rank != owner[stage - step]
    assert sent == received
    crossings = sum(a != b for a, b in pairwise(owner))
    assert sent.total() == 2 * m * crossings


@given(st.sampled_from(SCHEDULES), st.integers(1, 16), st.integers(1, 64), st.integers(2, 4))
def test_the_bubble_fraction_falls_with_micro_batches(name: str, p: int, m: int, chunks: int) -> None:
    v = chunks if name in ("interleaved", "looped_bfs") else 2 if name in ("zero_bubble_v", "dualpipe_v") else 1
    assert bubble_fraction(p, m + 1, v, SCHEDULES.index(name)) <= bubble_fraction(p, m, v, SCHEDULES.index(name))


@given(st.sampled_from(CLUSTERS), st.sampled_from(COLLECTIVES), st.floats(3.0, 10.0))
@settings(max_examples=40)
def test_more_ranks_are_never_faster(cluster: str, kind: Collective, exponent: float) -> None:
    """The same buffer among twice the ranks, except where the further ranks bring their node's NICs, or in a mesh their links, to a
    group that had fewer."""
    tiers, size = tiers_of(cluster), 10.0**exponent
    node = int(tiers.gpus[0])
    for stride in (1, 2, 4, node):
        for few, many in pairwise(n for n in (2, 4, 8, 16, 32, 64) if n * stride <= 8 * node):
            if few * stride < node and not tiers.is_switched[0]:
                continue
            if few * stride >= node and members_per_node(tiers, many, stride) > members_per_node(tiers, few, stride):
                continue
            seconds = [float(collective_s(tiers, kind, size, n, stride)) for n in (few, many)]
            assert seconds[1] >= seconds[0] * (1 - 1e-9), (stride, few, many, seconds)


@given(st.sampled_from(CLUSTERS), st.sampled_from(COLLECTIVES), st.floats(3.0, 10.0))
@settings(max_examples=40)
def test_more_bytes_and_more_distance_are_never_faster(cluster: str, kind: Collective, exponent: float) -> None:
    tiers, size = tiers_of(cluster), 10.0**exponent
    node = int(tiers.gpus[0])
    for ranks in (2, 4, 8):
        near, far = (float(collective_s(tiers, kind, size, ranks, stride)) for stride in (1, node))
        assert near <= far
        assert near <= float(collective_s(tiers, kind, 1.5 * size, ranks, 1))
        sent = [float(point_to_point_s(tiers, size, 2, stride)) for stride in (1, node)]
        assert sent[0] <= sent[1]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_curves_of_the_catalog_never_make_more_bytes_much_faster(cluster: str) -> None:
    """Time = size / rate between two measured points is no shorter than at the nearer of both: points dip by up to a tenth, what
    lies between them does not dip further."""
    machine = load_cluster(cluster)
    curves = [machine.node.intra.efficiency, machine.network.efficiency, *machine.gpu.gemm_efficiency.values()]
    for curve in curves:
        points = np.asarray(curve.sizes) / np.asarray(curve.fractions)
        for i, (low, high) in enumerate(pairwise(curve.sizes)):
            sizes = np.geomspace(low, high, 50)
            seconds = sizes / curve.at(sizes)
            assert (seconds >= min(points[i], points[i + 1]) * (1 - 1e-9)).all()
        assert (points[1:] >= points[:-1] * 0.9).all()
