"""Checkpoints and failures: published figures, Young's and Daly's intervals against brute-force minima, and how goodput must move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.goodput import (
    GPU_HOURS_PER_FAILURE,
    checkpoint_bytes_per_parameter,
    daly_interval_s,
    goodput_fraction,
    mean_time_between_failures_s,
    young_interval_s,
)
from shardplan.costmodel.job import Job
from shardplan.costmodel.model import parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster

HOUR = 3600.0
writes = st.floats(0.1, 1000.0)
mean_times = st.floats(600.0, 1e7)


def test_llama_3_405b_stopped_every_3_hours():
    """54 days on 16,384 H100: 466 interruptions, 47 of them planned (arXiv 2407.21783, section 3.3.4)."""
    gpu_hours = 54 * 24 * 16384
    assert 466 - 47 == 419
    assert gpu_hours / 419 == GPU_HOURS_PER_FAILURE == pytest.approx(50_677, abs=1)
    assert mean_time_between_failures_s(16384, GPU_HOURS_PER_FAILURE) / HOUR == pytest.approx(54 * 24 / 419)
    assert mean_time_between_failures_s(16384, GPU_HOURS_PER_FAILURE) / HOUR == pytest.approx(3.09, abs=0.005)
    assert mean_time_between_failures_s(16384, gpu_hours / 466) / HOUR == pytest.approx(2.78, abs=0.005)


def test_llama_3_405b_kept_more_than_90_percent():
    """14 B per parameter to 2 TB/s of Tectonic, 10 minutes to restart: "higher than 90 % effective training time"."""
    write = 14 * 405.9e9 / 2e12
    mean_time = mean_time_between_failures_s(16384, GPU_HOURS_PER_FAILURE)
    interval = daly_interval_s(write, mean_time)
    assert (write, interval / 60) == (pytest.approx(2.84, abs=0.01), pytest.approx(4.16, abs=0.02))
    assert 0.90 < goodput_fraction(interval, write, mean_time, 600.0) < 0.94
    assert goodput_fraction(interval, write, mean_time, 900.0) == pytest.approx(0.90, abs=0.005)


def test_bloom_saved_2_3_tb_in_40_s_every_3_hours():
    """bigscience tr11-176B-ml: "2.3TB" is what du prints, in TiB and rounded up; every 3 hours is what a failure a few days apart asks."""
    bloom, job = 176_247_271_424, Job(seq=2048, global_batch=2048)
    size = float(checkpoint_bytes_per_parameter(load_runtime("megatron-deepspeed"), job, 1)) * bloom
    assert size == 14 * bloom
    assert 2.2 < size / 2**40 < 2.3
    storage = load_cluster("jean-zay").storage
    assert storage is not None
    assert 2.3e12 / storage.write_bytes_per_s == pytest.approx(40.0)
    days_between_failures = (3 * HOUR) ** 2 / (2 * 40.0) / 86400
    assert days_between_failures == pytest.approx(16.9, abs=0.1)
    assert young_interval_s(40.0, days_between_failures * 86400) == pytest.approx(3 * HOUR)


def test_megatrons_trillion_parameters_saved_13_8_tb():
    """arXiv 2104.04473 section 5.10 (from memory): 13.8 TB."""
    model, job = load_model("megatron-1t"), Job(seq=2048, global_batch=3072, precision="fp16")
    size = checkpoint_bytes_per_parameter(load_runtime("megatron-2021"), job, 0) * parameter_counts(model)["total"]
    assert size == pytest.approx(13.8e12, rel=0.03)


@pytest.mark.parametrize(
    ("runtime", "zero", "words", "expected"),
    [
        ("megatron", 0, {}, 14.0),  # bf16, fp32 master, two moments
        ("megatron", 3, {}, 14.0),
        ("megatron", 1, {"precision": "fp16"}, 14.0),  # its 4 bytes of fp32 gradients are not saved
        ("deepspeed", 2, {}, 14.0),
        ("fsdp2", 3, {}, 12.0),  # fp32 shards, no 16-bit copy
        ("fsdp2", 1, {"precision": "fp32"}, 12.0),  # the gathered fp32 copy is not saved twice
        ("fsdp2+bf16_states", 3, {}, 6.0),
        ("megatron", 0, {"optimizer": "sgd"}, 6.0),
        ("megatron", 0, {"precision": "fp8"}, 14.0),
        ("megatron", 0, {"precision": "fp32"}, 12.0),
    ],
)
def test_checkpoint_bytes_follow_the_runtimes_states(runtime, zero, words, expected):
    job = Job(seq=2048, global_batch=8, **words)
    assert checkpoint_bytes_per_parameter(load_runtime(runtime), job, zero) == expected


def test_all_formulas_take_arrays():
    write, mean_time = np.array([1.0, 10.0]), np.array([[1e4], [1e5]])
    interval = daly_interval_s(write, mean_time)
    assert interval.shape == goodput_fraction(interval, write, mean_time, 600.0).shape == (2, 2)
    assert checkpoint_bytes_per_parameter(load_runtime("fsdp2"), Job(seq=8, global_batch=8), [0, 1, 2, 3]).tolist() == [
        *(14.0, 14.0, 14.0, 12.0)
    ]


@given(write=writes, mean_time=mean_times)
def test_youngs_interval_wastes_least_to_first_order(write, mean_time):
    interval = young_interval_s(write, mean_time) * np.geomspace(0.2, 5.0, 2001)
    waste = write / interval + interval / (2.0 * mean_time)
    assert interval[waste.argmin()] == pytest.approx(float(young_interval_s(write, mean_time)), rel=2e-3)


@given(write=writes, mean_time=mean_times, restart=st.floats(0.0, 3600.0))
def test_dalys_interval_is_the_best_of_the_goodput_model(write, mean_time, restart):
    tried = float(daly_interval_s(write, mean_time)) * np.geomspace(0.1, 10.0, 4001)
    best = goodput_fraction(tried, write, mean_time, restart).max()
    assert goodput_fraction(daly_interval_s(write, mean_time), write, mean_time, restart) >= best * (1 - 1e-2)
    if write < 0.1 * mean_time:
        assert goodput_fraction(daly_interval_s(write, mean_time), write, mean_time, restart) >= best * (1 - 1e-4)


def test_far_below_the_mean_time_the_share_is_what_the_parts_leave():
    interval, write, mean_time, restart = 3000.0, 30.0, 3e6, 600.0
    plain = 1 - write / interval - (interval / 2 + restart) / mean_time
    assert goodput_fraction(interval, write, mean_time, restart) == pytest.approx(plain, abs=2e-4)


@given(write=writes, mean_time=mean_times, restart=st.floats(0.0, 3600.0), more=st.floats(1.01, 100.0))
def test_more_failures_less_goodput_and_faster_storage_shorter_intervals(write, mean_time, restart, more):
    def best(c, m):
        return goodput_fraction(daly_interval_s(c, m), c, m, restart)

    assert 0.0 <= best(write, mean_time / more) <= best(write, mean_time) <= 1.0
    assert best(write / more, mean_time) >= best(write, mean_time)
    assert daly_interval_s(write / more, mean_time) < daly_interval_s(write, mean_time)
    assert young_interval_s(write / more, mean_time) < young_interval_s(write, mean_time)


def test_a_job_that_fails_faster_than_it_saves_gets_nowhere():
    assert daly_interval_s(10.0, 4.0) == 4.0
    assert goodput_fraction(4.0, 10.0, 4.0, 600.0) < 1e-6
    assert goodput_fraction(1e6, 10.0, 1.0, 600.0) == 0.0


@pytest.mark.parametrize("gpus", [1, 64, 16384])
def test_every_gpu_can_stop_the_job(gpus):
    assert mean_time_between_failures_s(gpus, 50_000) == pytest.approx(50_000 * HOUR / gpus)
