"""Context parallelism: ranks share each sequence. Everything but attention runs on a rank's own positions and needs no change.

| cp_kind    | positions of rank r              | attention                                                    |
|------------|----------------------------------|--------------------------------------------------------------|
| ring       | chunks r and 2·cp-1-r of 2·cp    | keys and values go around (`ring_attention.py`)              |
| all_gather | the same                         | keys and values are gathered (`gathered_attention.py`)       |
| ulysses    | chunk r of cp                    | all-to-alls trade positions for heads (arXiv 2309.14509), where any attention runs |

Gradients are summed with those of data-parallel ranks: the mesh of states has cp inside dp (`mesh.py`), so ZeRO shards over both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from shardplan.costmodel.attention_time import takes_own_kernel
from shardplan.costmodel.layout import Layout
from shardplan.executor.attention_kernel import triton_is_installed
from shardplan.executor.context_exchange import heads_to_sequence, sequence_to_heads
from shardplan.executor.gathered_attention import gathered_attention
from shardplan.executor.mesh import MESH_AXES, mesh_ranks
from shardplan.executor.ring_attention import Blocks, ring_attention
from shardplan.executor.transformer import Attend, Attention, Transformer


@dataclass(frozen=True, kw_only=True)
class Context:
    """This rank's share of every sequence."""

    kind: str = "ring"
    group: dist.ProcessGroup | None = None
    """The ranks that share one; None: this one has it whole."""
    positions: Tensor | None = None
    """Those it holds, in the order it holds them; None: all."""

    def own(self, x_BS: Tensor) -> Tensor:
        """The columns of this rank."""
        return x_BS if self.positions is None else x_BS[:, self.positions.to(x_BS.device)]


def join_context(layout: Layout, seq: int) -> Context:
    """The group of this rank and its positions; every rank of the job calls it."""
    if layout.cp == 1:
        return Context()
    groups = mesh_ranks(layout).movedim(MESH_AXES.index("cp"), -1).reshape(-1, layout.cp).tolist()
    group, _ = dist.new_subgroups_by_enumeration(groups)
    assert isinstance(group, dist.ProcessGroup)  # the groups hold every rank
    held = held_positions(layout.cp_kind, seq, ranks=layout.cp, rank=dist.get_rank(group))
    return Context(kind=layout.cp_kind, group=group, positions=held)


def held_positions(kind: str, seq: int, *, ranks: int, rank: int) -> Tensor:
    """Positions of the sequence that `rank` of `ranks` holds, (seq / ranks,)."""
    positions = torch.arange(seq)
    if kind == "ulysses":
        return positions.chunk(ranks)[rank]
    chunks = positions.chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def spread_context(model: Transformer, context: Context, blocks: Blocks, *, compiled: bool = False) -> None:
    """Let `model` (whole, or one pipeline chunk) run on this rank's positions, in place. Its attention must be chosen before; where
    layers are `compiled`, it stands between their graphs."""
    if context.positions is None or context.group is None:
        return
    if model.table is not None:
        model.table = model.table[context.positions.to(model.table.device)]
    if model.embedding is not None:
        model.embedding.places = context.positions.to(model.embedding.tokens.weight.device)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    spread: dict[Attend, Attend] = {}  # one function for all layers, as compiled code asks which it is
    for attend in dict.fromkeys(layer.attend for layer in layers):
        over = _spread(attend, context.kind, context.group, blocks)
        spread[attend] = (
            cast("Attend", torch.compiler.disable(over)) if compiled else over
        )  # ranks exchange within: no part of a graph
    for layer in layers:
        layer.attend = spread[layer.attend]


def _spread(attend: Attend, kind: str, group: dist.ProcessGroup, blocks: Blocks) -> Attend:
    if kind == "ulysses":
        return partial(ulysses_attention, attend=attend, group=group)
    return partial(ring_attention if kind == "ring" else gathered_attention, blocks=blocks, group=group)


def ulysses_attention(
    q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, *, attend: Attend, group: dist.ProcessGroup
) -> Tensor:
    """(B, S/cp, N, D) by `attend` on whole sequences of N/cp heads; fewer key-value heads than ranks are copied."""
    ranks = dist.get_world_size(group)
    copies = max(ranks // k_BSKD.shape[2], 1)
    if copies > 1:
        k_BSKD, v_BSKD = (x.repeat_interleave(copies, dim=2) for x in (k_BSKD, v_BSKD))
    whole = [sequence_to_heads(x, group) for x in (q_BSND, k_BSKD, v_BSKD)]
    return heads_to_sequence(attend(*whole), group)


def choose_blocks(device: torch.device, *, word: str, precision: str, head_dim: int) -> Blocks:
    """What computes one block: this project's kernels on NVIDIA's GPUs in 16 bits (or as the layout's `word` says), else plain torch."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if word == "triton" or (nvidia and takes_own_kernel(precision, head_dim) and triton_is_installed()):
        from shardplan.kernels import attention_block  # needs triton

        return Blocks(attention_block.block_attention, attention_block.block_gradients)
    from shardplan.kernels import attention_block_reference

    return Blocks(attention_block_reference.block_attention, attention_block_reference.block_gradients)
