"""fp16: the loss scale grows, shrinks and is kept; an overflow on one rank skips the step on all; layouts agree with one process.

The file is also the script of a rank: launches of 1 and of 4 ranks write down what the tests look at.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.executor.loss_scale import LossScale, ScaleWords
from shardplan.planner.plan import Plan

SEQ = 32
STEPS = 2
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-3
"""Relative to a tensor's norm; fp16 rounds by up to 4.9e-4, and layouts round in other places."""

# (ranks, global batch, layout)
CASES = [
    (1, 2, "dp=1"),
    (1, 2, "dp=1 micro_batch=2 recompute=selective"),
    (1, 2, "dp=1 micro_batch=2 attention=flash"),
    (1, 2, "dp=1 micro_batch=2 attention=unfused recompute=full"),
    (4, 8, "dp=4 zero=0"),
    (4, 8, "dp=4 zero=1"),
    (4, 8, "dp=4 zero=2 dp_shard=2"),
    (4, 8, "dp=4 zero=3"),
    (4, 4, "dp=2 tp=2 zero=3"),
    (4, 4, "dp=2 tp=2 zero=1 sequence_parallel=true"),
    (4, 4, "dp=2 pp=2 zero=2"),
    (4, 4, "tp=2 pp=2 schedule=interleaved virtual_stages=2"),
]
EXPERT_CASES = [
    (1, 4, "dp=1 recompute=selective"),
    (4, 4, "dp=4 zero=3"),
    (4, 4, "dp=4 ep=4 zero=1"),
    (4, 4, "dp=2 tp=2 ep=2 zero=2 sequence_parallel=true"),
    (4, 4, "dp=2 pp=2 ep=2 zero=1"),
    (4, 4, "dp=2 cp=2 ep=2 zero=3 cp_kind=ulysses"),
]
"""Of a model with experts, beside a loop that sends every token through every expert."""
EXPERT_SEED = 43
LEAST_MARGIN = 5e-4
"""Between the last chosen expert's score and the next one's: a rounding of fp16. A token that went elsewhere would move gradients by more
than GRADIENT_TOLERANCE."""
OVERFLOWS = [(4, 4, "dp=4 zero=3"), (4, 2, "dp=2 tp=2 zero=0"), (4, 2, "tp=2 pp=2")]


