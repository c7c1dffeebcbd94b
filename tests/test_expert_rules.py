"""What layers with experts do not go with in the runtimes that say so."""

from __future__ import annotations

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster


def refused(words: str, *, runtime: str = "shardplan", model: str = "mixtral-8x7b", precision: str = "bf16") -> dict:
    at = Setting(
        model=load_model(model),
        job=Job(seq=4096, global_batch=64, precision=precision),
        cluster=load_cluster("h100-ib", gpus=64),
        runtime=load_runtime(runtime),
    )
    return {one.rule: str(one) for one in rejections(at, parse_layout(words))[0]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("dp=64 ep=2 zero=3 hpz=8", "hpz=8 and ep=2; drop hpz"),
        ("dp=64 zero=3 hpz=8", "hpz=8 and dp*cp = 64, which cuts experts; drop hpz"),
    ],
)
def test_the_rule_names_what_does_not_go_together_and_the_remedy(words, told):
    assert told in refused(words)["experts-without-hpz"]
    assert "experts-without-hpz" not in refused(words, model="llama-3-8b")
    assert "experts-without-hpz" not in refused(words, runtime="megatron")


def test_a_second_copy_goes_with_whole_experts():
    assert "experts-without-hpz" not in refused("dp=8 pp=8 zero=3 hpz=2")


def test_spread_experts_go_with_the_rest():
    assert refused("dp=64 ep=8 zero=3") == {}
    assert refused("dp=8 tp=4 pp=2 ep=8 zero=1 sequence_parallel=true recompute=full") == {}
    assert refused("dp=8 cp=4 tp=2 ep=8 zero=3 sequence_parallel=true", precision="fp16") == {}
    assert refused("dp=8 cp=2 pp=4 ep=8 zero=1 schedule=zero_bubble") == {}


@pytest.mark.parametrize(
    ("rule", "words", "remedy"),
    [
        ("joined-passes-dispatch", "dp=64", "use ep > 1"),
        ("joined-passes-chunks", "dp=16 pp=4 ep=8", "virtual_stages=2"),
        ("joined-passes-full-recompute", "dp=64 ep=8 recompute=full", "recompute=none"),
        ("joined-passes-full-recompute", "dp=64 ep=8 recompute=full:2", "recompute=none"),
    ],
)
def test_exchanges_hide_behind_another_micro_batch_only_where_passes_can_be_joined(rule, words, remedy):
    joined = "megatron+a2a_overlap"
    assert remedy in refused(words, runtime=joined)[rule]
    assert refused(words, runtime="megatron") == {}
    assert refused("dp=64 ep=8 recompute=selective:act", runtime=joined) == {}
    assert refused("dp=16 pp=4 ep=8 schedule=interleaved virtual_stages=2", runtime=joined) == {}
