"""Pipeline schedules: the action lists, their replay, and the closed forms that stand for the replay."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardplan.costmodel.layout import SCHEDULES
from shardplan.costmodel.pipeline import bubble_fraction, bubble_share, in_flight
from shardplan.costmodel.schedule_replay import Replay, replay
from shardplan.costmodel.schedules import Action, PipelineSchedule, pipeline_schedule
from shardplan.hw_profiles.errors import InputError

FloatArray = NDArray[np.float64]

SPLIT = ("zero_bubble", "zero_bubble_v", "dualpipe_v")
CHUNKS = {
    "gpipe": (1,),
    "1f1b": (1,),
    "interleaved": (1, 2, 3, 4),
    "looped_bfs": (1, 2, 3),
    "zero_bubble": (1,),
    "zero_bubble_v": (2,),
    "dualpipe_v": (2,),
}
GRID = [
    (name, p, m, v)
    for name in SCHEDULES
    for v in CHUNKS[name]
    for p in (1, 2, 3, 4, 7, 8, 16)
    for m in sorted(
        {1, 2, 3, 5, p, p + 1, (4 * p + 1) // 3, 3 * p // 2 + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p + 2, 8 * p}
    )
    if name != "dualpipe_v" or m >= 2 * p
]


def timed(
    schedule: PipelineSchedule, forward: float = 1.0, inputs: float = 1.0, weights: float = 1.0, transfer: float = 0.0
) -> Replay:
    """Replay with equal stages."""
    stages = schedule.pp * schedule.virtual_stages
    return replay(
        schedule,
        forward_s=[forward] * stages,
        input_grad_s=[inputs] * stages,
        weight_grad_s=[weights] * stages,
        transfer_s=transfer,
    )


@st.composite
def schedules(draw: st.DrawFn) -> PipelineSchedule:
    name = draw(st.sampled_from(SCHEDULES))
    p = draw(st.integers(1, 7))
    m = draw(st.integers(2 * p if name == "dualpipe_v" else 1, 24))
    return pipeline_schedule(name, pp=p, micro_batches=m, virtual_stages=draw(st.sampled_from(CHUNKS[name])))


@st.composite
def timings(draw: st.DrawFn) -> tuple[PipelineSchedule, dict[str, list[float]]]:
    schedule = draw(schedules())
    stages = schedule.pp * schedule.virtual_stages
    seconds = st.lists(st.floats(0.0, 4.0), min_size=stages, max_size=stages)
    return schedule, {name: draw(seconds) for name in ("forward_s", "input_grad_s", "weight_grad_s")}


def test_one_f_one_b_of_two_ranks() -> None:
    first, last = pipeline_schedule("1f1b", pp=2, micro_batches=3).ranks
    assert [f"{a.kind}{a.micro_batch}" for a in first] == ["F0", "F1", "B0", "F2", "B1", "B2"]
    assert [f"{a.kind}{a.micro_batch}" for a in last] == ["F0", "B0", "F1", "B1", "F2", "B2"]


def test_replay_of_one_f_one_b_by_hand() -> None:
    """F 1 s, B 2 s, 0.5 s a transfer: rank 0 waits for F on rank 1 (1.5 to 2.5), its B (to 4.5), the way back (to 5)."""
    found = timed(pipeline_schedule("1f1b", pp=2, micro_batches=2), transfer=0.5)
    assert found.start_s[0].tolist() == [0.0, 1.0, 5.0, 8.0]
    assert found.end_s[1].tolist() == [2.5, 4.5, 5.5, 7.5]
    assert found.step_s == 10.0
    assert found.busy_s.tolist() == [6.0, 6.0]
    assert found.bubble_s.tolist() == [4.0, 4.0]
    assert found.peak_in_flight.tolist() == [2, 1]


def test_placement() -> None:
    looped = pipeline_schedule("interleaved", pp=3, micro_batches=3, virtual_stages=2)
    assert looped.stage_ranks() == [0, 1, 2, 0, 1, 2]
    shaped = pipeline_schedule("zero_bubble_v", pp=3, micro_batches=3, virtual_stages=2)
    assert shaped.stage_ranks() == [0, 1, 2, 2, 1, 0]
    assert shaped.stage(0, 1) == 5


def test_the_turn_of_a_v_is_not_a_transfer() -> None:
    """Two ranks, four stages: stage 1 and 2 share rank 1, so one micro-batch crosses twice each way."""
    one = pipeline_schedule("zero_bubble_v", pp=2, micro_batches=1, virtual_stages=2)
    assert timed(one, transfer=1.0).step_s == pytest.approx(timed(one).step_s + 4.0)


@settings(max_examples=80, deadline=None)
@given(schedules())
def test_every_micro_batch_passes_every_stage_once(schedule: PipelineSchedule) -> None:
    done = Counter(
        (action.kind, action.micro_batch, schedule.stage(rank, action.chunk))
        for rank, actions in enumerate(schedule.ranks)
        for action in actions
    )
    assert set(done.values()) == {1}
    for at in range(schedule.micro_batches):
        for stage in range(schedule.pp * schedule.virtual_stages):
            kinds = {kind for kind in "FBIW" if (kind, at, stage) in done}
            assert kinds in ({"F", "B"}, {"F", "I", "W"})
            assert schedule.name in SPLIT or "B" in kinds


@settings(max_examples=80, deadline=None)
@given(timings(), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_replay_respects_work_and_transfers(
    timing: tuple[PipelineSchedule, dict[str, list[float]]], transfer: float, more: float
) -> None:
    schedule, seconds = timing
    found = replay(schedule, **seconds, transfer_s=transfer)
    assert found.step_s >= found.busy_s.max() - 1e-9
    assert (found.bubble_s >= -1e-9).all()
    assert found.busy_s.sum() == pytest.approx(schedule.micro_batches * sum(map(sum, seconds.values())))
    for start, end in zip(found.start_s, found.end_s, strict=True):
        assert (start[1:] >= end[:-1]).all()
    assert replay(schedule, **seconds, transfer_s=transfer + more).step_s >= found.step_s


@settings(max_examples=40, deadline=None)
@given(timings(), st.floats(0.0, 3.0))
def test_replay_respects_dependencies(timing: tuple[PipelineSchedule, dict[str, list[float]]], transfer: float) -> None:
    schedule, seconds = timing
    found = replay(schedule, **seconds, transfer_s=transfer)
    span: dict[tuple[str, int, int], tuple[float, float]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for action, start, end in zip(actions, found.start_s[rank], found.end_s[rank], strict=True):
            kind = "B" if action.kind == "I" else action.kind
            span[kind, action.micro_batch, schedule.stage(rank, action.chunk)] = (start, end)
    owner = schedule.stage_ranks()
    for (kind, at, stage), (start, _) in span.items():
        needed = [("B", stage)] if kind == "W" else [("F", stage)] if kind == "B" else []
        neighbour = stage - 1 if kind == "F" else stage + 1
        if kind != "W" and 0 <= neighbour < len(owner):
            needed.append((kind, neighbour))
        for before, other in needed:
            assert start >= span[before, at, other][1] + (0.0 if owner[stage] == owner[other] else transfer)


@given(st.integers(1, 8), st.integers(1, 24))
def test_one_f_one_b_holds_no_more_than_gpipe(p: int, m: int) -> None:
    late, early = (timed(pipeline_schedule(name, pp=p, micro_batches=m)) for name in ("1f1b", "gpipe"))
    assert (late.peak_in_flight <= early.peak_in_flight).all()
    assert late.step_s == early.step_s


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_forms_are_the_replay(name: str) -> None:
    """Equal stages, I = W = F: the bubble and the peak of every rank, exactly; ZB-V's bubble to 2 % of the step at p < m <= 1.5 p."""
    code = SCHEDULES.index(name)
    for _, p, m, v in (row for row in GRID if row[0] == name):
        found = timed(pipeline_schedule(name, pp=p, micro_batches=m, virtual_stages=v))
        case = f"{name} pp={p} micro_batches={m} virtual_stages={v}"
        expected = np.full(p, float(bubble_fraction(p, m, v, code)))
        within = 0.02 if name == "zero_bubble_v" and p < m <= 1.5 * p else 1e-12
        assert 1.0 + found.bubble_s / found.busy_s == pytest.approx(1.0 + expected, rel=within), case
        held = in_flight(code, p, np.arange(p), m, v)
        assert found.peak_in_flight / v == pytest.approx(held, abs=1e-12), case


