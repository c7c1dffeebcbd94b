"""Detection of this machine, and what `shardplan hardware` shows."""

import json

import pytest
from typer.testing import CliRunner

from shardplan.hw_profiles import detect
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.show import hardware_list, hardware_show
from shardplan.hw_profiles.topology import tier_table

GIB = 2.0**30


def machine(monkeypatch, *, gpus="", topology="", cores=4.0, flags="avx2"):
    """Pretend to be another machine."""
    facts = detect.CpuFacts(
        model="Test CPU",
        architecture="x86_64",
        cores=cores,
        ram_bytes=64 * GIB,
        clock_hz=3e9,
        flags=frozenset(flags.split()),
    )
    monkeypatch.setattr(detect, "cpu_facts", lambda: facts)
    monkeypatch.setattr(detect, "_output", lambda *command: topology if "topo" in command else gpus)


def test_this_machine_is_described_without_trouble():
    cluster = load_cluster("localhost")
    assert cluster.name == "localhost"
    assert cluster.nodes == 1
    assert cluster.gpu.memory_bytes > 0


def test_a_cpu_gives_each_core_a_slot(monkeypatch):
    machine(monkeypatch, cores=4.0)
    cluster = load_cluster("localhost")
    assert (cluster.gpus, cluster.gpu.device, cluster.node.intra.kind) == (4, "cpu", "shared_memory")
    assert cluster.gpu.memory_bytes == pytest.approx(16 * GIB)
    assert cluster.gpu.peak_flop_per_s["fp32"] == pytest.approx(3e9 * 8 * 4)
    assert cluster.gpu.peak_flop_per_s["bf16"] == cluster.gpu.peak_flop_per_s["fp32"]
    assert cluster.provenance["gpu.peak_tflops.fp32"].kind == "guess"
    assert cluster.provenance["gpu.memory_mib"].kind == "measured"
    assert tier_table(cluster).names == ("node",)


@pytest.mark.parametrize(("cores", "share"), [(1.0, 0.5), (0.5, 0.25), (2.0, 1.0), (3.7, 1.0)])
def test_two_slots_at_least_share_a_small_machine(monkeypatch, cores, share):
    machine(monkeypatch, cores=cores)
    cluster = load_cluster("localhost")
    assert cluster.gpus == max(2, int(cores))
    assert cluster.gpu.peak_flop_per_s["fp32"] == pytest.approx(3e9 * 8 * 4 * share)


@pytest.mark.parametrize(("flags", "gain"), [("avx2", 1), ("avx512f avx512_bf16", 2), ("avx512f amx_bf16", 8)])
def test_bf16_is_faster_only_with_hardware(monkeypatch, flags, gain):
    machine(monkeypatch, flags=flags)
    peak = load_cluster("localhost").gpu.peak_flop_per_s
    assert peak["bf16"] / peak["fp32"] == pytest.approx(gain)


@pytest.mark.parametrize(
    ("line", "topology", "gpu", "link"),
    [
        ("NVIDIA H100 80GB HBM3, 81559", "GPU0 X NV18", "h100-sxm", "nvswitch"),
        ("NVIDIA H200, 143771", "GPU0 X NV18", "h200", "nvswitch"),
        ("NVIDIA A100-SXM4-40GB, 40960", "GPU0 X NV12", "a100-40gb", "nvswitch"),
        ("NVIDIA A100 80GB PCIe, 81920", "GPU0 X SYS", "a100-80gb-pcie", "pcie"),
        ("NVIDIA A100-PCIE-40GB, 40960", "GPU0 X SYS", "a100-40gb-pcie", "pcie"),
        ("NVIDIA A800-SXM4-80GB, 81920", "GPU0 X NV8", "a800-80gb", "nvswitch"),
        ("NVIDIA H100 PCIe, 81559", "GPU0 X SYS", "h100-pcie", "pcie"),
        ("NVIDIA H100 NVL, 95830", "GPU0 X SYS", "h100-nvl", "pcie"),
        ("NVIDIA H800, 81559", "GPU0 X NV8", "h800", "nvswitch"),
        ("NVIDIA H20, 97871", "GPU0 X NV18", "h20", "nvswitch"),
        ("NVIDIA B300 SXM6 AC, 275040", "GPU0 X NV18", "b300", "nvswitch"),
        ("NVIDIA L40S, 46068", "GPU0 X PHB", "l40s", "pcie"),
        ("NVIDIA L4, 23034", "GPU0 X PHB", "l4", "pcie"),
        ("NVIDIA A10, 23028", "GPU0 X PHB", "a10", "pcie"),
        ("NVIDIA A40, 46068", "GPU0 X PHB", "a40", "pcie"),
        ("NVIDIA RTX A6000, 49140", "GPU0 X PHB", "a6000", "pcie"),
        ("NVIDIA RTX 6000 Ada Generation, 49140", "GPU0 X PHB", "rtx6000-ada", "pcie"),
        ("NVIDIA GeForce RTX 3090, 24576", "GPU0 X PHB", "rtx3090", "pcie"),
        ("NVIDIA GeForce RTX 5090, 32607", "GPU0 X PHB", "rtx5090", "pcie"),
        ("Tesla V100-SXM2-16GB, 16384", "GPU0 X NV1", "v100-16gb", "mesh"),
        ("Tesla V100-SXM2-32GB, 32768", "GPU0 X NV1", "v100-32gb", "nvswitch"),
        ("NVIDIA GeForce RTX 4090, 24564", "GPU0 X PHB", "rtx4090", "pcie"),
    ],
)
def test_nvidia_gpus_are_found_in_the_catalog(monkeypatch, line, topology, gpu, link):
    machine(monkeypatch, gpus=f"{line}\n{line}\n", topology=topology)
    cluster = load_cluster("localhost")
    assert (cluster.gpu.name, cluster.gpus, cluster.node.intra.kind) == (gpu, 2, link)
    assert cluster.gpu.memory_bytes == float(line.rsplit(",", maxsplit=1)[1]) * 2**20
    assert cluster.node.host.ram_bytes == 64 * GIB
    assert cluster.node.nvme is None


