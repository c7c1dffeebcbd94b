"""A table that is embedding and head of a pipeline: what the cost model counts for both copies, and checkpoints of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.executor import measure
from shardplan.executor.launch import Recovery, run_plan
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.plan import Plan

TIED = load_model("qwen2.5-0.5b")
APART = dataclasses.replace(TIED, tied_embeddings=False)
TABLE = TIED.vocab * TIED.hidden
V = "schedule=zero_bubble_v virtual_stages=2"


def estimated(words: str, model: Model = TIED, *more: str):
    layouts = [parse_layout(one) for one in (words, *more)]
    return estimate(
        model=model,
        job=Job(seq=1024, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=layouts[0].gpus),
        layouts=layout_table(layouts),
        runtime=load_runtime("shardplan"),
    )


def memory(words: str, model: Model) -> list[float]:
    """Bytes of parameters of the ranks that can be the worst."""
    return list(estimated(words, model).stages["parameters"][0])


@pytest.mark.parametrize("words", ["pp=4 zero=1", f"pp=4 zero=1 {V}"])
def test_both_ends_of_a_pipeline_hold_the_whole_table(words: str) -> None:
    assert TIED.tied_embeddings
    assert memory(words, TIED) == pytest.approx(memory(words, APART))
    assert memory("zero=1", TIED)[0] < memory("zero=1", APART)[0]


def test_the_exchange_is_of_the_shard_that_a_rank_holds() -> None:
    """A table of fp32 gradients over NVLink, about an eighth of it where eight ranks share it, nothing where one rank holds both."""

    def exchanged(words: str) -> float:
        """Seconds beyond those of the same stages without a tie."""
        tied, apart = (float(estimated(words, model).time["dp_exposed_s"][0]) for model in (TIED, APART))
        return tied - apart

    alone, shared, in_v = exchanged("pp=2"), exchanged("dp=8 pp=2 zero=1"), exchanged(f"pp=2 {V}")
    assert 4 * TABLE / 450e9 < alone < 4 * TABLE / 20e9
    assert alone / 12 < shared < alone
    assert in_v == 0


def test_tied_pipelines_are_planned() -> None:
    for words in ("pp=2", f"pp=2 {V}", "dp=2 tp=2 pp=2 zero=3"):
        layout = parse_layout(words)
        cluster = load_cluster("h100-ib", gpus=layout.gpus)
        at = Setting(model=TIED, job=Job(seq=1024, global_batch=64), cluster=cluster, runtime=load_runtime("shardplan"))
        assert rejections(at, layout)[0] == []


def test_a_layout_beside_others_is_estimated_as_alone() -> None:
    """Those with explicit stages are estimated apart from the rest, with the same constants."""
    uneven, even = "pp=4 zero=1 stage_layers=7,7,6,4", "pp=4 zero=1"
    both = estimated(uneven, TIED, even)
    for row, words in enumerate((uneven, even)):
        assert float(both.step_s[row]) == float(estimated(words).step_s[0])


def trained(folder: Path, words: str, **recovery) -> tuple[Path, dict[int, float]]:
    """The run folder and the losses by step of eight steps of a small model."""
    layout, tiny = parse_layout(words), load_model("tiny")
    plan = Plan(
        model=dataclasses.replace(tiny, tied_embeddings=True),
        job=Job(seq=32, global_batch=4, precision="fp32"),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={"time": {"step_s": 0.1}, "throughput": {"tokens_per_s": 1.0}, "memory": {"stages": []}},
        search={},
        digests={},
        shardplan_version="0",
    )
    plan.write(folder.with_suffix(".json"))
    outcome = run_plan(
        folder.with_suffix(".json"),
        device="cpu",
        steps=8,
        on_step=lambda _: None,
        out=folder,
        recovery=Recovery(checkpoint_every=4, **recovery),
    )
    assert outcome.error is None, (outcome.folder / "log.txt").read_text()[-3000:]
    return outcome.folder, {record.step: record.loss for record in measure.read_records(outcome.folder)[0]}


@pytest.mark.distributed
def test_a_table_tied_across_stages_is_saved_once_and_loaded_into_both_copies(tmp_path: Path) -> None:
    """From the ends of a pipeline to one rank that holds both, and to none that has copies."""
    pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.checkpoint import CheckpointReader

    folder, losses = trained(tmp_path / "whole", "pp=2")
    saved = folder / "checkpoints" / "step-00000004"
    names = set(CheckpointReader(saved).read_metadata().state_dict_metadata)
    assert "model.embedding.tokens.weight" in names
    assert not [name for name in names if "head" in name]
    for at, words in enumerate((f"pp=2 {V}", "dp=2 zero=3")):
        _, again = trained(tmp_path / f"resumed-{at}", words, resume=saved)
        assert again == pytest.approx({step: loss for step, loss in losses.items() if step > 4}, rel=1e-6), words
