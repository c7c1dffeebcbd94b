"""Chunks of unequal length on the ranks of a pipeline: the closed form against the replay of the schedule."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from shardplan.costmodel.layout import SCHEDULES, V_PLACED, Layout, layout_table
from shardplan.costmodel.pipeline import bubble_share, uneven_chunks_s
from shardplan.costmodel.schedule_replay import replay
from shardplan.costmodel.schedules import PipelineSchedule, pipeline_schedule

PASSES = (0.33, 0.43, 0.24)
"""F, I and W of a layer."""


def closed(schedule: str, p: int, v: int, m: int, chunks: NDArray[np.float64]) -> float:
    """Seconds of the pipeline as `pace.pipeline_pace` has them."""
    rank = np.tile(np.arange(p), v)
    if schedule in V_PLACED:
        rank[p:] = rank[p:][::-1]
    stages = np.bincount(rank, weights=chunks)
    by_number = chunks.reshape(v, p).mean(axis=1) / chunks.mean()
    uneven = np.array([[by_number.max(), by_number.min()]])
    layout = layout_table([Layout(pp=p, virtual_stages=v, schedule=schedule)])
    weight = float(bubble_share(SCHEDULES.index(schedule), p, m, v, PASSES)) / (p - 1) / v
    longest = 1.0 if schedule in V_PLACED else uneven[0, 0]
    late = uneven_chunks_s(layout, np.array([float(m)]), uneven, np.array([stages.mean()]), np.array([stages.max()]))
    return float(m * stages.max() + weight * (stages.sum() - stages.max()) * longest + late[0])


def replayed(lists: PipelineSchedule, chunks: NDArray[np.float64]) -> float:
    """Seconds of the replay."""
    f, i, w = (chunks * part for part in PASSES)
    return replay(lists, forward_s=f, input_grad_s=i, weight_grad_s=w).step_s


CASES = [
    (layers, p, v) for layers in (32, 80, 96, 126) for p in (4, 8, 16, 32) for v in (2, 3, 4, 5, 8) if p * v < layers
]


@pytest.mark.parametrize(("schedule", "mean", "most"), [("interleaved", 0.015, 0.05), ("looped_bfs", 0.005, 0.015)])
def test_layers_that_do_not_divide(schedule: str, mean: float, most: float) -> None:
    """Remainders on the earliest chunks, as runtimes place them."""
    off = []
    for layers, p, v in CASES:
        each, more = divmod(layers, p * v)
        chunks = np.repeat([each + 1.0, each], [more, p * v - more])
        for m in (p, 2 * p, 4 * p, 8 * p) if p * v <= 64 else (4 * p,):
            lists = pipeline_schedule(schedule, pp=p, micro_batches=m, virtual_stages=v)
            off.append(closed(schedule, p, v, m, chunks) / replayed(lists, chunks) - 1.0)
    assert float(np.mean(np.abs(off))) <= mean
    assert float(np.max(np.abs(off))) <= most


@pytest.mark.parametrize(
    ("rounds", "mean", "short", "long"), [(1, 0.075, 0.10, 0.21), (4, 0.04, 0.16, 0.11), (16, 0.03, 0.19, 0.03)]
)
def test_cuts_as_the_planner_makes_them(rounds: int, mean: float, short: float, long: float) -> None:
    """One layer more on the first ranks, fewer on the last: the longer chunks of a rank come first, those of the first rank last."""
    off = []
    for p, v in ((4, 2), (8, 2), (4, 4), (8, 3), (16, 2)):
        lists = pipeline_schedule("interleaved", pp=p, micro_batches=rounds * p, virtual_stages=v)
        for each, more, fewer in product(range(v, 4 * v), (1, p // 4, p // 2, p - 1), (0, 1, 2)):
            ranks = [each + (rank < more) for rank in range(p - 1)] + [max(each - fewer, v)]
            turns = [[held // v + (turn < held % v) for turn in range(v)] for held in ranks]
            turns[0].reverse()
            chunks = np.array(turns, dtype=np.float64).T.ravel()
            off.append(closed("interleaved", p, v, rounds * p, chunks) / replayed(lists, chunks) - 1.0)
    assert float(np.mean(np.abs(off))) <= mean
    assert min(off) >= -short and max(off) <= long


@pytest.mark.parametrize(("schedule", "mean", "most"), [("zero_bubble_v", 0.019, 0.07), ("dualpipe_v", 0.021, 0.092)])
def test_the_odd_layer_of_a_v(schedule: str, mean: float, most: float) -> None:
    """On the way down, or in turn on both ways: the step goes by the mean chunk, as by the longest it would be longer than replays."""
    off, by_longest = list[float](), list[float]()
    for p, times, each in product((4, 8, 16), (2, 4, 8), (2, 3, 5)):
        lists = pipeline_schedule(schedule, pp=p, micro_batches=times * p, virtual_stages=2)
        for odd, in_turn in product((p // 4, p // 2, p), (False, True)):
            down = [each + (rank < odd and not (in_turn and rank % 2)) for rank in range(p)]
            up = [each + (rank < odd and bool(in_turn and rank % 2)) for rank in range(p)]
            chunks = np.array([*down, *reversed(up)], dtype=np.float64)
            step_s, lengths = replayed(lists, chunks), np.array([sum(down), sum(up)])
            off.append(closed(schedule, p, 2, times * p, chunks) / step_s - 1.0)
            bubble = float(bubble_share(SCHEDULES.index(schedule), p, times * p, 2, PASSES)) / (p - 1) / 2
            others = chunks.sum() - max(a + b for a, b in zip(down, up, strict=True))
            by_longest.append(off[-1] + bubble * others * (lengths.max() / lengths.mean() - 1.0) / step_s)
    assert float(np.mean(np.abs(off))) <= mean
    assert float(np.max(np.abs(off))) <= most
    assert abs(float(np.mean(off))) < abs(float(np.mean(by_longest)))


def test_two_and_one_layers_in_turn() -> None:
    """48 layers on 16 ranks of two chunks: once full, a round of 16 micro-batches loses the time of 13 layers, and so does the replay."""
    chunks = np.repeat([2.0, 1.0], 16)
    few, many = (pipeline_schedule("interleaved", pp=16, micro_batches=m, virtual_stages=2) for m in (64, 128))
    assert (replayed(many, chunks) - replayed(few, chunks)) / 4 == pytest.approx(16 * 3.0 + 13.0, rel=0.002)
    assert (closed("interleaved", 16, 2, 128, chunks) - closed("interleaved", 16, 2, 64, chunks)) / 4 == pytest.approx(
        61.0
    )
