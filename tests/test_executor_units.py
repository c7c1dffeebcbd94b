"""The executor's parts that need no process group: rank map, stages, data, initial values, measurements, refusals."""

from __future__ import annotations

import csv
import io
import json
import signal
from dataclasses import replace

import numpy as np
import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, parse_layout
from shardplan.costmodel.model import LayerKind, parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rank_groups import rank_coordinates
from shardplan.executor import measure
from shardplan.executor.check import refusals, shipped_text_refusals
from shardplan.executor.data import batch, load_text
from shardplan.executor.failure import failure
from shardplan.executor.launch import layout_slug
from shardplan.executor.measure import StepRecord
from shardplan.executor.progress import ProgressLine, summary
from shardplan.executor.recorder import RankRecorder
from shardplan.hw_profiles.load import cluster_document
from shardplan.planner.plan import Plan

H100 = cluster_document("h100-ib")


def make_plan(words: str, **job_words) -> Plan:
    layout = parse_layout(words)
    job = Job(**{"seq": 64, "global_batch": 8, "precision": "bf16", **job_words})
    return Plan(
        model=load_model("tiny"),
        job=job,
        cluster=H100,
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )


def refused_rules(plan: Plan, *, device: str = "cuda", cuda_devices: int = 8) -> list[str]:
    return [found.rule for found in refusals(plan, device=device, cuda_devices=cuda_devices)]


# --- data -----------------------------------------------------------------------------------------------------------


def test_text_is_a_megabyte_of_ascii():
    text = load_text()
    assert len(text) > 1_000_000
    assert text.max() < 128
    assert bytes(text[:54]) == b"In the beginning God created the heaven and the earth."


def test_every_split_of_the_global_batch_sees_the_same_sequences():
    text = load_text()
    inputs, targets = batch(text, seq=16, seed=0, step=3, first=0, count=4)
    halves = [batch(text, seq=16, seed=0, step=3, first=first, count=2)[0] for first in (0, 2)]
    assert np.array_equal(inputs, np.concatenate(halves))
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert not np.array_equal(inputs, batch(text, seq=16, seed=0, step=4, first=0, count=4)[0])


# --- mesh, stages, model (torch, one process) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "dp=4 tp=2 pp=2 zero=3",
        "dp=4 dp_shard=2 tp=2 zero=1",
        "dp=2 pp=4 zero=0",
        "dp=4 dp_shard=2 tp=2 pp=2 zero=3 order=dp-tp-cp-pp",
        "dp=2 tp=2 pp=2 cp=2 zero=1 order=tp-cp-pp-dp",
        "dp=4 dp_shard=2 tp=2 pp=2 zero=2 order=pp-cp-dp-tp",
    ],
)
def test_mesh_follows_the_rank_map_of_the_cost_model(words):
    pytest.importorskip("torch")
    from shardplan.executor.mesh import MESH_AXES, mesh_ranks

    layout = parse_layout(words)
    ranks = mesh_ranks(layout).numpy()
    at = {axis: np.empty(layout.gpus, dtype=int) for axis in MESH_AXES}
    for place, rank in np.ndenumerate(ranks):
        for axis, coordinate in zip(MESH_AXES, place, strict=True):
            at[axis][rank] = coordinate
    expected = rank_coordinates(layout)
    assert np.array_equal(at["dp_replicate"] * layout.shard_ranks + at["dp_shard"], expected["dp"])
    assert all(np.array_equal(at[axis], expected[axis]) for axis in ("pp", "cp", "tp"))


def test_chunks_follow_the_layout_then_the_prediction_then_the_default():
    pytest.importorskip("torch")
    from shardplan.executor.pipeline import chunk_layers, chunks_of_rank, layers_before, parts

    layout = Layout(pp=2)
    predicted = {"memory": {"stages": [{"layers": 4}, {"layers": 3}]}}
    assert chunk_layers(replace(layout, stage_layers=(5, 2)), 7, predicted) == (5, 2)
    assert chunk_layers(layout, 7, {"memory": {"stages": [{"layers": 3}, {"layers": 4}]}}) == (3, 4)
    assert chunk_layers(layout, 7, {"memory": None}) == (4, 3)
    assert chunks_of_rank(Layout(pp=2, schedule="interleaved", virtual_stages=2), 1) == [1, 3]
    assert chunks_of_rank(Layout(pp=4, schedule="zero_bubble_v", virtual_stages=2), 1) == [1, 6]
    assert layers_before(Layout(pp=2, schedule="dualpipe_v", virtual_stages=2), (3, 2, 1, 1), 0) == [0, 3]
    first, last = parts((4, 3))
    assert (first.first, first.end, first.embedding, first.head) == (0, 4, True, False)
    assert (last.first, last.end, last.embedding, last.head) == (4, 7, False, True)


