"""Forms of a question: precisions and switches that the user allows, global batches of a range."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import Objective, search
from shardplan.planner.variants import NEAR_BEST, Answer, ask_all, batch_range, best_answer, forms

JOB = Job(seq=4096, global_batch=32, precision="bf16")


def test_a_range_of_batches() -> None:
    assert batch_range("512") == (512,)
    assert batch_range("512:2048") == (512, 1024, 2048)
    assert batch_range("48:100") == (48, 96, 100)
    for bad in ("x", "8:4", "0", "1:2:3", "4:"):
        with pytest.raises(InputError):
            batch_range(bad)


def test_forms_are_what_is_allowed() -> None:
    plain = list(forms(JOB, "fsdp2", (32,), ()))
    assert [(one.runtime_name, one.job.precision) for one in plain] == [("fsdp2", "bf16")]
    found = list(forms(JOB, "fsdp2", (32, 64), ("compile", "cuda_graph", "fp8", "qwz")))
    names = {one.runtime_name for one in found}
    assert names == {"fsdp2", "fsdp2+compile", "fsdp2+compile+cuda_graph"}  # CUDA graphs need compiled layers
    assert {one.job.precision for one in found} == {"bf16", "fp8"}
    assert len(found) == 3 * 2 * 2
    with pytest.raises(InputError, match="--allow"):
        list(forms(JOB, "fsdp2", (32,), ("turbo",)))


def answered(
    batches: tuple[int, ...], allow: tuple[str, ...] = (), objective: Objective = "throughput"
) -> list[Answer]:
    model, cluster = load_model("llama-3-8b"), load_cluster("h100-ib", gpus=16)
    return ask_all(
        list(forms(JOB, "fsdp2", batches, allow)),
        lambda form: search(model=model, job=form.job, cluster=cluster, runtime=form.runtime, objective=objective),
    )


def test_the_smallest_batch_within_reach_of_the_best() -> None:
    answers = answered((16, 64, 256, 1024))
    chosen = best_answer(answers, "throughput")
    rates = {
        one.form.job.global_batch: float(one.result.ranked.tokens_per_s[0]) for one in answers if one.result.ranked
    }
    near = [batch for batch, rate in rates.items() if rate * NEAR_BEST >= max(rates.values())]
    assert chosen.form.job.global_batch == min(near)
    assert min(near) < 1024


def test_the_best_precision_wins() -> None:
    chosen = best_answer(answered((64,), ("fp8",)), "throughput")
    assert chosen.form.job.precision == "fp8"


def test_where_nothing_fits_the_question_as_asked_is_told() -> None:
    small = Answer(
        form=next(iter(forms(replace(JOB, global_batch=3), "fsdp2", (3,), ()))),
        result=search(
            model=load_model("llama-3-405b"),
            job=JOB,
            cluster=load_cluster("h100-ib", gpus=8),
            runtime=load_runtime("fsdp2"),
        ),
    )
    assert small.result.ranked is None
    assert best_answer([small], "throughput") is small
    assert small.row()["layout"] is None
