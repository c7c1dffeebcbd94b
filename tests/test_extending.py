"""The page that shows how to add things works as it stands, and each of its files is under 30 lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.family import Family
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in a folder, which is the working one."""
    for text in re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        assert text.count("\n") < 30
        (tmp_path / text.split("\n")[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(runtime: Runtime, cluster: str = "h100-ib") -> Estimates:
    layout = parse_layout("dp=16 zero=3 recompute=full")
    job, machine = Job(seq=4096, global_batch=32), load_cluster(cluster, gpus=16)
    return estimate(model=load_model("llama-3-8b"), job=job, cluster=machine, layouts=layout, runtime=runtime)


@pytest.mark.usefixtures("files")
def test_a_gpu_and_a_cluster() -> None:
    cluster = load_cluster("my-cluster.toml", gpus=16)
    assert (cluster.gpu.peak_flop_per_s["bf16"], cluster.nodes, cluster.node.usd_per_hour) == (181e12, 2, 18.0)
    assert cluster.network.nics_per_node == 2 and cluster.guesses()
    assert of(load_runtime("fsdp2"), "my-cluster.toml").step_s[0] > of(load_runtime("fsdp2")).step_s[0]


def test_a_model_family() -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    space: dict[str, object] = {}
    exec(text, space)
    assert isinstance(space["GRANITE"], Family) and text.count("\n") < 30


@pytest.mark.usefixtures("files")
def test_a_runtime_lies_over_its_base() -> None:
    base, mine = load_runtime("fsdp2+compile"), load_runtime("my-engine.toml")
    assert (mine.name, mine.fitted_entry, mine.execution) == ("my-engine", "fsdp2", base.execution)
    assert mine.abilities.schedules != base.abilities.schedules and mine.abilities.zero == base.abilities.zero
    assert of(mine).time["compute_s"][0] == of(base).time["compute_s"][0]
    assert of(mine).time["dp_exposed_s"][0] > of(base).time["dp_exposed_s"][0]
    small = load_runtime(
        "my-engine.toml+bf16_reduce+chunked_loss"
    )  # a switch of its own, one of the base that needs `compile`
    assert small.states["bf16"].gradient_dtype == "bf16"
    assert small.activations.logit_bytes < mine.activations.logit_bytes


def test_bad_bases_of_runtimes_are_told(files: Path) -> None:
    text = (files / "my-engine.toml").read_text(encoding="utf-8")
    for old, new, told in (
        ("fsdp2+compile", "fsdp3", "did you mean fsdp"),
        ("fsdp2+compile", "fsdp2+compil", "switch 'compil' is unknown"),
        ("fsdp2+compile", "none.toml", "no such runtime file"),
        ("fsdp2+compile", "my-engine.toml", "leads back to this file"),
        ('"fsdp2+compile"', "3", "base = 3 is not a runtime"),
        ("version", "versoin", "version is missing"),
        ("reduce_overlap", "reduce_overlpa", "reduce_overlpa"),
    ):
        (files / "my-engine.toml").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(InputError, match=told):
            load_runtime("my-engine.toml")
