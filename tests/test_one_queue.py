"""What hides tensor parallelism needs one queue of kernels before Blackwell, what hides exchanges of states or of tokens several."""

from __future__ import annotations

import pytest

from shardplan.costmodel.estimate import estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.hw_profiles.load import load_cluster


def showing(
    words: str, *, cluster: str = "h100-ib", runtime: str = "megatron+tp_comm_overlap", model: str = "llama-3-8b"
) -> float:
    """Share of tensor-parallel communication that nothing hides."""
    found = estimate(
        model=load_model(model),
        job=Job(seq=4096, global_batch=64),
        cluster=load_cluster(cluster, gpus=16),
        layouts=parse_layout(f"{words} sequence_parallel=true"),
        runtime=runtime,
    )
    exposed, hidden = found.time["tp_exposed_s"][0], found.hidden["tp_s"][0]
    return float(exposed / (exposed + hidden))


def test_sharded_states_of_every_micro_batch_leave_tensor_parallelism_unhidden() -> None:
    plain = showing("dp=8 tp=2 zero=3", runtime="megatron")
    assert showing("dp=8 tp=2 zero=1") == pytest.approx(0.2 * plain)  # the switch hides 0.8 of it
    for zero in (2, 3):
        assert showing(f"dp=8 tp=2 zero={zero}") == pytest.approx(plain)
        assert showing(f"dp=8 tp=2 zero={zero}", cluster="b200-ib") == pytest.approx(0.2 * plain)


def test_joined_passes_do_too_where_tokens_are_dispatched() -> None:
    both, moe = "megatron+a2a_overlap+tp_comm_overlap", "qwen3-30b-a3b"
    alone = showing("dp=8 tp=2 zero=1 ep=8", model=moe)
    assert showing("dp=8 tp=2 zero=1 ep=8", model=moe, runtime=both) == pytest.approx(5.0 * alone)
    assert showing("dp=8 tp=2 zero=1 ep=8", model=moe, runtime=both, cluster="b200-ib") == pytest.approx(alone)
