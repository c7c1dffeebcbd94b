"""Cost and time to result as users meet them: prices, power, a token budget, a power cap; nulls where nobody says."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardplan.cli
from shardplan.costmodel.answer import answer
from shardplan.costmodel.error_band import GUESS_BAND, TIME_BAND
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.published_rows import RefusedRowError, row_case
from shardplan.costmodel.result import checkpoint_storage, cost_document, power_w, result_document
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.validation import estimate_case
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, cluster_from_document, load_cluster, load_gpu
from shardplan.hw_profiles.machine import Failures, Nvme, Storage
from shardplan.hw_profiles.override import with_failure_rate, with_price
from shardplan.hw_profiles.power import capped_curve, clock_fraction

MODEL, RUNTIME = load_model("llama-3-8b"), load_runtime("megatron")
JOB = Job(seq=8192, global_batch=128, tokens=1e12)
LAYOUT = parse_layout("dp=8 tp=2 zero=1")
STEP_S = 10.0


def result_of(cluster, job=JOB):
    found = result_document(model=MODEL, job=job, cluster=cluster, runtime=RUNTIME, layout=LAYOUT, step_s=STEP_S)
    assert found is not None
    return found


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["shardplan", *words])
        with pytest.raises(SystemExit) as left:
            shardplan.cli.main()
        output = capsys.readouterr()
        return left.value.code, output.out, output.err

    return run


WORDS = ("--global-batch", "128", "--seq", "8192", "--layout", "dp=8 tp=2 zero=1 recompute=full")


def test_two_nodes_of_aws_p5_by_hand():
    """55.04 USD a node and hour: 10 s of two nodes are 0.306 USD for 1.05 M tokens."""
    p5 = load_cluster("aws-p5", gpus=16)
    cost = cost_document(p5, JOB, STEP_S)
    assert cost["usd_per_step"] == pytest.approx(2 * 55.04 * 10 / 3600)
    assert cost["usd_per_million_tokens"] == pytest.approx(2 * 55.04 * 10 / 3600 / (8192 * 128) * 1e6)
    assert cost["joules_per_token"] == pytest.approx(16 * 700 * 10 / (8192 * 128))
    result = result_of(p5)
    assert result["days"] == pytest.approx(1e12 / (8192 * 128) * 10 / 86400)
    assert result["usd"] == pytest.approx(result["days"] * 24 * 2 * 55.04)
    assert result["usd_with_failures"] == pytest.approx(result["usd"] / result["goodput"])
    assert result["days_with_failures"] == pytest.approx(result["days"] / result["goodput"])
    assert result["energy_j"] == pytest.approx(result["days"] * 86400 * 16 * 700)


def test_bloom_drew_433_mwh_by_the_power_of_its_gpus():
    """1,082,990 GPU-hours of 400 W are 433 MWh (arXiv 2211.02001, from memory); its node's power is not known."""
    node = replace(load_cluster("jean-zay").node, power_w=None)
    found = power_w(replace(load_cluster("jean-zay"), node_runs=((node, 48),)))
    assert found is not None
    assert "384 GPUs alone" in found[1]
    assert found[0] * 1_082_990 / 384 / 1e6 == pytest.approx(433.2, abs=0.1)


def test_node_power_goes_before_gpu_power_and_a_cap_lowers_both():
    h100 = load_cluster("h100-ib", gpus=16)
    gpu = replace(h100.gpu, power_cap_w=500.0)
    capped = replace(h100.node, gpu=gpu)
    alone = replace(capped, power_w=None)
    assert power_w(h100) == (2 * 10200.0, "2 nodes at full power, 10,200 W each")
    assert (power_w(replace(h100, node_runs=((capped, 2),))) or (0,))[0] == 2 * (10200.0 - 8 * 200)
    assert (power_w(replace(h100, node_runs=((alone, 2),))) or (0,))[0] == 16 * 500.0


