"""As few recomputed layers as make a layout fit, against trying every number of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import RATIO_STEPS, LayoutTable
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.recompute import ALL_LAYERS, RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import search
from shardplan.planner.space import Wishes, layout_space, parse_wishes

NONE, FULL = RECOMPUTE.index("none"), RECOMPUTE.index("full")


def setting(runtime: str = "megatron", *, model: str = "llama-2-13b", gpus: int = 16) -> Setting:
    return Setting(
        model=load_model(model),
        job=Job(seq=4096, global_batch=64),
        cluster=load_cluster("selene", gpus=gpus),
        runtime=load_runtime(runtime),
    )


def searched(at: Setting, wishes: Wishes | None = None):
    return search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)


def every_number(at: Setting) -> tuple[float, str]:
    """(step time, words) of the best of the whole space with every N of full:N written out, and with activations in host memory."""
    space = layout_space(
        at.model,
        at.job,
        at.cluster.gpus,
        cp_kinds=at.runtime.abilities.context_parallel,
        schedules=at.runtime.abilities.schedules,
        bare_ends=at.runtime.abilities.ends_without_layers,
    )
    plain = space.take(space.recompute == NONE)
    pieces = [space]
    for layers in range(1, at.model.layer_count + 1):
        some = plain.take(plain.pp * layers <= at.model.layer_count)
        rows = len(some)
        pieces.append(dataclasses.replace(some, recompute=np.full(rows, FULL), recompute_layers=np.full(rows, layers)))
    if "cpu" in at.runtime.offload.activations:
        full = [piece.take(piece.recompute == FULL) for piece in pieces]
        pieces += [dataclasses.replace(one, offload_activations=np.ones(len(one), dtype=np.int64)) for one in full]
    columns = {name: np.concatenate([piece.columns()[name] for piece in pieces]) for name in space.columns()}
    table = LayoutTable(**columns, splits=space.splits)
    table = table.take(~np.any([np.zeros(len(table), dtype=bool), *broken_rules(at, table).values()], axis=0))
    found = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=table, runtime=at.runtime)
    rows = np.flatnonzero(found.fits())
    best = rows[found.step_s[rows].argmin()]
    return float(found.step_s[best]), table.row(int(best)).words()


@pytest.mark.parametrize("runtime", ["megatron", "fsdp2"])
def test_the_search_finds_what_trying_every_number_finds(runtime: str) -> None:
    at = setting(runtime)
    step_s, words = every_number(at)
    ranked = searched(at, parse_wishes("", ["order"])).ranked
    assert ranked is not None
    assert "recompute=full:" in words
    unnamed = np.flatnonzero((ranked.layouts.recompute_parts == 0) & (ranked.layouts.offload_ratio == RATIO_STEPS))
    assert float(ranked.step_s[unnamed[0]]) == pytest.approx(step_s, rel=1e-12)
    best = ranked.layouts.row(int(unnamed[0]))
    assert best.recompute.startswith("full:")


def test_one_layer_less_would_not_fit() -> None:
    at = setting()
    ranked = searched(at).ranked
    assert ranked is not None
    partly = np.flatnonzero((ranked.layouts.recompute == FULL) & (ranked.layouts.recompute_layers != ALL_LAYERS))
    assert len(partly)
    rows = ranked.layouts.take(partly)
    less = rows.recompute_layers - 1
    fewer = dataclasses.replace(
        rows, recompute=np.where(less > 0, FULL, NONE), recompute_layers=np.where(less > 0, less, ALL_LAYERS)
    )
    found = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=fewer, runtime=at.runtime)
    assert not found.fits().any()


def test_only_where_the_runtime_can_and_the_user_lets_it() -> None:
    def partial(at: Setting, wishes: Wishes | None = None) -> bool:
        ranked = searched(at, wishes).ranked
        assert ranked is not None
        return bool(((ranked.layouts.recompute == FULL) & (ranked.layouts.recompute_layers != ALL_LAYERS)).any())

    assert not partial(setting("deepspeed"))
    assert not partial(setting(), parse_wishes("recompute=full"))
    assert not partial(setting(), parse_wishes("", ["recompute"]))
    assert partial(setting(), parse_wishes("tp=2"))


def test_the_account_adds_up() -> None:
    found = searched(setting())
    assert found.ranked is not None
    refused = sum(one.count for one in found.refused)
    fitting = len(found.ranked)
    assert found.looked_at - refused - found.slower - found.does_not_fit <= fitting <= found.looked_at + found.refined