@cache
def parity() -> ModuleType:
    """The parity test, for its experts."""
    spec = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("test_executor_parity.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_plan(words: str, *, global_batch: int, experts: bool = False) -> Plan:
    layout = parse_layout(words)
    llama = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm")
    model = Model(name="llama", family="llama", layers=((llama, 4),), vocab=256, tied_embeddings=False)
    if experts:
        mixtral = replace(llama, ffn=48, experts=4, experts_per_token=2, balance_weight=0.02)
        model = replace(model, name="mixtral", family="mixtral", layers=((mixtral, 2),))
    return Plan(
        model=model,
        job=Job(seq=SEQ, global_batch=global_batch, precision="fp16"),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )


def case_key(batch: int, words: str) -> str:
    return f"{batch} {words}"


# --- the scale alone -------------------------------------------------------------------------------------------------


def moved(words: ScaleWords, overflows: str) -> list[float]:
    """The scale after each step; `x` is an overflow."""
    scale, values = LossScale(words), []
    for letter in overflows:
        scale.update(overflow=letter == "x")
        values.append(scale.value)
    return values


def test_scale_doubles_after_a_window_without_overflow():
    assert moved(ScaleWords(initial=8.0, window=3), "......") == [8, 8, 16, 16, 16, 32]
    assert moved(ScaleWords(initial=8.0, window=3, hysteresis=1), "..x...") == [8, 8, 4, 4, 4, 8]


def test_first_overflow_is_forgiven_until_the_scale_has_doubled():
    words = ScaleWords(initial=8.0, window=2)
    assert moved(words, "x.xx..xx") == [8, 8, 4, 2, 2, 4, 4, 2]
    assert ScaleWords().initial == 65536


def test_scale_stops_at_its_minimum_and_says_that_training_diverged():
    scale = LossScale(ScaleWords(initial=6.0, minimum=2.0, hysteresis=1))
    for _ in range(2):
        scale.update(overflow=True)
    assert (scale.value, scale.skipped_steps) == (2.0, 2)
    with pytest.raises(
        FloatingPointError, match="smallest loss scale, 2: the training has diverged; lower learning_rate"
    ):
        scale.update(overflow=True)


def test_state_goes_on_in_the_middle_of_a_window():
    words = ScaleWords(initial=8.0, window=4)
    first, second = LossScale(words), LossScale(words)
    for overflow in (True, False, False):
        first.update(overflow=overflow)
    second.restore(json.loads(json.dumps(first.state())))
    for overflow in (False, False, True):
        first.update(overflow=overflow)
        second.update(overflow=overflow)
    assert first.state() == second.state()
    assert first.value == 16


def test_states_made_for_a_checkpoint_before_the_first_update_are_those_of_no_update():
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.checkpoint import training_state

    weight = torch.nn.Parameter(torch.ones(3))
    state = training_state({"w": weight}, torch.optim.AdamW([weight], lr=0.1, fused=True))
    assert state["model.w"].tolist() == [1, 1, 1]
    assert {name: value.abs().sum().item() for name, value in state.items() if name != "model.w"} == {
        "optimizer.w.step": 0,
        "optimizer.w.exp_avg": 0,
        "optimizer.w.exp_avg_sq": 0,
    }


# --- over ranks -------------------------------------------------------------------------------------------------------


def launch(ranks: int, result: Path) -> dict[str, dict]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*torchrun, __file__, str(ranks), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("scale")
    return cache(lambda ranks: launch(ranks, folder / f"{ranks}.json"))


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "batch", "words"), CASES)
def test_fp16_layout_computes_what_one_fp16_process_computes(found, ranks, batch, words):
    one = found(ranks)[case_key(batch, words)]
    assert one["masters"] == ["torch.float32"]
    assert one["skipped"] == 0
    assert one["loss"] < LOSS_TOLERANCE
    assert one["gradient"] < GRADIENT_TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "batch", "words"), EXPERT_CASES)
def test_fp16_experts_compute_what_one_fp16_process_computes(found, ranks, batch, words):
    one = found(ranks)[f"experts {case_key(batch, words)}"]
    assert one["skipped"] == 0
    assert one["margin"] > LEAST_MARGIN
    assert one["loss"] < LOSS_TOLERANCE
    assert one["gradient"] < GRADIENT_TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "batch", "words"), OVERFLOWS)
def test_overflow_on_one_rank_skips_the_step_on_all(found, ranks, batch, words):
    for rank in found(ranks)[f"overflow {case_key(batch, words)}"]:
        assert rank["unchanged"], "parameters moved"
        assert rank["scales"] == [65536, 65536, 32768, 32768]  # of steps 2 and 3, the first forgiven
        assert rank["skipped"] == 2
        assert rank["moved_again"]


# --- what a rank does ---------------------------------------------------------------------------------------------


def reference(plan: Plan, *, micro_batch: int):
    """Losses, first gradients by name and least router margin of a plain loop: fp32 values, cast to fp16 for each pass, a fixed scale."""
    import torch

    from shardplan.executor.data import batch, load_text
    from shardplan.executor.schedule import learning_rate
    from shardplan.executor.transformer import build_transformer, whole

    model, scale, total = plan.model, 2.0**16, plan.job.global_batch
    plain = build_transformer(model, seq=SEQ, part=whole(model), seed=seed_of(plan), device=torch.device("cpu"))
    balance: list[torch.Tensor] = []
    margins = [1.0]
    ((kind, layers),) = model.layers
    if kind.experts:
        parity().scale_routers([plain])
        for layer in plain.layers.values():
            parity().all_through_all(layer.ffn, kind, layers, balance, margins)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    text, losses, gradients = load_text(), [], {}
    for step in range(1, STEPS + 1):
        arrays = batch(text, seq=SEQ, seed=seed_of(plan), step=step, first=0, count=total)
        inputs, targets = (torch.from_numpy(array.copy()) for array in arrays)
        losses.append(0.0)
        size = micro_batch if kind.experts else total
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            balance.clear()
            half = {name: parameter.half() for name, parameter in plain.named_parameters()}
            logits = torch.func.functional_call(plain, half, (x,))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            ((loss + sum(balance)) * (scale * size / total)).backward()
            losses[-1] += loss.item() * size / total
        for parameter in plain.parameters():
            parameter.grad /= scale
        gradients = gradients or {name: p.grad.clone() for name, p in plain.named_parameters()}
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, model.hidden)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, min(margins)