def test_what_nobody_says_is_null():
    bare = load_cluster("h100-ib", gpus=16)
    node = replace(bare.node, nvme=None, power_w=None, usd_per_hour=None, gpu=replace(bare.gpu, power_w=None))
    nothing = replace(bare, node_runs=((node, 2),), storage=None)
    assert set(cost_document(nothing, JOB, STEP_S).values()) == {None}
    result = result_of(nothing)
    unknown = {key for key, value in result.items() if value is None}
    assert unknown == {
        *("days_with_failures", "goodput", "checkpoint_write_s", "checkpoint_interval_s", "restart_s"),
        *("usd", "usd_with_failures", "energy_j"),
    }
    assert result["checkpoint_bytes"] == pytest.approx(14 * 8.03e9, rel=1e-3)
    assert (
        result_document(
            model=MODEL, job=replace(JOB, tokens=None), cluster=bare, runtime=RUNTIME, layout=LAYOUT, step_s=STEP_S
        )
        is None
    )


def test_checkpoints_go_to_shared_storage_then_to_the_nodes_flash():
    bare = load_cluster("h100-ib", gpus=16)
    nas = Storage(kind="nfs", read_bytes_per_s=3e9, write_bytes_per_s=2e9)
    shared, flash = checkpoint_storage(replace(bare, storage=nas)), checkpoint_storage(bare)
    assert shared is not None
    assert flash is not None
    assert (shared.write_bytes_per_s, shared.read_bytes_per_s, shared.words) == (2e9, 3e9, "shared storage (nfs)")
    assert flash.write_bytes_per_s == 2 * 33.9e9
    meta = checkpoint_storage(load_cluster("meta-24k-roce", gpus=16))
    assert meta is not None
    assert meta.write_bytes_per_s == 16 * 50e9, "2 TB/s, but sixteen NICs of 400 Gbit/s"


def test_the_failure_rate_of_a_profile_goes_before_the_default():
    h100 = load_cluster("h100-ib", gpus=16)
    known = replace(h100, failures=Failures(gpu_hours_per_failure=8100.0, restart_s=1800.0))
    assert result_of(h100)["mean_time_between_failures_s"] == pytest.approx(50_677 / 16 * 3600, rel=1e-4)
    assert result_of(known)["mean_time_between_failures_s"] == 8100 / 16 * 3600
    assert result_of(known)["restart_s"] == pytest.approx(1800.0, abs=3.0)
    meta = load_cluster("meta-24k-roce")
    assert meta.failures == Failures(gpu_hours_per_failure=50700.0)


def test_the_interval_is_at_least_a_step_and_a_hopeless_job_never_ends():
    doomed = replace(load_cluster("h100-ib", gpus=16), failures=Failures(gpu_hours_per_failure=1e-3))
    result = result_of(doomed)
    assert result["checkpoint_interval_s"] == STEP_S
    assert result["goodput"] == pytest.approx(0.0)
    assert result["days_with_failures"] is None
    json.dumps(result, allow_nan=False)


@given(price=st.floats(0.1, 100.0), hours=st.floats(100.0, 1e6), speed=st.floats(1e8, 1e12))
def test_cost_follows_price_failures_and_storage(price, hours, speed):
    base = load_cluster("aws-p5", gpus=16)

    def found(price, hours, speed):
        flash = Nvme(read_bytes_per_s=speed, write_bytes_per_s=speed, capacity_bytes=1e13)
        node = replace(base.node, usd_per_hour=price, nvme=flash)
        rate = Failures(gpu_hours_per_failure=hours)
        return result_of(replace(base, node_runs=((node, 2),), failures=rate))

    one = found(price, hours, speed)
    assert found(2 * price, hours, speed)["usd"] == pytest.approx(2 * one["usd"])
    assert found(price, hours / 2, speed)["goodput"] <= one["goodput"]
    assert found(price, hours, 2 * speed)["checkpoint_interval_s"] <= one["checkpoint_interval_s"]
    assert found(price, hours, 2 * speed)["goodput"] >= one["goodput"]


def test_given_price_and_failures_go_into_the_document_with_their_source():
    document = cluster_document("aws-p5")
    given = with_failure_rate(with_price(document, 2.5, 8), 20_000)
    cluster = cluster_from_document(given)
    assert (cluster.node.usd_per_hour, cluster.node.price_date) == (20.0, None)
    assert cluster.failures == Failures(gpu_hours_per_failure=20_000)
    assert "--price 2.5" in cluster.provenance["node.usd_per_hour"].text
    assert load_cluster("aws-p5").node.usd_per_hour == 55.04
    assert document == cluster_document("aws-p5"), "the document itself stays"


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_prices_and_rates_are_positive(bad):
    with pytest.raises(InputError, match=r"--price: price=\S+ is not a positive number; give USD per GPU and hour"):
        with_price(cluster_document("aws-p5"), bad, 8)
    with pytest.raises(InputError, match=r"--gpu-hours-per-failure: .* is not a positive number; give GPU-hours"):
        with_failure_rate(cluster_document("aws-p5"), bad)
    with pytest.raises(InputError, match=r"--tokens: tokens=\S+ is not a positive number; give the tokens"):
        Job(seq=8, global_batch=8, tokens=bad)


