"""Every kind of layout computes what one process computes: losses of three steps, gradients and gradient norm of the first.

The file is also the script of a rank: two launches (2 and 4 ranks) walk through all layouts and write down the differences.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.planner.plan import Plan

SEQ = 32
STEPS = 3
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5

# (ranks, model, global batch, layout); micro_batch is 1, so a batch above dp means accumulation or pipelining
CASES = [
    (1, "llama", 2, "dp=1 micro_batch=2"),
    (1, "llama", 2, "dp=1 recompute=full"),
    (1, "llama", 2, "dp=1 recompute=full:2"),
    (1, "llama", 2, "dp=1 recompute=selective"),
    (1, "gpt", 2, "dp=1"),
    (1, "gpt-tied", 2, "dp=1 recompute=selective"),
    (2, "llama", 2, "dp=2 zero=0"),
    (2, "llama", 4, "dp=2 zero=0"),
    (2, "llama", 4, "dp=2 zero=1"),
    (2, "llama", 4, "dp=2 zero=2"),
    (2, "llama", 4, "dp=2 zero=3"),
    (2, "llama", 4, "dp=2 zero=3 recompute=full"),
    (2, "gpt-tied", 4, "dp=2 zero=3 recompute=selective"),
    (2, "llama", 2, "tp=2"),
    (2, "llama", 2, "tp=2 sequence_parallel=true"),
    (2, "gpt", 2, "tp=2 recompute=full"),
    (2, "gpt-tied", 2, "tp=2 sequence_parallel=true recompute=selective"),
    (2, "llama", 4, "pp=2 schedule=gpipe"),
    (2, "llama", 4, "pp=2 schedule=1f1b"),
    (2, "llama", 4, "pp=2 schedule=interleaved virtual_stages=2"),
    (2, "llama", 4, "pp=2 stage_layers=3,1 recompute=full:1"),
    (2, "gpt", 2, "pp=2 recompute=selective"),
    (4, "llama", 8, "dp=4 zero=0"),
    (4, "llama", 8, "dp=4 zero=1"),
    (4, "llama", 8, "dp=4 zero=2"),
    (4, "llama", 4, "dp=4 zero=3"),
    (4, "llama", 8, "dp=4 zero=1 dp_shard=2"),
    (4, "llama", 8, "dp=4 zero=2 dp_shard=2"),
    (4, "llama", 8, "dp=4 zero=3 dp_shard=2"),
    (4, "llama", 4, "dp=2 tp=2 zero=3"),
    (4, "llama", 2, "dp=2 tp=2 zero=0"),
    (4, "gpt-tied", 2, "dp=2 tp=2 zero=1 sequence_parallel=true"),
    (4, "llama", 4, "dp=2 pp=2 zero=1"),
    (4, "llama", 4, "dp=2 pp=2 zero=2 schedule=gpipe"),
    (4, "llama", 4, "dp=2 pp=2 zero=3 recompute=full"),
    (4, "llama", 8, "dp=2 pp=2 zero=3 schedule=interleaved virtual_stages=2"),
    (4, "llama", 4, "dp=2 tp=2 zero=3 order=dp-tp-cp-pp"),
    (4, "gpt-tied", 2, "dp=2 tp=2 zero=1 sequence_parallel=true order=dp-pp-tp-cp"),
    (4, "llama", 4, "dp=2 pp=2 zero=2 order=tp-cp-pp-dp"),
    (4, "llama", 2, "tp=2 pp=2"),
    (4, "llama", 2, "tp=2 pp=2 sequence_parallel=true order=pp-tp-cp-dp"),
    (4, "llama", 2, "tp=2 pp=2 sequence_parallel=true"),
]


def models() -> dict[str, Model]:
    llama = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm")
    gpt = LayerKind(
        hidden=64,
        heads=4,
        kv_heads=4,
        head_dim=16,
        ffn=128,
        gated_mlp=False,
        norm="layernorm",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rotary=False,
    )

    def gpt_model(name: str, *, tied: bool) -> Model:
        return Model(
            name=name, family="gpt2", layers=((gpt, 4),), vocab=256, tied_embeddings=tied, learned_positions=SEQ
        )

    return {
        "llama": Model(name="llama", family="llama", layers=((llama, 4),), vocab=256, tied_embeddings=False),
        "gpt": gpt_model("gpt", tied=False),
        "gpt-tied": gpt_model("gpt-tied", tied=True),
    }


def make_plan(model: Model, words: str, *, global_batch: int) -> Plan:
    layout = parse_layout(words)
    return Plan(
        model=model,
        job=Job(seq=SEQ, global_batch=global_batch, precision="fp32"),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )


def launch(ranks: int, result: Path) -> dict[str, dict[str, float]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*torchrun, __file__, str(ranks), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("parity")
    return cache(lambda ranks: launch(ranks, folder / f"{ranks}.json"))


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "model", "batch", "words"), CASES)
def test_layout_computes_what_one_process_computes(differences, ranks, model, batch, words):
    found = differences(ranks)[case_key(model, batch, words)]
    assert found["loss"] < LOSS_TOLERANCE
    assert found["gradient"] < GRADIENT_TOLERANCE
    assert found["norm"] < GRADIENT_TOLERANCE
    assert found["parameters"] == found["expected_parameters"]


def case_key(model: str, batch: int, words: str) -> str:
    return f"{model} {batch} {words}"


# --- what a rank does ---------------------------------------------------------------------------------------------


def reference(model: Model, global_batch: int):
    """Losses, first gradients by name and first gradient norm of a plain loop over the whole batch, without any of our loop."""
    import torch

    from shardplan.executor.data import batch, load_text
    from shardplan.executor.schedule import learning_rate
    from shardplan.executor.transformer import build_transformer, whole

    plain = build_transformer(model, seq=SEQ, part=whole(model), seed=0, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    text, losses, gradients, norms = load_text(), [], {}, []
    for step in range(1, STEPS + 1):
        arrays = batch(text, seq=SEQ, seed=0, step=step, first=0, count=global_batch)
        inputs, targets = (torch.from_numpy(array.copy()) for array in arrays)
        loss = torch.nn.functional.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in plain.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, model.hidden)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, norms[0]


def difference(model: Model, words: str, global_batch: int, expected) -> dict[str, float]:
    """Largest relative differences of this rank; a gradient's is measured against its norm, or 1e-4 of the global one."""
    import torch
    from torch.distributed.tensor import DTensor

    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.recompute import parameter_name
    from shardplan.executor.trainer import Trainer

    losses, gradients, norm = expected
    plan = make_plan(model, words, global_batch=global_batch)
    trainer = Trainer(plan, build_mesh(plan.layout, "cpu"), torch.device("cpu"))
    worst = {"loss": 0.0, "gradient": 0.0, "norm": 0.0}
    names = set()
    for step in range(1, STEPS + 1):
        loss = trainer.forward_backward(step)
        for chunk in trainer.chunks if step == 1 else ():
            for name, parameter in chunk.named_parameters():
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                right = gradients[parameter_name(name)]
                error = (grad - right).norm() / (right.norm() + 1e-4 * norm)
                worst["gradient"] = max(worst["gradient"], error.item())
                names.add(parameter_name(name))
        found = trainer.update(step).item()
        if step == 1:
            worst["norm"] = abs(found - norm) / norm
        worst["loss"] = max(worst["loss"], abs(trainer.global_loss(loss) / losses[step - 1] - 1))
    return {**worst, "names": sorted(names)}


def rank_main(ranks: int, result: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected = cache(lambda name, batch: reference(models()[name], batch))
    answers = {}
    for world, name, batch, words in CASES:
        if world != ranks:
            continue
        mine = difference(models()[name], words, batch, expected(name, batch))
        every: list[dict] = [{}] * ranks
        dist.all_gather_object(every, mine)
        answers[case_key(name, batch, words)] = {
            **{field: max(one[field] for one in every) for field in ("loss", "gradient", "norm")},
            "parameters": sorted(set().union(*(one["names"] for one in every))),
            "expected_parameters": sorted(expected(name, batch)[1]),
        }
    if dist.get_rank() == 0:
        result.write_text(json.dumps(answers))
    dist.destroy_process_group()
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
