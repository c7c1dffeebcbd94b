"""Every kind of layout computes what one process computes: losses of three steps, gradients and gradient norm of the first.

Experts are compared with a loop that sends every token through every expert. Which experts a token goes to may not hang on rounding,
so seeds are chosen such that the last chosen expert scores 1e-4 more than the next, which is asserted.

The file is also the script of a rank: two launches (2 and 4 ranks) walk through all layouts and write down the differences.
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
from shardplan.planner.plan import Plan

SEQ = 32
STEPS = 3
"""The third loss sees moments that the optimizer kept."""
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
LEAST_MARGIN = 1e-4
ROUTER_SCALE = 6.0
"""Initial routers times this, for scores that differ."""
SEEDS = {"mixtral": 3, "mixed": 5}

# (ranks, model, global batch, layout); micro_batch is 1, so a batch above dp means accumulation or pipelining
CASES = [
    (1, "llama", 2, "dp=1 micro_batch=2"),
    (1, "llama", 2, "dp=1 recompute=full"),
    (1, "llama", 2, "dp=1 recompute=full:2"),
    (1, "llama", 2, "dp=1 recompute=selective"),
    (1, "gpt", 2, "dp=1"),
    (1, "gpt-tied", 2, "dp=1 recompute=selective"),
    (1, "gpt-tied", 2, "dp=1 recompute=selective:layernorm+act"),
    (1, "llama", 2, "dp=1 attention=unfused recompute=selective:core_attn"),
    (2, "llama", 2, "dp=2 zero=0"),
    (2, "llama", 4, "dp=2 zero=0"),
    (2, "llama", 4, "dp=2 zero=1"),
    (2, "llama", 4, "dp=2 zero=2"),
    (2, "llama", 4, "dp=2 zero=3"),
    (2, "llama", 4, "dp=2 zero=3 recompute=full"),
    (2, "gpt-tied", 4, "dp=2 zero=3 recompute=selective"),
    (1, "mixtral", 4, "dp=1 recompute=selective"),
    (1, "mixed", 4, "dp=1 micro_batch=2 recompute=full"),
    (2, "mixtral", 4, "dp=2 zero=0"),
    (2, "mixtral", 4, "dp=2 zero=3 recompute=full"),
    (2, "mixtral", 4, "dp=2 ep=2 zero=0"),
    (2, "mixtral", 4, "dp=2 ep=2 zero=1"),
    (2, "mixtral", 4, "dp=2 ep=2 zero=2 recompute=full"),
    (2, "mixtral", 4, "dp=2 ep=2 zero=3 recompute=selective"),
    (2, "mixtral", 4, "dp=2 ep=2 zero=3 micro_batch=2"),
    (2, "mixed", 4, "dp=2 ep=2 zero=2"),
    (2, "mixtral", 4, "tp=2"),
    (2, "mixed", 4, "tp=2 sequence_parallel=true recompute=selective"),
    (2, "mixtral", 4, "tp=2 ep=2 sequence_parallel=true"),
    (2, "mixed", 4, "pp=2 schedule=gpipe stage_layers=3,1"),
    (2, "mixtral", 4, "pp=2 schedule=zero_bubble"),
    (2, "mixtral", 4, "cp=2 ep=2 zero=1"),
    (2, "mixed", 4, "cp=2 zero=3 cp_kind=ulysses recompute=full"),
    (2, "llama", 2, "tp=2"),
    (2, "llama", 2, "tp=2 sequence_parallel=true"),
    (2, "gpt", 2, "tp=2 recompute=full"),
    (2, "gpt-tied", 2, "tp=2 sequence_parallel=true recompute=selective"),
    (2, "llama", 4, "pp=2 schedule=gpipe"),
    (2, "llama", 4, "pp=2 schedule=1f1b"),
    (2, "llama", 4, "pp=2 schedule=interleaved virtual_stages=2"),
    (2, "llama", 4, "pp=2 stage_layers=3,1 recompute=full:1"),
    (2, "gpt", 2, "pp=2 recompute=selective"),
    (2, "llama", 4, "dp=2 zero=3 recompute=selective:layernorm+core_attn+mlp"),
    (2, "llama", 4, "pp=2 recompute=selective:act+proj+qkv"),
    (2, "llama", 4, "cp=2 zero=3"),
    (2, "llama", 2, "cp=2 zero=1 recompute=selective"),
    (2, "gpt-tied", 2, "cp=2 recompute=full:2"),
    (2, "gpt", 2, "cp=2 cp_kind=ulysses"),
    (2, "llama", 4, "cp=2 cp_kind=ulysses zero=3 recompute=selective micro_batch=2"),
    (2, "llama-one", 2, "cp=2 cp_kind=ulysses recompute=full"),
    (2, "llama", 4, "cp=2 cp_kind=all_gather zero=3 recompute=selective micro_batch=2"),
    (4, "llama", 8, "dp=4 zero=1 dp_shard=2"),
    (4, "llama", 8, "dp=4 zero=2 dp_shard=2"),
    (4, "llama", 8, "dp=4 zero=3 dp_shard=2"),
    (4, "llama", 4, "dp=2 tp=2 zero=3"),
    (4, "gpt-tied", 2, "dp=2 tp=2 zero=1 sequence_parallel=true"),
    (4, "llama", 4, "dp=2 pp=2 zero=3 recompute=full"),
    (4, "llama", 8, "dp=2 pp=2 zero=3 schedule=interleaved virtual_stages=2"),
    (4, "llama", 4, "dp=2 pp=2 zero=2 order=tp-cp-pp-dp"),
    (4, "mixtral", 4, "dp=4 ep=4 zero=1"),
    (4, "mixtral", 4, "dp=4 ep=2 zero=3 recompute=full"),
    (4, "mixed", 4, "dp=4 ep=2 zero=3"),
    (4, "mixtral", 4, "dp=4 ep=2 zero=2 dp_shard=2"),
    (4, "mixtral", 4, "dp=2 ep=2 pp=2 zero=3 schedule=interleaved virtual_stages=2"),
    (4, "mixtral", 4, "dp=2 tp=2 zero=3 sequence_parallel=true"),
    (4, "mixtral", 4, "dp=2 tp=2 ep=2 zero=1 sequence_parallel=true"),
    (4, "mixtral", 4, "dp=2 tp=2 ep=4 zero=3 sequence_parallel=true recompute=full"),
    (4, "mixed", 4, "dp=2 tp=2 ep=2 zero=3 sequence_parallel=true order=dp-tp-cp-pp"),
    (4, "mixtral", 4, "tp=2 ep=2 pp=2 sequence_parallel=true recompute=selective"),
    (4, "mixtral", 4, "cp=2 tp=2 ep=4 sequence_parallel=true zero=3 cp_kind=all_gather"),
    (4, "mixtral", 4, "dp=2 cp=2 ep=4 zero=2 recompute=selective"),
    (4, "mixed", 4, "cp=2 pp=2 ep=2 zero=1 schedule=zero_bubble"),
    (4, "llama", 2, "tp=2 pp=2 sequence_parallel=true order=pp-tp-cp-dp"),
    (4, "llama-one", 2, "cp=4 zero=3 recompute=selective"),
    (4, "gpt", 2, "cp=4 cp_kind=all_gather zero=2"),
    (4, "llama", 8, "dp=2 cp=2 zero=3 dp_shard=1 cp_kind=ulysses"),
    (4, "llama", 4, "dp=2 cp=2 zero=1 cp_kind=ulysses order=dp-cp-tp-pp"),
    (4, "llama", 2, "cp=2 tp=2 sequence_parallel=true cp_kind=ulysses zero=1 recompute=selective"),
    (4, "llama", 4, "cp=2 pp=2 recompute=full"),
    (4, "llama", 4, "cp=2 pp=2 zero=2 schedule=interleaved virtual_stages=2"),
]
SLOW_CASES = [  # every pair of their words is in tests/test_covering_array.py too
    (4, "llama", 8, "dp=4 zero=0"),
    (4, "llama", 8, "dp=4 zero=1"),
    (4, "llama", 8, "dp=4 zero=2"),
    (4, "llama", 4, "dp=4 zero=3"),
    (4, "llama", 2, "dp=2 tp=2 zero=0"),
    (4, "llama", 4, "dp=2 pp=2 zero=1"),
    (4, "llama", 4, "dp=2 pp=2 zero=2 schedule=gpipe"),
    (4, "llama", 4, "dp=2 tp=2 zero=3 order=dp-tp-cp-pp"),
    (4, "gpt-tied", 2, "dp=2 tp=2 zero=1 sequence_parallel=true order=dp-pp-tp-cp"),
    (4, "mixed", 4, "dp=4 zero=3"),
    (4, "mixtral", 4, "dp=4 ep=2 zero=0"),
    (4, "mixtral", 4, "dp=4 ep=2 zero=1"),
    (4, "mixtral", 4, "dp=4 ep=2 zero=2"),
    (4, "mixtral", 4, "dp=2 ep=2 pp=2 zero=1 order=tp-cp-pp-dp"),
    (4, "llama", 2, "tp=2 pp=2"),
    (4, "llama", 2, "tp=2 pp=2 sequence_parallel=true"),
    (4, "llama", 2, "cp=4 cp_kind=ulysses recompute=full"),
    (4, "llama", 4, "dp=2 cp=2 zero=0"),
    (4, "llama", 8, "dp=2 cp=2 zero=3"),
    (4, "gpt-tied", 2, "cp=2 tp=2 zero=3 sequence_parallel=true"),
    (4, "llama", 2, "cp=2 tp=2 sequence_parallel=true zero=0 order=cp-tp-dp-pp"),
    (4, "gpt", 4, "cp=2 pp=2 zero=3 cp_kind=ulysses schedule=gpipe"),
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

    mixtral = replace(llama, ffn=48, experts=4, experts_per_token=2, balance_weight=0.02)
    mixed = replace(llama, ffn=32, experts=6, experts_per_token=3, raw_scores=True, balance_weight=0.02)

    def gpt_model(name: str, *, tied: bool) -> Model:
        return Model(
            name=name, family="gpt2", layers=((gpt, 4),), vocab=256, tied_embeddings=tied, learned_positions=SEQ
        )

    return {
        "llama-one": Model(
            name="llama-one",
            family="llama",
            layers=((replace(llama, kv_heads=1), 4),),
            vocab=256,
            tied_embeddings=False,
        ),
        "llama": Model(name="llama", family="llama", layers=((llama, 4),), vocab=256, tied_embeddings=False),
        "mixtral": Model(name="mixtral", family="mixtral", layers=((mixtral, 4),), vocab=256, tied_embeddings=False),
        "mixed": Model(
            name="mixed", family="qwen3_moe", layers=((llama, 1), (mixed, 3)), vocab=256, tied_embeddings=False
        ),
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


def launch(ranks: int, slow: bool, result: Path) -> dict[str, dict[str, float]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*torchrun, __file__, str(ranks), str(result), *(["slow"] if slow else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("parity")
    return cache(lambda ranks, slow: launch(ranks, slow, folder / f"{ranks}-{slow}.json"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "model", "batch", "words"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_layout_computes_what_one_process_computes(differences, ranks, model, batch, words):
    found = differences(ranks, (ranks, model, batch, words) in SLOW_CASES)[case_key(model, batch, words)]
    assert found["loss"] < LOSS_TOLERANCE
    assert found["gradient"] < GRADIENT_TOLERANCE
    assert found["norm"] < GRADIENT_TOLERANCE
    assert found["margin"] > LEAST_MARGIN
    assert found["parameters"] == found["expected_parameters"]


def case_key(model: str, batch: int, words: str) -> str:
    return f"{model} {batch} {words}"


# --- what a rank does ---------------------------------------------------------------------------------------------


def scale_routers(chunks) -> None:
    import torch

    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if "router" in name:
                    parameter.mul_(ROUTER_SCALE)


def all_through_all(layer, kind: LayerKind, routers: int, balance: list, margins: list[float]) -> None:
    """Let a layer of experts send every token through every expert; its balance loss and the margin of its choice are appended."""
    import torch
    from torch.nn import functional

    router, experts = layer.router, layer.experts

    def forward(x):
        scores = (x.float() @ router.weight.float().T).softmax(-1)
        best = scores.topk(kind.experts_per_token + 1, dim=-1)
        weights, chosen = best.values[..., :-1], best.indices[..., :-1]
        margins.append((best.values[..., -2] - best.values[..., -1]).min().item())
        if not kind.raw_scores:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(kind.experts):
            wide = functional.silu(x @ experts.w1[e].T) * (x @ experts.w3[e].T)
            out = out + (weights * (chosen == e)).sum(-1, keepdim=True).to(x.dtype) * (wide @ experts.w2[e].T)
        sent = torch.stack([(chosen == e).sum() / scores[..., 0].numel() for e in range(kind.experts)])
        even = kind.experts * (sent * scores.flatten(0, 1).mean(0)).sum()
        balance.append(kind.balance_weight / routers * even)
        return out

    layer.forward = forward


def reference(model: Model, global_batch: int, micro_batch: int):
    """Losses, first gradients by name, first gradient norm and least margin of a plain loop, without any of our loop."""
    import torch

    from shardplan.executor.data import batch, load_text
    from shardplan.executor.schedule import learning_rate
    from shardplan.executor.transformer import build_transformer, layer_kinds, whole

    seed = SEEDS.get(model.name, 0)
    plain = build_transformer(model, seq=SEQ, part=whole(model), seed=seed, device=torch.device("cpu"))
    scale_routers([plain])
    balance: list[torch.Tensor] = []
    margins = [1.0]
    kinds = layer_kinds(model)
    for layer, kind in zip(plain.layers.values(), kinds, strict=True):
        if kind.experts:
            all_through_all(layer.ffn, kind, sum(one.experts > 0 for one in kinds), balance, margins)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    text, losses, gradients, norms = load_text(), [], {}, []
    for step in range(1, STEPS + 1):
        arrays = batch(text, seq=SEQ, seed=seed, step=step, first=0, count=global_batch)
        inputs, targets = (torch.from_numpy(array.copy()) for array in arrays)
        size = micro_batch if any(kind.experts for kind in kinds) else global_batch
        losses.append(0.0)
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            balance.clear()
            loss = torch.nn.functional.cross_entropy(plain(x).flatten(0, 1), y.flatten())
            ((loss + sum(balance)) * size / global_batch).backward()
            losses[-1] += loss.item() * size / global_batch
        gradients = gradients or {name: p.grad.clone() for name, p in plain.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, model.hidden)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, norms[0], min(margins)


def difference(model: Model, words: str, global_batch: int, expected) -> dict[str, float]:
    """Largest relative differences of this rank; a gradient's is measured against its norm, or 1e-4 of the global one."""
    import torch
    from torch.distributed.tensor import DTensor

    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.recipe import plain_recipe
    from shardplan.executor.recompute import parameter_name
    from shardplan.executor.trainer import Trainer

    losses, gradients, norm, margin = expected
    plan = make_plan(model, words, global_batch=global_batch)
    recipe = plain_recipe(plan, seed=SEEDS.get(model.name, 0))
    trainer = Trainer(plan, build_mesh(plan.layout, "cpu"), torch.device("cpu"), recipe)
    scale_routers(trainer.chunks)
    worst = {"loss": 0.0, "gradient": 0.0, "norm": 0.0}
    names = set()
    for step in range(1, STEPS + 1):
        loss = trainer.forward_backward(step)
        for chunk in trainer.chunks if step == 1 else ():
            for name, parameter in chunk.named_parameters():
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                plain = chunk.whole_name(parameter_name(name))
                right = gradients[plain]
                error = (grad - right).norm() / (right.norm() + 1e-4 * norm)
                worst["gradient"] = max(worst["gradient"], error.item())
                names.add(plain)
        found = trainer.update(step).item()
        if step == 1:
            worst["norm"] = abs(found - norm) / norm
        worst["loss"] = max(worst["loss"], abs(trainer.global_loss(loss) / losses[step - 1] - 1))
    return {**worst, "margin": margin, "names": sorted(names)}


def rank_main(ranks: int, cases: list, result: Path) -> None:
    import torch
    import torch.distributed as dist

    sys.path.append(str(Path(__file__).parent))
    from ranks import process_group

    torch.set_num_threads(1)
    expected = cache(lambda name, batch, micro_batch: reference(models()[name], batch, micro_batch))
    answers = {}
    for number, (world, name, batch, words) in enumerate(cases):
        if world != ranks:
            continue
        right = expected(name, batch, parse_layout(words).micro_batch)
        every: list[dict] = [{}] * ranks
        with process_group(f"case-{number}"):
            dist.all_gather_object(every, difference(models()[name], words, batch, right))
        answers[case_key(name, batch, words)] = {
            **{field: max(one[field] for one in every) for field in ("loss", "gradient", "norm", "margin")},
            "parameters": sorted(set().union(*(one["names"] for one in every))),
            "expected_parameters": sorted(right[1]),
        }
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps(answers))
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), SLOW_CASES if sys.argv[3:] == ["slow"] else CASES, Path(sys.argv[2]))
