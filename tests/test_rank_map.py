"""The rank map of plan files: a few numbers from which the coordinates of every rank follow, the same that the executor's meshes have."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from shardplan.costmodel.layout import layout_table, parse_layout
from shardplan.costmodel.rank_groups import rank_coordinates
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.rank_map import rank_map

LAYOUTS = [
    "dp=8 tp=2 pp=2 zero=0",
    "dp=8 tp=2 pp=2 cp=2 zero=3 dp_shard=4",
    "dp=4 tp=8 pp=4 zero=1 order=tp-cp-pp-dp",
    "dp=4 tp=2 pp=4 cp=2 zero=2 dp_shard=2 order=dp-pp-cp-tp",
    "dp=8 tp=2 pp=2 ep=4 zero=1",
    "dp=8 tp=2 pp=2 cp=2 ep=8 zero=3 dp_shard=4",
    "dp=8 tp=2 pp=4 ep=2 zero=1 order=tp-cp-pp-dp",
    "dp=8 tp=2 pp=4 ep=4 zero=0 order=dp-pp-tp-cp",
]


def coordinates(axes: list[dict[str, Any]], counted: np.ndarray) -> dict[str, np.ndarray]:
    """As docs/plan_file.md says."""
    return {axis["axis"]: counted // axis["stride"] % axis["size"] for axis in axes}


@pytest.mark.parametrize("words", LAYOUTS)
def test_the_map_is_that_of_the_cost_model(words: str) -> None:
    layout = parse_layout(words)
    axes = rank_map(layout, load_cluster("h100-ib", gpus=layout.gpus))["axes"]
    ranks = np.arange(layout.gpus)
    found = coordinates(axes, ranks)
    assert np.sum([found[axis["axis"]] * axis["stride"] for axis in axes], axis=0).tolist() == ranks.tolist()
    found["dp"] = found["dp_replicate"] * layout.shard_ranks + found["dp_shard"]
    for axis, expected in rank_coordinates(layout).items():
        assert found[axis].tolist() == expected.tolist(), axis
    strides = {axis["axis"]: axis["stride"] for axis in axes}
    for axis in ("tp", "cp", "pp"):
        assert strides[axis] == layout_table([layout]).stride(axis)[0]
    assert strides["dp_shard"] == layout_table([layout]).stride("dp")[0]


@pytest.mark.parametrize("words", LAYOUTS)
def test_the_map_is_that_of_the_meshes_that_run(words: str) -> None:
    torch = pytest.importorskip("torch")
    from shardplan.executor.expert_parallel import EXPERT_AXES, expert_mesh_ranks
    from shardplan.executor.mesh import MESH_AXES, mesh_ranks

    layout = parse_layout(words)
    document = rank_map(layout, load_cluster("h100-ib", gpus=layout.gpus))
    mesh, ranks = mesh_ranks(layout), np.arange(layout.gpus)
    found = coordinates(document["axes"], ranks)
    assert mesh[tuple(torch.as_tensor(found[axis]) for axis in MESH_AXES)].tolist() == ranks.tolist()
    if layout.ep == 1:
        assert document["expert_axes"] is None
        return
    step = next(axis["stride"] for axis in document["axes"] if axis["axis"] == "pp")
    place = ranks // (step * layout.pp) * step + ranks % step
    of_experts = {**coordinates(document["expert_axes"], place), "pp": found["pp"]}
    mesh = expert_mesh_ranks(layout)
    assert mesh[tuple(torch.as_tensor(of_experts[axis]) for axis in EXPERT_AXES)].tolist() == ranks.tolist()


def nodes(words: str, gpus: int) -> dict[str, int]:
    document = rank_map(parse_layout(words), load_cluster("h100-ib", gpus=gpus))
    return {axis["axis"]: axis["nodes"] for axis in (*document["axes"], *(document["expert_axes"] or ()))}


def test_axes_that_stay_inside_a_node_are_told() -> None:
    """Nodes of 8: the 4 of tp lie in one, two neighbours on dp too, the other dp neighbours and pp do not."""
    assert nodes("dp=8 tp=4 pp=2 zero=3", 64) == {"tp": 1, "cp": 1, "dp_shard": 4, "dp_replicate": 1, "pp": 2}
    assert nodes("dp=8 tp=4 pp=2 zero=3 dp_shard=2", 64)["dp_shard"] == 1
    assert nodes("dp=8 tp=4 pp=2 zero=3 order=pp-tp-cp-dp", 64)["pp"] == 1
    assert nodes("dp=8 tp=3 pp=1", 24)["tp"] == 2  # ranks 6 to 8 lie in two nodes
    assert nodes("dp=16 tp=2 pp=2 ep=8", 64)["ep"] == 1
    assert nodes("dp=16 tp=2 pp=2 ep=8 order=tp-cp-pp-dp", 64)["ep"] == 2


def test_the_map_of_16384_gpus_is_small() -> None:
    words = "dp=128 tp=8 pp=16 ep=8 zero=1"
    assert len(json.dumps(rank_map(parse_layout(words), load_cluster("h100-ib", gpus=16384)))) < 1000