@pytest.mark.parametrize(
    ("name", "within"), [("1f1b", 1e-9), ("zero_bubble", 1e-9), ("zero_bubble_v", 0.04), ("dualpipe_v", 0.04)]
)
def test_closed_forms_with_unequal_parts(name: str, within: float) -> None:
    """As transformers have them (I 1 to 1.6 F, W 0.4 to 1 F), few and many micro-batches, relative to the step."""
    random = np.random.default_rng(0)
    parts = np.stack([np.ones(20), random.uniform(1.0, 1.6, 20), random.uniform(0.4, 1.0, 20)], axis=1)
    _assert_closed_forms(name, parts, [(p, m) for p in (2, 4, 8) for m in (1, 3, 8, 12, 17, 32)], within)


@pytest.mark.parametrize(("name", "within"), [("1f1b", 1e-9), ("zero_bubble", 1e-9), *((n, 0.05) for n in SPLIT[1:])])
def test_closed_forms_with_any_parts(name: str, within: float) -> None:
    """F, I and W each between 0.5 and 3 s, relative to the step; in the first two also with fewer micro-batches than stages."""
    parts = np.random.default_rng(0).choice([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0], size=(60, 3))
    counts = [(p, m) for p in (2, 4, 8) for m in ((1, 3, 2 * p + 1) if within < 1e-6 else (2 * p + 1,))]
    _assert_closed_forms(name, parts, counts, within)