def test_estimate_answers_result_only_with_a_budget(call):
    code, out, err = call("estimate", "llama-3-8b", "--cluster", "aws-p5", *WORDS, "--json")
    assert (code, err, json.loads(out)["result"]) == (0, "", None)
    _, out, _ = call("estimate", "llama-3-8b", "--cluster", "aws-p5", *WORDS, "--tokens", "15e12", "--json")
    found = json.loads(out)
    assert set(found["result"]) == {
        *("tokens", "days", "days_with_failures", "goodput", "checkpoint_bytes", "checkpoint_write_s"),
        *("checkpoint_interval_s", "mean_time_between_failures_s", "restart_s"),
        *("usd", "usd_with_failures", "energy_j"),
    }
    assert any("2026-07-20: on demand in us-east-1" in line for line in found["assumptions"])
    assert any("GPUs alone at full power" in line for line in found["assumptions"])


def test_a_given_price_is_that_of_the_gpus_in_use(call):
    words = ("--global-batch", "128", "--seq", "8192", "--layout", "dp=2 tp=2 zero=1 recompute=full", "--json")
    _, out, _ = call("estimate", "llama-3-8b", "--cluster", "h100-ib", "--price", "2", *words)
    found = json.loads(out)
    assert found["cost"]["usd_per_step"] == pytest.approx(4 * 2.0 * found["time"]["step_s"] / 3600)


def test_people_read_it_in_four_lines(call):
    _, out, _ = call("estimate", "llama-3-8b", "--cluster", "aws-p5", *WORDS, "--tokens", "15e12")
    text = " ".join(out.split())
    assert "USD per million tokens," in text
    assert "15T tokens: " in text
    assert " with failures (goodput 99." in text
    assert "to restart; a checkpoint of 112 GB in" in text
    assert "Wh at full power" in text
    _, out, _ = call("estimate", "llama-3-8b", "--cluster", "h800-ib", *WORDS, "--tokens", "15e12")
    text = " ".join(out.split())
    assert "cost unknown: no price in the profile (--price USD per GPU and hour)" in text
    assert "goodput unknown: the profile has neither [storage] write_gb_per_s nor [node.nvme]" in text


def test_a_plan_keeps_what_was_given_and_explain_can_change_it(call, tmp_path):
    path = str(tmp_path / "plan.json")
    job = ("--cluster", "h100-ib", "--gpus", "8", "--global-batch", "64", "--seq", "4096")
    assert call("plan", "llama-3-8b", *job, "--tokens", "1e12", "--price", "2", "-o", path)[0] == 0
    _, out, _ = call("explain", path, "--json")
    planned = json.loads(out)["result"]
    _, out, _ = call("explain", path, "--price", "4", "--tokens", "2e12", "--gpu-hours-per-failure", "1000", "--json")
    changed = json.loads(out)["result"]
    assert changed["usd"] == pytest.approx(4 * planned["usd"])
    assert changed["goodput"] < planned["goodput"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--price", "0"), "--price: price=0 is not a positive number; give USD per GPU and hour"),
        (("--price", "cheap"), "--price"),
        (("--gpu-hours-per-failure", "-3"), "gpu_hours_per_failure=-3 is not a positive number; give GPU-hours"),
        (("--tokens", "0"), "tokens=0 is not a positive number; give the tokens of the whole training"),
        (("--prise", "3"), "--prise"),
    ],
)
def test_bad_words_are_told_in_one_line(call, words, told):
    code, out, err = call("estimate", "llama-3-8b", "--cluster", "h100-ib", *WORDS, *words)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1


CAPPED = '[node]\nbase = "dgx-h100"\n[gpu]\npower_cap_w = 500\n'


def capped(tmp_path, text=CAPPED):
    path = tmp_path / "capped.toml"
    path.write_text(text)
    return load_cluster(path)


