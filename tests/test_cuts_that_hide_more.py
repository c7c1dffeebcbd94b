"""Cuts whose pipeline is not the fastest but whose step is: exchanges hide behind launches that the slowest stage waits for, and with one
micro-batch behind the slowest stage. Small models, whose launches take long, against every cut with every recompute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, layout_table
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.chain import best_cut, every_cut
from shardplan.planner.search import search
from shardplan.planner.space import layout_space, parse_wishes

FORBIDDEN = (
    "offload",
    "order",
    "hsdp",
    "hpz",
    "virtual_stages=2",
    "virtual_stages=3",
    "virtual_stages=4",
    "virtual_stages=5",
    "virtual_stages=6",
    "recompute=selective",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model with one kind of layer, or two, and what a search is asked for."""

    runtime: str
    cluster: str
    gpus: int
    hidden: int
    heads: int
    ffn: int
    layers: int
    wide: int = 0
    """Of them with twice the `ffn`, last."""
    vocab: int
    tied: bool = False
    seq: int
    batch: int
    fix: str
    gbps: float | None = None

    def setting(self) -> Setting:
        """The case as it is searched."""
        kind = LayerKind(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            ffn=self.ffn,
            gated_mlp=True,
            norm="rmsnorm",
        )
        kinds = ((kind, self.layers - self.wide), (replace(kind, ffn=2 * self.ffn), self.wide))
        return Setting(
            model=Model(
                name="small",
                family="llama",
                layers=tuple(one for one in kinds if one[1]),
                vocab=self.vocab,
                tied_embeddings=self.tied,
            ),
            job=Job(seq=self.seq, global_batch=self.batch, precision="bf16"),
            cluster=load_cluster(self.cluster, gpus=self.gpus),
            runtime=load_runtime(self.runtime),
        )


COMMON = {"hidden": 1024, "heads": 8, "ffn": 2048}
CASES = (
    # most of the layers on one stage that waits for launches: the all-reduce of the tied table hides behind them
    Case(
        runtime="megatron", cluster="h100-ib", gpus=4, hidden=512, heads=16, ffn=1024, layers=6, vocab=128256, tied=True, seq=512, batch=8,
        fix="pp=4",
    ),
    Case(
        runtime="shardplan", cluster="selene", gpus=8, hidden=1024, heads=8, ffn=4096, layers=6, vocab=50304, seq=1024, batch=8,
        fix="pp=2 tp=1 micro_batch=1",
    ),
    # two stages that wait for launches take as long, one of them with less to compute
    Case(
        runtime="megatron", cluster="h100-ib", gpus=8, hidden=64, heads=2, ffn=256, layers=4, wide=2, vocab=50304, seq=512, batch=16,
        fix="pp=4",
    ),
    # one micro-batch: every cut takes as long, and the longer the slowest stage the more hides
    Case(
        runtime="deepspeed", cluster="h100-ib", gpus=4, hidden=512, heads=8, ffn=1024, layers=5, vocab=128256, seq=1024, batch=4,
        fix="pp=2",
    ),
    Case(runtime="megatron", cluster="h100-ib", gpus=4, layers=4, vocab=50304, seq=512, batch=2, fix="pp=2", **COMMON),
    Case(runtime="megatron", cluster="h100-ib", gpus=8, layers=6, vocab=8192, seq=1024, batch=4, fix="pp=2", **COMMON),
)  # fmt: skip


def cuts_of(layout: Layout, at: Setting) -> Iterator[tuple[int, ...]]:
    """Layers of each stage."""
    bare, layers = at.runtime.abilities.ends_without_layers, at.model.layer_count
    for ends in combinations(range(1 - bare, layers + bare), layout.pp - 1):
        yield tuple(np.diff((0, *ends, layers)).tolist())


