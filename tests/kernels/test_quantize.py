"""Block quantisation: bytes against the plain-torch reference, errors against theory, zeros, NaN, ragged ends, dither."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.kernels import quantize_reference as reference
from shardplan.kernels.dequantize import dequantize, dequantize_reduce
from shardplan.kernels.packing import LARGEST_CODE, Packing, part_numel, swizzled_row
from shardplan.kernels.quantize import quantize

KINDS = ("int8", "int4", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


def normal(numel: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit, where any NaN equals any other."""
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_the_reference_bit_for_bit(kind, dtype, scale_dtype, device):
    packing = Packing(kind=kind, block=128, scale_dtype=scale_dtype)
    x = normal(3_000_007 if ON_GPU else 20_007, device, dtype)
    x[300:700] = 0.0
    x[1000], x[5000] = float("nan"), -float("inf")
    for partitions, devices_per_node in ((1, 1), (6, 2)):
        packed = quantize(x, packing, partitions=partitions, devices_per_node=devices_per_node)
        assert torch.equal(packed, reference.quantize(x, packing, partitions, devices_per_node, None))
        back = dequantize(packed, x.numel(), dtype, packing, devices_per_node=devices_per_node)
        assert same(back, reference.dequantize(packed[None], x.numel(), dtype, packing, devices_per_node, 1.0))


@settings(max_examples=25, deadline=None)
@given(
    numel=st.integers(1, 3000),
    partitions=st.integers(1, 5),
    kind=st.sampled_from(KINDS),
    block=st.sampled_from([64, 128, 1024]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-38, 1e-30, 1e-6, 1.0, 3e4, 1e30]),
)
def test_any_size_magnitude_and_split(numel, partitions, kind, block, dtype, magnitude):
    packing = Packing(kind=kind, block=block)
    x = (normal(numel, "cpu") * magnitude).to("cuda" if ON_GPU else "cpu", dtype)
    packed = quantize(x, packing, partitions=partitions)
    assert packed.shape == (partitions, packing.row_bytes(part_numel(numel, partitions)))
    assert torch.equal(packed, reference.quantize(x, packing, partitions, 1, None))
    back = dequantize(packed, numel, dtype, packing)
    assert same(back, reference.dequantize(packed[None], numel, dtype, packing, 1, 1.0))


