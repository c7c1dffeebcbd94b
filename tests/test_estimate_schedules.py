"""Schedules inside the estimate: which layouts they allow, their bubble and memory, what a V places where."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import SCHEDULES, SPLIT_BACKWARD, V_PLACED, layout_table, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.runtime_document import runtime_names
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import search
from shardplan.planner.space import parse_wishes

NEW = ("looped_bfs", "zero_bubble", "zero_bubble_v", "dualpipe_v")
CHUNKS = {"interleaved": 2, "looped_bfs": 2, "zero_bubble_v": 2, "dualpipe_v": 2}
BASE = "dp=2 tp=8 pp=4 zero=1"


def words(schedule: str) -> str:
    """BASE under a schedule with the chunks it needs."""
    return f"{BASE} schedule={schedule} virtual_stages={CHUNKS.get(schedule, 1)}"


def one(layout: str, *, model: str = "llama-3-70b", batch: int = 64) -> Estimates:
    row = parse_layout(layout)
    job, cluster = Job(seq=8192, global_batch=batch), load_cluster("h100-ib", gpus=row.gpus)
    return estimate(model=load_model(model), job=job, cluster=cluster, layouts=row, runtime="megatron")


def broken(
    layout: str, *, runtime: str = "megatron", batch: int = 64, model: str = "llama-3-70b", device: str = "cuda"
) -> dict[str, str]:
    """Detail and remedy by rule."""
    row = parse_layout(layout)
    cluster = load_cluster("h100-ib", gpus=row.gpus)
    node = dataclasses.replace(cluster.node, gpu=dataclasses.replace(cluster.gpu, device=device))
    cluster = dataclasses.replace(cluster, node_runs=((node, cluster.nodes),))
    job = Job(seq=8192, global_batch=batch)
    setting = Setting(model=load_model(model), job=job, cluster=cluster, runtime=load_runtime(runtime))
    return {r.rule: f"{r.detail}; {r.remedy}" for r in rejections(setting, row)[0]}


def test_codes_of_plans_already_written_stay() -> None:
    assert SCHEDULES[:3] == ("gpipe", "1f1b", "interleaved")
    assert SCHEDULES[3:] == NEW


@pytest.mark.parametrize("schedule", NEW)
@pytest.mark.parametrize("runtime", runtime_names())
def test_runtimes_refuse_by_name_what_they_lack(schedule: str, runtime: str) -> None:
    lacks = schedule not in load_runtime(runtime).abilities.schedules
    found = broken(words(schedule), runtime=runtime)
    assert ("runtime-schedule" in found) == lacks
    assert not lacks or f"{runtime!r} has no schedule={schedule}" in found["runtime-schedule"]


@pytest.mark.parametrize(
    ("layout", "batch", "rule", "told"),
    [
        (f"{BASE} schedule=zero_bubble_v", 64, "v-placement-chunks", "virtual_stages=1; use virtual_stages=2"),
        (f"{BASE} schedule=dualpipe_v virtual_stages=4", 64, "v-placement-chunks", "use virtual_stages=2"),
        (words("dualpipe_v"), 14, "dualpipe-v-micro-batches", "with 7 micro-batches; use 8 micro-batches or more"),
        (
            f"{BASE} schedule=looped_bfs",
            64,
            "virtual-stages-interleaved",
            "looped_bfs need pp > 1 and virtual_stages > 1",
        ),
        (f"{BASE} schedule=zero_bubble virtual_stages=2", 64, "virtual-stages-interleaved", "virtual_stages=1"),
        (
            "dp=8 tp=8 schedule=zero_bubble_v virtual_stages=2",
            64,
            "virtual-stages-interleaved",
            "pp=1 virtual_stages=2",
        ),
    ],
)
def test_chunks_and_micro_batches(layout: str, batch: int, rule: str, told: str) -> None:
    assert told in broken(layout, batch=batch)[rule]


@pytest.mark.parametrize("schedule", NEW)
def test_well_formed_layouts_lack_only_the_runtime(schedule: str) -> None:
    assert set(broken(words(schedule))) == {"runtime-schedule"}


def test_which_runtime_has_which_schedule() -> None:
    """DeepSpeed's engine runs TrainSchedule, 1F1B; nanotron `pp_engine` 1f1b or afab; Megatron-Core 1F1B and its interleaving;
    torch.distributed.pipelining all of them, but not the ones that split the backward over compiled stages."""
    has = {name: set(load_runtime(name).abilities.schedules) for name in (*runtime_names(), "fsdp2+compile")}
    assert has["deepspeed"] == has["megatron-deepspeed"] == {"1f1b"}
    assert has["nanotron"] == {"gpipe", "1f1b"}
    assert has["megatron"] == {"1f1b", "interleaved"}
    assert has["fsdp2"] == set(SCHEDULES)
    assert has["fsdp2+compile"] == set(SCHEDULES) - set(SPLIT_BACKWARD)


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_torch_splits_the_backward_only_where_gradients_are_right(schedule: str) -> None:
    """With DDP (pytorch#144530) hooks are skipped, with parameters resharded after the forward (torch 2.11 and 2.13, executed)
    gradients are missing; sharded optimizer states and gradients work, and so does no data parallelism."""

    def zero(stage: int, dp: int = 2) -> dict[str, str]:
        chunks = CHUNKS.get(schedule, 1)
        return broken(f"dp={dp} tp=8 pp=4 zero={stage} schedule={schedule} virtual_stages={chunks}", runtime="fsdp2")

    assert not zero(1)
    assert not zero(2)
    assert not zero(0, dp=1)
    assert "hooks that reduce gradients are skipped; use zero=1 or 2" in zero(0)["split-backward-zero"]
    assert "resharded parameters get no gradient; use zero=1 or 2" in zero(3)["split-backward-zero"]
    assert not broken(f"{BASE[:-1]}3 schedule=interleaved virtual_stages=2", runtime="fsdp2")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_torch_recomputes_more_than_once_when_it_splits_the_backward(recompute: str) -> None:
    """Forwards of a checkpointed layer per micro-batch, counted with torch 2.13 on two gloo ranks: 2 under looped_bfs, 4 under
    zero_bubble; pytorch/torchtitan#773 measured 13 tokens/s where interleaved takes 128."""
    for schedule in NEW:
        found = broken(f"{words(schedule)} recompute={recompute}", runtime="fsdp2")
        assert ("split-backward-recompute" in found) == (schedule in SPLIT_BACKWARD)
        assert set(found) <= {"split-backward-recompute"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_v_schedules_hang_over_gloo(schedule: str) -> None:
    """Torch 2.11: receive timeout of both V schedules with 2 and 4 ranks; the others run."""
    found = broken(words(schedule), runtime="fsdp2", device="cpu")
    assert ("schedule-needs-gpu" in found) == (schedule in V_PLACED)


def test_rounds_of_zero_bubble() -> None:
    """torch ScheduleInterleavedZeroBubble: the micro-batches divide into max(1, m // pp) rounds; 3, 4, 6 of 2 and 9 of 4 ranks."""
    for micro_batches, refused in ((4, False), (5, False), (7, False), (8, False), (9, True), (12, False), (14, True)):
        found = broken(words("zero_bubble"), runtime="fsdp2", batch=2 * micro_batches)
        assert ("zero-bubble-rounds" in found) == refused, micro_batches


@pytest.mark.parametrize("schedule", NEW)
def test_every_schedule_can_be_asked_for(schedule: str) -> None:
    job, cluster = Job(seq=8192, global_batch=64), load_cluster("h100-ib", gpus=64)
    inputs = {"model": load_model("llama-3-70b"), "job": job, "cluster": cluster, "runtime": "fsdp2"}
    asked = search(**inputs, wishes=parse_wishes(f"pp=4 schedule={schedule}")).ranked
    assert asked is not None
    assert (asked.layouts.schedule == SCHEDULES.index(schedule)).all()


def test_the_search_looks_at_every_schedule_of_the_runtime() -> None:
    """All are ranked unasked but gpipe, which 1f1b outdoes where it may be had."""
    at = Setting(
        model=load_model("llama-3-8b"),
        job=Job(seq=2048, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=8),
        runtime=load_runtime("fsdp2"),
    )

    def ranked(forbid: str = "") -> set[str]:
        found = search(
            model=at.model,
            job=at.job,
            cluster=at.cluster,
            runtime=at.runtime,
            wishes=parse_wishes("dp=2 pp=4", [forbid]),
        )
        assert found.ranked is not None
        assert (found.slower > 0) == (not forbid)
        return {SCHEDULES[code] for code in np.unique(found.ranked.layouts.schedule[found.ranked.layouts.pp > 1])}

    assert ranked() == set(SCHEDULES) - {"gpipe"}
    assert ranked("schedule=1f1b") == set(SCHEDULES) - {"1f1b"}


def test_breadth_first_takes_any_number_of_micro_batches() -> None:
    assert "interleaved-rounds" in broken(words("interleaved"), batch=2 * 7)
    assert "interleaved-rounds" not in broken(words("looped_bfs"), batch=2 * 7)


def test_a_layout_without_meaning_has_no_estimate() -> None:
    with pytest.raises(InputError, match="v-placement-chunks"):
        one(f"{BASE} schedule=zero_bubble_v")


def test_bubbles_in_the_order_of_the_papers() -> None:
    bubble = {name: float(one(words(name)).time["bubble_s"][0]) for name in SCHEDULES}
    assert bubble["gpipe"] == bubble["1f1b"]
    assert bubble["looped_bfs"] == bubble["interleaved"]
    assert 0 < bubble["zero_bubble_v"] < bubble["zero_bubble"] < bubble["1f1b"]
    assert bubble["zero_bubble_v"] <= bubble["dualpipe_v"] < bubble["interleaved"]


def test_weight_gradients_fill_a_part_of_the_bubble() -> None:
    """F + I - W of F, I, W waits, a third where all are equal; W lacks attention and element-wise operators, and full recompute adds a
    forward that waits too. No tensor-parallel communication: tp=1."""
    left = {}
    for recompute in ("none", "full"):
        alone = f"dp=16 pp=4 zero=1 recompute={recompute}"
        halved, plain = (one(f"{alone} schedule={name}").time["bubble_s"] for name in ("zero_bubble", "1f1b"))
        left[recompute] = float(halved[0] / plain[0])
    assert 1 / 3 < left["none"] < 1 / 2 < left["full"] < 2 / 3


def test_breadth_first_with_few_micro_batches_waits_at_every_chunk() -> None:
    """p - 1 + (v - 1)(p - m) hops: 3 + 2 with two micro-batches on four ranks."""
    few, many = (one(words("looped_bfs"), batch=batch).time["bubble_s"][0] for batch in (4, 64))
    assert few == pytest.approx(many * 5 / 3, rel=0.02)


def test_activations_in_flight() -> None:
    held = {name: one(words(name)).stages["activations"][0] for name in SCHEDULES}
    assert held["looped_bfs"] == pytest.approx(held["gpipe"])
    assert held["zero_bubble"][0] == pytest.approx(held["1f1b"][0])
    assert held["zero_bubble"][3] > held["1f1b"][3]
    assert held["zero_bubble_v"].max() < held["dualpipe_v"].max() < held["interleaved"].max() * 1.1


def test_a_v_places_embedding_and_head_on_rank_0() -> None:
    split = f"stage_layers={','.join(map(str, (9, 10, 10, 11, 10, 10, 10, 10)))}"
    looped = one(f"{words('interleaved')} {split}")
    shaped = one(f"{words('zero_bubble_v')} {split}")
    assert looped.stage_layer_counts[0].tolist() == [19, 20, 20, 21]
    assert shaped.stage_layer_counts[0].tolist() == [19, 20, 20, 21]
    uneven = one(f"{words('zero_bubble_v')} stage_layers=1,2,3,4,10,20,30,10")
    assert uneven.stage_layer_counts[0].tolist() == [11, 32, 23, 14]
    parameters = shaped.stages["parameters"][0]
    assert parameters[0] > parameters[3]
    assert parameters.sum() == pytest.approx(looped.stages["parameters"][0].sum())


def test_a_v_holds_a_tied_embedding_once() -> None:
    """A tied embedding is also the head: held twice over looped stages, once on rank 0 of a V."""
    tied = dataclasses.replace(load_model("llama-3-70b"), tied_embeddings=True)
    job, cluster = Job(seq=8192, global_batch=64), load_cluster("h100-ib", gpus=64)
    total = {
        name: float(
            estimate(model=tied, job=job, cluster=cluster, layouts=parse_layout(words(name)), runtime="megatron")
            .stages["parameters"]
            .sum()
        )
        for name in ("interleaved", "zero_bubble_v")
    }
    assert total["zero_bubble_v"] < total["interleaved"]
    assert "tied-embeddings-across-stages" not in broken(words("zero_bubble_v"), runtime="fsdp2", model="gpt2")


def test_one_row_equals_many() -> None:
    rows = [parse_layout(words(name)) for name in SCHEDULES]
    job, cluster = Job(seq=8192, global_batch=64), load_cluster("h100-ib", gpus=64)
    many = estimate(
        model=load_model("llama-3-70b"), job=job, cluster=cluster, layouts=layout_table(rows), runtime="megatron"
    )
    alone = [one(words(name)) for name in SCHEDULES]
    assert many.step_s == pytest.approx(np.concatenate([row.step_s for row in alone]))
    assert many.device_peak_bytes == pytest.approx(np.concatenate([row.device_peak_bytes for row in alone]))
