"""Pipelines of models of a few layers, against every cut with every number of recomputed layers.

Cuts whose pipeline is not the fastest but whose step is: exchanges hide behind launches that the slowest stage waits for (kernels of small
models are short), and with one micro-batch behind the slowest stage. Chunks of models of several kinds of layer, moved one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import pytest

from shardplan.costmodel.error_band import memory_band
from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import V_PLACED, Layout, layout_table, parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner import stage_search
from shardplan.planner.chain import best_cut, every_cut
from shardplan.planner.chunk_climb import climbed, even_chunks
from shardplan.planner.search import search
from shardplan.planner.space import Wishes, layout_space, parse_wishes
from shardplan.planner.stage_search import wanted_of

NOT_WRITTEN_OUT = ("offload", "order", "hsdp", "hpz", "recompute=selective")
"""Forbidden: other tests compare these words with writing them out."""


@dataclass(frozen=True, kw_only=True)
class SmallCase:
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
    least_memory: float = 0.0
    """Quantile of what pipelines need that the GPUs have, where memory is to be short."""

    def with_memory(self, known: Estimates, quantile: float) -> Setting:
        """The setting with GPUs on which that share of the `known` layouts fits."""
        at, headroom = self.setting(), 0.05
        needed = float(np.quantile(known.device_peak_bytes, quantile)) * (1.0 + memory_band(at.cluster))
        gpu = replace(at.cluster.node.gpu, memory_bytes=needed / (1.0 - headroom) * (1.0 + 1e-6))
        return replace(
            at, cluster=replace(at.cluster, node_runs=((replace(at.cluster.node, gpu=gpu), at.cluster.nodes),))
        )

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


def cuts_of(layout: Layout, at: Setting) -> Iterator[tuple[int, ...]]:
    """Layers of each chunk."""
    bare = at.runtime.abilities.ends_without_layers and layout.schedule not in V_PLACED
    layers = at.model.layer_count
    for ends in combinations(range(1 - bare, layers + bare), layout.pp * layout.virtual_stages - 1):
        yield tuple(np.diff((0, *ends, layers)).tolist())


def words_of(layout: Layout, cut: tuple[int, ...], at: Setting) -> list[str]:
    """What the stages may recompute."""
    can = at.runtime.abilities
    if layout.recompute != "none" or not can.partial_recompute:
        return [layout.recompute]
    if can.recompute_by_stage and layout.virtual_stages == 1:
        every = product(*(range(held + 1) for held in cut))
        return ["none", *(f"full:{','.join(map(str, some))}" for some in every if any(some))]
    most = max(cut) if layout.virtual_stages == 1 else sum(cut)
    return ["none", *(f"full:{count}" for count in range(1, most + 1))]


def written_out(at: Setting, wishes: Wishes) -> Estimates:
    """Estimates of all pipelines of the space with every cut and recompute that no rule refuses."""
    can = at.runtime.abilities
    sizes = (at.model, at.job, at.cluster.gpus, wishes)
    space = layout_space(*sizes, cp_kinds=(), schedules=can.schedules, bare_ends=can.ends_without_layers)
    table = layout_table(
        [
            replace(layout, stage_layers=cut, recompute=word)
            for layout in map(space.row, range(len(space)))
            for cut in cuts_of(layout, at)
            for word in words_of(layout, cut, at)
        ]
    )
    table = table.take(np.flatnonzero(~np.any(list(broken_rules(at, table).values()), axis=0)))
    return estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=table, runtime=at.runtime)


ONE_CHUNK = (*NOT_WRITTEN_OUT, *(f"virtual_stages={chunks}" for chunks in range(2, 7)))
COMMON = {"hidden": 1024, "heads": 8, "ffn": 2048}
CASES = (
    # most of the layers on one stage that waits for launches: the all-reduce of the tied table hides behind them
    SmallCase(
        runtime="megatron", cluster="h100-ib", gpus=4, hidden=512, heads=16, ffn=1024, layers=6, vocab=128256, tied=True, seq=512, batch=8,
        fix="pp=4",
    ),
    SmallCase(
        runtime="shardplan", cluster="selene", gpus=8, hidden=1024, heads=8, ffn=4096, layers=6, vocab=50304, seq=1024, batch=8,
        fix="pp=2 tp=1 micro_batch=1",
    ),
    # two stages that wait for launches take as long, one of them with less to compute
    SmallCase(
        runtime="megatron", cluster="h100-ib", gpus=8, hidden=64, heads=2, ffn=256, layers=4, wide=2, vocab=50304, seq=512, batch=16,
        fix="pp=4",
    ),
    # a layer more of the stage that exchanges most leaves a smaller last bucket
    SmallCase(
        runtime="fsdp2", cluster="h100-ib", gpus=8, hidden=1024, heads=8, ffn=4096, layers=6, vocab=128256, seq=4096, batch=8,
        fix="pp=4 micro_batch=1",
    ),
    # recomputing all layers of the first stage, which fits without, makes it the slowest, and it waits for launches
    SmallCase(
        runtime="megatron", cluster="h100-ib", gpus=8, hidden=512, heads=4, ffn=1024, layers=6, wide=2, vocab=128256, tied=True, seq=512,
        batch=16, fix="pp=2 tp=1",
    ),
    # one micro-batch: every cut takes as long, and the longer the slowest stage the more hides
    SmallCase(
        runtime="deepspeed", cluster="h100-ib", gpus=4, hidden=512, heads=8, ffn=1024, layers=5, vocab=128256, seq=1024, batch=4,
        fix="pp=2",
    ),
    SmallCase(runtime="megatron", cluster="h100-ib", gpus=4, layers=4, vocab=50304, seq=512, batch=2, fix="pp=2", **COMMON),
    SmallCase(runtime="megatron", cluster="h100-ib", gpus=8, layers=6, vocab=8192, seq=1024, batch=4, fix="pp=2", **COMMON),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.runtime}-{case.hidden}-{case.batch}")
def test_no_cut_hides_more_than_the_answer_knows(case: SmallCase) -> None:
    at, wishes = case.setting(), parse_wishes(f"{case.fix} cp=1", ONE_CHUNK)
    known = written_out(at, wishes)
    best = int(np.flatnonzero(known.fits())[known.step_s[known.fits()].argmin()])
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes)
    assert found.ranked is not None
    assert found.proved
    words = known.layouts.row(best).words(), found.ranked.layouts.row(0).words()
    assert float(found.ranked.step_s[0]) == pytest.approx(float(known.step_s[best]), rel=1e-9), words


def test_too_many_cuts_of_one_micro_batch_prove_nothing() -> None:
    """32 layers on 8 stages have millions of cuts; with one micro-batch the fastest pipeline need not be the fastest step."""
    large = {"hidden": 2048, "heads": 16, "ffn": 4096, "layers": 32, "vocab": 50304}
    at = SmallCase(runtime="megatron", cluster="h100-ib", gpus=16, seq=1024, batch=2, fix="", **large).setting()
    wishes = parse_wishes("pp=8 cp=1 tp=1 dp=2", ONE_CHUNK)
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


TWO_CHUNKS = (*NOT_WRITTEN_OUT, *(f"virtual_stages={chunks}" for chunks in (1, 3, 4, 5, 6)))
KINDS = (
    SmallCase(
        runtime="shardplan", cluster="h100-ib", gpus=2, hidden=64, heads=4, ffn=128, layers=6, wide=2, vocab=256, tied=True, seq=512,
        batch=4, fix="pp=2",
    ),
    SmallCase(
        runtime="megatron", cluster="h100-ib", gpus=8, hidden=512, heads=4, ffn=2048, layers=3, wide=2, vocab=50304, seq=512, batch=16,
        fix="pp=2",
    ),
    # memory that the runtime's own split of the layers does not do with
    SmallCase(
        runtime="megatron", cluster="selene", gpus=4, hidden=1024, heads=8, ffn=2048, layers=4, wide=2, vocab=128256, seq=1024, batch=16,
        fix="pp=2", least_memory=0.02,
    ),
    SmallCase(
        runtime="megatron", cluster="h100-ib", gpus=4, hidden=512, heads=8, ffn=1024, layers=4, wide=2, vocab=8192, seq=4096, batch=8,
        fix="pp=2", least_memory=0.02,
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", KINDS, ids=lambda case: f"{case.runtime}-{case.hidden}-{case.batch}")
def test_no_cut_of_chunks_is_much_faster(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 % of the best, where the runtime's own split is further off or does not fit; nothing is called proved that is behind."""
    at, wishes = case.setting(), parse_wishes(f"{case.fix} cp=1", TWO_CHUNKS)
    known = written_out(at, wishes)
    if case.least_memory:
        at = case.with_memory(known, case.least_memory)
        known = written_out(at, wishes)
    least_s = float(known.step_s[known.fits()].min())
    asked = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime, "wishes": wishes}
    found = search(**asked)
    assert found.ranked is not None
    assert least_s * (1.0 - 1e-9) <= found.ranked.step_s[0] <= 1.02 * least_s
    assert not found.proved or found.ranked.step_s[0] <= least_s * (1.0 + 1e-9)
    monkeypatch.setattr(stage_search, "MOST_CLIMBED", 0)
    plain = search(**asked)
    assert plain.ranked is None or plain.ranked.step_s[0] > 1.005 * float(found.ranked.step_s[0])