def words_of(layout: Layout, cut: tuple[int, ...], at: Setting) -> list[str]:
    """What the stages may recompute."""
    can = at.runtime.abilities
    if layout.recompute != "none" or not can.partial_recompute:
        return [layout.recompute]
    if can.recompute_by_stage:
        every = product(*(range(held + 1) for held in cut))
        return ["none", *(f"full:{','.join(map(str, some))}" for some in every if any(some))]
    return ["none", *(f"full:{count}" for count in range(1, max(cut) + 1))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.runtime}-{case.hidden}-{case.batch}")
def test_no_cut_hides_more_than_the_answer_knows(case: Case) -> None:
    at, wishes = case.setting(), parse_wishes(f"{case.fix} cp=1", FORBIDDEN)
    can = at.runtime.abilities
    space = layout_space(
        at.model, at.job, at.cluster.gpus, wishes, cp_kinds=(), schedules=can.schedules, bare_ends=can.ends_without_layers
    )  # fmt: skip
    plain = [space.row(row) for row in range(len(space))]
    every = [
        replace(layout, stage_layers=cut, recompute=word)
        for layout in plain
        for cut in cuts_of(layout, at)
        for word in words_of(layout, cut, at)
    ]
    table = layout_table([one for one in every if one.virtual_stages == 1])
    table = table.take(np.flatnonzero(~np.any(list(broken_rules(at, table).values()), axis=0)))
    known = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=table, runtime=at.runtime)
    best = int(np.flatnonzero(known.fits())[known.step_s[known.fits()].argmin()])
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    assert found.proved
    words = table.row(best).words(), found.ranked.layouts.row(0).words()
    assert float(found.ranked.step_s[0]) == pytest.approx(float(known.step_s[best]), rel=1e-9), words


def test_too_many_cuts_of_one_micro_batch_prove_nothing() -> None:
    """32 layers on 8 stages have millions of cuts; with one micro-batch the fastest pipeline need not be the fastest step."""
    large = {"hidden": 2048, "heads": 16, "ffn": 4096, "layers": 32, "vocab": 50304}
    at = Case(runtime="megatron", cluster="h100-ib", gpus=16, seq=1024, batch=2, fix="", **large).setting()
    wishes = parse_wishes("pp=8 cp=1 tp=1 dp=2", FORBIDDEN)
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    assert not found.proved


def test_the_least_penalty_is_found_among_all_cuts() -> None:
    """Random chains: what the slowest stage adds decides between cuts that are as fast but for it."""
    random = np.random.default_rng(5)
    for _ in range(60):
        stages, layers = int(random.integers(2, 5)), int(random.integers(4, 9))
        each = random.integers(1, 4, size=(stages, layers)) / 4.0
        before = np.concatenate([np.zeros((stages, 1)), each.cumsum(axis=1)], axis=1)
        seconds = before[:, None, :] - before[:, :, None]
        seconds = np.where(np.arange(layers + 1)[:, None] < np.arange(layers + 1), seconds, np.inf)
        penalty_s = random.integers(0, 5, size=seconds.shape) / 2.0
        weights = {"peak_weight": float(random.integers(1, 9)), "sum_weight": float(random.integers(0, 2))}

        def worth(counts: tuple[int, ...], seconds=seconds, penalty_s=penalty_s, weights=weights) -> float:
            ends = np.cumsum(counts)
            at = np.arange(len(counts)), ends - counts, ends
            times = seconds[at]
            longest = penalty_s[at][times >= times.max()].min()
            return weights["peak_weight"] * times.max() + weights["sum_weight"] * times.sum() + longest

        every = every_cut(np.isfinite(seconds), 10**6)
        assert every is not None
        assert len(every) == len(list(combinations(range(1, layers), stages - 1)))
        counts = best_cut(seconds, penalty_s=penalty_s, **weights)
        assert counts is not None
        assert worth(counts) <= min(map(worth, every)) + 1e-9
        assert every_cut(np.isfinite(seconds), len(every) - 1) is None