def _assert_closed_forms(name: str, parts: FloatArray, counts: Sequence[tuple[int, int]], within: float) -> None:
    code, v = SCHEDULES.index(name), CHUNKS[name][0]
    for p, m in counts:
        if name == "dualpipe_v" and m < 2 * p:
            continue
        schedule = pipeline_schedule(name, pp=p, micro_batches=m, virtual_stages=v)
        steps = np.array([timed(schedule, *row).step_s for row in parts])
        closed = parts.sum(axis=1) * (m * v + bubble_share(code, p, m, v, tuple(parts.T)))
        assert closed == pytest.approx(steps, rel=within), (p, m)


def test_published_comparison() -> None:
    """Qi et al.: ZB-H1's bubble is a third of 1F1B's at the same peak; ZB-V halves it again, waiting for the last rank's start."""
    p, m = 8, 32
    one, halved, shaped = (
        timed(pipeline_schedule(name, pp=p, micro_batches=m, virtual_stages=v), 2.0 / v, 2.0 / v, 2.0 / v)
        for name, v in (("1f1b", 1), ("zero_bubble", 1), ("zero_bubble_v", 2))
    )
    assert [float(found.bubble_s[0]) for found in (one, halved, shaped)] == [6.0 * 7, 2.0 * 7, 1.0 * 7]
    assert [found.peak_in_flight.max() / v for found, v in ((one, 1), (halved, 1), (shaped, 2))] == [8, 8, 8]
    own = [end[-1] - start[0] - m * 6.0 for start, end in zip(shaped.start_s, shaped.end_s, strict=True)]
    assert own == pytest.approx([0.0] * p), "zero bubble from each rank's own first action to its last"


