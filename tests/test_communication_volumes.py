"""Payload bytes of every collective of a real step on gloo ranks are those that the cost model takes its seconds from.

The file is also the script of a rank: two launches (2 and 4 ranks) count the second step of every layout. Payloads of 4 KiB and more
count, which leaves out norms of gradients, losses, gradients of norms under sequence parallelism at these widths. The cost model
does not have, and so the test adds, what NOT_MODELLED says. What stages tell each other of shapes is in the first step.
Sizes here divide by all ranks: where a parameter's rows do not, fully_shard pads them, which is not modelled either (1 % at widths of 100).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.volumes import communication_volumes
from shardplan.planner.plan import Plan

SMALL_BYTES = 4096  # of traffic.py, which needs torch

# (ranks, model, sequence length, global batch, precision, layout); micro_batch is 1: a batch above dp means accumulation or pipelining
CASES = [
    (2, "llama", 128, 2, "fp32", "dp=2 zero=0"),
    (2, "llama", 128, 4, "fp32", "dp=2 zero=0"),
    (2, "llama", 128, 2, "bf16", "dp=2 zero=1"),
    (2, "llama", 128, 4, "fp32", "dp=2 zero=1"),
    (2, "llama", 128, 2, "fp32", "dp=2 zero=2"),
    (2, "llama", 128, 4, "bf16", "dp=2 zero=2"),
    (2, "llama", 128, 2, "fp32", "dp=2 zero=3"),
    (2, "llama", 128, 4, "bf16", "dp=2 zero=3"),
    (2, "llama", 128, 4, "fp32", "dp=2 zero=3 recompute=full"),
    (2, "llama", 128, 2, "fp32", "tp=2"),
    (2, "llama", 128, 2, "bf16", "tp=2"),
    (2, "llama", 128, 2, "fp32", "tp=2 sequence_parallel=true"),
    (2, "llama", 1024, 2, "fp32", "tp=2"),  # the loss over split logits: three numbers a token, 4 KiB each
    (2, "llama", 1024, 2, "fp32", "tp=2 sequence_parallel=true recompute=full"),
    (2, "llama", 128, 2, "fp32", "tp=2 recompute=full"),
    (2, "llama", 128, 2, "fp32", "tp=2 recompute=full:2"),
    (2, "llama", 128, 2, "fp32", "tp=2 sequence_parallel=true recompute=full"),
    (2, "llama", 128, 2, "fp32", "tp=2 recompute=selective"),
    (2, "llama", 128, 2, "fp32", "tp=2 sequence_parallel=true recompute=selective"),
    (2, "gpt", 128, 2, "fp32", "tp=2"),
    (2, "gpt", 128, 2, "fp32", "tp=2 sequence_parallel=true"),
    (2, "llama", 128, 4, "fp32", "pp=2 schedule=gpipe"),
    (2, "llama", 128, 4, "bf16", "pp=2 schedule=1f1b"),
    (2, "llama", 128, 4, "fp32", "pp=2 schedule=interleaved virtual_stages=2"),
    (2, "llama", 128, 2, "fp32", "cp=2 zero=1"),
    (2, "llama", 128, 2, "bf16", "cp=2 zero=3 recompute=full"),
    (2, "llama", 128, 2, "fp32", "cp=2 cp_kind=ulysses zero=0"),
    (2, "llama", 128, 2, "fp32", "cp=2 cp_kind=all_gather zero=2"),
    (2, "llama", 128, 2, "fp32", "cp=2 zero=1 recompute=selective"),
    (2, "llama", 128, 2, "fp32", "cp=2 zero=1 recompute=selective:mlp"),
    (2, "llama", 128, 2, "fp32", "cp=2 cp_kind=ulysses zero=1 recompute=selective"),
    (2, "llama", 128, 2, "fp32", "cp=2 cp_kind=all_gather zero=1 recompute=selective:mlp"),
    (2, "llama", 128, 4, "fp32", "pp=2 schedule=zero_bubble_v virtual_stages=2"),
    (2, "llama", 128, 4, "fp32", "pp=2 schedule=dualpipe_v virtual_stages=2"),
    (2, "tied", 128, 4, "fp32", "pp=2 schedule=1f1b"),
    (2, "tied", 128, 4, "bf16", "pp=2 schedule=interleaved virtual_stages=2"),
    (2, "tied", 128, 4, "fp32", "dp=2 zero=3"),
    (2, "mixtral", 128, 4, "fp32", "dp=2 ep=2 zero=1"),
    (2, "mixtral", 128, 2, "bf16", "dp=2 ep=2 zero=3 recompute=full"),
    (2, "mixtral", 128, 2, "fp32", "dp=2 ep=2 zero=2 recompute=selective"),
    (2, "mixtral", 128, 2, "fp32", "dp=2 ep=2 zero=2 recompute=selective:act+mlp"),
    (2, "mixtral", 128, 2, "fp32", "dp=2 zero=3"),
    (2, "mixtral", 128, 2, "fp32", "tp=2 ep=2 sequence_parallel=true zero=1"),
    (2, "mixtral", 128, 2, "fp32", "tp=2 ep=2 sequence_parallel=true zero=1 recompute=selective"),
    (2, "mixtral", 128, 2, "fp32", "tp=2 ep=2 sequence_parallel=true zero=1 recompute=full:2"),
    (2, "mixtral", 128, 2, "fp32", "tp=2 sequence_parallel=true"),
    (2, "mixtral", 128, 2, "fp32", "tp=2 sequence_parallel=true recompute=selective"),
    (2, "mixtral", 128, 2, "fp32", "cp=2 zero=1"),
    (2, "mixtral", 128, 2, "fp32", "cp=2 ep=2 zero=1"),
    (2, "mixtral", 128, 2, "fp32", "cp=2 ep=2 cp_kind=ulysses zero=3 recompute=full"),
    (2, "mixtral", 128, 2, "bf16", "cp=2 ep=2 cp_kind=all_gather zero=2 recompute=selective"),
    (2, "mixtral", 128, 4, "fp32", "pp=2 schedule=zero_bubble"),
    (2, "mixtral", 128, 4, "fp32", "pp=2 schedule=zero_bubble_v virtual_stages=2"),
    (2, "mixed", 128, 4, "fp32", "dp=2 ep=2 zero=1 recompute=full:2"),
    (2, "mixed", 128, 2, "fp32", "tp=2 sequence_parallel=true recompute=full:3"),
    (2, "mixed", 128, 2, "fp32", "tp=2 ep=2 sequence_parallel=true zero=1 recompute=full:1"),
    (2, "turns", 128, 2, "fp32", "tp=2 ep=2 sequence_parallel=true zero=1 recompute=full:3"),
    (4, "turns", 128, 8, "fp32", "dp=2 pp=2 ep=2 zero=1 schedule=interleaved virtual_stages=2 recompute=full:1"),
    (4, "mixed", 128, 8, "fp32", "dp=2 pp=2 ep=2 zero=1 recompute=full:1,2"),
    (4, "tied", 128, 8, "fp32", "dp=2 pp=2 zero=3"),
    (4, "tied", 128, 8, "fp32", "dp=2 pp=2 zero=0"),
    (4, "tied", 128, 4, "fp32", "tp=2 pp=2 sequence_parallel=true"),
    (4, "mixtral", 128, 8, "fp32", "dp=4 ep=2 zero=3"),
    (4, "mixtral", 128, 8, "bf16", "dp=4 ep=2 zero=1"),
    (4, "mixtral", 128, 8, "fp32", "dp=4 ep=2 zero=2 dp_shard=2"),
    (4, "mixtral", 128, 8, "fp32", "dp=4 ep=4 zero=2"),
    (4, "mixtral", 128, 8, "fp32", "dp=2 pp=2 ep=2 zero=1"),
    (4, "mixtral", 128, 4, "fp32", "dp=2 tp=2 ep=2 zero=1 sequence_parallel=true"),
    (4, "mixtral", 128, 4, "fp32", "dp=2 cp=2 ep=4 zero=1"),
    (4, "mixtral", 128, 4, "fp32", "dp=2 cp=2 ep=2 zero=3"),
    (4, "mixtral", 128, 4, "fp32", "cp=2 pp=2 ep=2 zero=1"),
    (4, "mixtral", 128, 2, "fp32", "cp=2 tp=2 ep=2 sequence_parallel=true zero=1"),
    (4, "mixtral", 128, 8, "fp32", "dp=2 pp=2 ep=2 schedule=zero_bubble zero=1"),
    (4, "mixtral", 128, 4, "fp32", "tp=2 pp=2 ep=2 sequence_parallel=true schedule=dualpipe_v virtual_stages=2 zero=1"),
    (4, "llama", 128, 8, "fp32", "dp=4 zero=0"),
    (4, "llama", 128, 8, "fp32", "dp=4 zero=3 hpz=2"),
    (4, "llama", 128, 4, "fp32", "cp=4 zero=1"),
    (4, "llama", 128, 4, "fp32", "dp=2 cp=2 cp_kind=ulysses zero=3"),
    (4, "llama", 128, 4, "fp32", "cp=2 tp=2 sequence_parallel=true zero=1"),
    (4, "llama", 128, 8, "fp32", "dp=4 zero=1 dp_shard=2"),
    (4, "llama", 128, 8, "fp32", "dp=4 zero=2 dp_shard=2"),
    (4, "llama", 128, 8, "bf16", "dp=4 zero=3 dp_shard=2"),
    (4, "llama", 128, 4, "fp32", "dp=2 tp=2 zero=3"),
    (4, "gpt", 128, 4, "fp32", "dp=2 tp=2 zero=3"),
    (4, "llama", 128, 4, "fp32", "dp=2 tp=2 zero=1 sequence_parallel=true order=dp-tp-cp-pp"),
    (4, "llama", 128, 8, "fp32", "dp=2 pp=2 zero=1"),
    (4, "llama", 128, 8, "fp32", "dp=2 pp=2 zero=3"),
    (4, "llama", 128, 8, "fp32", "dp=2 pp=2 zero=3 schedule=interleaved virtual_stages=2"),
    (4, "llama", 128, 4, "fp32", "tp=2 pp=2 sequence_parallel=true"),
    (4, "llama", 128, 4, "fp32", "pp=4 schedule=1f1b"),
]

TOKENS = "ep all_to_all"
"""Ranks send to experts what routers choose, so it is counted over all ranks of a stage."""
NOT_MODELLED = {
    "gpt 128 2 fp32 tp=2 sequence_parallel=true": {
        "tp all_reduce": 4.0 * 128 * 64
    }  # gradient of learned positions, once a step
}


def models() -> dict[str, Model]:
    """Sizes that all ranks divide; a row of the hidden state has fewer than 4 KiB, a stream of 128 tokens more."""
    llama = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm")
    biases = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
    experts = replace(llama, experts=4, experts_per_token=2, balance_weight=0.02)
    gpt = replace(llama, kv_heads=4, ffn=128, gated_mlp=False, norm="layernorm", rotary=False, **biases)
    return {
        "llama": Model(name="llama", family="llama", layers=((llama, 4),), vocab=256, tied_embeddings=False),
        "tied": Model(name="tied", family="llama", layers=((llama, 4),), vocab=256, tied_embeddings=True),
        "mixtral": Model(name="mixtral", family="mixtral", layers=((experts, 4),), vocab=256, tied_embeddings=False),
        "mixed": Model(
            name="mixed", family="mixtral", layers=((llama, 2), (experts, 2)), vocab=256, tied_embeddings=False
        ),
        "turns": Model(
            name="turns",
            family="mixtral",
            layers=((experts, 2), (llama, 2)),
            pattern=(0, 1),
            vocab=256,
            tied_embeddings=False,
        ),
        "gpt": Model(
            name="gpt", family="gpt2", layers=((gpt, 4),), vocab=256, tied_embeddings=False, learned_positions=128
        ),
    }


def key(case: tuple) -> str:
    return " ".join(map(str, case[1:]))


def launch(ranks: int, result: Path) -> dict[str, list[dict[str, int]]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*torchrun, __file__, str(ranks), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("volumes")
    return cache(lambda ranks: launch(ranks, folder / f"{ranks}.json"))


def merged(volumes: dict[str, float]) -> dict[str, float]:
    """All-gathers and reduce-scatters of tensor parallelism together: recompute repeats a share of both."""
    found: dict[str, float] = {}
    for name, size in volumes.items():
        renamed = "tp gather or scatter" if name in ("tp all_gather", "tp reduce_scatter") else name
        found[renamed] = found.get(renamed, 0.0) + size
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=key)
def test_a_real_step_sends_what_the_cost_model_says(counted, case):
    ranks, name, seq, batch, precision, words = case
    layout, job = parse_layout(words), Job(seq=seq, global_batch=batch, precision=precision)
    said = communication_volumes(models()[name], job, layout, load_runtime("shardplan"), smallest_bytes=SMALL_BYTES)
    found = counted(ranks)[key(case)]
    assert len(found) == ranks
    for one in found:
        expected = {f"{axis} {what}": size for (axis, what), size in said[one["stage"]].items()}
        expected |= NOT_MODELLED.get(key(case), {})
        sent, even = one["volumes"], expected.pop(TOKENS, 0.0)
        together = [other["volumes"].get(TOKENS, 0.0) for other in found if other["stage"] == one["stage"]]
        assert sum(together) == pytest.approx(len(together) * even, rel=1e-12)
        assert merged({name: size for name, size in sent.items() if name != TOKENS}) == pytest.approx(
            merged(expected), rel=1e-12
        )


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=key)
def test_every_collective_is_waited_for_under_the_clock(counted, case):
    """Of point-to-point transfers a wait covers several, so there a wait or more is all that can be asked."""
    for one in counted(case[0])[key(case)]:
        waits, times = dict(one["waits"]), {axis: number for axis, number in one["times"].items() if number}
        if "pp=" in case[-1]:
            assert waits.pop("pp") > times.pop("pp")
        if "cp=" in case[-1] and "cp_kind=" not in case[-1]:  # a ring
            assert waits.pop("cp") > times.pop("cp", 0)
        if "ep=" in case[-1] and "selective" in case[-1]:  # tokens that are kept look waited for twice
            assert waits.pop("ep") > times.pop("ep")
        assert waits == times


def test_a_compiled_layer_runs_whole_again_under_tensor_parallelism():
    """Counted on gloo ranks by torch's profiler, as compiled layers run under no dispatch mode: one more reduction a layer."""
    job, layout = Job(seq=128, global_batch=2, precision="fp32"), parse_layout("tp=2 recompute=full")
    stream, layers, micro_batches = 4.0 * 128 * 64, 4, 2
    plain, compiled = (
        communication_volumes(models()["llama"], job, layout, load_runtime(name), smallest_bytes=SMALL_BYTES)[0]
        for name in ("shardplan", "shardplan+compile")
    )
    assert compiled["tp", "all_reduce"] - plain["tp", "all_reduce"] == stream * layers * micro_batches


