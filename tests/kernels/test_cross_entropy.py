"""Cross-entropy: whole, in parts of the vocabulary, and fused with the output layer, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from shardplan.kernels.cross_entropy import cross_entropy
from shardplan.kernels.linear_cross_entropy import chunk_of, linear_cross_entropy
from shardplan.kernels.vocabulary_parallel import (
    Statistics,
    local_gradient,
    local_statistics,
    losses_of,
    merge,
    vocabulary_parallel_cross_entropy,
)

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS, VOCABULARIES, HIDDEN = (501, (1000, 50_257, 128_256), 512) if ON_GPU else (7, (1000, 9001), 24)
IGNORED = -100


def batch(tokens, vocabulary, dtype, device, seed=0):
    """Logits, and targets of which every fifth is ignored."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = (4 * torch.randn(tokens, vocabulary, device=device, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    targets[::5] = IGNORED
    return logits, targets


def plain(logits, targets, *, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """torch's cross-entropy, plus the z-loss."""
    loss = functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * (logits.logsumexp(-1) ** 2).masked_fill(targets == IGNORED, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != IGNORED).sum()


def results(function, logits, targets, **how):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, targets, **how)
    loss.backward(torch.linspace(1, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape))
    return loss.detach(), leaf.grad


def check(ours, same, exact):
    """At most twice torch's error in the same precision, plus a millionth of the largest value for sums in another order."""
    ours_error, plain_error = ((each.double() - exact).abs().max().item() for each in (ours, same))
    assert ours_error <= 2 * plain_error + 1e-6 * exact.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "sum"}, {"z_loss": 1e-2, "reduction": "none"}],
    ids=["mean", "sum", "none"],
)
def test_loss_and_gradient(how, vocabulary, dtype, device):
    logits, targets = batch(TOKENS, vocabulary, dtype, device)
    ours = results(cross_entropy, logits, targets, **how)
    same = results(plain, logits, targets, **how)
    exact = results(plain, logits.double(), targets, **how)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for got, wanted, true in zip(ours, same, exact, strict=True):
        check(got, wanted, true)
    assert not ours[1][targets == IGNORED].any()


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(1, 299), max_size=3, unique=True),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_parts_of_the_vocabulary_make_the_whole(cuts, smoothing, z_loss):
    device = "cuda" if ON_GPU else "cpu"
    logits, targets = batch(5, 300, torch.float32, device)
    edges = [0, *sorted(cuts), 300]
    parts = [(first, logits[:, first:end]) for first, end in itertools.pairwise(edges)]
    how = {"label_smoothing": smoothing, "z_loss": z_loss}
    statistics = [local_statistics(part, targets, start=first) for first, part in parts]
    whole = merge(*statistics)
    losses, lse = losses_of(whole, targets, vocabulary=300, **how)
    grad = torch.ones_like(losses)
    gradient = torch.cat(
        [local_gradient(part, targets, lse, grad, start=first, vocabulary=300, **how) for first, part in parts], dim=1
    )
    wanted_losses, wanted_gradient = results(cross_entropy, logits, targets, reduction="sum", **how)
    torch.testing.assert_close(losses.sum(), wanted_losses)
    torch.testing.assert_close(gradient, wanted_gradient)

    nested = merge(statistics[0], merge(*statistics[1:])) if cuts else merge(whole)
    for got, wanted in zip(nested, whole, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_part_that_is_masked_out(device):
    logits, targets = batch(4, 64, torch.float32, device)
    logits[:, 32:] = -torch.inf
    targets = targets.clamp(-100, 31)
    parts = [local_statistics(logits[:, first : first + 32], targets, start=first) for first in (32, 0)]
    losses, _ = losses_of(merge(*parts), targets, vocabulary=64)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, targets, reduction="none"))
    assert isinstance(parts[0], Statistics)