@pytest.mark.parametrize("name", ["tiny", "gpt2", "qwen2.5-0.5b", "mistral-nemo-12b", "phi-3-mini"])
def test_built_model_has_the_parameters_the_cost_model_counts(name):
    torch = pytest.importorskip("torch")
    from shardplan.executor.transformer import Transformer, whole

    model = load_model(name)
    with torch.device("meta"):
        built = Transformer(model, seq=64, part=whole(model))
    built.tie()
    assert sum(parameter.numel() for parameter in built.parameters()) == parameter_counts(model)["total"]


def test_a_part_gets_the_initial_values_of_the_whole():
    torch = pytest.importorskip("torch")
    from shardplan.executor.transformer import Part, build_transformer, whole

    model = load_model("tiny")
    options = {"seq": 64, "seed": 7, "device": torch.device("cpu")}
    everything = dict(build_transformer(model, part=whole(model), **options).named_parameters())
    part = build_transformer(model, part=Part(first=1, end=3, embedding=False), **options)
    assert "layers.2.attention.wo.weight" in dict(part.named_parameters())
    assert all(torch.equal(parameter, everything[name]) for name, parameter in part.named_parameters())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_plan_for_present_gpus_is_accepted():
    assert refused_rules(make_plan("dp=2 tp=2 pp=2 zero=3")) == []


@pytest.mark.parametrize(
    ("words", "job_words", "rule"),
    [
        ("dp=2 cp=2", {"seq": 66}, "cp-divides-seq"),
        ("dp=2 cp=2 cp_kind=all_gather attention=flash", {}, "context-attention"),
        ("tp=2 cp=8 cp_kind=ulysses", {}, "ulysses-divides-heads"),
        ("dp=2 zero=1 offload_optimizer=cpu", {}, "runtime-offload"),
        ("dp=1 tp=4", {}, "tp-divides-kv-heads"),
        ("dp=2", {"precision": "fp8"}, "runtime-precision"),
        ("dp=2", {"optimizer": "sgd"}, "runtime-optimizer"),
        ("dp=2", {"precision": "fp32", "grad_dtype": "bf16"}, "runtime-gradient-dtype"),
        ("dp=8 micro_batch=2", {}, "batch-divisible"),
        ("pp=4 dp=2 micro_batch=2", {}, "micro-batches-cover-stages"),
    ],
)
def test_what_cannot_be_executed_is_refused_by_name(words, job_words, rule):
    found = refusals(make_plan(words, **job_words), device="cuda", cuda_devices=8)
    assert rule in [one.rule for one in found]
    assert all(one.detail and one.remedy for one in found)


def test_models_that_cannot_be_executed_are_refused_by_name():
    plan = make_plan("dp=2 tp=2 pp=2")
    kind = plan.model.layers[0][0]
    experts = replace(kind, experts=4, experts_per_token=2)

    def refused_layers(layer: LayerKind, **changes) -> list[str]:
        spread = replace(plan, model=replace(plan.model, layers=((layer, 4),)), layout=parse_layout("dp=8 zero=1 ep=2"))
        return refused_rules(replace(spread, **changes))

    assert refused_layers(experts) == []
    assert refused_layers(replace(experts, router_bias=True)) == ["runtime-layer-parts"]
    assert refused_layers(replace(experts, shared_ffn=64)) == ["runtime-layer-parts"]
    assert refused_layers(experts, layout=parse_layout("dp=4 tp=2 zero=1 ep=2")) == ["ep-needs-sequence-parallel"]
    assert refused_layers(experts, layout=parse_layout("dp=4 tp=2 zero=1 etp=1 sequence_parallel=true")) == [
        "runtime-expert-tensor-parallel"
    ]
    assert "tp-divides-vocab" in refused_rules(replace(plan, model=replace(plan.model, vocab=257)))
    assert isinstance(kind, LayerKind)


def test_only_the_shipped_text_needs_a_vocabulary_of_256():
    plan = make_plan("dp=8")
    letters = replace(plan, model=replace(plan.model, vocab=65))
    assert refused_rules(letters) == []
    assert shipped_text_refusals(plan) == []
    (one,) = shipped_text_refusals(letters)
    assert "vocab=65 of " in one.detail
    assert "--job" in one.remedy


