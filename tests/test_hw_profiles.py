"""The catalog and user profiles: complete, sourced, equal to the published figures, merged and read back."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardplan.hw_profiles.document import part_document
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import (
    cluster_digest,
    cluster_document,
    cluster_from_document,
    list_parts,
    load_cluster,
    load_gpu,
)
from shardplan.hw_profiles.machine import EfficiencyCurve
from shardplan.hw_profiles.show import hardware_show
from shardplan.hw_profiles.write import profile_text, write_profile

CLUSTERS = [name for name in list_parts("clusters") if name != "localhost"]
GIB = 2.0**30
DOC = Path(__file__).parent.parent / "docs" / "hardware_profiles.md"


def numbers(table, path=""):
    """(path, leaf) of every number and curve of a merged document."""
    for key, value in table.items():
        if isinstance(value, dict) and "source" in value:
            yield f"{path}{key}", value
        elif isinstance(value, dict):
            yield from numbers(value, f"{path}{key}.")
        else:
            assert isinstance(value, str), f"{path}{key} = {value!r} has no source"


def test_catalog_holds_what_is_promised():
    assert {"v100-32gb", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200", "rtx4090", "cpu"} <= set(
        list_parts("gpus")
    )
    assert {"dgx-a100", "dgx-h100", "hgx-h200", "8x4090"} <= set(list_parts("nodes"))
    assert {"ib-hdr", "ib-ndr", "none"} <= set(list_parts("networks"))
    assert {"selene", "h100-ib", "h200-ib", "8x4090", "localhost"} <= set(list_parts("clusters"))


@pytest.mark.parametrize("kind", ["gpus", "nodes", "networks", "clusters"])
def test_every_number_of_the_catalog_has_a_source(kind):
    for name in list_parts(kind):
        if name == "localhost":
            continue
        for path, leaf in numbers(part_document(kind, name)):
            assert leaf["source"], (name, path)
            assert not leaf["source"].startswith("catalog file"), f"{kind}/{name}.toml says no source for {path}"
            assert leaf["source_kind"] in ("spec", "measured", "published", "guess")


@pytest.mark.parametrize("name", list_parts("gpus"))
def test_every_gpu_loads(name):
    gpu = load_gpu(name)
    assert gpu.name == name
    assert gpu.memory_bytes > 0
    assert gpu.gemm_curve("fp16") is gpu.gemm_efficiency["default"]


@pytest.mark.parametrize(
    ("gpu", "mib", "bf16_tflops", "gb_per_s"),
    [
        ("a100-40gb", 40960, 312, 1555),
        ("a100-80gb", 81920, 312, 2039),
        ("h100-sxm", 81559, 989, 3350),
        ("h200", 143771, 989, 4800),
        ("b200", 183359, 2250, 8000),
        ("rtx4090", 24564, 165.2, 1008),
    ],
)
def test_published_figures(gpu, mib, bf16_tflops, gb_per_s):
    part = load_gpu(gpu)
    assert part.memory_bytes == mib * 2**20
    assert part.peak_flop_per_s["bf16"] == pytest.approx(bf16_tflops * 1e12)
    assert part.memory_bandwidth_bytes_per_s == gb_per_s * 1e9


def test_volta_has_no_bf16_and_ampere_no_fp8():
    assert "bf16" not in load_gpu("v100-32gb").peak_flop_per_s
    assert load_gpu("v100-32gb").peak_flop_per_s["fp16"] == 125e12
    assert "fp8" not in load_gpu("a100-80gb").peak_flop_per_s


def test_selene():
    cluster = load_cluster("selene")
    assert (cluster.nodes, cluster.gpus, cluster.gpu.name) == (560, 4480, "a100-80gb")
    assert cluster.node.intra.bandwidth_bytes_per_s == 300e9
    assert (cluster.network.nics_per_node, cluster.network.nic_bytes_per_s) == (8, 25e9)
    assert cluster.node.host.pcie_bytes_per_s == pytest.approx(26.3e9)
    assert cluster.node.usd_per_hour is None


def test_measured_gemm_and_link_points_come_back():
    a100, h100 = load_gpu("a100-80gb"), load_cluster("h100-ib").node.intra
    cube = 2 * 8192**3
    assert float(a100.gemm_curve("bf16").at(cube)) == pytest.approx(253.7 / 312, rel=2e-3)
    assert h100.all_reduce_efficiency is not None
    assert float(h100.all_reduce_efficiency.at(2**26)) == pytest.approx(361.78 / 450, rel=2e-3)
    assert load_cluster("selene").node.intra.all_reduce_efficiency is None  # no NVLS on Ampere


def curves_of(cluster):
    gpu, intra, network = cluster.gpu, cluster.node.intra, cluster.network
    curves = [*gpu.gemm_efficiency.values(), gpu.memory_efficiency, intra.efficiency, network.efficiency]
    return curves + ([intra.all_reduce_efficiency] if intra.all_reduce_efficiency else [])


@pytest.mark.parametrize("name", CLUSTERS)
def test_curves_rise_and_stay_near_the_peak(name):
    for curve in curves_of(load_cluster(name)):
        assert list(curve.sizes) == sorted(set(curve.sizes))
        assert list(curve.fractions) == sorted(curve.fractions)
        assert 0 < curve.fractions[0] <= curve.fractions[-1] <= 1.1


def test_cpu_memory_efficiency_may_fall_with_size_but_stays_below_one():
    assert all(0 < fraction <= 1 for fraction in load_gpu("cpu").memory_efficiency.fractions)


def test_a_curve_is_a_power_between_points_and_flat_outside():
    curve = EfficiencyCurve(sizes=(1.0, 100.0), fractions=(0.2, 0.8))
    assert curve.at([0.0, 1.0, 10.0, 100.0, 1e9]) == pytest.approx([0.2, 0.2, 0.4, 0.8, 0.8])


@pytest.mark.parametrize("name", [*CLUSTERS, "localhost"])
def test_a_document_read_back_is_the_same_cluster(name):
    document = cluster_document(name)
    again = json.loads(json.dumps(document))
    assert cluster_from_document(again) == cluster_from_document(document)
    assert cluster_digest(again) == cluster_digest(document)
    assert re.fullmatch("[0-9a-f]{64}", cluster_digest(document))


def test_the_digest_ignores_the_order_of_keys_and_sees_values():
    document = cluster_document("h100-ib")
    assert cluster_digest(dict(reversed(document.items()))) == cluster_digest(document)
    assert cluster_digest({**document, "name": "other"}) != cluster_digest(document)


def test_provenance_names_file_keys():
    cluster = load_cluster("h100-ib")
    assert cluster.provenance["gpu.memory_mib"].kind == "spec"
    assert cluster.provenance["node.intra.efficiency"].kind == "published"
    assert "skypilot" in cluster.provenance["node.usd_per_hour"].text
    assert "gpu.context_gib" in cluster.guesses()
    assert {"nodes", "network.nic_gbit_per_s", "gpu.peak_tflops.bf16", "gpu.gemm_efficiency.fp8"} <= set(
        cluster.provenance
    )


def test_gpus_override_takes_part_of_a_node_or_whole_nodes():
    assert load_cluster("h100-ib", gpus=4).node.gpus == 4
    assert load_cluster("h100-ib", gpus=4).nodes == 1
    assert load_cluster("h100-ib", gpus=64).nodes == 8
    assert load_cluster("h100-ib", gpus=4096).gpus == 4096
    with pytest.raises(InputError, match=r"gpus=12 is not a whole number.*use 8 or 16"):
        load_cluster("h100-ib", gpus=12)
    with pytest.raises(InputError, match="gpus=0"):
        load_cluster("h100-ib", gpus=0)


def doc_example():
    return re.search(r"```toml\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)[1]


def test_the_documented_profile_loads(tmp_path):
    text = doc_example()
    assert len(text.splitlines()) <= 25
    path = tmp_path / "ours.toml"
    path.write_text(text, encoding="utf-8")
    cluster = load_cluster(path)
    assert (cluster.name, cluster.gpus, cluster.gpu.name) == ("ours", 192, "h100-sxm")
    assert cluster.gpu.memory_bandwidth_bytes_per_s == 2400e9
    assert cluster.gpu.memory_efficiency.fractions == (0.55, 0.75, 0.9)
    assert cluster.node.host.ram_bytes == 1024 * GIB
    assert cluster.node.host.cores == 112  # from the part
    assert cluster.network.nics_per_node == 4
    assert cluster.provenance["gpu.bandwidth_gb_per_s"].kind == "measured"
    assert cluster.provenance["node.usd_per_hour"].text == "our cluster handbook, June"


def test_a_profile_may_start_from_a_cluster_and_change_its_gpu(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100-ib"\nnodes = 2\n[gpu]\nbase = "h200"\npower_w = 650\n', encoding="utf-8")
    cluster = load_cluster(str(path))
    assert (cluster.name, cluster.nodes, cluster.gpu.name, cluster.gpu.power_w) == ("mine", 2, "h200", 650)
    assert cluster.provenance["gpu.power_w"].text == "user profile mine.toml"
    assert cluster.provenance["gpu.power_w"].kind == "spec"
    assert cluster.network.name == "ib-ndr"


def test_a_profile_may_start_from_a_file_beside_it(tmp_path):
    (tmp_path / "box.toml").write_text('base = "dgx-a100"\ngpus = 4\ngpu = { base = "a100-40gb" }\n', encoding="utf-8")
    (tmp_path / "pool.toml").write_text('[node]\nbase = "box.toml"\n', encoding="utf-8")
    cluster = load_cluster(tmp_path / "pool.toml")
    assert (cluster.node.name, cluster.gpus, cluster.gpu.name, cluster.network.kind) == ("box", 4, "a100-40gb", "none")


@pytest.mark.parametrize("name", ["h100-ib", "8x4090", "localhost"])
def test_a_written_profile_reads_back(name, tmp_path):
    document, path = cluster_document(name), tmp_path / "profile.toml"
    write_profile(document, path)
    assert cluster_document(path) == document


def test_a_complete_measured_profile_of_one_gpu_can_be_written(tmp_path):
    document = cluster_document("localhost")
    curve = {"size_mib": [1.0, 10.0], "fraction": [0.5, 0.9]}
    plain = {
        "source": 'shardplan calibrate, "this" box \\ 3',
        "source_kind": "measured",
        "nodes": 1,
        "gpu": {
            **{"name": "bench gpu", "vendor": "x", "architecture": "y", "device": "cuda"},
            **{"memory_mib": 1024, "bandwidth_gb_per_s": 100.5, "l2_mib": 4, "multiprocessors": 10},
            **{"vector_tflops": 1.0, "launch_us": 4.2, "context_gib": 0.5, "power_w": None},
            "peak_tflops": {"fp32": 1.0, "bf16": 8.0},
            "attention_efficiency": {"forward": 0.5, "backward": 0.4},
            "gemm_efficiency": {"default": {"size_gflop": [1e-05, 1.0], "fraction": [0.1, 0.8]}},
            "memory_efficiency": curve,
        },
        "node": {
            "name": "bench",
            "gpus": 1,
            "intra": {
                **{"kind": "none", "bandwidth_gb_per_s": 0, "latency_us": 0, "point_to_point_fraction": 1.0},
                "efficiency": curve,
            },
            "host": document["node"]["host"],
        },
    }
    path = tmp_path / "calibrated.toml"
    write_profile(plain, path)
    cluster = load_cluster(path)
    assert cluster.provenance["gpu.memory_efficiency"].kind == "measured"
    assert cluster.provenance["gpu.memory_mib"].text == 'shardplan calibrate, "this" box \\ 3'
    assert (cluster.gpus, cluster.gpu.power_w, cluster.gpu.memory_efficiency.fractions) == (1, None, (0.5, 0.9))


def test_profile_text_refuses_what_toml_cannot_say():
    assert profile_text({"a": True, "b": [1, 2.5], "odd key": "x"}) == 'a = true\nb = [1, 2.5]\n"odd key" = "x"\n'
    with pytest.raises(TypeError, match="not set"):
        profile_text({"a": {1, 2}})


def test_the_machine_needs_no_pydantic():
    code = "import sys, shardplan.hw_profiles.machine, shardplan.hw_profiles.load, shardplan.hw_profiles.topology\n"
    code += "sys.exit(any(name in sys.modules for name in ('pydantic', 'networkx', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=DOC.parent.parent / "src").returncode == 0


def test_no_catalog_number_is_absurd():
    for name in CLUSTERS:
        cluster = load_cluster(name)
        assert 1e-6 < cluster.gpu.launch_s < 1e-4
        assert cluster.gpu.context_bytes < 3 * GIB
        assert math.isfinite(cluster.node.host.memory_bandwidth_bytes_per_s)


KERNEL = (
    "head_dim = [64, 128]\nforward = [0.4, 0.6]\nbackward = [0.3, 0.5]\n"
    "forward_ramp_tokens = 100\nbackward_ramp_tokens = 200\ncausal_ramp_tokens = 300\n"
)


def test_attention_comes_by_kernel_and_head_dim(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "h100-ib"\n[gpu.attention_efficiency.flash2]\n{KERNEL}', encoding="utf-8")
    cluster = load_cluster(path)
    curve = cluster.gpu.attention_curve(["flash2"])
    assert list(cluster.gpu.attention_efficiency) == ["cudnn", "flash3", "flash2", "flash1", "triton", "shardplan"]
    assert cluster.provenance["gpu.attention_efficiency.flash2"].text == "user profile mine.toml"
    assert float(curve.at("forward", 128, 700, causal=False)) == pytest.approx(0.6 * 700 / 800)
    assert float(curve.at("backward", 96, 500, causal=True)) == pytest.approx(0.4 / 2)
    assert curve.at("forward", [32, 256], 1e12, causal=False).tolist() == pytest.approx([0.2, 0.6])
    rows = {row["field"]: row for section in hardware_show(path)["sections"] for row in section["rows"]}
    assert rows["attention_efficiency.flash2.forward"]["value"] == [[64, 0.4], [128, 0.6]]
    assert rows["attention_efficiency.flash2.causal_ramp_tokens"]["unit"] == "tokens"
    written = tmp_path / "written.toml"
    write_profile(cluster_document(path), written)
    assert cluster_document(written) == cluster_document(path)


def test_a_causal_mask_may_lower_the_plateau(tmp_path):
    path = tmp_path / "mine.toml"
    masked = f"{KERNEL}causal_plateau_fraction = 0.8\n"
    path.write_text(f'base = "h100-ib"\n[gpu.attention_efficiency.flash2]\n{masked}', encoding="utf-8")
    curve = load_cluster(path).gpu.attention_curve(["flash2"])
    assert float(curve.at("forward", 128, 1e12, causal=True)) == pytest.approx(0.8 * 0.6)
    assert float(curve.at("forward", 128, 1e12, causal=False)) == pytest.approx(0.6)
    rows = {row["field"]: row for section in hardware_show(path)["sections"] for row in section["rows"]}
    assert rows["attention_efficiency.flash2.causal_plateau_fraction"]["value"] == 0.8
    written = tmp_path / "written.toml"
    write_profile(cluster_document(path), written)
    assert cluster_document(written) == cluster_document(path)


def test_plain_attention_goes_before_the_kernels_of_the_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100-ib"\n[gpu.attention_efficiency]\nforward = 0.5\nbackward = 0.4\n', encoding="utf-8")
    gpu = load_cluster(path).gpu
    assert list(gpu.attention_efficiency) == ["plain"]
    curve = gpu.attention_curve(["cudnn", "flash2"])
    assert curve.at("forward", [16, 128, 256], 1e12, causal=True).tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("[gpu.attention_efficiency]\nforward = 0.5\n", "one of forward and backward"),
        (f"[gpu.attention_efficiency.flash9]\n{KERNEL}", "unknown key"),
        ("[gpu.attention_efficiency]\nflash2 = 0.5\n", "a table of head dims"),
        (f"[gpu.attention_efficiency.flash2]\n{KERNEL.replace('[0.3, 0.5]', '[0.3]')}", "as many of each"),
        (f"[gpu.attention_efficiency.flash2]\n{KERNEL.replace('[64, 128]', '[128, 64]')}", "do not ascend"),
    ],
)
def test_what_is_wrong_with_attention_is_said(section, told, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "h100-ib"\n{section}', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert told in str(caught.value)
