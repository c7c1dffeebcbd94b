"""Published numbers of tiles, NICs, context parallelism and pipelines; each test names where they are from."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel import kernels_time
from shardplan.costmodel.collectives import collective_s, wire_factor
from shardplan.costmodel.context_parallel import Exchange, exchanges
from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.fitted import Fitted
from shardplan.costmodel.job import Job
from shardplan.costmodel.kernels_time import gemm_s, tile_slots
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.operators import Shapes, layer_ops
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.document import part_names
from shardplan.hw_profiles.load import load_cluster, load_gpu
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.topology import tier_table


@pytest.mark.parametrize(
    ("rows", "columns", "tile", "tiles", "waves", "utilisation"),
    [
        (2048, 2048, (128, 256), 128, 1, 0.97),  # the best measured shape of an H100, 128 of 132 multiprocessors busy
        (4096, 4096, (128, 256), 512, 4, 0.97),
        (8192, 8192, (128, 256), 2048, 16, 0.97),
        (4352, 4096, (128, 256), 544, 5, 0.82),  # 6 % more rows take 24 % longer
        (4096, 1536, (128, 256), 192, 2, 0.73),
        (4096, 1536, (128, 128), 384, 3, 0.97),
        (1024, 1024, (128, 256), 32, 1, 0.24),
    ],
)
def test_tile_and_wave_quantisation(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    tile: tuple[int, int],
    tiles: int,
    waves: int,
    utilisation: float,
) -> None:
    """One tile shape, whole waves on 132 multiprocessors (NVIDIA, "Matrix multiplication background", wave quantisation)."""
    monkeypatch.setattr(kernels_time, "TILES", ((float(tile[0]), float(tile[1]), 1.0),))
    monkeypatch.setattr(kernels_time, "WAVE_SOFTNESS", 0.0)
    found = rows * columns / float(tile_slots(load_gpu("h100-sxm"), rows, columns))
    assert found == pytest.approx(tiles / (waves * 132), rel=1e-12)
    assert found == pytest.approx(utilisation, abs=0.005)


def test_an_all_reduce_on_four_nodes_of_b200(tmp_path: Path) -> None:
    """stas00/ml-engineering@744d01e network: 381.8 GB/s busbw at 16 GiB on four p6-b200 nodes. Reduced inside the nodes first, each
    NIC carries 2 (k - 1)/k of an eighth: busbw (k - 1)/(n - 1) = 36.95 GB/s, 73.9 % of its 50."""
    profile = tmp_path / "p6-b200.toml"
    profile.write_text(
        'source = "p6-b200"\nsource_kind = "spec"\nnodes = 4\n[node]\nbase = "dgx-b200"\n[network]\nbase = "efa-3200"\n'
    )
    size, n, k, g = 2.0**34, 32, 4, 8
    seconds = float(collective_s(tier_table(load_cluster(profile)), "all_reduce", size, n, 1))
    assert size * 2 * (n - 1) / n / seconds / 1e9 == pytest.approx(381.8, rel=0.01)
    rate = 2 * (k - 1) / k * size / g / seconds / 1e9
    assert rate == pytest.approx(36.95, rel=0.01)
    assert rate / 50 == pytest.approx(0.739, rel=0.01)


def sent(parts: tuple[Exchange, ...], ranks: float) -> float:
    """Bytes a rank puts on the wire."""
    return sum(
        float(np.sum(part.times * part.size_bytes))
        * (1.0 if part.operation == "pass" else float(wire_factor(part.operation, ranks)))
        for part in parts
    )


def attention_exchange(kind: LayerKind, seq: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a rank's queries and of its keys and values in one layer."""
    one = np.ones(1)
    shapes = Shapes(
        micro_batch=one,
        seq=seq / ranks * one,
        cp=ranks * one,
        tp=one,
        sp=one,
        flash=np.array([True]),
        element_bytes=2,
    )
    (attention,) = [op for op in layer_ops(kind, shapes, load_runtime("megatron")) if op.name == "attention"]
    assert attention.context is not None
    return attention.context


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_ulysses_sends_4_nh_over_p(ranks: int) -> None:
    """DeepSpeed-Ulysses (arXiv 2309.14509): 4 N h / P a layer for q, k, v and the output, of which the share 1/P stays; Megatron's
    sequence parallelism moves 4 N h whatever P, as two gathers and two reductions."""
    ((kind, _),), seq = load_model("llama-2-7b").layers, 65536
    queries, keys_values = attention_exchange(kind, seq, ranks)
    forward, backward = (
        sent(part, ranks) for part in exchanges("ulysses", np.array([float(ranks)]), queries, keys_values)
    )
    assert forward == backward == pytest.approx(2 * 4 * seq * kind.hidden / ranks * (ranks - 1) / ranks, rel=1e-12)
    one = np.ones(1)
    tensor = Shapes(
        micro_batch=one, seq=seq * one, tp=ranks * one, sp=ranks * one, flash=np.array([True]), element_bytes=2
    )
    moved = sum(
        float(np.sum(size)) * float(wire_factor(name, ranks))
        for op in layer_ops(kind, tensor, load_runtime("megatron"))
        for name, size in op.forward
    )
    assert moved == pytest.approx(2 * 4 * seq * kind.hidden * (ranks - 1) / ranks, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 8])
def test_ring_attention_passes_keys_and_values(ranks: int) -> None:
    """Ring Attention (arXiv 2310.01889): cp - 1 passes of 2 b (s/cp) kv_heads D elements; backward their gradients as well."""
    ((kind, _),), seq = load_model("llama-3-8b").layers, 65536
    queries, keys_values = attention_exchange(kind, seq, ranks)
    forward, backward = (
        sent(part, ranks) for part in exchanges("ring", np.array([float(ranks)]), queries, keys_values)
    )
    assert forward == 2 * 2 * seq / ranks * 8 * 128 * (ranks - 1)
    assert backward == 2 * forward


