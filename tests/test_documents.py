"""Documents that share a window and do not see each other: positions of the loader, logits, layouts.

The file is also the script of a rank: one launch of two ranks walks through all layouts and writes down the differences.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.executor.loader import Loader, positions_of
from shardplan.executor.token_files import open_tokens
from shardplan.planner.plan import Plan

SEQ = 32
STEPS = 2
END = 0
LAYOUTS = [
    "dp=2 zero=0",
    "dp=2 zero=3 recompute=full",
    "tp=2 recompute=full",
    "tp=2 sequence_parallel=true recompute=selective",
    "pp=2 schedule=1f1b",
    "pp=2 schedule=interleaved virtual_stages=2 recompute=selective",
]


def model(*, rotary: bool = True) -> Model:
    kind = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm", rotary=rotary)
    return Model(
        name="small",
        family="llama",
        layers=((kind, 4),),
        vocab=256,
        tied_embeddings=False,
        learned_positions=0 if rotary else SEQ,
    )


def make_plan(words: str, **model_words) -> Plan:
    layout = parse_layout(words)
    return Plan(
        model=model(**model_words),
        job=Job(seq=SEQ, global_batch=4, precision="fp32"),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={},
        search={},
        digests={},
        shardplan_version="0",
    )


def make_tokens(folder: Path) -> Path:
    """Documents of 1 to 40 tokens, END behind each."""
    numbers = np.random.default_rng(7)
    lengths = numbers.integers(1, 40, size=200)
    pieces = [np.append(numbers.integers(1, 256, size=length - 1), END) for length in lengths]
    path = folder / "tokens.bin"
    np.concatenate(pieces).astype("<u2").tofile(path)
    return path


def make_loader(path: Path) -> Loader:
    file = open_tokens(str(path), dtype="uint16", end_of_document=END)
    return Loader([file], [1.0], seq=SEQ, global_batch=4, vocabulary=256, seed=3)


# --- one process -----------------------------------------------------------------------------------------------------


def test_positions_count_from_the_start_of_each_document():
    assert positions_of([3, 5], seq=7).tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert positions_of([0], seq=3).tolist() == [0, 1, 2]
    assert positions_of([], seq=3).tolist() == [0, 1, 2]
    assert positions_of([3], seq=3).tolist() == [0, 1, 2]  # begins with the last target


def test_packed_batches_are_the_batches_with_positions(tmp_path):
    loader = make_loader(make_tokens(tmp_path))
    inputs, targets, positions = loader.packed(2, first=1, count=2)
    plain = loader.batch(2, first=1, count=2)
    assert np.array_equal(inputs, plain[0])
    assert np.array_equal(targets, plain[1])
    begins = (positions == 0)[:, 1:]
    assert np.array_equal(begins, inputs[:, :-1] == END)  # behind each END, and nowhere else
    assert begins.sum() > 2


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("attention", ["auto", "flash", "unfused"])
def test_logits_of_a_packed_window_are_those_of_its_documents(rotary, attention):
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.attention_kernel import attention_backends, attention_context
    from shardplan.executor.transformer import build_transformer, whole

    shape = model(rotary=rotary)

    def build(seq: int):
        return build_transformer(shape, seq=seq, part=whole(shape), seed=0, device=torch.device("cpu"))

    plain = build(SEQ)
    lengths = [[5, 20, 1, 6], [32]]
    tokens = torch.randint(0, 256, (2, SEQ), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    with torch.no_grad(), attention_context(attention_backends(attention, device_type="cpu", precision="fp32")):
        together = plain(tokens, positions)
        for row, sizes in enumerate(lengths):
            alone = [build(len(piece))(piece[None]) for piece in tokens[row].split(sizes)]
            torch.testing.assert_close(together[row], torch.cat(alone, dim=1)[0], rtol=1e-5, atol=1e-6)
        across = plain(tokens)
    assert not torch.allclose(across[0], together[0], atol=1e-3)
    torch.testing.assert_close(across[1], together[1], rtol=1e-5, atol=1e-6)


def test_bounds_of_the_kernels_are_the_starts_of_documents_over_all_sequences():
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.attention_kernel import document_bounds

    bounds = document_bounds(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    assert bounds.tolist() == [0, 2, 4, 8]
    assert bounds.dtype == torch.int32


def test_flash_of_a_gpu_cannot_keep_documents_apart():
    pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.attention_kernel import check_documents
    from shardplan.hw_profiles.errors import InputError

    for word, precision in (("unfused", "bf16"), ("auto", "fp32")):
        check_documents(word, device_type="cuda", precision=precision, own=False)
    check_documents("triton", device_type="cuda", precision="bf16", own=True)
    check_documents("flash", device_type="cpu", precision="bf16", own=False)
    with pytest.raises(InputError, match="attention=flash cannot keep documents apart on this GPU"):
        check_documents("flash", device_type="cuda", precision="bf16", own=False)


@pytest.mark.parametrize(
    ("words", "precision", "told"),
    [
        ("cp=2", "fp32", "does not go with cp=2; plan with cp=1, or set it to true"),
        (
            "dp=2 attention=flash",
            "bf16",
            "attention=flash of a GPU cannot keep documents apart; plan with attention=auto",
        ),
        ("dp=2 attention=flash", "fp32", None),
        ("dp=2", "bf16", None),
    ],
)
def test_layouts_that_cannot_keep_documents_apart_are_refused_before_the_start(tmp_path, words, precision, told):
    from shardplan.executor.job_file import parse_job
    from shardplan.executor.recipe import check_job
    from shardplan.hw_profiles.errors import InputError
    from shardplan.hw_profiles.load import cluster_document

    plan = replace(make_plan(words), cluster=cluster_document("h100-ib"))
    plan = replace(plan, job=replace(plan.job, precision=precision))
    files = [{"path": str(make_tokens(tmp_path)), "end_of_document": END}]
    job = {"steps": 1, "data": {"files": files, "attend_across_documents": False}, "learning_rate": {"peak": 1e-3}}
    if told is None:
        check_job(plan, parse_job(job, place="job"))
    else:
        with pytest.raises(InputError, match=told):
            check_job(plan, parse_job(job, place="job"))


def test_an_end_of_document_that_never_occurs_keeps_nothing_apart(tmp_path):
    from shardplan.executor.job_file import parse_job
    from shardplan.executor.recipe import check_job
    from shardplan.hw_profiles.errors import InputError

    def check(end: int, *, across: bool) -> None:
        files = [{"path": str(tmp_path / "tokens.bin"), "end_of_document": end}]
        data = {"files": files, "attend_across_documents": across}
        check_job(
            make_plan("dp=1"), parse_job({"steps": 1, "data": data, "learning_rate": {"peak": 1e-3}}, place="job")
        )

    np.append(np.arange(1, 200), END).astype("<u2").tofile(tmp_path / "tokens.bin")
    check(END, across=False)  # one document, and it ends
    check(255, across=True)
    with pytest.raises(InputError, match="end_of_document=255 occurs nowhere in it"):
        check(255, across=False)


def test_an_index_and_the_token_that_ends_documents_agree(tmp_path):
    from shardplan.executor.job_file import parse_job
    from shardplan.executor.recipe import check_job
    from shardplan.executor.token_files import TokenWriter
    from shardplan.hw_profiles.errors import InputError

    writer = TokenWriter(tmp_path / "tokens.bin", vocabulary=1000)
    for length in (100, 60, 60):
        writer.write(np.append(np.arange(1, length), END))
        writer.end_document()
    writer.close()

    def check(end: int | None, *, across: bool) -> None:
        files = [{"path": str(tmp_path / "tokens.bin"), **({} if end is None else {"end_of_document": end})}]
        data = {"files": files, "attend_across_documents": across}
        check_job(
            make_plan("dp=1"), parse_job({"steps": 1, "data": data, "learning_rate": {"peak": 1e-3}}, place="job")
        )

    for across in (False, True):
        check(None, across=across)
        check(END, across=across)
        with pytest.raises(
            InputError, match=f"end_of_document=7, but document 0 of the .idx beside it ends with {END}"
        ):
            check(7, across=across)


def test_own_kernels_take_documents_over_packed_sequences(monkeypatch):
    """The call, not the kernel: tests/kernels hold `cu_seqlens` against plain attention."""
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from types import ModuleType

    from shardplan.executor import attention_kernel
    from shardplan.executor.transformer import causal_attention, document_mask

    def packed(q, k, v, *, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
        sizes = cu_seqlens_q.diff().tolist()
        split = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(a[None], b[None], c[None])[0] for a, b, c in split])

    kernels = ModuleType("shardplan.kernels.attention")
    monkeypatch.setattr(kernels, "attention", packed, raising=False)
    monkeypatch.setitem(sys.modules, "shardplan.kernels.attention", kernels)
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
    found = attention_kernel.own_attention(q, k, v, attention_kernel.document_bounds(positions))
    torch.testing.assert_close(found, causal_attention(q, k, v, document_mask(positions)))


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("documents")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, __file__, str(make_tokens(folder)), str(folder / "answers.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("words", LAYOUTS)
def test_layout_keeps_documents_apart_as_one_process_does(differences, words):
    found = differences[words]
    assert found["loss"] < 2e-6
    assert found["gradient"] < 1e-5
    assert found["validation"] < 2e-6


def reference(path: Path):
    """Losses, first gradients by name, last validation loss of a plain loop."""
    import torch

    from shardplan.executor.schedule import learning_rate
    from shardplan.executor.transformer import build_transformer, whole

    shape = model()
    plain = build_transformer(shape, seq=SEQ, part=whole(shape), seed=0, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    loader, losses, gradients = make_loader(path), [], {}

    def loss_of(step: int):
        inputs, targets, positions = (torch.from_numpy(one.copy()) for one in loader.packed(step, first=0, count=4))
        return torch.nn.functional.cross_entropy(plain(inputs, positions).flatten(0, 1), targets.flatten())

    for step in range(1, STEPS + 1):
        loss = loss_of(step)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in plain.named_parameters()}
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, shape.hidden)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, loss_of(1).item()


def difference(words: str, path: Path, expected) -> dict[str, float]:
    import torch
    from torch.distributed.tensor import DTensor

    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.recipe import plain_recipe
    from shardplan.executor.recompute import parameter_name
    from shardplan.executor.trainer import Trainer

    losses, gradients, validation = expected
    plan = make_plan(words)
    recipe = replace(plain_recipe(plan), data=make_loader(path), attend_across_documents=False)
    trainer = Trainer(plan, build_mesh(plan.layout, "cpu"), torch.device("cpu"), recipe)
    worst = {"loss": 0.0, "gradient": 0.0}
    for step in range(1, STEPS + 1):
        loss = trainer.global_loss(trainer.forward_backward(step))
        worst["loss"] = max(worst["loss"], abs(loss / losses[step - 1] - 1))
        for chunk in trainer.chunks if step == 1 else ():
            for name, parameter in chunk.named_parameters():
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                right = gradients[parameter_name(name)]
                worst["gradient"] = max(worst["gradient"], ((grad - right).norm() / right.norm()).item())
        trainer.update(step)
    return {**worst, "validation": abs(trainer.validate(recipe.data, 1) / validation - 1)}


def rank_main(path: Path, result: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected, answers = reference(path), {}
    for words in LAYOUTS:
        every: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, difference(words, path, expected))
        answers[words] = {field: max(one[field] for one in every) for field in every[0]}
    if dist.get_rank() == 0:
        result.write_text(json.dumps(answers))
    dist.destroy_process_group()
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
