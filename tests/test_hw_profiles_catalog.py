"""The breadth of the catalog: what it holds, restated vendor figures, honest guesses, and an estimate on every cluster."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shardplan.cli import hardware as command
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.published_software import names
from shardplan.hw_profiles.complaints import parse
from shardplan.hw_profiles.document import part_document
from shardplan.hw_profiles.load import cluster_document, cluster_from_document, list_parts, load_cluster, load_gpu
from shardplan.hw_profiles.schema import NetworkPart, NodeFile
from shardplan.hw_profiles.show import hardware_list, hardware_show
from shardplan.hw_profiles.topology import tier_table
from shardplan.hw_profiles.write import write_profile

CLUSTERS = [name for name in list_parts("clusters") if name != "localhost"]
DOC = Path(__file__).parent.parent / "docs" / "hardware_profiles.md"
MEMORY = "from memory"

REQUIRED = {
    "gpus": "v100-16gb v100-32gb a100-40gb a100-80gb a100-40gb-pcie a100-80gb-pcie a800-80gb h100-sxm h100-pcie h100-nvl h100-96gb-500w "
    "h800 h200 h20 b200 b300 gb200 gb300 l40s l4 a10 a40 a6000 rtx3090 rtx4090 rtx5090 rtx6000-ada mi250x mi300x mi325x mi355x "
    "gaudi2 gaudi3 cpu",
    "nodes": "dgx-1v dgx-2 dgx-a100 dgx-h100 dgx-b200 hgx-h200 gb200-nvl72 aws-p4d aws-p4de aws-p5 aws-p5en aws-p6-b200 aws-p6-b300 "
    "azure-nd-a100-v4 azure-nd-h100-v5 gcp-a3-high gcp-a3-mega gcp-a3-ultra",
    "networks": "ib-hdr ib-ndr ib-ndr-2to1 ib-xdr roce-200 roce-400 roce-400-pods efa-400 efa-3200 omni-path-100 ethernet-100 none",
    "clusters": "selene eos h100-ib h200-ib a100-roce b200-ib gb200-nvl72 mi300x-ib jean-zay 4x3090 8x4090 localhost",
}


@pytest.mark.parametrize("kind", REQUIRED)
def test_every_required_name_is_there(kind):
    assert set(REQUIRED[kind].split()) <= set(list_parts(kind))


STAS = "stas00/ml-engineering@744d01e compute/accelerator/README.md"
SPECIFIED = [
    # GPU, driver's MiB (None: a guess), dense TFLOP/s by precision, GB/s (None: a guess), citation
    ("v100-16gb", None, {"fp32": 15.7, "fp16": 125}, 900, "public V100 SXM2 specification"),
    ("v100-32gb", None, {"fp32": 15.7, "fp16": 125}, 900, "public V100 SXM2 specification"),
    ("a100-40gb", 40960, {"tf32": 156, "bf16": 312}, None, STAS),
    ("a100-80gb", 81920, {"tf32": 156, "bf16": 312}, 2039, STAS),
    ("a100-40gb-pcie", 40960, {"tf32": 156, "bf16": 312}, None, STAS),
    ("a100-80gb-pcie", 81920, {"tf32": 156, "bf16": 312}, 1940, STAS),
    ("h100-sxm", 81559, {"tf32": 494.5, "bf16": 989, "fp8": 1979}, 3350, STAS),
    ("h100-pcie", None, {"tf32": 378, "bf16": 756, "fp8": 1513}, 2000, STAS),
    ("h100-nvl", None, {"fp16": 835, "bf16": 835}, 3900, "pytorch/torchtitan tools/utils.py"),
    ("h200", 143771, {"bf16": 989, "fp8": 1979}, 4800, STAS),
    ("h20", None, {"bf16": 148, "fp8": 296}, 4000, "secondary specification pages"),
    ("b200", 183359, {"bf16": 2250, "fp8": 4500, "fp4": 9000}, 8000, STAS),
    ("b300", 275040, {"bf16": 2250, "fp8": 4500, "fp4": 12600}, 8000, STAS),
    ("gb200", 189471, {"bf16": 2500, "fp8": 5000, "fp4": 10000}, 8000, STAS),
    ("gb300", None, {"bf16": 2500, "fp8": 5000, "fp4": 15000}, None, STAS),
    ("l40s", 45776, {"fp32": 91.6, "bf16": 362, "fp8": 733}, 864, STAS),
    ("l4", None, {"fp32": 30.3, "bf16": 121, "fp8": 242}, 300, "public L4 specification"),
    ("a10", None, {"fp32": 31.2, "bf16": 125}, 600, "public A10 specification"),
    ("rtx4090", None, {"fp32": 82.6, "bf16": 165.2, "fp8": 330.3}, 1008, "NVIDIA Ada architecture white paper"),
    (
        "rtx-pro-6000",
        None,
        {"fp32": 126, "bf16": 503.8, "fp8": 1010, "fp4": 2020},
        1792,
        "public specification page of the RTX PRO 6000",
    ),
    ("rtx5090", 32109, {"fp32": 104.8}, 1792, "public RTX 5090 specification"),
    ("mi250x", None, {"fp32": 23.95, "fp16": 191.5, "bf16": 191.5}, 1640, STAS),
    ("mi300x", None, {"tf32": 653.7, "bf16": 1300, "fp8": 2610}, 5300, STAS),
    ("mi325x", None, {"tf32": 653.7, "bf16": 1300, "fp8": 2610}, 6000, STAS),
    ("mi355x", None, {"fp32": 157.3, "bf16": 2500, "fp8": 5000, "fp4": 10100}, 8000, STAS),
    ("gaudi2", None, {"bf16": 432, "fp8": 865}, 2460, STAS),
    ("gaudi3", None, {"fp32": 229, "bf16": 1677, "fp8": 1677}, 3700, STAS),
]


@pytest.mark.parametrize(("name", "mib", "tflops", "gb_per_s", "citation"), SPECIFIED)
def test_vendor_figures_are_restated_with_their_citation(name, mib, tflops, gb_per_s, citation):
    gpu = part_document("gpus", name)
    stated = [gpu["peak_tflops"][word] for word in tflops]
    assert [one["value"] for one in stated] == list(tflops.values())
    for figure, value in ((gpu["memory_mib"], mib), (gpu["bandwidth_gb_per_s"], gb_per_s)):
        assert (figure["source_kind"] == "guess") == (value is None)
        assert value is None or figure["value"] == value
        stated += (
            [figure] if value and "karpenter" not in figure["source"] and "listing" not in figure["source"] else []
        )
    for one in stated:
        assert one["source_kind"] in ("spec", "published")
    assert any(citation in one["source"] for one in stated)


@pytest.mark.parametrize("name", ["a800-80gb", "h800", "a40", "a6000", "rtx3090", "rtx6000-ada"])
def test_what_only_memory_says_is_a_guess(name):
    gpu = part_document("gpus", name)
    for field in ("memory_mib", "bandwidth_gb_per_s", "multiprocessors"):
        assert gpu[field]["source_kind"] == "guess", field
    assert all(one["source_kind"] == "guess" and MEMORY in one["source"] for one in gpu["peak_tflops"].values())


def test_no_source_from_memory_poses_as_a_fact():
    for kind in ("gpus", "nodes", "networks", "clusters"):
        for name in list_parts(kind):
            for path, leaf in leaves(part_document(kind, name) if name != "localhost" else {}):
                if MEMORY in leaf["source"]:
                    assert leaf["source_kind"] == "guess", (name, path)


def leaves(table, path=""):
    for key, value in table.items():
        if isinstance(value, dict) and "source" in value:
            yield f"{path}{key}", value
        elif isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


MEASURED_PRODUCTS = {"a100-80gb", "a100-40gb", "h100-sxm", "h200", "b200-simumax", "rtx5090"}


def test_matrix_rates_of_gpus_that_nobody_measured_are_guesses():
    known = {
        name
        for name in list_parts("gpus")
        if part_document("gpus", name)["gemm_efficiency"]["default"]["source_kind"] != "guess"
    }
    assert known == MEASURED_PRODUCTS


def test_guesses_are_listed():
    shown = hardware_show("8x-rtx6000-ada")
    assert {"gpu.peak_tflops.bf16", "gpu.gemm_efficiency.default", "node.intra.efficiency"} <= set(shown["guesses"])
    rows = [row for section in shown["sections"] for row in section["rows"]]
    assert sum(row["source_kind"] == "guess" for row in rows) >= len(shown["guesses"])


def test_peak_rates_keep_to_what_the_hardware_has():
    assert "bf16" not in load_gpu("v100-16gb").peak_flop_per_s
    for name in ("a800-80gb", "a10", "a40", "a6000", "rtx3090", "mi250x"):
        assert "fp8" not in load_gpu(name).peak_flop_per_s
    assert "tf32" not in load_gpu("mi355x").peak_flop_per_s
    assert (load_gpu("gaudi2").device, load_gpu("mi300x").device) == ("hpu", "cuda")


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_has_tiers_and_an_estimate(name):
    cluster = load_cluster(name)
    tiers = tier_table(cluster)
    assert tiers.gpus[-1] == cluster.gpus
    assert (np.diff(tiers.gpus) > 0).all()
    assert (tiers.bandwidth_bytes_per_s > 0).all()
    assert (tiers.latency_s > 0).all()
    few = cluster.with_gpus(min(cluster.nodes, 2) * cluster.node.gpus)
    answer = estimate(
        model=load_model("tiny"),
        job=Job(seq=256, global_batch=2 * few.gpus, precision="bf16" if "bf16" in few.gpu.peak_flop_per_s else "fp16"),
        cluster=few,
        layouts=parse_layout(f"dp={few.gpus} zero=1"),
        runtime="megatron",
    )
    assert 0 < answer.step_s[0] < 10
    assert answer.fits().all()
    assert 0.08 < answer.band_of(0) < 0.3


def test_prices_have_a_date():
    for row in hardware_list()["clusters"]:
        assert (row["usd_per_gpu_hour"] is None) == (row["price_date"] is None), row["name"]
    p5 = hardware_show("aws-p5")
    assert (p5["usd_per_gpu_hour"], p5["price_date"]) == (6.88, "2026-07-20")
    price = next(row for section in p5["sections"] for row in section["rows"] if row["field"] == "usd_per_hour")
    assert (price["value"], price["date"], price["source_kind"]) == (55.04, "2026-07-20", "published")
    assert "karpenter" in price["source"]
    assert load_cluster("aws-p5").node.usd_per_gpu_hour == 6.88


def test_what_nobody_says_is_absent():
    shown = hardware_show("eos")
    assert (shown["usd_per_gpu_hour"], shown["price_date"]) == (None, None)
    assert load_cluster("eos").storage is None
    assert load_cluster("aws-p5").node.power_w is None
    assert load_cluster("h800-ib").node.nvme is None
    assert load_cluster("jean-zay").storage.read_bytes_per_s is None
    assert load_cluster("aws-p5").network.rail_optimised is None
    assert "null" in json.dumps(shown)


def test_shared_storage_and_rails():
    meta = load_cluster("meta-24k-roce")
    assert (meta.storage.kind, meta.storage.read_bytes_per_s, meta.storage.capacity_bytes) == ("tectonic", 2e12, 240e15)
    assert load_cluster("jean-zay").storage.write_bytes_per_s == 57.5e9
    assert load_cluster("selene").network.rail_optimised is True
    tiers = tier_table(meta)
    assert tiers.gpus.tolist() == [8, 3072, 24576]
    assert tiers.bandwidth_bytes_per_s == pytest.approx([450e9, 50e9, 50e9 / 7])
    sections = {section["title"]: section["rows"] for section in hardware_show("meta-24k-roce")["sections"]}
    assert {row["field"]: row["unit"] for row in sections["storage"]} == {
        **{"kind": "", "read_gb_per_s": "GB/s", "write_gb_per_s": "GB/s", "capacity_tb": "TB"},
    }


def test_a_halved_fabric_halves_the_spine():
    assert load_cluster("h100-ib").network.oversubscription == 1
    assert parse(NetworkPart, part_document("networks", "ib-ndr-2to1"), "").oversubscription.value == 2


def test_every_gpu_of_the_names_of_published_runs_stands_for_a_cluster():
    for cluster in names()["gpus"].values():
        assert cluster in CLUSTERS


def test_without_and_borrowed(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[node]\nbase = "dgx-h100"\nwithout = ["power_w", "nvme"]\nhost = { borrowed = "as the DGX", ram_gib = 512 }\n'
        '[gpu]\nbase = "h200"\n[gpu.gemm_efficiency]\nborrowed = "another stepping"\nwithout = ["fp8"]\n',
        encoding="utf-8",
    )
    cluster = load_cluster(path)
    assert (cluster.node.power_w, cluster.node.nvme) == (None, None)
    assert (cluster.provenance["node.host.cores"].kind, cluster.provenance["node.host.cores"].text) == (
        "guess",
        "as the DGX",
    )
    assert cluster.provenance["node.host.ram_gib"].kind == "spec"
    assert cluster.provenance["node.intra.efficiency"].kind == "published"
    assert cluster.provenance["gpu.gemm_efficiency.default"].text == "another stepping"
    assert set(cluster.gpu.gemm_efficiency) == {"default", "fp32"}


def test_a_date_may_stand_bare_and_all_of_it_can_be_written(tmp_path):
    path, written = tmp_path / "mine.toml", tmp_path / "written.toml"
    path.write_text(
        'base = "h100-ib"\n[node]\nusd_per_hour = { value = 20, date = 2026-08-01, source = "our contract" }\n'
        "[storage]\nread_gb_per_s = 40\n[network]\nrail_optimised = false\n",
        encoding="utf-8",
    )
    document = cluster_document(path)
    cluster = cluster_from_document(document)
    assert (cluster.node.usd_per_gpu_hour, cluster.node.price_date) == (2.5, "2026-08-01")
    assert (cluster.storage.read_bytes_per_s, cluster.network.rail_optimised) == (40e9, False)
    write_profile(document, written)
    assert cluster_document(written) == document


def documented_files():
    """File name (the comment on the first line) -> text of each example that has one."""
    blocks = re.findall(r"```toml\n(# (\S+\.toml)\n.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {name: text for text, name in blocks}


def test_the_documented_parts_load(tmp_path):
    files = documented_files()
    assert list(files) == ["t4.toml", "4x-t4.toml", "our-roce.toml", "our-t4.toml"]
    for name, text in files.items():
        assert len(text.splitlines()) < 30
        (tmp_path / name).write_text(text, encoding="utf-8")
    parse(NodeFile, part_document("nodes", tmp_path / "4x-t4.toml"), "4x-t4.toml")
    cluster = load_cluster(tmp_path / "our-t4.toml")
    assert (cluster.gpus, cluster.gpu.name, cluster.gpu.architecture) == (32, "t4", "turing")
    assert cluster.gpu.peak_flop_per_s == {"fp32": 8.1e12, "fp16": 65e12}
    assert (cluster.node.price_date, cluster.network.oversubscription, cluster.network.rail_optimised) == (
        "2026-07",
        3,
        False,
    )
    assert cluster.provenance["gpu.launch_us"].kind == "guess"
    assert cluster.provenance["gpu.memory_mib"].kind == "measured"
    assert cluster.storage.write_bytes_per_s == 2e9
    assert (cluster.failures.gpu_hours_per_failure, cluster.failures.restart_s) == (30000, 900)
    assert tier_table(cluster).names == ("node", "leaf")


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_and_a_profile_fit_the_terminal(width, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(command, "make_console", lambda: Console(file=screen, width=width, highlight=False))
    command.list_hardware()
    listed = screen.getvalue()
    names = {line.split()[0] for line in listed.splitlines() if line.startswith(" ") and line.strip()}
    for kind in ("clusters", "nodes", "networks", "gpus"):
        assert set(list_parts(kind)) <= names
    heading = next(line for line in listed.splitlines() if "USD/GPU h" in line)
    assert (" node " in heading) == (width == 120)
    command.show_hardware("aws-p5")
    assert all(len(line) <= width for line in screen.getvalue().splitlines())
    assert "55.04 USD/h (2026-07-20)" in screen.getvalue()


def test_part_of_a_rack_has_its_servers_share_of_hosts_and_power() -> None:
    rack = load_cluster("gb200-nvl72", gpus=72).node
    tray, six, parts = (load_cluster("gb200-nvl72", gpus=gpus) for gpus in (4, 6, 256))
    assert rack.power_w and tray.node.power_w and parts.node.power_w and six.node.power_w
    assert tray.node.power_w == pytest.approx(rack.power_w / 18) and tray.node.host.cores == rack.host.cores // 18
    assert six.node.host.ram_bytes == pytest.approx(rack.host.ram_bytes / 9)  # two servers
    assert parts.nodes * parts.node.power_w == pytest.approx(rack.power_w * 256 / 72)


@pytest.mark.parametrize("name", ["gb200-nvl72", "gb300-nvl72"])
def test_flash_of_a_rack_is_that_of_its_trays(name: str) -> None:
    rack, tray = load_cluster(name, gpus=72).node.nvme, load_cluster(name, gpus=4).node.nvme
    parts = load_cluster(name, gpus=256)
    assert rack and tray and parts.node.nvme
    for field in ("capacity_bytes", "read_bytes_per_s", "write_bytes_per_s"):
        assert getattr(tray, field) == pytest.approx(getattr(rack, field) / 18)
        assert parts.nodes * getattr(parts.node.nvme, field) == pytest.approx(getattr(rack, field) * 256 / 72)
    assert tray.capacity_bytes == pytest.approx(22.5e12)


@pytest.mark.parametrize(
    ("name", "cards", "gbit"), [("aws-p5", 32, 100), ("aws-p5en", 16, 200), ("aws-p6-b300", 16, 400)]
)
def test_nodes_with_more_cards_than_gpus(name: str, cards: int, gbit: int) -> None:
    network, node = load_cluster(name).network, load_cluster(name).node
    assert (network.nics_per_node, network.nic_bytes_per_s) == (cards, gbit * 1e9 / 8)
    assert tier_table(load_cluster(name)).bandwidth_bytes_per_s[1] == cards * gbit * 1e9 / 8 / node.gpus


def test_a_node_draws_more_than_its_gpus() -> None:
    """Hosts, fans and links take 100 W to 1 kW a GPU."""
    for name in CLUSTERS:
        node = load_cluster(name).node
        if node.power_w and node.gpu.power_w:
            beside = node.power_w - node.gpus * node.gpu.power_w
            assert 100.0 * node.gpus < beside < 1000.0 * node.gpus, name
    mi325x = load_cluster("mi325x-ib").node
    assert (mi325x.host.ram_bytes / 2**30, mi325x.power_w) == (2304, 12600)
