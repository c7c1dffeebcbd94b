"""Spans and waits of a step: what is timed in which phase, and what of it others caused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shardplan.executor import phases  # noqa: E402
from shardplan.executor.phases import STAGE_WORK, StepClock, watch_stages  # noqa: E402


class Time:
    """What the clock reads, moved by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch) -> Time:
    moved = Time()
    monkeypatch.setattr(phases, "time", moved)
    return moved


class Stage:
    """One of a pipeline, which reduces gradients with others."""

    def __init__(self, clock: StepClock, hand: Time) -> None:
        self.clock, self.hand = clock, hand

    def forward_one_chunk(self) -> str:
        self.hand.now += 1.0
        return "output"

    def backward_one_chunk(self) -> None:
        self.hand.now += 2.0

    def perform_reduce_grad(self, factor: int) -> None:
        self.hand.now += factor
        with self.clock.waiting("dp"), self.clock.waiting("tp"):
            self.hand.now += 16.0


class Schedule:
    """With several stages a rank, none of which splits the backward."""

    def __init__(self, clock: StepClock, hand: Time) -> None:
        self._stages = [Stage(clock, hand), Stage(clock, hand)]


def test_the_work_of_stages_is_timed_without_the_waits_in_it(hand):
    clock = StepClock(torch.device("cpu"))
    schedule = Schedule(clock, hand)
    watch_stages(schedule, clock)
    clock.on = True
    for stage in schedule._stages:
        assert stage.forward_one_chunk() == "output"
        stage.backward_one_chunk()
        stage.perform_reduce_grad(4)
    # the wait inside a wait is part of it
    assert clock.read() == {"forward": 2.0, "backward": 12.0, "optimizer": 0.0, "dp": 32.0}
    assert clock.read() == dict.fromkeys(("forward", "backward", "optimizer"), 0.0)


def test_a_clock_that_is_off_times_nothing(hand):
    clock = StepClock(torch.device("cpu"))
    schedule = Schedule(clock, hand)
    watch_stages(schedule, clock)
    schedule._stages[0].backward_one_chunk()
    assert clock.read() == dict.fromkeys(("forward", "backward", "optimizer"), 0.0)


def test_every_watched_method_is_one_of_torch():
    from torch.distributed.pipelining import PipelineStage

    assert [name for name in STAGE_WORK if not hasattr(PipelineStage, name)] == []