@pytest.mark.parametrize("schedule", ["zero_bubble_v", "dualpipe_v"])
def test_v_schedules_over_gloo_need_a_torch_that_does_not_hang(schedule):
    plan = make_plan(f"pp=2 schedule={schedule} virtual_stages=2")
    (old,) = refusals(plan, device="cpu", cuda_devices=0, torch="2.11.0+cu130")
    assert (old.rule, "2.11.0" in old.detail, "2.13" in old.remedy) == ("v-schedule-torch", True, True)
    assert refusals(plan, device="cpu", cuda_devices=0, torch="2.13.0+cpu") == []
    assert refusals(plan, device="cuda", cuda_devices=2, torch="2.11.0+cu130") == []


def test_missing_gpus_are_refused_unless_forced_onto_few_enough_processes():
    assert refused_rules(make_plan("dp=2"), cuda_devices=1) == ["cuda-devices"]
    assert refused_rules(make_plan("dp=2"), device="cpu", cuda_devices=0) == []
    many = make_plan("dp=512", global_batch=512)
    assert refused_rules(many, device="cpu", cuda_devices=0) == ["cpu-processes"]


# --- measurements -----------------------------------------------------------------------------------------------------


def step_record(step: int, **changes) -> StepRecord:
    values = {
        "loss": 6.0 - step,
        "grad_norm": 1.0,
        "step_s": 0.5,
        "tokens_per_s": 1024.0,
        "rss_bytes": 2**30,
        "max_loss": 7.0 - step,
    }
    return StepRecord(step=step, **{**values, **changes})


def write_ranks(folder, *, ranks: int, steps: int) -> None:
    for rank in range(ranks):
        with RankRecorder(folder, rank=rank) as recorder:
            for step in range(1, steps + 1):
                recorder.write(step_record(step, step_s=0.5 + 0.1 * rank, rss_bytes=2**30 * (rank + 1)))


def test_measurements_are_long_rows_with_torchtitans_names(tmp_path):
    write_ranks(tmp_path, ranks=2, steps=2)
    measure.write_measurements(tmp_path, measure.read_records(tmp_path), ranks=2)
    rows = list(csv.DictReader((tmp_path / "measurements.csv").open()))
    assert list(rows[0]) == ["step", "rank", "metric", "value", "unit"]
    assert len(rows) == 2 * 2 * 6
    by_key = {(row["step"], row["rank"], row["metric"]): (float(row["value"]), row["unit"]) for row in rows}
    assert by_key["2", "1", "loss_metrics/global_avg_loss"] == (4.0, "nats")
    assert by_key["2", "1", "loss_metrics/global_max_loss"] == (5.0, "nats")
    assert by_key["1", "1", "memory/max_rss(GiB)"] == (2.0, "GiB")
    assert by_key["1", "0", "throughput(tps)"] == (512.0, "tokens/s/rank")
    assert by_key["1", "0", "time_metrics/end_to_end(s)"] == (0.5, "s")


def test_the_scale_of_fp16_and_its_skipped_steps_are_told(tmp_path):
    skipped = step_record(1, grad_norm=None, loss_scale=65536.0, skipped_steps=1)
    with RankRecorder(tmp_path, rank=0) as recorder:
        recorder.write(skipped)
    records = measure.read_records(tmp_path)
    measure.write_measurements(tmp_path, records, ranks=1)
    found = {row["metric"]: row["value"] for row in csv.DictReader((tmp_path / "measurements.csv").open())}
    assert (found["loss_scale"], found["skipped_steps"]) == ("65536", "1")
    assert "grad_norm" not in found
    document = {"measured": measure.measured(records, tokens_per_step=1, warmup_steps=0)}
    document["predicted"] = measure.predicted({}, memory_kind="rss")
    document["ratio"] = measure.ratios(document["measured"], document["predicted"])
    assert "overflowed: 1" in summary({**document, "steps_done": 1, "warmup_steps": 0})
    assert "scale 65536 (1 skipped)" in ProgressLine(io.StringIO(), steps=3, prediction={}).line(skipped)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    write_ranks(tmp_path, ranks=1, steps=2)
    with measure.rank_file(tmp_path, 0).open("a") as file:
        file.write('{"step": 3, "los')
    assert [record.step for record in measure.read_records(tmp_path)[0]] == [1, 2]


def test_summary_takes_the_slowest_rank_and_the_fullest_rank(tmp_path):
    write_ranks(tmp_path, ranks=2, steps=4)
    found = measure.measured(measure.read_records(tmp_path), tokens_per_step=600, warmup_steps=1)
    assert found["step_s"] == pytest.approx(0.6)
    assert found["tokens_per_s"] == pytest.approx(1000)
    assert (found["peak_memory_bytes"], found["memory_kind"]) == (2 * 2**30, "rss")
    assert (found["first_loss"], found["last_loss"]) == (5.0, 2.0)


