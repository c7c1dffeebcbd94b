"""Attention over a spread sequence equals whole attention, gradients too, and sends the bytes the cost model says.

The file is also the script of a rank: one launch of four walks through all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.axis_order import ORDERS
from shardplan.costmodel.collectives import wire_factor
from shardplan.costmodel.context_parallel import exchanges, kept_bytes
from shardplan.costmodel.layout import CP_KINDS, parse_layout
from shardplan.costmodel.rank_groups import rank_coordinates

torch = pytest.importorskip("torch", reason="the executor needs torch")

from shardplan.executor.context_parallel import held_positions  # noqa: E402
from shardplan.executor.gathered_attention import by_rank, in_order  # noqa: E402
from shardplan.executor.mesh import STATE_AXES, data_coordinate, state_ranks  # noqa: E402
from shardplan.executor.ring_attention import Blocks, merge, part_in_sight  # noqa: E402
from shardplan.kernels import attention_block_reference  # noqa: E402
from shardplan.kernels.attention_block_reference import block_attention, block_gradients  # noqa: E402

RANKS = 4
BATCH, WIDTH = 2, 8
# (positions of the whole sequence, query heads, key/value heads)
SHAPES = [(32, 4, 4), (48, 8, 2), (24, 4, 1), (8, 4, 4)]


def draw(seq: int, heads: int, kv_heads: int, dtype=torch.float64):
    """q, k, v and the gradient of the output, over the whole sequence; the same on every rank."""
    numbers = torch.Generator().manual_seed(seq)
    sizes = [(BATCH, seq, count, WIDTH) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(size, generator=numbers, dtype=torch.float64).to(dtype) for size in sizes]


def whole_attention(q, k, v, grad):
    """Output and gradients of q, k and v in fp64, by torch."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def error(found, right) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


# --- blocks and their order, one process --------------------------------------------------------------------------


