"""Rows share keys: what is computed on a key is what the row alone would get, and nothing depends on how a table is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel import estimate as estimate_module
from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.keys import unique_keys
from shardplan.costmodel.layout import COLUMNS, LayoutTable, layout_table, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.row_keys import FEW_ROWS, SHARING
from shardplan.costmodel.rule import Rule, Setting
from shardplan.costmodel.rules import STRUCTURAL, broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.space import layout_space


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 3), st.integers(0, 10**12)), min_size=1, max_size=60))
def test_unique_keys_gather_back(rows: list[tuple[int, int, int]]) -> None:
    columns = [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
    first, inverse = unique_keys(*columns)
    assert len(first) == len(set(rows))
    for column in columns:
        assert (column[first][inverse] == column).all()


def setting(runtime: str) -> Setting:
    return Setting(
        model=load_model("llama-3-8b"),
        job=Job(seq=4096, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=16),
        runtime=load_runtime(runtime),
    )


def valid_layouts(given: Setting) -> LayoutTable:
    space = layout_space(given.model, given.job, given.cluster.gpus)
    return space.take(~np.any(np.stack(list(broken_rules(given, space).values())), axis=0))


def estimates(given: Setting, layouts: LayoutTable) -> Estimates:
    return estimate(model=given.model, job=given.job, cluster=given.cluster, layouts=layouts, runtime=given.runtime)


def test_structural_rules_read_columns_of_one_kind_of_key() -> None:
    """A rule is asked about one layout of each key (`estimate._check_meaning`): it may not read columns of both."""
    table = layout_table(
        [parse_layout("dp=8 pp=2 zero=1 dp_shard=4"), parse_layout("dp=2 tp=8 zero=3 stage_layers=32")]
    )
    of_stages = {"dp", "tp", "pp", "cp", "virtual_stages", "split", "order"}
    for rule in STRUCTURAL:
        read = columns_read(rule, setting("megatron"), table)
        assert not read & set(SHARING) or read <= of_stages | set(SHARING), (rule.id, read)


def columns_read(rule: Rule, given: Setting, table: LayoutTable) -> set[str]:
    read = set[str]()

    class Watched(LayoutTable):
        def __getattribute__(self, name: str) -> object:
            if name in COLUMNS:
                read.add(name)
            return super().__getattribute__(name)

    rule.broken(given, Watched(**table.columns(), splits=table.splits, depths=table.depths))
    return read


@pytest.mark.parametrize("runtime", ["megatron", "fsdp2", "deepspeed"])
def test_peaks_are_those_of_the_fullest_stage(runtime: str) -> None:
    given = setting(runtime)
    got = estimates(given, valid_layouts(given))
    rows, fullest = np.arange(len(got)), got.stages["device"].argmax(axis=1)
    allocated, slack, device = (got.stages[part][rows, fullest] for part in ("allocated", "slack", "device"))
    assert got.peaks["allocated"] == pytest.approx(allocated, rel=1e-12)
    assert got.peaks["reserved"] == pytest.approx(allocated + slack, rel=1e-12)
    assert got.peaks["device"] == pytest.approx(device, rel=1e-12)
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    assert got.stages["allocated"] == pytest.approx(sum(got.stages[part] for part in parts), rel=1e-12)


def test_pieces_and_chosen_rows_are_those_of_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    given = setting("fsdp2")
    layouts = valid_layouts(given)
    whole = estimates(given, layouts)
    monkeypatch.setattr(estimate_module, "ROWS_AT_ONCE", len(layouts) // 3)
    chosen = np.array([len(layouts) - 1, 0, 7])
    assert len(layouts) > FEW_ROWS > len(chosen)  # of few rows each is computed by itself
    for cut in (estimates(given, layouts).take(chosen), estimates(given, layouts.take(chosen))):
        for one, other in ((whole.time, cut.time), (whole.hidden, cut.hidden), (whole.peaks, cut.peaks)):
            for name, column in one.items():
                assert other[name] == pytest.approx(column[chosen], rel=1e-12, abs=1e-15), name
        for name, part in whole.stages.items():
            assert cut.stages[name] == pytest.approx(part[chosen], rel=1e-12), name
        assert (cut.stage_index == whole.stage_index[chosen]).all()
        assert [cut.layouts.row(i) for i in range(3)] == [layouts.row(int(i)) for i in chosen]
