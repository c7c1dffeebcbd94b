"""NF4: levels and bits as published, bytes against the plain-torch reference, zeros, NaN, ragged ends."""

from __future__ import annotations

import math

import pytest
import torch

from shardplan.kernels import normal_float_reference as reference
from shardplan.kernels.dequantize import dequantize
from shardplan.kernels.normal_float import dequantize_nf4, quantize_nf4
from shardplan.kernels.normal_float_reference import LEVELS, Nf4Layout
from shardplan.kernels.packing import Packing
from shardplan.kernels.quantize import quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = torch.cuda.is_available()


def normal(numel: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_the_reference_bit_for_bit(dtype, double, device):
    x = normal(2_000_003 if ON_GPU else 20_003, device, dtype)
    x[300:700] = 0.0
    for spoilt in (False, True):
        if spoilt:
            x[5000], x[19_000] = float("nan"), float("inf")
        packed = quantize_nf4(x, double=double)
        layout = Nf4Layout(numel=x.numel(), block=64, double=double)
        assert torch.equal(packed, reference.quantize_nf4(x, 64, double))
        back, wanted = (
            dequantize_nf4(packed, x.numel(), dtype, double=double),
            reference.dequantize_nf4(packed, dtype, layout),
        )
        assert torch.equal(back.isnan(), wanted.isnan())
        assert torch.equal(back.nan_to_num(), wanted.nan_to_num())
        assert spoilt or not back[320:640].any()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 8191, 8192, 8193])
@pytest.mark.parametrize("block", [64, 256])
def test_ragged_ends(numel, block, device):
    x = normal(numel, device)
    packed = quantize_nf4(x, block=block)
    layout = Nf4Layout(numel=numel, block=block, double=True)
    assert torch.equal(packed, reference.quantize_nf4(x, block, True))
    assert torch.equal(
        dequantize_nf4(packed, numel, torch.float32, block=block),
        reference.dequantize_nf4(packed, torch.float32, layout),
    )


def test_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: equal steps of probability from 0.5 to 0.9677083, eight up and seven down, over the largest."""
    unit = torch.distributions.Normal(0.0, 1.0)
    upper = unit.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -unit.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    wanted = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper.flip(0)]) / upper.max()
    assert torch.tensor(LEVELS, dtype=torch.float64).tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_every_level_survives_and_halves_lie_as_documented(device):
    x = torch.tensor(LEVELS * 4, device=device) * 2.0
    packed = quantize_nf4(x, double=False)
    assert torch.equal(dequantize_nf4(packed, 64, torch.float32, double=False), x)
    assert packed[:3].tolist() == [0x00, 0x11, 0x22]  # elements 0 and 32, 1 and 33, 2 and 34
    assert packed[32:36].cpu().view(torch.float32).item() == 2.0


def test_bits_per_parameter_are_the_paper_s():
    numel = 1 << 24
    assert Nf4Layout(numel=numel, block=64, double=True).total_bytes * 8 / numel == pytest.approx(4.127, abs=5e-4)
    assert Nf4Layout(numel=numel, block=64, double=False).total_bytes * 8 / numel == 4.5


def test_error_of_a_gaussian_is_below_int4_and_double_quantisation_is_nearly_free(device):
    x = normal(1 << 16, device)

    def error(found: torch.Tensor) -> float:
        return float((found - x).norm() / x.norm())

    single, double = (
        error(dequantize_nf4(quantize_nf4(x, double=d), x.numel(), torch.float32, double=d)) for d in (0, 1)
    )
    packing = Packing(kind="int4", block=64)
    assert single == pytest.approx(0.0917, rel=0.03)  # mean squared distance to the nearest level, blocks of 64
    assert double < single * 1.01
    assert single < error(dequantize(quantize(x, packing), x.numel(), torch.float32, packing)) * 0.9


def test_a_bad_value_stays_in_its_block_or_with_double_quantisation_in_its_group(device):
    x = normal(64 * 600, device)
    x[64 * 300 + 5] = -float("inf")
    for double, first, last in ((False, 300, 301), (True, 256, 512)):
        bad = dequantize_nf4(quantize_nf4(x, double=double), x.numel(), torch.bfloat16, double=double).isnan()
        assert bad.nonzero().flatten().tolist() == list(range(64 * first, 64 * last))


def test_ops_are_well_formed_and_compile_whole(device):
    x = normal(1000, device)
    torch.library.opcheck(torch.ops.shardplan.quantize_nf4.default, (x, 64, True))
    packed = quantize_nf4(x)
    torch.library.opcheck(torch.ops.shardplan.dequantize_nf4.default, (packed, 1000, torch.bfloat16, 64, True))

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4(quantize_nf4(x), x.numel(), torch.float32) + 1

    assert torch.equal(torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x), there_and_back(x))


def test_refusals_name_value_and_remedy(device):
    x = normal(256, device)
    packed = quantize_nf4(x)
    for refused, words in (
        (lambda: quantize_nf4(x.long()), "int64; use bfloat16"),
        (lambda: quantize_nf4(x, block=48), "block=48"),
        (lambda: dequantize_nf4(packed, 256, torch.float32, double=False), "double that quantize_nf4"),
        (lambda: dequantize_nf4(packed[None], 256, torch.float32), r"\[1, "),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    assert math.prod(dequantize_nf4(quantize_nf4(x[:0]), 0, torch.float32).shape) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_linear_layer_of_nf4_weights_replays_as_a_graph():
    weight, x = normal(1 << 20, "cuda", torch.bfloat16), normal(1 << 12, "cuda", torch.bfloat16).view(4, 1024)
    packed = quantize_nf4(weight)
    eager = x @ dequantize_nf4(packed, 1 << 20, torch.bfloat16).view(1024, 1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = x @ dequantize_nf4(packed, 1 << 20, torch.bfloat16).view(1024, 1024)
    graph.replay()
    assert torch.equal(found, eager)