def _one_rank(rank, world, path, logits, targets, queue):
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    columns = logits.shape[1] // world
    part = logits[:, rank * columns : (rank + 1) * columns].clone().requires_grad_()
    loss = vocabulary_parallel_cross_entropy(
        part, targets, start=rank * columns, vocabulary=logits.shape[1], z_loss=1e-3
    )
    loss.backward()
    queue.put((rank, loss.item(), part.grad.tolist()))
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(ON_GPU, reason="a process with CUDA cannot fork; covered where there is none")
def test_two_ranks_agree_with_one(tmp_path):
    logits, targets = batch(6, 40, torch.float32, "cpu")
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [
        context.Process(target=_one_rank, args=(rank, 2, str(tmp_path / "store"), logits, targets, queue))
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    answers = sorted(queue.get(timeout=120) for _ in ranks)
    for each in ranks:
        each.join()
    loss, gradient = results(plain, logits, targets, z_loss=1e-3)
    assert [answer[1] for answer in answers] == pytest.approx([loss.item()] * 2, rel=1e-6)
    torch.testing.assert_close(torch.cat([torch.tensor(answer[2]) for answer in answers], dim=1), gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_fused_with_the_output_layer(chunk, reduction, dtype, device):
    vocabulary = VOCABULARIES[0]
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device=device, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, HIDDEN, device=device, generator=generator) / HIDDEN**0.5).to(dtype)
    targets = batch(TOKENS, vocabulary, dtype, device)[1]

    def run(function, *tensors):
        leaves = [each.clone().requires_grad_() for each in tensors]
        loss = function(*leaves)
        loss.backward(torch.full_like(loss, 2.0))
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def by_torch(h, w):
        return functional.cross_entropy(
            (h @ w.t()).to(torch.promote_types(h.dtype, torch.float32)), targets, reduction=reduction
        )

    ours = run(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, chunk_tokens=chunk), hidden, weight
    )
    same = run(by_torch, hidden, weight)
    exact = run(by_torch, hidden.double(), weight.double())
    assert [each.dtype for each in ours] == [torch.float32, dtype, dtype]
    for got, wanted, true in zip(ours, same, exact, strict=True):
        check(got, wanted, true)