def seed_of(plan: Plan) -> int:
    return EXPERT_SEED if plan.model.name == "mixtral" else 0


def whole_tensor(tensor):
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_trainer(plan: Plan):
    import torch

    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.recipe import plain_recipe
    from shardplan.executor.trainer import Trainer

    recipe = plain_recipe(plan, seed=seed_of(plan))
    trainer = Trainer(plan, build_mesh(plan.layout, "cpu"), torch.device("cpu"), recipe)
    parity().scale_routers(trainer.chunks)
    return trainer


def difference(plan: Plan, expected) -> dict:
    from shardplan.executor.recompute import parameter_name

    losses, gradients, margin = expected
    norm = sum(float(one.norm()) ** 2 for one in gradients.values()) ** 0.5
    trainer = make_trainer(plan)
    worst = {"loss": 0.0, "gradient": 0.0}
    for step in range(1, STEPS + 1):
        loss = trainer.global_loss(trainer.forward_backward(step))
        worst["loss"] = max(worst["loss"], abs(loss / losses[step - 1] - 1))
        for chunk in trainer.chunks if step == 1 else ():
            for name, parameter in chunk.named_parameters():
                right = gradients[parameter_name(name)]
                error = (whole_tensor(parameter.grad) / trainer.scale - right).norm() / (right.norm() + 1e-4 * norm)
                worst["gradient"] = max(worst["gradient"], error.item())
        trainer.update(step)
    assert trainer.loss_scale is not None
    masters = sorted({str(parameter.dtype) for parameter in trainer.parameters()})
    return {**worst, "masters": masters, "skipped": trainer.loss_scale.skipped_steps, "margin": margin}


def overflow(plan: Plan) -> dict:
    """Four steps, of which the second and third have an Inf or NaN in one gradient of the last rank."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    trainer = make_trainer(plan)
    assert trainer.loss_scale is not None
    scales, kept, after = [], [], []
    for step in range(1, 5):
        trainer.forward_backward(step)
        if step in (2, 3):
            kept = [whole_tensor(p).clone() for p in trainer.parameters()] if step == 2 else kept
            grad = next(p.grad for p in trainer.parameters() if p.grad is not None and p.grad.dim() == 1)
            if dist.get_rank() == dist.get_world_size() - 1:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local[-1] = float("inf") if step == 2 else float("nan")
        trainer.update(step)
        scales.append(trainer.loss_scale.value)
        after.append([whole_tensor(p).clone() for p in trainer.parameters()])
    return {
        "unchanged": all(a.equal(b) and a.isfinite().all().item() for a, b in zip(kept, after[2], strict=True)),
        "moved_again": any(not a.equal(b) for a, b in zip(after[2], after[3], strict=True)),
        "scales": scales,
        "skipped": trainer.loss_scale.skipped_steps,
    }


def rank_main(ranks: int, result: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answers: dict[str, object] = {}
    for experts, cases in ((False, CASES), (True, EXPERT_CASES)):
        for _, batch, words in [case for case in cases if case[0] == ranks]:
            plan = make_plan(words, global_batch=batch, experts=experts)
            mine = difference(plan, reference(plan, micro_batch=plan.layout.micro_batch))
            every: list[dict] = [{}] * ranks
            dist.all_gather_object(every, mine)
            worst = {field: max(one[field] for one in every) for field in ("loss", "gradient", "skipped")}
            answers[f"{'experts ' if experts else ''}{case_key(batch, words)}"] = {**mine, **worst}
    for _, batch, words in [case for case in OVERFLOWS if case[0] == ranks]:
        every = [{}] * ranks
        dist.all_gather_object(every, overflow(make_plan(words, global_batch=batch)))
        answers[f"overflow {case_key(batch, words)}"] = every
    if dist.get_rank() == 0:
        result.write_text(json.dumps(answers))
    dist.destroy_process_group()
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
