"""`shardplan+compile`: compiled layers give the losses, gradients and names of the others; a CPU without a compiler is refused.

The file is also the script of a rank. Graphs are captured and split as always and then run by PyTorch (`aot_eager`), so no C++ compiler is
needed; one slow test builds kernels with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.executor import compiling
from shardplan.hw_profiles.load import cluster_document
from shardplan.planner.plan import Plan

# (ranks, backend, model, precision, layout)
CASES = [
    (2, "aot_eager", "llama", "fp32", "dp=2 zero=3 recompute=full"),
    (2, "aot_eager", "llama", "fp32", "dp=2 zero=2 recompute=selective"),
    (2, "aot_eager", "llama", "fp32", "tp=2"),
    (2, "aot_eager", "llama", "fp16", "tp=2 sequence_parallel=true"),
    (2, "aot_eager", "llama", "fp32", "tp=2 recompute=full"),
    (2, "aot_eager", "llama", "fp32", "tp=2 sequence_parallel=true recompute=full:2"),
    (2, "aot_eager", "mixtral", "fp32", "dp=2 zero=3 recompute=selective"),
    (2, "aot_eager", "mixtral", "fp32", "tp=2 recompute=full"),
    (2, "aot_eager", "llama", "fp32", "cp=2 zero=1"),
    (2, "aot_eager", "llama", "fp32", "cp=2 zero=3 cp_kind=ulysses recompute=full"),
    (2, "aot_eager", "mixtral", "fp32", "cp=2 zero=2 cp_kind=all_gather"),
    (2, "aot_eager", "llama", "fp32", "pp=2 schedule=interleaved virtual_stages=2 recompute=full"),
    pytest.param(1, "inductor", "llama", "fp32", "dp=1 recompute=selective", marks=pytest.mark.slow),
]
TOLERANCE = {"aot_eager": 1e-6, "inductor": 1e-5}


def make_plan(words: str, *, name: str = "llama", precision: str = "fp32", cluster=None) -> Plan:
    layout = parse_layout(words)
    llama = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm")
    experts = replace(llama, ffn=48, experts=4, experts_per_token=2, balance_weight=0.02)
    kind = experts if name == "mixtral" else llama
    return Plan(
        model=Model(name=name, family=name, layers=((kind, 4),), vocab=256, tied_embeddings=False),
        job=Job(seq=32, global_batch=4, precision=precision),
        cluster=cluster or {},
        gpus=layout.gpus,
        runtime="shardplan+compile",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )


def test_the_runtime_of_a_plan_says_whether_layers_are_compiled():
    assert compiling.is_compiled("shardplan+compile")
    assert compiling.is_compiled("fsdp2+compile+async_tp")
    assert not compiling.is_compiled("shardplan")


def test_a_cpu_without_a_compiler_is_refused(monkeypatch, tmp_path):
    from shardplan.executor.check import refusals

    plan = make_plan("dp=8", cluster=cluster_document("h100-ib"))
    plan = replace(plan, job=replace(plan.job, global_batch=8, precision="bf16"))

    def rules(device: str) -> list[str]:
        return [one.rule for one in refusals(plan, device=device, cuda_devices=8) if one.rule != "cpu-processes"]

    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert rules("cpu") == ["compiler"]
    assert rules("cuda") == []
    monkeypatch.setenv("CXX", sys.executable)
    assert rules("cpu") == []


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("compiled")
    return cache(lambda ranks: launch(ranks, folder / f"{ranks}.json"))


def launch(ranks: int, result: Path) -> dict[str, dict]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*torchrun, __file__, str(ranks), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "backend", "model", "precision", "words"), CASES)
def test_compiled_layers_compute_what_the_others_do(differences, ranks, backend, model, precision, words):
    if backend == "inductor" and compiling.compiler_here() is None:
        pytest.skip("no C++ compiler")
    found = differences(ranks)[f"{model} {words}"]
    assert found["graphs"] > 0
    assert found["same_names"]
    assert found["loss"] < TOLERANCE[backend]
    assert found["gradient"] < TOLERANCE[backend]
    assert found["validation"] < TOLERANCE[backend]


def trained(plan: Plan, backend: str):
    """(two losses and a validation loss, first gradients, names in a checkpoint); looked into, as `shardplan run` does."""
    import torch
    from torch.distributed.tensor import DTensor

    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.trainer import Trainer
    from shardplan.executor.waits import Waits

    trainer = Trainer(plan, build_mesh(plan.layout, "cpu"), torch.device("cpu"), compile_backend=backend)
    waits = Waits(trainer.clock, trainer.mesh, trainer.groups, compiled=compiling.is_compiled(plan.runtime))
    losses, gradients = [], {}
    for step in (1, 2):
        with waits:
            loss = trainer.forward_backward(step)
        losses.append(trainer.global_loss(loss))
        for chunk in trainer.chunks if step == 1 else ():
            for name, parameter in chunk.named_parameters():
                grad = parameter.grad
                gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        trainer.update(step)
    return [*losses, trainer.validate(trainer.recipe.data, 1)], gradients, sorted(trainer.state())


def difference(plan: Plan, backend: str) -> dict[str, float]:
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # another case may have compiled the same layer
    losses, gradients, names = trained(replace(plan, runtime="shardplan"), backend)
    counters.clear()
    other_losses, other_gradients, other_names = trained(plan, backend)
    off = [abs(one / other - 1) for one, other in zip(other_losses, losses, strict=True)]
    worst = max(((other_gradients[name] - one).norm() / one.norm()).item() for name, one in gradients.items())
    graphs = counters["stats"]["unique_graphs"]
    same = names == other_names and sorted(gradients) == sorted(other_gradients)
    return {"loss": max(off[:2]), "validation": off[2], "gradient": worst, "graphs": graphs, "same_names": same}


def rank_main(ranks: int, result: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answers = {}
    for case in CASES:
        world, backend, name, precision, words = getattr(case, "values", case)
        if world == ranks:
            plan = make_plan(words, name=name, precision=precision)
            every: list[dict] = [{}] * ranks
            dist.all_gather_object(every, difference(plan, backend))
            worst = {field: max(one[field] for one in every) for field in ("loss", "validation", "gradient")}
            answers[f"{name} {words}"] = {
                **worst,
                **{f: min(one[f] for one in every) for f in ("graphs", "same_names")},
            }
    if dist.get_rank() == 0:
        result.write_text(json.dumps(answers))
    dist.destroy_process_group()
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
