"""Mixed clusters: how a file describes them, layers by what each kind of node can take, never worse than treating all as the slowest."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shardplan
from shardplan.cli import app
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.mixed import estimate_any, stages_on_parts
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, cluster_from_document
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.mixed import as_all, in_order
from shardplan.hw_profiles.show import hardware_show
from shardplan.planner.space import parse_wishes
from shardplan.planner.sweep import Grid, Sweep

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "a100-h100.toml"


def mixed(tmp_path: Path, *parts: str, network: str = "ib-hdr", name: str = "ours") -> Cluster:
    """A cluster of `parts`, each the words of one entry."""
    text = f'[network]\nbase = "{network}"\n' + "".join(f"\n[[parts]]\n{words}\n" for words in parts)
    path = tmp_path / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return shardplan.load_cluster(path)


def searched(cluster: Cluster, runtime: str = "megatron", model: str = "llama-3-8b", words: str = "") -> Any:
    return shardplan.search(
        model=shardplan.load_model(model),
        job=shardplan.Job(seq=4096, global_batch=256),
        cluster=cluster,
        runtime=runtime,
        wishes=parse_wishes(words),
    )


def test_a_file_lists_parts() -> None:
    cluster = shardplan.load_cluster(EXAMPLE)
    assert [(part.name, part.nodes, part.gpus) for part in cluster.parts] == [("a100-80gb", 4, 32), ("h100-sxm", 4, 32)]
    assert (cluster.gpus, cluster.nodes, cluster.network.name) == (64, 8, "ib-hdr")
    assert [part.network.name for part in cluster.parts] == ["ib-hdr", "ib-ndr"]
    assert cluster_from_document(cluster_document(EXAMPLE)) == cluster


def test_hardware_show_prints_every_part() -> None:
    shown = hardware_show(EXAMPLE)
    titles = {section["title"] for section in shown["sections"]}
    assert {"network", "a100-80gb: gpu", "h100-sxm: node", "h100-sxm: network"} <= titles
    assert {row["tier"] for row in shown["tiers"]} >= {"a100-80gb: node", "h100-sxm: leaf"}
    told = CliRunner().invoke(app, ["hardware", "show", str(EXAMPLE)])
    assert told.exit_code == 0 and "h100-sxm: node" in told.stdout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[parts]]\nnode = { base = "dgx-a100" }\n', "parts is not a list of two tables"),
        (
            'nodes = 2\n[[parts]]\nnode = { base = "dgx-a100" }\n[[parts]]\nnode = { base = "dgx-h100" }\n',
            "'nodes' stands beside",
        ),
        (
            '[network]\nbase = "ib-ndr"\n[[parts]]\nnode = { base = "dgx-h100" }\n[[parts]]\nnode = { base = "8x-mi300x" }\n',
            "which no communication library joins",
        ),
        (
            '[[parts]]\nnode = { base = "dgx-a100" }\n[[parts]]\nnode = { base = "dgx-h100" }\n',
            "no network between them",
        ),
        (
            '[network]\nbase = "ib-ndr"\n[[parts]]\nnode = { base = "dgx-h100" }\nnods = 3\n[[parts]]\nnode = { base = "dgx-a100" }\n',
            "nods",
        ),
        (
            '[network]\nbase = "ib-ndr"\n[[parts]]\nnode = { base = "dgx-h100" }\n[[parts]]\nnode = { base = "4x3090" }\n',
            "not a multiple of the 8",
        ),
    ],
)
def test_impossible_clusters_are_refused_in_words(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=complaint):
        shardplan.load_cluster(path)


def test_a_mixed_cluster_is_used_whole() -> None:
    cluster = shardplan.load_cluster(EXAMPLE)
    with pytest.raises(InputError, match=r"gpus=32 is not all of the mixed cluster .* \(32 a100-80gb \+ 32 h100-sxm\)"):
        cluster.with_gpus(32)
    with pytest.raises(InputError, match="used whole"):
        shardplan.search(
            model=shardplan.load_model("llama-3-8b"),
            job=shardplan.Job(seq=4096, global_batch=256),
            cluster=cluster,
            objective="gpus",
        )


A100, H100 = 'nodes = 1\nnode = { base = "dgx-a100" }', 'nodes = 1\nnode = { base = "dgx-h100" }'
SMALL = 'nodes = 1\nnode = { base = "dgx-a100-40gb" }'
SLOW_NET = 'nodes = 2\nnode = { base = "dgx-h100" }\nnetwork = { base = "ethernet-100" }'
FAST_NET = 'nodes = 2\nnode = { base = "dgx-h100" }\nnetwork = { base = "ib-ndr" }'


@pytest.mark.parametrize(
    ("parts", "runtime"),
    [
        ((A100, H100), "megatron"),
        ((SMALL, H100), "fsdp2"),
        ((SLOW_NET, FAST_NET), "megatron"),
        ((A100, H100), "megatron-2021"),
        ((A100, H100, SMALL, A100), "nanotron"),
    ],
)
def test_never_worse_than_all_gpus_as_the_slowest(tmp_path: Path, parts: tuple[str, ...], runtime: str) -> None:
    cluster = mixed(tmp_path, *parts)
    best = searched(cluster, runtime)
    alone = [searched(as_all(cluster, part), runtime) for part in cluster.parts]
    assert best.ranked is not None
    slowest = max(float(one.ranked.step_s[0]) if one.ranked is not None else float("inf") for one in alone)
    assert best.ranked.step_s[0] <= slowest * (1 + 1e-9)


def test_a_large_model_uses_the_faster_half() -> None:
    """70B on 4 nodes of A100 and 4 of H100: as many layers on each as it can take, not the pace of the A100 everywhere."""
    job = shardplan.Job(seq=4096, global_batch=256)
    question = {"model": shardplan.load_model("llama-3-70b"), "job": job, "runtime": "fsdp2"}
    cluster = shardplan.load_cluster(EXAMPLE)
    found = [
        shardplan.search(cluster=one, **question) for one in (cluster, *(as_all(cluster, p) for p in cluster.parts))
    ]
    mixed_s, slow_s, fast_s = (float(one.ranked.step_s[0]) for one in found if one.ranked is not None)
    assert mixed_s < 1.1 * 2.0 / (1.0 / slow_s + 1.0 / fast_s)


def test_the_faster_half_gets_more_layers() -> None:
    cluster = shardplan.load_cluster(EXAMPLE)
    result = searched(cluster)
    best = result.ranked.layouts.row(0)
    stages = stages_on_parts(result.cluster, best)
    assert stages is not None and best.stage_layers is not None
    of_rank = [sum(best.stage_layers[rank :: best.pp]) for rank in range(best.pp)]
    on = [part.name for part, count in zip(result.cluster.parts, stages, strict=True) for _ in range(count)]
    layers = {name: sum(n for n, own in zip(of_rank, on, strict=True) if own == name) for name in set(on)}
    assert layers["h100-sxm"] > 1.5 * layers["a100-80gb"]
    slowest = searched(as_all(cluster, cluster.parts[0]))
    assert result.ranked.step_s[0] < 0.8 * slowest.ranked.step_s[0]


@pytest.mark.parametrize("words", ["dp=4 tp=2 pp=2 micro_batch=1 zero=1", "dp=2 tp=2 pp=4 micro_batch=2 zero=0"])
def test_cuts_on_parts_are_the_best_of_all(tmp_path: Path, words: str) -> None:
    """Brute force over all cuts and both orders of the parts."""
    cluster, model = mixed(tmp_path, A100, H100), shardplan.load_model("llama-3-8b")
    model = dataclasses.replace(model, layers=((model.layers[0][0], 9),))
    job, layout = shardplan.Job(seq=2048, global_batch=64), parse_layout(words)
    runtime, found = load_runtime("megatron"), list[float]()
    for order in ((0, 1), (1, 0)):
        given = Setting(model=model, job=job, cluster=in_order(cluster, order), runtime=runtime)
        for ends in itertools.combinations(range(1, 9), layout.pp - 1):
            counts = tuple(b - a for a, b in zip((0, *ends), (*ends, 9), strict=True))
            one = estimate_any(given, dataclasses.replace(layout, stage_layers=counts))
            if one.fits()[0]:
                found.append(float(one.step_s[0]))
    fixed = f"{words} dp_shard={layout.dp} recompute=none schedule=1f1b virtual_stages=1 sequence_parallel=false"
    result = shardplan.search(
        model=model, job=job, cluster=cluster, runtime=runtime, wishes=parse_wishes(fixed, ["offload"])
    )
    assert result.ranked is not None
    assert result.ranked.step_s[0] == pytest.approx(min(found), rel=1e-6)


def test_every_stage_fits_the_memory_of_its_own_part(tmp_path: Path) -> None:
    """40 and 80 GB: what fits is asked of each part, not of the smallest for all."""
    cluster = mixed(tmp_path, SMALL, H100)
    result = searched(cluster, model="llama-2-7b", words="tp=1 dp=8 pp=2 zero=1 schedule=1f1b")
    assert result.ranked is not None
    given = Setting(
        model=shardplan.load_model("llama-2-7b"),
        job=shardplan.Job(seq=4096, global_batch=256),
        cluster=result.cluster,
        runtime=load_runtime("megatron"),
    )
    one = estimate_any(given, result.ranked.layouts.row(0))
    assert one.stage_capacity_bytes is not None and len(set(one.stage_capacity_bytes.tolist())) == 2
    assert (one.stages["device"][0] < one.stage_capacity_bytes).all()


def test_two_equal_parts_are_the_plain_cluster(tmp_path: Path) -> None:
    halves = mixed(tmp_path, H100, H100, network="ib-ndr")
    whole = shardplan.load_cluster("h100-ib", gpus=16)
    assert [part.name for part in halves.parts] == ["h100-sxm", "h100-sxm-1"]
    one, other = searched(halves), searched(whole)
    assert one.ranked.step_s[0] == pytest.approx(other.ranked.step_s[0], rel=1e-6)


def test_unequal_chunks_cost_as_much_on_equal_parts(tmp_path: Path) -> None:
    layout = parse_layout("tp=2 pp=8 micro_batch=1 zero=1 schedule=interleaved virtual_stages=3")
    model = shardplan.load_model("llama-3-8b")  # 32 layers in 24 chunks
    job, runtime = shardplan.Job(seq=4096, global_batch=256), load_runtime("shardplan")
    halves, whole = mixed(tmp_path, H100, H100, network="ib-ndr"), shardplan.load_cluster("h100-ib", gpus=16)
    bubbles_s = [
        float(estimate_any(Setting(model=model, job=job, cluster=one, runtime=runtime), layout).time["bubble_s"][0])
        for one in (halves, whole)
    ]
    assert bubbles_s[0] == pytest.approx(bubbles_s[1], rel=1e-6)


@pytest.mark.parametrize("words", [[], ["--runtime", "fsdp2", "--precision", "fp32"]])
def test_a_plan_is_made_and_told_with_every_runtime(tmp_path: Path, words: list[str]) -> None:
    plan = tmp_path / "plan.json"
    asked = ["plan", "llama-3.2-1b", "--cluster", str(EXAMPLE), "--global-batch", "128", "--seq", "2048", *words]
    made = CliRunner().invoke(app, [*asked, "-o", str(plan)])
    assert made.exit_code == 0, made.output
    told = "fp32, though a100-80gb multiplies" if words else "flash (a100-80gb) and triton (h100-sxm) attention"
    assert told in " ".join(made.output.split())


def test_plan_and_explain_name_parts_and_runtimes(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    words = ["plan", "llama-3-8b", "--cluster", str(EXAMPLE), "--global-batch", "256", "--seq", "4096"]
    made = CliRunner().invoke(app, [*words, "--runtime", "megatron", "-o", str(plan)])
    assert made.exit_code == 0, made.output
    told = CliRunner().invoke(app, ["explain", str(plan), "--json"])
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert {part["name"] for part in document["parts"]} == {"a100-80gb", "h100-sxm"}
    assert "megatron" in document["runtimes"] and "megatron-2021" not in document["runtimes"]
    assert sum(stage["layers"] for stage in document["stages"]) == 32
    assert {stage["part"] for stage in document["stages"]} == {"a100-80gb", "h100-sxm"}
    assert any(line.startswith("stage 0 on ") for line in document["binds"])
    read = shardplan.Plan.read(plan)
    assert [part["name"] for part in read.cluster["parts"]] == [part["name"] for part in document["parts"]]


def test_a_sweep_takes_a_mixed_cluster_whole() -> None:
    model, job = shardplan.load_model("llama-3-8b"), shardplan.Job(seq=4096, global_batch=256, tokens=1e12)
    cluster = shardplan.load_cluster(EXAMPLE)
    sweep = Sweep(model=model, runtime=load_runtime("megatron"), wishes=parse_wishes("tp=1"))
    grid = Grid(machines=[(cluster, job)], global_batches=[256], seqs=[4096])
    (row,) = sweep.rows(grid, days=30.0)
    assert (row["gpus"], row["gpu"], row["network_gbps_per_gpu"]) == (64, "a100-80gb + h100-sxm", 200.0)
    found = searched(cluster, words="tp=1").ranked
    assert row["step_s"] == pytest.approx(float(found.step_s[0]))
    assert row["days"] is not None