def bare(name: str) -> Runtime:
    """The runtime where nothing hides."""
    runtime = load_runtime(name)
    shown = replace(runtime.communication, gather_overlap=0.0, reduce_overlap=0.0, pipeline_overlap=0.0)
    return replace(runtime, communication=shown, name="bare")


def quiet(gpus: int) -> Cluster:
    """H100 nodes whose network has no latency."""
    cluster = load_cluster("h100-ib", gpus=gpus)
    return replace(cluster, network=replace(cluster.network, latency_s=0.0, spine_latency_s=0.0))


def whole(model: Model, words: str, runtime: Runtime) -> Estimates:
    layout = parse_layout(words)
    return estimate(
        model=model,
        job=Job(seq=8192, global_batch=64, grad_dtype="bf16"),
        cluster=quiet(layout.gpus),
        layouts=layout,
        runtime=runtime,
        constants=Fitted(architecture={}, runtime={}),
    )


def test_scatter_gather_of_megatron_divides_boundary_tensors() -> None:
    """arXiv 2104.04473 section 4.1: b s h / tp between nodes even without sequence parallelism, the rest is gathered over NVLink."""
    model = load_model("llama-3-70b")
    scattered = bare("megatron")
    plain = replace(scattered, communication=replace(scattered.communication, pipeline_scatter=False))
    seconds = [
        float(whole(model, "dp=2 tp=8 pp=4 zero=1", runtime).time["pp_exposed_s"][0]) for runtime in (plain, scattered)
    ]
    assert seconds[0] / seconds[1] == pytest.approx(8, rel=1e-9)


def test_a_tied_embedding_is_reduced_between_first_and_last_stage() -> None:
    """DeepSpeed's pipeline tutorial: one more all-reduce of the tied gradient, V h / tp elements between two ranks."""
    untied = load_model("llama-3-70b")
    got = [
        whole(replace(untied, tied_embeddings=tied), "dp=1 tp=8 pp=4", bare("megatron")).time["dp_exposed_s"][0]
        for tied in (True, False)
    ]
    table = 2.0 * untied.vocab * untied.hidden / 8
    expected = float(collective_s(tier_table(quiet(32)), "all_reduce", table, 2, 24))
    assert float(got[0] - got[1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("stages", "micro_batches", "of_total"), [(4, 16, 3 / 19), (8, 32, 7 / 39)])
def test_a_gpipe_bubble_of_four_micro_batches_a_stage(stages: int, micro_batches: int, of_total: float) -> None:
    """(K - 1)/(M + K - 1) of the time with K stages and M micro-batches, small where M >= 4 K (arXiv 1811.06965): the share of the
    estimate, whose 80 layers are spread evenly, to a hundredth."""
    words = f"dp=1 tp=8 pp={stages} schedule=gpipe recompute=full"
    model = replace(load_model("llama-3-70b"), vocab=1024)
    layout = parse_layout(words)
    got = estimate(
        model=model,
        job=Job(seq=8192, global_batch=micro_batches),
        cluster=quiet(layout.gpus),
        layouts=layout,
        runtime="nanotron",
    )
    moving = sum(got.time[p] for p in ("compute_s", "recompute_s", "tp_exposed_s", "bubble_s"))
    assert float(got.time["bubble_s"][0] / moving[0]) == pytest.approx(of_total, rel=0.01)


@pytest.mark.parametrize("name", part_names("gpus"))
def test_no_larger_product_takes_less(name: str) -> None:
    """One side grows, by multiples of 8, or how many there are; the others are those of heads, experts, projections and vocabularies."""
    gpu, grows = load_gpu(name), np.arange(8.0, 8193.0, 40.0)
    for precision in gpu.peak_flop_per_s:
        for one, other in product((64.0, 1024.0, 7168.0), (128.0, 4096.0, 32000.0)):
            for batch in (1.0, 2.0, 32.0):
                for sides in ((grows, one, other), (one, grows, other), (one, other, grows)):
                    seconds = gemm_s(gpu, precision, 2, *sides, batch)
                    assert (np.diff(seconds) >= -1e-12 * seconds[1:]).all(), (precision, one, other, batch)
            assert (np.diff(gemm_s(gpu, precision, 2, one, other, 4096.0, np.arange(2.0, 200.0))) >= -1e-15).all()


@pytest.mark.parametrize("name", ["v100-32gb", "a100-80gb", "h100-sxm", "b200"])
def test_cubes_take_what_their_curve_says(name: str) -> None:
    """But for what tiles and waves make of each: more of small ones."""
    gpu, sides = load_gpu(name), np.arange(512.0, 12289.0, 256.0)
    flop = 2.0 * sides**3
    told_s = flop / (gpu.peak_flop_per_s["fp16"] * gpu.gemm_curve("fp16").at(flop))
    off = gemm_s(gpu, "fp16", 2, sides, sides, sides) / told_s - 1.0
    assert abs(float(off.mean())) < 0.025
    assert float(np.abs(off[sides < 4096.0]).max()) < 0.2
    assert float(np.abs(off[sides >= 4096.0]).max()) < 0.07


def test_a_thin_product_takes_no_longer_than_a_thicker_one() -> None:
    gpu = load_cluster("h100-ib").gpu
    ranks = np.array([1.0, 2, 8, 16, 32, 64, 128, 256])
    for shape in ((4096.0, ranks, 4096.0), (4096.0, 4096.0, ranks), (ranks, 4096.0, 4096.0)):
        seconds = gemm_s(gpu, "bf16", 2, *shape)
        assert (np.diff(seconds) >= -1e-12).all()
        assert seconds[0] > 1e-5  # the larger operand is read