@pytest.mark.parametrize(
    "name", ["NVIDIA T4", "NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D"]
)
def test_an_unknown_gpu_is_to_be_measured(monkeypatch, name):
    machine(monkeypatch, gpus=f"{name}, 16384\n")
    with pytest.raises(InputError, match=rf"localhost: GPU '{name}' is not in the catalog; .*shardplan calibrate"):
        load_cluster("localhost")


@pytest.mark.parametrize("noise", ["", "No devices were found", "\n\n", "garbage without comma"])
def test_a_silent_nvidia_smi_means_a_cpu(monkeypatch, noise):
    machine(monkeypatch, gpus=noise)
    assert load_cluster("localhost").gpu.device == "cpu"


def test_memory_that_nvidia_smi_hides_comes_from_the_catalog(monkeypatch):
    machine(monkeypatch, gpus="NVIDIA H200, [N/A]\n")
    assert load_cluster("localhost").gpu.memory_bytes == 143771 * 2**20


def test_an_empty_machine_still_has_facts(monkeypatch):
    monkeypatch.setattr(detect, "_read", lambda path: "")
    monkeypatch.setattr(detect, "_output", lambda *command: "")
    facts = detect.cpu_facts()
    assert facts.cores >= 1
    assert facts.ram_bytes == 4 * GIB
    assert facts.clock_hz == 3e9


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_a_mac_is_asked_through_sysctl(monkeypatch, system):
    monkeypatch.setattr(detect.platform, "system", lambda: system)
    monkeypatch.setattr(detect, "_read", lambda path: "")
    monkeypatch.setattr(detect, "_output", lambda *command: "17179869184" if "hw.memsize" in command else "Apple M2")
    assert detect.cpu_facts().ram_bytes == (16 * GIB if system == "Darwin" else 4 * GIB)


def test_the_list_names_every_part():
    rows = hardware_list()
    assert set(rows) == {"clusters", "nodes", "networks", "gpus"}
    assert next(row for row in rows["gpus"] if row["name"] == "h200")["memory_mib"] == 143771
    assert next(row for row in rows["clusters"] if row["name"] == "selene")["gpus"] == 4480
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("name", ["h100-ib", "dgx-a100", "ib-ndr", "rtx4090", "none", "8x4090", "localhost"])
def test_every_kind_of_entry_is_shown_with_units_and_sources(name):
    shown = hardware_show(name)
    rows = [row for section in shown["sections"] for row in section["rows"]]
    assert all(row["source"] for row in rows if not isinstance(row["value"], str))
    for row in rows:
        last = row["field"].rsplit(".", maxsplit=1)[-1]
        assert row["unit"] or not last.endswith(("_mib", "_gib", "_per_s", "_us", "_tflops", "_w", "_tb")), row
    assert ("tiers" in shown) == (shown["kind"] == "cluster")
    json.dumps(shown, allow_nan=False)


def test_tiers_are_shown_in_human_units():
    node, leaf, spine = hardware_show("h100-ib")["tiers"]
    assert (node["bandwidth_gb_per_s"], leaf["bandwidth_gb_per_s"], spine["latency_us"]) == (450.0, 50.0, 15.0)


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(InputError, match=r"unknown hardware 'dgx-h10'; did you mean .*dgx-h100"):
        hardware_show("dgx-h10")


def test_the_command_writes_tables_or_json_alone(tmp_path):
    from shardplan.cli.hardware import app

    run = CliRunner().invoke
    assert "selene" in run(app, ["list"]).stdout
    assert {"clusters", "gpus"} <= set(json.loads(run(app, ["list", "--json"]).stdout))
    assert "ib-ndr" in run(app, ["show", "h100-ib"]).stdout
    assert json.loads(run(app, ["show", "h100-ib", "--json"]).stdout)["gpus"] == 1024
    profile = tmp_path / "mine.toml"
    profile.write_text('base = "8x4090"\n[node]\ngpus = 4\n', encoding="utf-8")
    assert json.loads(run(app, ["show", str(profile), "--json"]).stdout)["gpus"] == 4
    assert isinstance(run(app, ["show", "nothing-like-it"]).exception, InputError)
    for command in ("list", "show"):
        assert "Example:" in run(app, [command, "--help"]).stdout


def test_more_processes_than_slots_share_a_cpu() -> None:
    machine = load_cluster("localhost")
    if machine.gpu.device != "cpu":
        pytest.skip("this machine has GPUs")
    twice = machine.with_gpus(2 * machine.gpus)
    assert twice.gpus == 2 * machine.gpus
    assert twice.nodes == 1
    assert twice.gpu.memory_bytes == machine.gpu.memory_bytes / 2
    assert twice.gpu.peak_flop_per_s["fp32"] == machine.gpu.peak_flop_per_s["fp32"] / 2
    with pytest.raises(InputError, match="processes on each"):
        machine.with_gpus(1000 * machine.gpus)
