"""ZeRO++: volumes, quantising, memory, and the published speed-ups by network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.data_parallel import one_exchange_s
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.kernels_time import memory_bound_s
from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.model import parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.published_rows import read_rows, row_case
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.validation import estimate_case
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster, load_gpu
from shardplan.hw_profiles.machine import EfficiencyCurve
from shardplan.hw_profiles.topology import TierTable
from shardplan.planner.search import judge

FLAT = EfficiencyCurve(sizes=(1.0, 2.0), fractions=(1.0, 1.0))
INSTANT = replace(load_gpu("v100-32gb"), memory_bandwidth_bytes_per_s=1e30)
PSI, NODES, LOCAL = 18e9, 8, 16


def wire(inside: float, between: float) -> TierTable:
    """Nodes of LOCAL GPUs; seconds are bytes of a rank where a rate is 1."""
    return TierTable(
        names=("node", "leaf"),
        gpus=np.array([LOCAL, LOCAL * NODES]),
        bandwidth_bytes_per_s=np.array([inside, between]),
        latency_s=np.zeros(2),
        efficiency=(FLAT, FLAT),
        all_reduce_efficiency=(FLAT, FLAT),
        point_to_point_fraction=np.ones(2),
        is_switched=np.array([True, True]),
    )


def exchanged(words: str, *, inside: float = 1e30, between: float = 1.0 / LOCAL, gpu=INSTANT) -> tuple[float, float]:
    """(reduction, mean of a forward's and a backward's gather) of a rank."""
    one = one_exchange_s(
        wire(inside, between),
        layout_table([parse_layout(f"dp={NODES * LOCAL} zero=3 {words}")]),
        load_runtime("deepspeed").communication,
        parameters=np.array([PSI]),
        trained=np.array([PSI]),
        units=np.array([40.0]),
        gradient_bytes=2,
        parameter_bytes=2,
        gpu=gpu,
    )
    return float(one.reduce_s[0]), float(one.gather_s[0])


def test_volumes_between_nodes() -> None:
    """arXiv 2306.10209 section 3: 3 M between nodes becomes 0.75 M: 0.5 M of the forward's gathers, none of the backward's, 0.25 M of
    gradients; of what a whole node sends, the other nodes' share."""
    plain_reduce, plain_gather = exchanged("")
    plain = plain_reduce + 2 * plain_gather
    reduce, gather = exchanged(f"qwz=true hpz={LOCAL} qgz=true")
    assert 2 * gather == pytest.approx(0.5 * plain_gather, rel=0.01)
    ring, all_to_all = (NODES * LOCAL - 1) / (NODES * LOCAL), (NODES - 1) / NODES
    assert reduce / all_to_all == pytest.approx(0.25 * plain_reduce / ring)
    assert (reduce / all_to_all + 2 * gather / ring) / (plain / ring) == pytest.approx(0.25, rel=0.01)
    assert exchanged("qwz=true")[1] == pytest.approx(0.5 * plain_gather, rel=0.01)
    assert exchanged(f"hpz={LOCAL}")[1] == pytest.approx(0.5 * plain_gather, rel=0.01)
    assert exchanged("qgz=true")[1] == plain_gather


def test_quantising_takes_memory_bandwidth() -> None:
    gpu = load_gpu("v100-32gb")
    for words, traffic in (("qwz=true", 3 * PSI * (1 + 1 / 128)), ("qgz=true", PSI * (3.0 + 1 / 16 + 2 / 128))):
        slow, fast = (exchanged(words, between=1e12, gpu=one) for one in (gpu, INSTANT))
        assert sum(slow) - sum(fast) == pytest.approx(float(memory_bound_s(gpu, traffic)), rel=1e-6)


def test_the_second_copy_of_hpz() -> None:
    """18B on 64 V100: 8.28 -> 10.26 GB of peak memory (deepspeedai/DeepSpeed docs/_tutorials/zeropp.md), 2 P / 16 = 2.25 GB."""
    psi = parameter_counts(load_model("llama-2-13b"))["total"]

    def allocated(words: str) -> float:
        found = estimate(
            model=load_model("llama-2-13b"),
            job=Job(seq=512, global_batch=64, precision="fp16"),
            cluster=load_cluster("dgx2-edr", gpus=64),
            layouts=parse_layout(f"dp=64 zero=3 recompute=full {words}"),
            runtime=load_runtime("deepspeed"),
        )
        return float(found.peaks["allocated"][0])

    assert allocated("hpz=16") - allocated("") == pytest.approx(2 * psi / 16, rel=1e-6)
    assert allocated("qwz=true qgz=true") == allocated("")


def test_published_speed_ups_by_network() -> None:
    """blogs/zeropp of DeepSpeed: GPT 18B on 384 V100, ZeRO-3 over ZeRO++ at 100 to 800 Gb/s a node."""
    runs = Path(__file__).parent.parent / "reports" / "published" / "runs.csv"
    seconds: dict[tuple[str, str], tuple[float, float]] = {}
    for row in read_rows(runs):
        if row["source"] == "ZeRO++ blog figures":
            found = estimate_case(row_case(row))
            key = (row["network_gbps_per_gpu"], "++" if row["hpz"] else "3")
            seconds[key] = (float(row["step_s"]), float(found.step_s[0]))
    rates = sorted({rate for rate, _ in seconds}, key=float)
    assert rates == ["6.25", "12.5", "25", "50"]
    for rate in rates:
        (base, base_said), (plus, plus_said) = seconds[rate, "3"], seconds[rate, "++"]
        assert base_said / plus_said == pytest.approx(base / plus, rel=0.15), rate


@pytest.mark.parametrize("name", ["deepspeed", "megatron-deepspeed", "shardplan"])
def test_what_users_reported_of_a_second_copy_is_told_with_every_layout_that_has_one(name: str) -> None:
    runtime, cluster = load_runtime(name), load_cluster("h100-ib", gpus=16)
    asked = {"model": load_model("llama-3-8b"), "job": Job(seq=4096, global_batch=64), "cluster": cluster}
    told = {}
    for words in ("dp=16 zero=3", "dp=16 zero=3 hpz=8"):
        answer = judge(parse_layout(words), **asked, runtime=runtime)
        assert isinstance(answer, dict)
        told[words] = [line for line in answer["assumptions"] if line.startswith("warning: ")]
        assert all(one["rule"] == "device-memory" for one in answer["rejections"])  # a warning refuses nothing
    assert told["dp=16 zero=3"] == []
    if name == "shardplan":  # its own is held against plain ZeRO-3 by tests of the executor
        assert told["dp=16 zero=3 hpz=8"] == []
    else:
        (line,) = told["dp=16 zero=3 hpz=8"]
        assert "hpz=8" in line
        assert "LlamaFactory#6372" in line
        assert "--forbid hpz" in line


def test_a_warning_is_of_a_word_of_layouts(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_text('base = "deepspeed"\nname = "ours"\nversion = "1"\nsource = "test"\n[warnings]\nhpzz = "wrong"\n')
    with pytest.raises(InputError, match=r"hpzz.*hpz"):
        load_runtime(str(path))
