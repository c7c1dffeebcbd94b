"""The fused middle step of qgZ, and qgZ whole: its stages over lists of tensors, against one hop and against a ring."""

from __future__ import annotations

import pytest
import torch

from shardplan.kernels import dequantize as dequantizing
from shardplan.kernels import quantize as quantizing
from shardplan.kernels import quantize_reduce as reducing
from shardplan.kernels import quantize_reference as reference
from shardplan.kernels.dequantize import dequantize, dequantize_reduce
from shardplan.kernels.packing import Packing, part_numel
from shardplan.kernels.quantize import quantize
from shardplan.kernels.quantize_reduce import dequantize_reduce_quantize

KINDS = ("int8", "int4", "fp8")
ON_GPU = torch.cuda.is_available()


def gradients(ranks: int, numel: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator).to(device) for _ in range(ranks)]


def one_shot(tensors: list[torch.Tensor], packing: Packing) -> torch.Tensor:
    """One all-to-all over all ranks: rank r sums part r of every rank. The shards of all ranks, joined."""
    ranks, numel = len(tensors), tensors[0].numel()
    sent = torch.stack([quantize(x, packing, partitions=ranks) for x in tensors])
    part = part_numel(numel, ranks)
    return torch.cat(
        [dequantize_reduce(sent[:, rank : rank + 1], part, torch.float32, packing) for rank in range(ranks)]
    )


def hierarchical(tensors: list[torch.Tensor], packing: Packing, devices: int) -> torch.Tensor:
    """qgZ (ZeRO++, section 3.3): an all-to-all in each node, the fused step, an all-to-all between nodes, the mean."""
    ranks, part = len(tensors), part_numel(tensors[0].numel(), len(tensors))
    nodes = ranks // devices
    sent = [quantize(x, packing, partitions=ranks, devices_per_node=devices) for x in tensors]
    middle = []
    for rank in range(ranks):
        node, local = divmod(rank, devices)
        peers = [sent[node * devices + peer].view(devices, nodes, -1)[local] for peer in range(devices)]
        middle.append(dequantize_reduce_quantize(torch.stack(peers), part, packing))
    shards = []
    for rank in range(ranks):
        node, local = divmod(rank, devices)
        peers = torch.stack([middle[peer * devices + local][node : node + 1] for peer in range(nodes)])
        shards.append(dequantize_reduce(peers, part, torch.float32, packing))
    return torch.cat(shards)


def ring(tensors: list[torch.Tensor], packing: Packing) -> torch.Tensor:
    """A ring reduce-scatter that quantises the running sum before each of its ranks - 1 hops."""
    total = tensors[0]
    for x in tensors[1:]:
        total = dequantize(quantize(total, packing), total.numel(), torch.float32, packing) + x
    return total / len(tensors)


def test_errors_grow_with_the_number_of_quantisations(device, monkeypatch):
    """16 ranks, 2 nodes of 8, int4 in blocks of 512: .135, .192, .385 of the mean, from a simulation in torch alone."""
    if not ON_GPU:  # 700 programs in the interpreter take half a minute; the reference gives the same bytes (below)
        for module in (quantizing, dequantizing, reducing):
            monkeypatch.setattr(module, "takes_kernel", lambda _: False)
    packing = Packing(kind="int4", block=512)
    tensors = gradients(16, 16 * (1 << 14), device)
    mean = torch.stack(tensors).double().mean(0)

    def error(found: torch.Tensor) -> float:
        return float((found.double() - mean).norm() / mean.norm())

    errors = [
        error(one_shot(tensors, packing)),
        error(hierarchical(tensors, packing, 8)),
        error(ring(tensors, packing)),
    ]
    assert errors == pytest.approx([0.135, 0.192, 0.385], rel=0.1)
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(("ranks", "devices"), [(4, 2), (6, 3), (4, 1), (4, 4)])
def test_hierarchical_reduces_every_part_to_its_rank(ranks, devices, device):
    """Coarse levels that int8 holds exactly, every rank another: the mean comes out exact, part for part."""
    packing = Packing(kind="int8", block=64)
    base = torch.arange(ranks * 192, device=device).remainder(17).float() - 8
    base[::64] = 127.0
    tensors = [base * 2.0**rank for rank in range(ranks)]
    found = hierarchical(tensors, packing, devices)
    assert torch.allclose(found, torch.stack(tensors).mean(0), rtol=0, atol=127 * 2.0**ranks / ranks / 200)