def test_a_deadlock_names_the_action() -> None:
    right = pipeline_schedule("1f1b", pp=2, micro_batches=2)
    wrong = dataclasses.replace(
        right, ranks=((Action("F", 0, 0), Action("B", 0, 0), Action("B", 1, 0)), right.ranks[1])
    )
    with pytest.raises(InputError, match=r"B of micro-batch 1 on stage 0 \(rank 0, action 2\) waits for ever"):
        timed(wrong)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"name": "1f2b", "pp": 2, "micro_batches": 2}, "is unknown"),
        ({"name": "1f1b", "pp": 0, "micro_batches": 2}, "pp=0"),
        ({"name": "zero_bubble", "pp": 2, "micro_batches": 2, "virtual_stages": 2}, "virtual_stages=2"),
        ({"name": "zero_bubble_v", "pp": 2, "micro_batches": 2}, "virtual_stages=1"),
        ({"name": "dualpipe_v", "pp": 4, "micro_batches": 7, "virtual_stages": 2}, "7 micro-batches"),
    ],
)
def test_what_no_schedule_can_be_made_of(words: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        pipeline_schedule(**words)


def test_seconds_must_cover_the_stages() -> None:
    schedule = pipeline_schedule("1f1b", pp=2, micro_batches=2)
    with pytest.raises(InputError, match=r"weight_grad_s has shape \(1,\)"):
        replay(schedule, forward_s=[1, 1], input_grad_s=[1, 1], weight_grad_s=[1])
    with pytest.raises(InputError, match="transfer_s=-1"):
        timed(schedule, transfer=-1.0)


def test_a_large_pipeline_is_replayed_in_seconds() -> None:
    start = time.perf_counter()
    found = timed(pipeline_schedule("interleaved", pp=64, micro_batches=512, virtual_stages=4))
    assert found.step_s == 3.0 * (512 * 4 + 63)
    assert time.perf_counter() - start < 10.0


TORCH = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zero_bubble_v": "ScheduleZBVZeroBubble",
    "dualpipe_v": "ScheduleDualPipeV",
}


def torch_schedule(library: Any, name: str, p: int, m: int, v: int) -> PipelineSchedule:
    """The order torch computes, without processes or stages, as our actions."""
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    cls = getattr(library, TORCH[name])
    made = cls.__new__(cls)
    made.__dict__.update(pp_group_size=p, _n_microbatches=m, _num_stages=p * v, num_stages=p * v, n_local_stages=v)
    made.__dict__.update(_stages=[SimpleNamespace()] * v, number_of_rounds=max(1, m // p))
    made.microbatches_per_round = m // made.number_of_rounds
    single = v == 1 and name in ("gpipe", "1f1b")
    orders = made._get_pipeline_order() if single else [made._calculate_single_rank_operations(r) for r in range(p)]
    ranks: list[tuple[Action, ...]] = []
    for rank in range(p):
        plain = [part for action in orders[rank] if action is not None for part in (action.sub_actions or (action,))]
        ranks.append(
            tuple(
                Action(kinds[part.computation_type.name], part.microbatch_index, part.stage_index // p)  # type: ignore[arg-type]
                for part in plain
                if part.computation_type.name in kinds
            )
        )
    return PipelineSchedule(name=name, pp=p, virtual_stages=v, micro_batches=m, ranks=tuple(ranks))


@pytest.mark.parametrize("name", SCHEDULES)
def test_same_actions_as_torch_and_no_worse(name: str) -> None:
    """torch.distributed.pipelining: the same actions on every rank; step and peak of our order are not above those of its own."""
    library = pytest.importorskip("torch.distributed.pipelining.schedules")
    v = 3 if name in ("interleaved", "looped_bfs") else CHUNKS[name][0]
    for p, m in ((2, 4), (2, 9), (3, 6), (4, 8), (4, 10), (4, 16), (5, 15), (6, 30)):
        if m % (m // p) and name in ("interleaved", "zero_bubble"):
            continue  # torch refuses
        ours, theirs = (
            pipeline_schedule(name, pp=p, micro_batches=m, virtual_stages=v),
            torch_schedule(library, name, p, m, v),
        )
        if name == "1f1b":  # torch 2.13 prints the last rank's forwards from micro-batch 1 on; what it runs is right
            assert ours.ranks[:-1] == theirs.ranks[:-1]
            continue
        assert [Counter(actions) for actions in ours.ranks] == [Counter(actions) for actions in theirs.ranks]
        mine, other = timed(ours), timed(theirs)
        assert mine.step_s <= other.step_s
        assert (mine.peak_in_flight <= other.peak_in_flight).all()