@pytest.mark.parametrize("block", [64, 2048, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_smallest_and_largest_blocks(kind, block, device):
    packing = Packing(kind=kind, block=block)
    x = normal(20_000, device)
    packed = quantize(x, packing)
    assert torch.equal(packed, reference.quantize(x, packing, 1, 1, None))
    assert same(
        dequantize(packed, 20_000, torch.float32, packing),
        reference.dequantize(packed[None], 20_000, torch.float32, packing, 1, 1.0),
    )


@pytest.mark.parametrize(
    ("kind", "block", "error"),
    # Relative RMS error of a Gaussian, from 2M samples; int4 is 1 / (7 · sqrt 12) of the largest of a block.
    [("int8", 128, 0.0065), ("int8", 2048, 0.0083), ("int4", 128, 0.118), ("int4", 512, 0.135), ("fp8", 512, 0.0263)],
)
def test_error_of_a_gaussian_is_what_theory_says(kind, block, error, device):
    packing = Packing(kind=kind, block=block)
    x = normal(1 << 17, device)
    back = dequantize(quantize(x, packing), x.numel(), torch.float32, packing)
    assert relative_error(back, x) == pytest.approx(error, rel=0.05)


def test_fp8_wins_where_tails_are_heavy_and_int8_where_they_are_not(device):
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(3.0).sample((1 << 16,)).to(device)
    int8, fp8 = Packing(kind="int8", block=2048), Packing(kind="fp8", block=2048)

    def error(x: torch.Tensor, packing: Packing) -> float:
        return relative_error(dequantize(quantize(x, packing), x.numel(), torch.float32, packing), x)

    assert error(heavy, fp8) < error(heavy, int8)
    assert error(normal(1 << 16, device), int8) < error(normal(1 << 16, device), fp8) / 2.5


def test_int4_bytes_by_hand(device):
    """Largest 7 gives scale 1; byte j holds element j in its low half and element j + 32 in its high half."""
    x = torch.zeros(64, device=device)
    x[0], x[1], x[2], x[32], x[33] = 7.0, -7.0, 2.5, -1.0, 3.5
    row = quantize(x, Packing(kind="int4", block=64))[0].cpu()
    assert row.shape == (48,)
    assert row[:3].tolist() == [0xF7, 0x49, 0x02]  # (-1, 7), (4, -7), (0, 2): ties go to the even 4 and 2
    assert row[32:36].view(torch.float32).item() == 1.0
    assert row[36:].tolist() == [0] * 12


def test_every_int4_code_survives(device):
    packing = Packing(kind="int4", block=64)
    x = (torch.arange(128, device=device) % 15 - 7).float()
    assert torch.equal(dequantize(quantize(x, packing), 128, torch.float32, packing), x)


def test_every_e4m3_code_survives(device):
    packing = Packing(kind="fp8", block=256)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # the two NaN
    x = codes.view(torch.float8_e4m3fn).float().to(device)
    assert torch.equal(dequantize(quantize(x, packing), 256, torch.float32, packing), x)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_tiny_blocks_return_as_exact_zeros(kind, device):
    packing = Packing(kind=kind, block=64)
    x = torch.zeros(192, device=device)
    x[64:128] = 1e-30 * normal(64, device)  # under largest code · 2^-100, whatever the code
    x[128:] = LARGEST_CODE[kind]  # scale 1
    back = dequantize(quantize(x, packing), 192, torch.float32, packing)
    assert torch.equal(back[:128], torch.zeros(128, device=device))
    assert torch.equal(back[128:], x[128:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_value_makes_its_block_nan_and_no_other(kind, bad, device):
    packing = Packing(kind=kind, block=64)
    x = normal(256, device)
    x[70] = bad
    packed = quantize(x, packing)
    assert packed[0, : 128 if kind != "int4" else 64][64 if kind != "int4" else 32 :].eq(0).all()
    assert dequantize(packed, 256, torch.bfloat16, packing).isnan().nonzero().flatten().tolist() == list(range(64, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_clipped_and_none_moves_by_more_than_half_a_step(kind, device):
    packing = Packing(kind=kind, block=128, scale_dtype=torch.bfloat16)
    x = normal(4096, device)
    error = (dequantize(quantize(x, packing), 4096, torch.float32, packing) - x).abs().view(-1, 128)
    largest = x.abs().view(-1, 128).amax(1, keepdim=True)
    step = largest / LARGEST_CODE[kind] * (32 if kind == "fp8" else 1) * (1 + 2.0**-7)
    assert (error <= step / 2).all()


def test_swizzle_puts_the_rows_of_a_local_device_together(device):
    """2 nodes of 4 devices: 0 4 1 5 2 6 3 7, ranks in the order their rows lie (ZeRO++, figure 5)."""
    order = sorted(range(8), key=lambda rank: swizzled_row(rank, 8, 4))
    assert order == [0, 4, 1, 5, 2, 6, 3, 7]
    packing = Packing(kind="int4", block=64)
    x = normal(8 * 640, device)
    plain = quantize(x, packing, partitions=8, seed=3)
    assert torch.equal(quantize(x, packing, partitions=8, devices_per_node=4, seed=3), plain[order])
    assert torch.equal(
        dequantize(plain[order], x.numel(), torch.float32, packing, devices_per_node=4),
        dequantize(plain, x.numel(), torch.float32, packing),
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_dither_equals_the_reference_and_repeats_with_its_seed(kind, device):
    packing = Packing(kind=kind, block=128)
    x = normal(30_001, device)
    packed = quantize(x, packing, partitions=3, seed=-5)
    assert torch.equal(packed, reference.quantize(x, packing, 3, 1, torch.tensor([-5], device=device)))
    assert torch.equal(packed, quantize(x, packing, partitions=3, seed=torch.tensor([-5], device=device)))
    assert not torch.equal(packed, quantize(x, packing, partitions=3, seed=6))


def test_philox_gives_the_published_numbers():
    """Known answers of Random123 for philox4x32-7, counter 0 and key 0: what the first eight elements draw."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    wanted = [half / 65536 - 0.5 + 2.0**-17 for word in words for half in (word & 0xFFFF, word >> 16)]
    assert reference.dither(torch.zeros(1, dtype=torch.int64), 1, 8, 0).flatten().tolist() == wanted


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_dither_is_unbiased_where_rounding_is_not(kind, device):
    packing = Packing(kind=kind, block=128)
    x = torch.full((1 << 16,), 3.3, device=device)
    x[::128] = LARGEST_CODE[kind]  # step 1: everything else is 3.3 steps
    small = torch.ones_like(x, dtype=torch.bool)
    small[::128] = False
    back = dequantize(quantize(x, packing, seed=11), x.numel(), torch.float32, packing)
    spread = (0.3 * 0.7 / (1 << 16)) ** 0.5
    assert set(back[small].unique().tolist()) == {3.0, 4.0}
    assert back[small].mean().item() == pytest.approx(3.3, abs=4 * spread)
    assert torch.equal(back[~small], x[~small])
    assert dequantize(quantize(x, packing), x.numel(), torch.float32, packing)[small].unique().tolist() == [3.0]


def test_dither_costs_about_sqrt_two_of_the_error(device):
    packing = Packing(kind="int4", block=512)
    x = normal(1 << 16, device)
    back = dequantize(quantize(x, packing, seed=1), x.numel(), torch.float32, packing)
    assert relative_error(back, x) == pytest.approx(0.191, rel=0.05)


def test_views_and_shapes_are_taken_flat(device):
    packing = Packing(block=64)
    x = normal(4096, device).view(64, 64)
    assert torch.equal(quantize(x.t(), packing), quantize(x.t().contiguous().view(-1), packing))
    packed = quantize(x, packing)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(packed).copy_(packed)
    assert same(
        dequantize(shifted, 4096, torch.float32, packing),
        dequantize(packed, 4096, torch.float32, packing),
    )
    empty = quantize(x[:0], packing, partitions=2)
    assert empty.shape == (2, 0)
    assert dequantize(empty, 0, torch.float32, packing).shape == (0,)


def test_refusals_name_value_and_remedy(device):
    x = normal(256, device)
    packing = Packing(block=64)
    packed = quantize(x, packing)
    for refused, words in (
        (lambda: Packing(block=100), "block=100"),
        (lambda: Packing(kind="int2"), "int2.*int8, int4, fp8"),
        (lambda: Packing(scale_dtype=torch.float16), "float16; use"),
        (lambda: quantize(x.double(), packing), "float64; use bfloat16"),
        (lambda: quantize(x, packing, partitions=6, devices_per_node=4), "partitions=6, devices_per_node=4"),
        (lambda: quantize(x, Packing(kind="fp8"), seed=1), "leave the seed out"),
        (lambda: quantize(x, packing, seed=torch.tensor([1.0])), "use one int64"),
        (lambda: dequantize(packed, 999, torch.float32, packing), r"need \[1, "),
        (lambda: dequantize(packed.float(), 256, torch.float32, packing), "uint8"),
        (lambda: dequantize(packed, 256, torch.int32, packing), "int32; use"),
        (lambda: dequantize_reduce(packed, 256, torch.float32, packing), r"pass \[sources, partitions"),
        (lambda: dequantize_reduce(packed[None], 256, torch.float32, packing, combine="max"), "'mean' or 'sum'"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


@pytest.mark.parametrize("seed", [None, 4])
def test_op_is_well_formed_and_compiles_whole(seed, device):
    packing = Packing(kind="int4", block=64)
    x = normal(1000, device)
    key = None if seed is None else torch.tensor([seed], device=device)
    arguments = (x, key, packing.kind, packing.block, packing.scale_dtype, 2, 1)
    torch.library.opcheck(torch.ops.shardplan.quantize.default, arguments)
    packed = quantize(x, packing, partitions=2, seed=seed)
    arguments = (packed[None], 1000, torch.bfloat16, packing.kind, packing.block, packing.scale_dtype, 1, 1.0)
    torch.library.opcheck(torch.ops.shardplan.dequantize.default, arguments)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        packed = quantize(x * 2, packing, partitions=2, seed=seed)
        return dequantize(packed, x.numel(), torch.float32, packing) / 2

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))


@pytest.mark.gpu
@needs_gpu
def test_graph_replays_with_another_seed():
    packing = Packing(kind="int4", block=512)
    x, seed = normal(1 << 20, "cuda"), torch.tensor([1], device="cuda")
    eager = [quantize(x, packing, seed=value) for value in (1, 2)]
    quantize(x, packing, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = quantize(x, packing, seed=seed)
        back = dequantize(packed, x.numel(), torch.float32, packing)
    for value, wanted in zip((1, 2), eager, strict=True):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(packed, wanted)
        assert torch.equal(back, dequantize(wanted, x.numel(), torch.float32, packing))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_more_elements_than_32_bits_count(kind):
    packing = Packing(kind=kind, block=2048)
    numel, tail = (1 << 31) + (1 << 20) + 5, (1 << 20) + 5
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    x[-tail:] = normal(tail, "cuda", torch.bfloat16)
    back = dequantize(quantize(x, packing), numel, torch.bfloat16, packing)
    alone = x[1 << 31 :]
    assert torch.equal(back[1 << 31 :], dequantize(quantize(alone, packing), tail, torch.bfloat16, packing))
    assert not back[: 1 << 31].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_finite_comes_back_finite_up_to_the_largest_number(kind, device):
    packing = Packing(kind=kind, block=64)
    largest = torch.finfo(torch.bfloat16).max
    x = torch.cat([torch.full((64,), size, device=device) for size in (1e37, -2e37, 1e38, -largest * 0.99)])
    back = dequantize(quantize(x, packing), 256, torch.float32, packing)
    assert torch.allclose(back, x, rtol=2.0**-7, atol=0)