def test_memory_is_compared_with_the_prediction_that_means_the_same():
    prediction = {
        "time": {"step_s": 0.3},
        "throughput": {"tokens_per_s": 2000.0},
        "memory": {"allocated_peak_bytes": 1.0, "device_peak_bytes": 2.0},
    }
    assert measure.predicted(prediction, memory_kind="rss")["peak_memory_bytes"] == 2.0
    assert measure.predicted(prediction, memory_kind="allocated")["peak_memory_bytes"] == 1.0
    found = {"step_s": 0.6, "tokens_per_s": 1000.0, "peak_memory_bytes": 3}
    ratio = measure.ratios(found, measure.predicted(prediction, memory_kind="rss"))
    assert ratio == {"step_s": 2.0, "tokens_per_s": 0.5, "peak_memory_bytes": 1.5}


def test_a_run_without_steps_or_prediction_still_has_a_summary():
    found = measure.measured({}, tokens_per_step=1, warmup_steps=0)
    expected = measure.predicted({"time": None, "memory": None}, memory_kind=found["memory_kind"])
    document = {"measured": found, "predicted": expected, "ratio": measure.ratios(found, expected)}
    assert "step time" in summary({**document, "steps_done": 0, "warmup_steps": 0})


# --- failures and words -------------------------------------------------------------------------------------------------


def test_the_first_rank_that_raised_is_named(tmp_path):
    for rank, error in ((0, ValueError("the cause\nmore")), (1, RuntimeError("Connection closed by peer"))):
        with pytest.raises(type(error)), RankRecorder(tmp_path, rank=rank):
            raise error
    (tmp_path / "log.txt").write_text("  rank      : 1 (local_rank: 1)\n  exitcode  : 1 (pid: 7)\n")
    assert failure(tmp_path, 1, ranks=2).line == "rank 0: ValueError: the cause"


def test_a_killed_rank_is_named_before_those_it_dragged_along(tmp_path):
    with pytest.raises(RuntimeError), RankRecorder(tmp_path, rank=0):
        raise RuntimeError("Connection reset by peer")
    (tmp_path / "log.txt").write_text(
        "  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 6)\n"
        "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
    )
    assert failure(tmp_path, 1, ranks=2).line.startswith(f"rank 1 was killed by signal {int(signal.SIGKILL)} SIGKILL")


def test_a_run_that_never_started_shows_the_last_error_of_the_log(tmp_path):
    (tmp_path / "log.txt").write_text("starting\nModuleNotFoundError: No module named 'x'\nbye\n")
    assert failure(tmp_path, 1, ranks=2).line == "ModuleNotFoundError: No module named 'x'"
    (tmp_path / "log.txt").write_text("")
    assert failure(tmp_path, 7, ranks=1).line == "torchrun ended with exit code 7"


def test_run_folders_are_named_by_what_the_layout_changes():
    assert layout_slug(parse_layout("dp=2 tp=2 zero=3 sequence_parallel=true")) == "dp2-tp2-zero3-sequence_parallel"
    assert (
        layout_slug(parse_layout("pp=2 stage_layers=3,1 recompute=full:1")) == "dp1-pp2-recomputefull_1-stage_layers3_1"
    )


def test_plain_progress_tells_first_and_last_step_and_the_prediction(capsys):
    import sys

    progress = ProgressLine(sys.stdout, steps=100, prediction={"time": {"step_s": 0.25}, "memory": None})
    for step in range(1, 101):
        progress(step_record(step))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert "step   1/100" in lines[0]
    assert "500.0 ms (predicted 250.0 ms)" in lines[-1]
    assert "memory 1.00 GiB (predicted -)" in lines[-1]


def test_records_are_plain_json(tmp_path):
    write_ranks(tmp_path, ranks=1, steps=1)
    line = json.loads(measure.rank_file(tmp_path, 0).read_text())
    assert line["step"] == 1
    assert line["allocated_bytes"] is None


def test_grouped_keys_are_repeated_where_a_kernel_takes_none(monkeypatch):
    """torch's only fused attention of fp32 on a GPU; else the whole score matrix would be kept (2.3 GiB of four layers of 2,048 tokens)."""
    torch = pytest.importorskip("torch")
    from shardplan.executor import transformer

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, heads, 16, generator=generator, requires_grad=True) for heads in (8, 2, 2))
    wanted = transformer.causal_attention(q, k, v)
    gradients = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    monkeypatch.setattr(transformer, "takes_grouped", lambda _: False)
    found = transformer.causal_attention(q, k, v)
    assert torch.allclose(found, wanted, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