def test_a_power_cap_lowers_the_plateau_by_one_multiplier(tmp_path):
    cluster, free, part = capped(tmp_path), load_gpu("h100-sxm"), load_gpu("h100-96gb-500w")
    big = 1e15  # FLOP of one product: the plateau
    fraction = clock_fraction(500, 700)
    assert fraction == pytest.approx((5 / 7) ** 0.5)
    for word in ("bf16", "fp8"):
        assert cluster.gpu.gemm_curve(word).at(big) == pytest.approx(fraction * free.gemm_curve(word).at(big), rel=1e-3)
    assert cluster.gpu.gemm_curve("bf16").at(big) == pytest.approx(part.gemm_curve("bf16").at(big), rel=1e-2)
    small = cluster.gpu.gemm_curve("bf16").at(1e8) / free.gemm_curve("bf16").at(1e8)
    assert 0.99 < small < 1.0, "small products wait for launches and memory"
    assert cluster.gpu.attention_efficiency == free.attention_efficiency
    assert cluster.gpu.peak_flop_per_s == free.peak_flop_per_s
    assert part.power_cap_w is None, "a part of the catalog made for less power is not capped again"


def test_a_power_cap_is_a_guess_that_slows_steps_and_widens_their_band(tmp_path):
    free, slow = load_cluster("h100-96gb-500w", gpus=8), capped(tmp_path)
    assert slow.provenance["gpu.gemm_efficiency.power_cap"].kind == "guess"
    assert "500 of 700 W" in slow.provenance["gpu.gemm_efficiency.power_cap"].text
    full = capped(tmp_path, CAPPED.replace("500", "700"))
    assert "gpu.gemm_efficiency.power_cap" not in full.provenance
    inputs = {"model": MODEL, "job": JOB, "layouts": parse_layout("dp=8 zero=3 recompute=full"), "runtime": "fsdp2"}
    at_500, at_700 = estimate(cluster=slow, **inputs), estimate(cluster=full, **inputs)
    assert 1.05 < float(at_500.step_s[0] / at_700.step_s[0]) < clock_fraction(500, 700) ** -1
    assert at_500.band_of(0) == pytest.approx(TIME_BAND + GUESS_BAND)
    told = answer(at_500, 0, model=MODEL, job=JOB, cluster=slow, runtime=load_runtime("fsdp2"))["assumptions"]
    assert any("gpu.gemm_efficiency.power_cap" in line for line in told)
    assert free.gpu.power_cap_w is None


def test_a_curve_measured_on_the_machine_was_measured_under_the_cap(tmp_path):
    measured = (
        '[gpu.gemm_efficiency.default]\nsize_gflop = [1, 1000]\nfraction = [0.2, 0.6]\nsource_kind = "measured"\n'
    )
    cluster = capped(tmp_path, CAPPED + measured)
    assert cluster.gpu.gemm_curve("bf16").fractions == (0.2, 0.6)


def test_the_square_root_predicts_torchtitans_runs_at_500_w():
    """From the curves of the 700 W part: mean error of the step time over 17 published runs of an H100 at 500 W."""
    cases = []
    with (resources.files("shardplan.reports") / "published" / "runs.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["gpu"] != "h100-96gb-sxm-500w" or not row["tokens_per_s_per_gpu"]:
                continue
            try:
                case = row_case(row)
            except RefusedRowError:
                continue
            tokens = float(row["global_batch"]) * float(row["seq"])
            cases.append((case, tokens / float(row["tokens_per_s_per_gpu"]) / float(row["gpus"])))
    assert len(cases) >= 10
    curves = load_gpu("h100-sxm").gemm_efficiency

    def bias(exponent):
        slower = {word: capped_curve(curve, (500 / 700) ** exponent) for word, curve in curves.items()}
        errors = []
        for case, measured_s in cases:
            node, count = case.cluster.node_runs[0]
            gpu = replace(node.gpu, gemm_efficiency=slower)
            cluster = replace(case.cluster, node_runs=((replace(node, gpu=gpu), count),))
            errors.append(float(estimate_case(replace(case, cluster=cluster)).step_s[0]) / measured_s - 1)
        return abs(float(np.mean(errors)))

    assert bias(0.5) < 0.04
    assert bias(0.5) < bias(1.0)