@pytest.mark.parametrize(("seq", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("tile", [256, 5])
def test_blocks_are_attention_and_its_gradients(monkeypatch, seq, heads, kv_heads, tile):
    monkeypatch.setattr(attention_block_reference, "QUERY_TILE", tile)
    q, k, v, grad = draw(seq, heads, kv_heads)
    right = whole_attention(q, k, v, grad)
    out, lse = block_attention(q, k, v, causal=True)
    found = [out, *block_gradients(grad, q, k, v, out, lse, causal=True)]
    assert max(error(*pair) for pair in zip(found, right, strict=True)) < 1e-12
    # the last queries alone see the same keys
    late, late_lse = block_attention(q[:, seq // 4 :], k, v, causal=True)
    assert error(late, right[0][:, seq // 4 :]) < 1e-12
    assert torch.allclose(late_lse, lse[:, :, seq // 4 :])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_blocks_of_a_ring_merge_into_whole_attention(ranks):
    """What each rank computes step by step, without sending: outputs and all gradients add up to those of the whole."""
    q, k, v, grad = draw(24, 4, 2)
    right = whole_attention(q, k, v, grad)
    found = [torch.zeros_like(x) for x in right]
    held = [held_positions("ring", 24, ranks=ranks, rank=rank) for rank in range(ranks)]
    for rank, own in enumerate(held):
        parts = [(*part_in_sight(rank, source, len(own)), held[source]) for source in range(ranks)]
        parts = [parts[rank], *parts[:rank], *parts[rank + 1 :]]
        out, lse = block_attention(q[:, own], k[:, own], v[:, own], causal=True)
        for queries, keys, _, theirs in parts[1:]:
            seen = theirs[keys]
            merge(
                out[:, queries],
                lse[:, :, queries],
                *block_attention(q[:, own[queries]], k[:, seen], v[:, seen], causal=False),
            )
        found[0][:, own] = out
        for queries, keys, causal, theirs in parts:
            asking, seen = own[queries], theirs[keys]
            dq, dk, dv = block_gradients(
                grad[:, asking],
                q[:, asking],
                k[:, seen],
                v[:, seen],
                out[:, queries],
                lse[:, :, queries],
                causal=causal,
            )
            for whole, at, part in zip(found[1:], (asking, seen, seen), (dq, dk, dv), strict=True):
                whole[:, at] += part
    assert max(error(*pair) for pair in zip(found, right, strict=True)) < 1e-12


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_of_a_ring_share_the_causal_work_evenly(ranks):
    """Every pair of a query and a key before it is computed once; each step takes all ranks the same work."""
    seq = 4 * ranks
    held = [held_positions("ring", seq, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(seq))
    pairs = torch.zeros(seq, seq, dtype=torch.long)
    for step in range(ranks):
        work = set()
        for rank, own in enumerate(held):
            source = (rank - step) % ranks
            queries, keys, causal = part_in_sight(rank, source, len(own))
            asking, seen = own[queries], held[source][keys]
            taken = torch.ones(len(asking), len(seen), dtype=torch.long)
            pairs[asking[:, None], seen] += taken.tril() if causal else taken
            work.add(taken.numel())
        assert len(work) == 1
    assert torch.equal(pairs, torch.ones(seq, seq, dtype=torch.long).tril())


def test_gathered_chunks_return_to_the_order_of_the_sequence():
    seq, ranks = 24, 3
    whole = torch.arange(seq).expand(2, 1, seq).reshape(2, 1, seq, 1, 1)
    held = torch.stack(
        [whole[:, :, held_positions("all_gather", seq, ranks=ranks, rank=rank)] for rank in range(ranks)]
    )
    assert torch.equal(in_order(held), whole)
    assert torch.equal(by_rank(whole, ranks), held)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("words", ["dp=4 dp_shard=2 cp=2 tp=2 zero=3", "dp=2 cp=2 pp=2 zero=0", "dp=2 cp=4 zero=1"])
def test_states_are_shared_by_ranks_of_dp_and_cp_in_ascending_order(words, order):
    """Members of a process group ascend by rank: a mesh in another order would give ranks each other's shards."""
    layout = parse_layout(f"{words} order={order}")
    ranks = state_ranks(layout).numpy()
    at = rank_coordinates(layout)
    for axis in range(len(STATE_AXES)):
        assert (np.diff(ranks, axis=axis) > 0).all()
        others = [name for name in ("pp", "tp") if name != STATE_AXES[axis]]
        groups = np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis])
        assert all(len(set(at[name][group])) == 1 for name in others for group in groups)
    shards = ranks.reshape(-1, *ranks.shape[2:])  # a row is a shard group
    expected = layout.shard_ranks * layout.cp if layout.zero else 1
    assert shards.shape[1] == expected
    assert [data_coordinate(layout, rank) for rank in range(layout.gpus)] == at["dp"].tolist()


# --- four ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> dict[str, dict[str, float]]:
    """Case -> largest errors over the ranks, bytes that each sent."""
    result = tmp_path_factory.mktemp("context") / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*torchrun, __file__, str(result)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


def case_key(kind: str, dtype: str, shape: tuple[int, int, int]) -> str:
    return f"{kind} {dtype} {shape}"


@pytest.mark.distributed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CP_KINDS)
def test_spread_attention_is_whole_attention(four_ranks, kind, shape):
    found = four_ranks[case_key(kind, "float64", shape)]
    assert max(found["errors"]) < 1e-12
    rounded = four_ranks[case_key(kind, "bfloat16", shape)]
    assert max(rounded["errors"]) < 2**-7


@pytest.mark.distributed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CP_KINDS)
def test_bytes_sent_are_those_of_the_cost_model(four_ranks, kind, shape):
    """Payload that leaves a rank, forward and backward, of one attention in 16 bits."""
    seq, heads, kv_heads = shape
    token_bytes = 2 * BATCH * seq / RANKS * WIDTH
    copied = max(kv_heads, RANKS) if kind == "ulysses" else kv_heads
    both = exchanges(
        kind, np.array([float(RANKS)]), np.array([token_bytes * heads]), np.array([token_bytes * 2 * copied])
    )
    expected = [
        sum(
            float(np.sum(one.times * one.size_bytes))
            * (1.0 if one.operation == "pass" else float(wire_factor(one.operation, RANKS)))
            for one in phase
        )
        for phase in both
    ]
    assert four_ranks[case_key(kind, "bfloat16", shape)]["bytes"] == [expected] * RANKS


@pytest.mark.distributed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CP_KINDS)
def test_what_is_kept_for_the_backward_is_what_the_cost_model_counts(four_ranks, kind, shape):
    """Queries, keys, values, output and log-sum-exp of one attention in 16 bits and of the product that takes its output."""
    seq, heads, kv_heads = shape
    tokens = BATCH * seq / RANKS
    queries, own = 2 * tokens * WIDTH * heads, 2 * tokens * WIDTH * 2 * kv_heads
    copied = own * max(kv_heads, RANKS) / kv_heads if kind == "ulysses" else own
    code = np.array([CP_KINDS.index(kind)])
    more = kept_bytes(code, np.array([float(RANKS)]), *(np.array([x]) for x in (queries, own, copied)))
    assert (
        four_ranks[case_key(kind, "bfloat16", shape)]["kept"]
        == [2 * queries + own + 4 * tokens * heads + more[0]] * RANKS
    )


# --- what a rank does ---------------------------------------------------------------------------------------------


class Sent:
    """Counts the bytes that leave this rank, in place of torch's functions."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.bytes = 0.0
        others = (RANKS - 1) / RANKS
        for name, counted in (
            ("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
            ("all_to_all_single", lambda _out, given: given.nbytes * others),
            ("all_gather_into_tensor", lambda out, _given: out.nbytes * others),
            ("reduce_scatter_tensor", lambda _out, given: given.nbytes * others),
        ):
            setattr(dist, name, partial(self.count, getattr(dist, name), counted))

    def count(self, function, counted, *tensors, **options):
        self.bytes += counted(*tensors)
        return function(*tensors, **options)

    def so_far(self) -> float:
        """Since the last call."""
        found, self.bytes = self.bytes, 0.0
        return found


def rounding_blocks(dtype) -> Blocks:
    """Blocks that give 16 bits back, as the kernels do."""

    def attention(*tensors, causal: bool):
        out, lse = block_attention(*tensors, causal=causal)
        return out.to(dtype), lse

    def gradients(*tensors, causal: bool):
        return tuple(x.to(dtype) for x in block_gradients(*tensors, causal=causal))

    return Blocks(attention, gradients)


@contextmanager
def kept_storages():
    """Address -> bytes of what autograd keeps meanwhile."""
    kept: dict[int, int] = {}

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        yield kept


def spread_case(kind: str, dtype, shape: tuple[int, int, int], sent: Sent) -> dict[str, list[float]]:
    import torch.distributed as dist
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from shardplan.executor.context_parallel import _spread
    from shardplan.executor.transformer import causal_attention

    drawn = draw(*shape, dtype=dtype)
    own = held_positions(kind, shape[0], ranks=RANKS, rank=dist.get_rank())
    q, k, v, grad = (x[:, own].contiguous() for x in drawn)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend = _spread(causal_attention, kind, dist.group.WORLD, rounding_blocks(dtype))
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    with (
        sdpa_kernel(SDPBackend.MATH if dtype == torch.float64 else SDPBackend.FLASH_ATTENTION),
        kept_storages() as kept,
    ):
        out = attend(*leaves)
        _ = out * scale  # keeps the output, as a projection does
    sent_bytes = [sent.so_far()]
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    sent_bytes.append(sent.so_far())
    right = [x[:, own] for x in whole_attention(*drawn)]
    assert all(x.dtype == dtype for x in found)
    return {
        "errors": [error(*pair) for pair in zip(found, right, strict=True)],
        "bytes": sent_bytes,
        "kept": sum(kept.values()) - scale.nbytes,
    }


def rank_main(result: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sent, answers = Sent(), {}
    for kind in CP_KINDS:
        for dtype in ("float64", "bfloat16"):
            for shape in SHAPES:
                every: list[dict] = [{}] * RANKS
                dist.all_gather_object(every, spread_case(kind, getattr(torch, dtype), shape, sent))
                answers[case_key(kind, dtype, shape)] = {
                    "errors": [value for one in every for value in one["errors"]],
                    "bytes": [one["bytes"] for one in every],
                    "kept": [one["kept"] for one in every],
                }
    if dist.get_rank() == 0:
        result.write_text(json.dumps(answers))
    dist.destroy_process_group()
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