# --- what a rank does ---------------------------------------------------------------------------------------------


def count(case: tuple) -> dict[str, object]:
    import torch

    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.traffic import Traffic
    from shardplan.executor.trainer import Trainer
    from shardplan.executor.waits import Waits

    _, name, seq, batch, precision, words = case
    layout = parse_layout(words)
    plan = Plan(
        model=models()[name],
        job=Job(seq=seq, global_batch=batch, precision=precision),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )
    mesh = build_mesh(layout, "cpu")
    trainer = Trainer(plan, mesh, torch.device("cpu"))
    trainer.forward_backward(1)
    trainer.update(1)
    with Traffic(mesh, trainer.groups) as traffic, Waits(trainer.clock, mesh, trainer.groups):
        trainer.forward_backward(2)
        trainer.update(2)
    waits = Counter(axis for _, axis, *_ in trainer.clock.waits)
    times = Counter[str]()
    for (axis, what), number in (traffic.times + traffic.small_times).items():
        times[axis] += number * (what != "send")
    volumes = {f"{axis} {what}": size for (axis, what), size in traffic.payload_bytes.items()}
    return {"stage": mesh.get_local_rank("pp"), "volumes": volumes, "waits": waits, "times": times}


def rank_main(ranks: int, result: Path) -> None:
    import torch
    import torch.distributed as dist

    sys.path.append(str(Path(__file__).parent))
    from ranks import process_group

    torch.set_num_threads(1)
    answers = {}
    for case in CASES:
        if case[0] == ranks:
            every: list[dict] = [{}] * ranks
            with process_group(key(case)):
                dist.all_gather_object(every, count(case))
            answers[key(case)] = every
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps(answers))
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
