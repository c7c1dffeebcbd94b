"""Rules, space, search and plan files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, layout_table, parse_layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rank_groups import rank_coordinates
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rule_parts import divisors
from shardplan.costmodel.rules import RULES, broken_rules, rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, load_cluster
from shardplan.planner.choose import make_plan
from shardplan.planner.explain import explain_layout, explain_plan
from shardplan.planner.nothing_fits import what_would_fit
from shardplan.planner.plan import Plan
from shardplan.planner.search import gpu_counts, judge, search
from shardplan.planner.space import Wishes, layout_space, parse_wishes


def setting(
    *,
    gpus: int = 64,
    runtime: str = "megatron",
    model: str = "llama-3-8b",
    seq: int = 4096,
    batch: int = 64,
    cluster: str = "h100-ib",
) -> Setting:
    known, changes = load_runtime(runtime), {"smallest_vocabulary": 256} if model == "SMALL" else {}
    return Setting(
        model=dataclasses.replace(load_model("tiny"), vocab=100) if model == "SMALL" else load_model(model),
        job=Job(seq=seq, global_batch=batch),
        cluster=load_cluster(cluster, gpus=gpus),
        runtime=dataclasses.replace(known, abilities=dataclasses.replace(known.abilities, **changes)),
    )


@pytest.mark.parametrize(
    ("rule", "words", "changed", "told"),
    [
        ("gpus-product", "dp=8", {}, "dp*tp*pp*cp = 8*1*1*1 = 8, but there are 64 GPUs; use dp=64"),
        ("batch-divisible", "dp=64 micro_batch=2", {}, "use a global batch of 128"),
        ("layers-cover-stages", "dp=1 pp=64", {}, "only 32 layers"),
        ("stage-layers-sum", "dp=32 pp=2 stage_layers=10,10", {}, "add up to 32"),
        ("dp-shard-divides", "dp=64 zero=3 dp_shard=7", {}, "dp_shard=7 does not divide dp=64"),
        ("recompute-layers", "dp=32 pp=2 recompute=full:20", {}, "recompute=full:20"),
        ("tp-divides-heads", "dp=1 tp=64", {}, "tp=64 does not divide heads=32; use 1, 2, 4, 8, 16 or 32"),
        ("tp-divides-kv-heads", "dp=4 tp=16", {}, "tp=16 does not divide kv_heads=8; use 1, 2, 4 or 8"),
        ("tp-divides-ffn", "dp=1 tp=3", {"model": "llama-2-7b"}, "tp=3 does not divide ffn=11008; use 1, 2, 4"),
        ("sp-needs-tp", "dp=64 sequence_parallel=true", {}, "raise tp"),
        ("sp-divides-seq", "dp=8 tp=8 sequence_parallel=true", {"seq": 4100}, "multiple of 8"),
        ("seq-within-positions", "dp=64", {"model": "gpt3-175b"}, "use --seq 2048"),
        ("virtual-stages-interleaved", "dp=32 pp=2 virtual_stages=2", {}, "schedule=1f1b"),
        ("interleaved-rounds", "dp=16 pp=4 schedule=interleaved virtual_stages=2", {"batch": 32}, "not 2"),
        ("micro-batches-cover-stages", "dp=16 pp=4", {"runtime": "fsdp2", "batch": 32}, "2 micro-batches"),
        ("runtime-schedule", "dp=32 pp=2 schedule=gpipe", {}, "can do: 1f1b, interleaved"),
        (
            "runtime-uneven-stages",
            "dp=1 tp=1 pp=64",
            {"runtime": "megatron-2021", "model": "megatron-39b"},
            "divides 48",
        ),
        ("tied-embeddings-across-stages", "dp=32 pp=2", {"runtime": "fsdp2", "model": "gpt2"}, "pp=1"),
        ("runtime-zero", "dp=64 zero=3", {"runtime": "nanotron"}, "can do: 0, 1"),
        ("runtime-zero-with-pipeline", "dp=32 pp=2 zero=3", {"runtime": "deepspeed"}, "zero=3 with pp=2"),
        ("dp-shard-needs-zero", "dp=64 dp_shard=8", {}, "shards nothing"),
        ("runtime-hsdp", "dp=64 zero=3 dp_shard=8", {"runtime": "deepspeed"}, "HSDP"),
        (
            "runtime-sequence-parallel",
            "dp=8 tp=8 sequence_parallel=true",
            {"runtime": "deepspeed"},
            "sequence parallelism",
        ),
        ("runtime-experts", "dp=64", {"runtime": "megatron-2021", "model": "mixtral-8x7b"}, "mixture-of-experts"),
        ("runtime-recompute", "dp=64 recompute=selective", {"runtime": "deepspeed"}, "can do: none, full"),
        ("runtime-partial-recompute", "dp=64 recompute=full:4", {"runtime": "deepspeed"}, "recompute=full"),
        ("runtime-attention", "dp=64 attention=triton", {"runtime": "fsdp2"}, "can do: flash, unfused"),
        ("own-attention", "dp=64 attention=triton", {"runtime": "shardplan", "precision": "fp32"}, "attention=auto"),
        (
            "own-attention",
            "dp=64 attention=triton",
            {"cluster": "mi300x-ib", "runtime": "shardplan"},
            "attention=auto",
        ),
        ("runtime-attention", "dp=64 attention=triton", {"runtime": "fsdp2"}, "can do: flash"),
        ("runtime-offload", "dp=64 offload_optimizer=cpu", {"runtime": "shardplan"}, "can do: none"),
        (
            "tp-divides-vocab",
            "dp=32 tp=2",
            {"runtime": "shardplan", "model": "gpt2"},
            "tp=2 does not divide vocab=50257",
        ),
        ("runtime-optimizer", "dp=64", {"runtime": "shardplan", "optimizer": "sgd"}, "can do: adamw"),
        ("runtime-gradient-dtype", "dp=64", {"runtime": "fsdp2", "grad_dtype": "fp16"}, "can do: fp32, bf16"),
        ("vocabulary-too-small", "dp=64", {"runtime": "fsdp2", "model": "SMALL"}, "vocab=100 is below the 256"),
        ("offload-zero", "dp=64 offload_optimizer=cpu", {}, "use zero=1"),
        ("gpu-precision", "dp=64", {"cluster": "dgx2-edr"}, "v100-32gb has no bf16 matrix units"),
        ("runtime-precision", "dp=64", {"runtime": "fsdp2", "precision": "fp16"}, "can do: bf16, fp32"),
    ],
)
def test_every_rule_names_values_and_remedy(rule: str, words: str, changed: dict, told: str) -> None:
    words_of_job = {name: value for name, value in changed.items() if name in ("optimizer", "grad_dtype", "precision")}
    at = setting(**{name: value for name, value in changed.items() if name not in words_of_job})
    at = dataclasses.replace(at, job=dataclasses.replace(at.job, **words_of_job))
    found, structural = rejections(at, parse_layout(words))
    (one,) = [r for r in found if r.rule == rule]
    assert told in str(one), str(one)
    assert not structural or any(r.structural for r in RULES if r.id in {f.rule for f in found})


def test_rule_ids_are_distinct_and_a_good_layout_breaks_none() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert rejections(setting(), parse_layout("dp=8 tp=4 pp=2 zero=1 sequence_parallel=true recompute=selective")) == (
        [],
        False,
    )


def test_space_holds_every_valid_layout() -> None:
    """Against plain loops over all words on 8 GPUs."""
    at = setting(gpus=8, runtime="fsdp2", batch=16)
    space = layout_space(at.model, at.job, 8)
    rows = {space.row(i) for i in range(len(space))}
    assert len(rows) == len(space)
    wanted: list[Layout] = []
    for tp, pp, mb, zero, sp, recompute in itertools.product(
        divisors(8), divisors(8), divisors(16), range(4), (False, True), ("none", "selective", "full")
    ):
        if 8 % (tp * pp) == 0:
            dp = 8 // tp // pp
            for shard in divisors(dp):
                for schedule, v in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("interleaved", 4)):
                    wanted.append(
                        Layout(
                            dp=dp,
                            tp=tp,
                            pp=pp,
                            micro_batch=mb,
                            zero=zero,
                            dp_shard=None if shard == dp else shard,
                            sequence_parallel=sp,
                            recompute=recompute,
                            schedule=schedule,
                            virtual_stages=v,
                        )
                    )
    table = layout_table(wanted)
    bad = np.any(np.stack(list(broken_rules(at, table).values())), axis=0)
    redundant = (
        ((table.pp == 1) & (table.schedule != 1))
        | ((table.dp == 1) & (table.zero > 0))
        | ((table.zero > 0) & (table.dp_shard == 1))
    )
    valid = {wanted[i] for i in np.flatnonzero(~bad & ~redundant)}
    assert valid
    assert valid <= rows


def test_best_is_the_best_of_all_estimates() -> None:
    """Of a runtime that recomputes all layers or none (tests/test_partial_recompute.py has the others), with the stages of its rule
    (tests/test_stages.py has other cuts) and no secondary partition, which refinement adds."""
    at = setting(gpus=8, runtime="deepspeed", batch=16)
    rule_alone = parse_wishes("", ["stage_layers", "hpz", "context"])
    result = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=rule_alone)
    assert result.ranked is not None
    space = layout_space(at.model, at.job, 8, schedules=at.runtime.abilities.schedules)
    broken = broken_rules(at, space)
    valid = space.take(~np.any(np.stack(list(broken.values())), axis=0))
    everything = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=valid, runtime=at.runtime)
    fits = everything.fits()
    assert result.ranked.step_s[0] == everything.step_s[fits].min()
    found = {result.ranked.layouts.row(i) for i in range(len(result.ranked))}
    assert {valid.row(int(i)) for i in np.flatnonzero(fits)} <= found  # and what refinement adds
    assert (np.diff(result.ranked.step_s) >= 0).all()
    assert result.looked_at == len(space) == sum(r.count for r in result.refused) + result.does_not_fit + fits.sum()
    assert not result.slower


def test_search_is_deterministic() -> None:
    at = setting()
    tables = [search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime).ranked for _ in range(2)]
    assert all(t is not None for t in tables)
    first, second = (t.layouts.columns() for t in tables if t is not None)
    assert all((first[name] == second[name]).all() for name in first)


def test_fix_and_forbid() -> None:
    at = setting()
    fixed = search(
        model=at.model,
        job=at.job,
        cluster=at.cluster,
        runtime=at.runtime,
        wishes=parse_wishes("tp=4 recompute=full:2 pp=2"),
    )
    assert fixed.ranked is not None
    best = fixed.ranked.layouts.row(0)
    assert (best.tp, best.pp, best.recompute) == (4, 2, "full:2")
    without = search(
        model=at.model,
        job=at.job,
        cluster=at.cluster,
        runtime=at.runtime,
        wishes=parse_wishes("", ["pp", "zero=1", "offload"]),
    )
    assert without.ranked is not None
    columns = without.ranked.layouts
    assert (columns.pp == 1).all()
    assert (columns.zero != 1).all()
    assert (columns.offload_optimizer == 0).all()
    for fix, forbid in (("tpp=8", ()), ("tp=0", ()), ("", ("offlod",)), ("", ("zero=9",))):
        with pytest.raises(InputError):
            parse_wishes(fix, forbid)


def test_objectives() -> None:
    at = setting()
    arguments = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
    fast = search(**arguments).ranked
    lean = search(**arguments, objective="memory").ranked
    few = search(**arguments, objective="gpus")
    assert fast is not None
    assert lean is not None
    assert few.ranked is not None
    assert lean.device_peak_bytes[0] <= fast.device_peak_bytes.min()  # stages are cut for memory: tests/test_front.py
    assert few.cluster.gpus == next(
        g
        for g in gpu_counts(at.cluster)
        if search(**{**arguments, "cluster": at.cluster.with_gpus(g)}).ranked is not None
    )
    assert gpu_counts(load_cluster("h100-ib", gpus=24)) == (1, 2, 4, 8, 16, 24)


def test_headroom_only_removes_layouts() -> None:
    at = setting()
    arguments = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
    counts = [
        len(found.ranked) if (found := search(**arguments, headroom=h)).ranked is not None else 0
        for h in (0.0, 0.05, 0.3, 0.6)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    with pytest.raises(InputError, match="headroom"):
        search(**arguments, headroom=1.0)


def planned() -> Plan:
    at = setting(gpus=8, batch=64)
    document = cluster_document("h100-ib")
    result = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime)
    return make_plan(
        result,
        model=at.model,
        job=at.job,
        runtime=at.runtime,
        runtime_name="megatron",
        cluster_document=document,
        version="0",
    )


def test_plan_file_round_trip(tmp_path: Path) -> None:
    plan = planned()
    path = tmp_path / "plan.json"
    plan.write(path)
    again = Plan.read(path)
    assert again.layout == plan.layout
    assert again.document() == json.loads(path.read_text())
    assert again.model == plan.model
    assert list(tmp_path.iterdir()) == [path]
    explained = explain_plan(again)
    assert explained["notes"] == []
    assert explained["time"]["step_s"] == pytest.approx(plan.prediction["time"]["step_s"])
    assert len(explained["binds"]) == 4
    assert all("device_peak_bytes" in row for row in explained["runners_up"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[: len(text) // 2], "truncated or not JSON"),
        (lambda text: "", "truncated or not JSON"),
        (lambda text: "[1]", "no JSON object"),
        (lambda text: "{}", "schema=None"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 7'), "newer than 1"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": "x"'), "schema_version='x'"),
        (lambda text: text.replace('"layout": {', '"layouts": {', 1), "'layout' is missing"),
        (lambda text: text.replace('"gpus": 8', '"gpus": "many"', 1), "malformed"),
        (lambda text: text.replace('"tp": ', '"tpp": ', 1), "'tpp' is unknown"),
    ],
)
def test_bad_plan_files(tmp_path: Path, change, told: str) -> None:
    path = tmp_path / "plan.json"
    planned().write(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError) as caught:
        Plan.read(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_plan_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such plan"):
        Plan.read(tmp_path / "none.json")
    with pytest.raises(InputError, match="does not exist"):
        planned().write(tmp_path / "no" / "plan.json")


def test_nothing_fits_says_what_would() -> None:
    at = setting(gpus=8, model="llama-3-405b", runtime="fsdp2", batch=64)
    result = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime)
    assert result.ranked is None
    assert result.closest is not None
    told = what_would_fit(
        result, model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=Wishes(), headroom=0.05
    )
    assert told["rejections"][0]["rule"] in ("device-memory", "host-memory")
    assert any("GPUs of the same kind" in change for change in told["would_fit"])
    json.dumps(told)


def test_no_factorisation_is_told() -> None:
    at = setting(gpus=8, batch=64)
    wishes = parse_wishes("dp=3")
    result = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert result.looked_at == 0
    told = what_would_fit(
        result, model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes, headroom=0.05
    )
    assert told["rejections"]
    assert told["would_fit"][0] == "dropping --fix"


def test_own_layout_is_judged_against_the_best() -> None:
    at = setting(gpus=8, batch=64)
    arguments = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
    own = judge(parse_layout("dp=8 zero=1 recompute=full"), **arguments)
    assert isinstance(own, dict)
    told = explain_layout(own, **arguments)
    assert "times the step time of the best" in told["notes"][0]
    assert told["runners_up"][0]["step_s"] < own["time"]["step_s"]


def test_rank_map() -> None:
    layout = parse_layout("dp=3 tp=2 pp=2")
    at = rank_coordinates(layout)
    assert layout.order == "tp-cp-dp-pp"
    assert at["tp"].tolist() == [0, 1] * 6
    assert at["dp"].tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert at["pp"].tolist() == [0] * 6 + [1] * 6


def test_a_model_of_two_layer_kinds() -> None:
    """Stages see which kinds they hold: wide layers first make the first stage heavier."""
    base = load_model("llama-3-8b")
    kind = base.layers[0][0]
    wide = dataclasses.replace(kind, ffn=2 * kind.ffn)
    mixed = Model(**{**{f: getattr(base, f) for f in base.__dataclass_fields__}, "layers": ((wide, 8), (kind, 24))})
    at = setting(gpus=8)
    one = estimate(
        model=mixed,
        job=at.job,
        cluster=at.cluster,
        layouts=parse_layout("pp=4 tp=2 recompute=full"),
        runtime="megatron",
    )
    parameters = one.stages["parameters"][0]
    assert parameters[0] > parameters[1]
    assert one.stage_layer_counts[0].tolist() == [8, 8, 8, 8]


def test_fewest_gpus_are_the_fewest_whole_nodes() -> None:
    at = setting(gpus=192, model="llama-3-70b", runtime="shardplan", batch=960)
    arguments = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
    few = search(**arguments, objective="gpus")
    assert few.ranked is not None
    for gpus in range(8, few.cluster.gpus, 8):
        assert search(**{**arguments, "cluster": at.cluster.with_gpus(gpus)}).ranked is None


def test_forbidding_one_value_keeps_its_neighbours() -> None:
    at = setting(gpus=8)
    space = layout_space(at.model, at.job, 8, parse_wishes("", ["recompute=full:2", "hsdp=8"]))
    assert (space.recompute == 2).any()
    assert ((space.dp == 8) & (space.dp_shard == 8)).any()
    assert not ((space.dp != space.dp_shard) & (space.dp_shard == 8)).any()