def test_under_autocast_the_output_layer_is_one_of_16_bits(device):
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device=device, generator=generator)
    weight = torch.randn(60, HIDDEN, device=device, generator=generator) / HIDDEN**0.5
    targets = batch(TOKENS, 60, torch.float32, device)[1]
    results = []
    for autocast in (True, False):
        h, w = (each.clone().requires_grad_() for each in (hidden, weight))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            given = (h, w) if autocast else (h.bfloat16(), w.bfloat16())
            loss = linear_cross_entropy(*given, targets)
            loss.backward()
        results.append((loss, h.grad, w.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    with torch.autocast(device, dtype=torch.bfloat16):  # a layer before it gives bf16, the weight is fp32
        linear_cross_entropy(hidden.bfloat16(), weight.requires_grad_(), targets).backward()
    assert weight.grad is not None


def test_a_second_derivative_is_refused(device):
    """It would be 0: gradients are made in the forward."""
    logits, targets = batch(8, 50, torch.float32, device)
    hidden, weight = logits[:, :16].clone().requires_grad_(), torch.eye(20, 16, device=device).requires_grad_()
    (first,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets % 20), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once"):
        first.sum().backward()


def test_chunks_do_not_matter(device):
    hidden, weight = torch.randn(9, 16, device=device), torch.randn(130, 16, device=device)
    targets = batch(9, 130, torch.float32, device)[1]
    losses = [linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk) for chunk in (1, 4, 9, 100)]
    torch.testing.assert_close(torch.stack(losses), losses[-1].expand(4))
    assert chunk_of(128_256) == 1024
    assert chunk_of(10**9) == 128


def test_only_needed_gradients_are_made(device):
    hidden, weight = torch.randn(9, 16, device=device), torch.randn(130, 16, device=device, requires_grad=True)
    targets = batch(9, 130, torch.float32, device)[1]
    frozen = weight.detach()
    linear_cross_entropy(hidden, weight, targets).backward()
    leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(leaf, frozen, targets).backward()
    wanted = hidden.clone().requires_grad_(), frozen.clone().requires_grad_()
    functional.cross_entropy(wanted[0] @ wanted[1].t(), targets).backward()
    torch.testing.assert_close(leaf.grad, wanted[0].grad)
    torch.testing.assert_close(weight.grad, wanted[1].grad)


def test_as_torch_where_nothing_counts_and_seen_where_a_target_is_wrong(device):
    logits, targets = batch(3, 40, torch.float32, device)
    loss, gradient = results(cross_entropy, logits, torch.full_like(targets, IGNORED))
    assert loss.isnan()
    assert not gradient.any()
    targets[1] = 40
    losses = cross_entropy(logits, targets, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    logits[2, :] = -torch.inf
    logits[2, 39] = 1.0
    targets[1:] = 39
    torch.testing.assert_close(cross_entropy(logits, targets), functional.cross_entropy(logits, targets))


def test_strides_batches_and_small_integers(device):
    logits, targets = batch(6, 50, torch.float32, device)
    wanted = results(cross_entropy, logits, targets, reduction="none")
    turned = logits.t().contiguous().t()
    padded = torch.cat((logits, logits), dim=1)[:, :50]
    for view in (turned, padded):
        assert torch.equal(cross_entropy(view, targets, reduction="none"), wanted[0])
    loss = cross_entropy(logits.view(2, 3, 50), targets.view(2, 3).int(), reduction="none")
    assert torch.equal(loss, wanted[0].view(2, 3))


def test_two_runs_give_the_same_bits(device):
    logits, targets = batch(TOKENS, VOCABULARIES[0], torch.float32, device)
    first, second = (results(cross_entropy, logits, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fp64_takes_the_reference():
    logits, targets = batch(4, 7, torch.float64, "cpu")
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, targets, label_smoothing=0.1, z_loss=0.1), (logits,), rtol=1e-6
    )
    hidden, weight = (torch.randn(count, 3, dtype=torch.float64, requires_grad=True) for count in (4, 7))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=3), (hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_are_well_formed(reduction, device):
    logits, targets = batch(6, 50, torch.float32, device)
    how = (IGNORED, 0.1, 1e-3)
    torch.library.opcheck(
        torch.ops.shardplan.cross_entropy.default, (logits.requires_grad_(), targets, *how, reduction)
    )
    torch.library.opcheck(torch.ops.shardplan.vocabulary_statistics.default, (logits.detach(), targets, 10))
    if reduction == "mean":
        hidden, weight = (torch.randn(count, 8, device=device, requires_grad=True) for count in (6, 50))
        torch.library.opcheck(
            torch.ops.shardplan.linear_cross_entropy.default, (hidden, weight, targets, *how, "mean", 4, True, True)
        )


def test_compiles_into_one_graph(device):
    logits, targets = batch(6, 50, torch.float32, device)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(results(compiled, logits, targets), results(cross_entropy, logits, targets), strict=True):
        assert torch.equal(got, wanted)

    hidden, weight = (torch.randn(count, 8, device=device, requires_grad=True) for count in (6, 50))
    fused = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for function in (fused, linear_cross_entropy):
        function(hidden, weight, targets).backward()
    doubled = hidden.grad / 2
    hidden.grad = None
    linear_cross_entropy(hidden, weight, targets).backward()
    torch.testing.assert_close(doubled, hidden.grad)


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    logits, targets = batch(256, 32_000, torch.bfloat16, "cuda")
    wanted = results(cross_entropy, logits, targets)
    leaf = logits.clone().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(leaf, targets)
        (gradient,) = torch.autograd.grad(loss, leaf)
    graph.replay()
    assert torch.equal(loss, wanted[0])
    assert torch.equal(gradient, wanted[1])


def test_wrong_inputs_are_named(device):
    logits, targets = batch(6, 50, torch.float32, device)
    with pytest.raises(ValueError, match=r"targets are torch\.int64 \(5,\); give int64 or int32 of shape \(6,\)"):
        cross_entropy(logits, targets[:5])
    with pytest.raises(ValueError, match="reduction='average' is unknown"):
        cross_entropy(logits, targets, reduction="average")
    with pytest.raises(ValueError, match="reduction='avg' is unknown"):
        vocabulary_parallel_cross_entropy(logits, targets, start=0, vocabulary=50, reduction="avg")
    with pytest.raises(ValueError, match=r"is torch\.int64; give a floating-point"):
        cross_entropy(logits.long(), targets)
    with pytest.raises(ValueError, match=r"label_smoothing=2 is no fraction"):
        cross_entropy(logits, targets, label_smoothing=2)
    with pytest.raises(ValueError, match=r"give \(V, 50\) in the torch\.float32 of hidden"):
        linear_cross_entropy(logits, logits[:, :4], targets)
    with pytest.raises(ValueError, match="columns 60 to 109 lie outside vocabulary=100"):
        vocabulary_parallel_cross_entropy(logits, targets, start=60, vocabulary=100)