@pytest.mark.parametrize("sources", [1, 3, 8, 12, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_step_equals_the_reference_bit_for_bit(kind, sources, device):
    packing = Packing(kind=kind, block=128, scale_dtype=torch.bfloat16 if sources == 3 else torch.float32)
    part = 300_003 if ON_GPU else 9_003
    tensors = gradients(sources, 2 * part, device)
    tensors[0][:256] = 0.0
    tensors[-1][700] = float("nan")
    packed = torch.stack([quantize(x, packing, partitions=2) for x in tensors])
    for combine, factor in (("mean", 1 / sources), ("sum", 1.0)):
        found = dequantize_reduce_quantize(packed, part, packing, combine=combine)
        assert torch.equal(found, reference.dequantize_reduce_quantize(packed, part, packing, factor, None))
        back = dequantize_reduce(packed, 2 * part, torch.bfloat16, packing, combine=combine)
        wanted = reference.dequantize(packed, 2 * part, torch.bfloat16, packing, 1, factor)
        assert torch.equal(back.isnan(), wanted.isnan())
        assert torch.equal(back.nan_to_num(), wanted.nan_to_num())
        bad = dequantize(found, 2 * part, torch.float32, packing).isnan().nonzero().flatten()
        assert bad.tolist() == list(range(640, 768))


@pytest.mark.parametrize("sources", [2, 5, 7, 9, 16, 36])
def test_sums_of_int4_are_exact_but_for_the_scales_last_bits(sources, device):
    """Scales are rounded to 16 bits of the largest: half of the last one, times a code of at most 7, for each source."""
    packing = Packing(kind="int4", block=64)
    tensors = [x * 2.0 ** (3 * rank % 11) for rank, x in enumerate(gradients(sources, 1000, device))]
    packed = torch.stack([quantize(x, packing) for x in tensors])
    codes, scales = reference.decode(packed, packing.blocks(1000), packing)
    exact = (codes.double() * scales.double()).sum(0)
    found = dequantize_reduce(packed, 1000, torch.float32, packing, combine="sum")
    largest = scales.double().amax(0).expand_as(exact)
    step = (7.0 * (sources - 1) * 2.0**-16 * largest).reshape(-1)[:1000]
    assert ((found.double() - exact.reshape(-1)[:1000]).abs() <= step).all()
    assert not found.isnan().any()


def test_a_block_that_is_zero_in_every_source_stays_zero(device):
    packing = Packing(kind="int4", block=64)
    tensors = [torch.cat([torch.zeros(64, device=device), x]) for x in gradients(8, 64, device)]
    packed = torch.stack([quantize(x, packing) for x in tensors])
    assert torch.equal(dequantize_reduce(packed, 128, torch.float32, packing)[:64], torch.zeros(64, device=device))
    again = dequantize_reduce_quantize(packed, 128, packing)
    assert torch.equal(dequantize(again, 128, torch.float32, packing)[:64], torch.zeros(64, device=device))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_fused_step_dithers_like_the_reference_but_not_like_the_first_step(kind, device):
    packing = Packing(kind=kind, block=128)
    tensors = gradients(2, 9_000, device)
    packed = torch.stack([quantize(x, packing, seed=1) for x in tensors])
    found = dequantize_reduce_quantize(packed, 9_000, packing, seed=1)
    key = torch.tensor([1], device=device)
    assert torch.equal(found, reference.dequantize_reduce_quantize(packed, 9_000, packing, 0.5, key))
    assert not torch.equal(found, reference.encode(reference.reduce_sources(packed, 71, packing, 0.5), packing, key, 0))


def test_fused_step_equals_dequantise_then_quantise(device):
    packing = Packing(kind="int8", block=256)
    packed = torch.stack([quantize(x, packing) for x in gradients(4, 10_000, device)])
    mean = dequantize_reduce(packed, 10_000, torch.float32, packing)
    assert torch.equal(dequantize_reduce_quantize(packed, 10_000, packing), quantize(mean, packing))


def test_op_is_well_formed_and_compiles_whole(device):
    packing = Packing(kind="int4", block=64)
    packed = torch.stack([quantize(x, packing) for x in gradients(2, 1000, device)])
    arguments = (packed, None, 1000, packing.kind, packing.block, packing.scale_dtype, 0.5)
    torch.library.opcheck(torch.ops.shardplan.dequantize_reduce_quantize.default, arguments)

    def step(packed: torch.Tensor) -> torch.Tensor:
        return dequantize(dequantize_reduce_quantize(packed, 1000, packing), 1000, torch.float32, packing)

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(packed), step(packed))


def test_refusals_name_value_and_remedy(device):
    packing = Packing(block=64)
    packed = quantize(gradients(1, 256, device)[0], packing)
    for refused, words in (
        (lambda: dequantize_reduce_quantize(packed, 256, packing), r"pass \[sources, rows, row_bytes\]"),
        (lambda: dequantize_reduce_quantize(packed[None], 300, packing), "numel, partitions and packing"),
        (lambda: dequantize_reduce_quantize(packed[None], 256, packing, combine="max"), "'mean' or 'sum'"),
        (lambda: dequantize_reduce_quantize(packed[None], 256, Packing(kind="fp8", block=64), seed=1), "seed out"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
