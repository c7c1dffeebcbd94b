"""Tensor parallelism as in Megatron-LM (arXiv 1909.08053), with sequence parallelism (arXiv 2205.05198) as an option.

Column-parallel into a block, row-parallel out of it. The residual stream is a plain tensor everywhere: whole on every
rank, or (B, S/tp, H) under sequence parallelism. Embedding and head are split over the vocabulary; logits leave as the
rank's own slice (B, S, V/tp), which `loss.py` takes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shardplan.executor.experts import MixtureOfExperts
from shardplan.executor.transformer import Block, Transformer


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Split the parameters of `model` over the one-axis `mesh`, in place."""
    stream: Placement = Shard(1) if sequence_parallel else Replicate()
    parallelize_module(model, mesh, _ends(model, stream))
    if sequence_parallel and model.embedding is not None and model.embedding.positions is not None:
        _split_positions(model.embedding.positions, mesh)
    for layer in model.layers.values():
        assert isinstance(layer, Block)
        parallelize_module(layer, mesh, _block(layer, stream))
    model.tie()


def _ends(model: Transformer, stream: Placement) -> dict[str, ParallelStyle]:
    styles: dict[str, ParallelStyle] = {}
    if model.embedding is not None:
        styles["embedding.tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    if model.head is not None:
        if stream.is_shard():
            styles["norm"] = SequenceParallel(use_local_output=True)
        styles["head"] = ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1))
    return styles


def _split_positions(positions: nn.Module, mesh: DeviceMesh) -> None:
    """Learned positions, whole on every rank, are looked up for the rank's part of the sequence only: (S) -> (S/tp, H)."""

    def split(_module: nn.Module, inputs: tuple[Tensor, ...], on: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], on, [Replicate()], run_check=False).redistribute(placements=[Shard(-1)])

    def local(_module: nn.Module, looked_up: DTensor, _on: DeviceMesh) -> Any:
        return looked_up.to_local()

    distribute_module(positions, mesh, input_fn=split, output_fn=local)


def _block(layer: Block, stream: Placement) -> dict[str, ParallelStyle]:
    styles: dict[str, ParallelStyle] = {
        # gathered once here, not once per projection
        "attention": PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)),
        "ffn": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
    }
    if stream.is_shard():
        styles["attention_norm"] = SequenceParallel(use_local_output=True)
        styles["ffn_norm"] = SequenceParallel(use_local_output=True)
    for name in ("attention.wq", "attention.wk", "attention.wv", "ffn.w1", "ffn.w3"):
        styles[name] = ColwiseParallel()
    for name in ("attention.wo", "ffn.w2"):
        styles[name] = RowwiseParallel(output_layouts=stream)
    known = {name for name, _ in layer.named_modules()}
    if isinstance(layer.ffn, MixtureOfExperts):  # expert_parallel.py spreads it
        known.remove("ffn")
    return {name: style for name, style in styles.items() if name in known}