def test_chunks_start_even_by_what_they_take() -> None:
    """Layers of twice the width count for more, the head for as many layers as it takes, prediction modules go with the last chunk."""
    at = SmallCase(
        runtime="megatron", cluster="h100-ib", gpus=8, hidden=2048, heads=16, ffn=8192, layers=32, wide=16, vocab=128256, seq=4096,
        batch=64, fix="",
    ).setting()  # fmt: skip
    layouts = layout_table([parse_layout("pp=4 virtual_stages=2 schedule=interleaved micro_batch=1 dp=2")])
    (cut,) = even_chunks(at, layouts)
    assert sum(cut) == 32
    assert cut[-1] < cut[-2] < cut[0]  # the head, wide layers
    assert max(cut[:3]) - min(cut[:3]) <= 1


def test_starts_that_are_far_off_are_left() -> None:
    at = KINDS[0].setting()
    layouts = layout_table([parse_layout("pp=2 virtual_stages=2 schedule=interleaved micro_batch=1")])
    wishes = parse_wishes("pp=2 cp=1", TWO_CHUNKS)
    wanted = wanted_of(at, wishes, 0.05)
    moved, looked_at = climbed(at, layouts, wishes, wanted, np.inf)
    assert moved
    assert climbed(at, layouts, wishes, wanted, 1e-9)[0] == []
    assert looked_at > len(moved)
