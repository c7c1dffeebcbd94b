"""AdamW: steps against torch.optim.AdamW in fp64, low-precision copies and moments, schedules on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.kernels.adamw import adamw_reference, adamw_schedule, adamw_step

SHAPE = (257, 1031) if torch.cuda.is_available() else (7, 331)
HOW = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
RATE = 3e-3


def random(shape, device, seed=0, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def by_torch(parameter, gradients, dtype):
    """Parameter after torch.optim.AdamW took the steps, computed in `dtype`."""
    leaf = parameter.to(dtype).requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=RATE, foreach=False, fused=leaf.is_cuda and dtype == torch.float32, **HOW)
    for gradient in gradients:
        leaf.grad = gradient.to(dtype)
        optimizer.step()
    return leaf.detach()


def by_us(parameter, gradients, *, moments=torch.float32, **more):
    parameter = parameter.clone()
    first, second = (torch.zeros_like(parameter, dtype=moments) for _ in range(2))
    for step, gradient in enumerate(gradients, 1):
        schedule = adamw_schedule(step, learning_rate=RATE, betas=HOW["betas"], device=parameter.device)
        adamw_step(parameter, gradient, first, second, schedule, **HOW, **more)
    return parameter, first, second


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_steps_of_an_fp32_master(gradient_dtype, device):
    parameter = random(SHAPE, device)
    gradients = [random(SHAPE, device, seed, gradient_dtype) for seed in (1, 2, 3)]
    exact = by_torch(parameter, gradients, torch.float64)
    ours = by_us(parameter, gradients)[0]
    plain = by_torch(parameter, gradients, torch.float32)
    ours_error, plain_error = ((each.double() - exact).abs().max().item() for each in (ours, plain))
    assert ours_error <= 2 * plain_error + 1e-7 * exact.abs().max().item()


def test_the_copy_is_the_parameter_rounded(device):
    parameter, gradient = random(SHAPE, device), random(SHAPE, device, 1, torch.bfloat16)
    copy = torch.empty_like(gradient)
    updated = by_us(parameter, [gradient], copy=copy)[0]
    assert torch.equal(copy, updated.bfloat16())


def test_bf16_moments_follow_fp32_ones(device):
    parameter = random(SHAPE, device)
    gradients = [random(SHAPE, device, seed, torch.bfloat16) for seed in range(1, 4)]
    wide, first, second = by_us(parameter, gradients)
    low, first_low, second_low = by_us(parameter, gradients, moments=torch.bfloat16)
    assert first_low.dtype == second_low.dtype == torch.bfloat16
    # each rounding costs at most one spacing, 2^-7 of the value, and three add up
    torch.testing.assert_close(second_low.float(), second, rtol=3 * 2**-7, atol=1e-8)
    torch.testing.assert_close(first_low.float(), first, rtol=3 * 2**-7, atol=1e-2)
    torch.testing.assert_close(low, wide, rtol=0, atol=0.2 * 3 * RATE)


@settings(max_examples=15)
@given(
    numel=st.integers(1, 2100),
    step=st.integers(1, 100_000),
    rate=st.floats(1e-6, 0.1),
    decay=st.floats(0, 0.5),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.999)),
)
def test_one_step_anywhere(numel, step, rate, decay, betas):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameter, gradient, first = (random(numel, device, seed) for seed in range(3))
    second = random(numel, device, 3).square()
    scale = torch.full((), 0.25, device=device)
    schedule = adamw_schedule(step, learning_rate=rate, betas=betas, device=device)
    wide = [each.double() for each in (parameter, gradient, first, second)]
    adamw_reference(*wide, None, schedule.double(), scale, *betas, 1e-8, decay)
    adamw_step(
        parameter, gradient, first, second, schedule, betas=betas, eps=1e-8, weight_decay=decay, gradient_scale=scale
    )
    for got, wanted in zip((parameter, first, second), (wide[0], wide[2], wide[3]), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("step", "rate_on_device"), itertools.product((1, 2, 1000, 1_000_000), (False, True)))
def test_schedules_on_host_and_device_agree(step, rate_on_device, device):
    betas = (0.9, 0.999)
    rate = torch.tensor(RATE, device=device) if rate_on_device else RATE
    host = adamw_schedule(step, learning_rate=rate, betas=betas, device=device)
    counter = torch.tensor(step, dtype=torch.int64, device=device)
    torch.testing.assert_close(adamw_schedule(counter, learning_rate=rate, betas=betas), host, rtol=3e-7, atol=0)
    assert host[2].item() == pytest.approx(1 - 0.999**step, rel=1e-6)


def test_the_operator_is_well_formed(device):
    parameter, gradient, first, copy = (random((5, 9), device, seed) for seed in range(4))
    schedule = adamw_schedule(1, learning_rate=RATE, betas=HOW["betas"], device=device)
    for given_copy in (None, copy):
        torch.library.opcheck(
            torch.ops.shardplan.adamw.default,
            (parameter, gradient, first, first.square(), given_copy, schedule, None, 0.9, 0.99, 1e-8, 0.1),
        )


def test_compiles_into_one_graph(device):
    def step(parameter, gradient, first, second, counter):
        schedule = adamw_schedule(counter, learning_rate=RATE, betas=HOW["betas"])
        adamw_step(parameter, gradient, first, second, schedule, **HOW)

    counter = torch.ones((), dtype=torch.int64, device=device)
    tensors = [random(SHAPE, device, seed) for seed in range(3)] + [random(SHAPE, device, 3).square()]
    plain, compiled = ([each.clone() for each in tensors] for _ in range(2))
    step(*plain, counter)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, counter)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_a_new_step():
    parameter, gradient = random(SHAPE, "cuda"), random(SHAPE, "cuda", 1)
    wanted = by_us(parameter, [gradient, gradient])[0]
    first, second, counter = torch.zeros_like(parameter), torch.zeros_like(parameter), torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    by_us(parameter, [gradient])  # compiles the kernel before the capture
    with torch.cuda.graph(graph):
        counter += 1
        schedule = adamw_schedule(counter, learning_rate=RATE, betas=HOW["betas"])
        adamw_step(parameter, gradient, first, second, schedule, **HOW)
    graph.replay()
    graph.replay()
    torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-7)


def test_wrong_inputs_are_named(device):
    x = torch.zeros(4, 6, device=device)
    schedule = adamw_schedule(1, learning_rate=RATE, betas=(0.9, 0.99), device=device)
    with pytest.raises(ValueError, match=r"gradient is \(6,\) on \w+"):
        adamw_step(x, x[0], x, x, schedule)
    with pytest.raises(ValueError, match=r"parameter has strides \(1, 4\); it is updated in place"):
        adamw_step(x.view(6, 4).t(), x, x, x, schedule)
    with pytest.raises(ValueError, match=r"schedule is torch\.float32 \(2,\)"):
        adamw_step(x, x, x, x, schedule[:2])
    with pytest.raises(ValueError, match=r"betas=\(0\.9, 1\.5\)"):
        adamw_step(x, x, x, x, schedule, betas=(0.9, 1.5))
    with pytest.raises(ValueError, match=r"gradient is torch\.int32; give a floating-point"):
        adamw_step(x, x.int(), x, x, schedule)
    with pytest.raises(ValueError, match="steps count from 1"):
        adamw_schedule(0, learning_rate=RATE, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"betas\[1\]=1\.0 lies outside"):
        adamw_schedule(1, learning_rate=RATE, betas=(0.9, 1.0))
