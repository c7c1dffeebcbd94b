"""Recomputation of parts of a layer (`selective:layernorm+act`): what the others wrote is kept, what these wrote is computed again.

Parts are those of `costmodel/recompute.py`. A layer runs under torch's selective checkpoint; every operation knows the module that it
runs in, and so its part. Rotary positions and residual adds are always run again, which costs next to nothing; the last product of a
layer never is, as nothing behind it is needed. In place of the residual stream before the MLP the output of the projection is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from shardplan.costmodel.recompute import PART_BITS

ZONES = {
    "attention_norm": ("layernorm",),
    "ffn_norm": ("layernorm",),
    "attention": ("core_attn",),
    "attention.wq": ("qkv",),
    "attention.wk": ("qkv",),
    "attention.wv": ("qkv",),
    "attention.wo": ("proj",),
    "ffn": ("act", "mlp"),
    "ffn.w1": ("mlp",),
    "ffn.w3": ("mlp",),
}
"""Module of a layer -> parts that run it again. Submodules apart, `attention` is rotary positions and the core, `ffn` the activation."""
UNFUSED = ("aten::bmm", "aten::_safe_softmax", "aten::_softmax")
"""What the core consists of where no fused kernel runs it."""
DISPATCHED = "_c10d_functional::all_to_all_single"
"""Brings tokens to experts and back: named parts stand for work, not for that."""
WRITTEN_OVER = ("aten::mean.dim", "aten::add_.Scalar")
"""Steps of RMSNorm on a CPU, which adds epsilon in place: what is kept must not change. On a GPU it is one kernel."""


def parts_context(layer: nn.Module, bits: int) -> Callable[[], Any]:
    """`context_fn` of a checkpoint around `layer` that runs the parts in `bits` again; marks the layer's modules for it."""
    chosen = {part for part, bit in PART_BITS.items() if bits & bit}
    running: list[str] = []
    for name, module in layer.named_modules():
        if name in ZONES or name == "ffn.w2":
            module.forward = _told(module.forward, name, running)
    kept = {name for name, parts in ZONES.items() if not chosen.intersection(parts)}

    def policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if _keeps(kept, running, operator) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def _keeps(kept: Collection[str], running: list[str], operator: Any) -> bool:
    """Whether what `operator` writes is kept, in the innermost of the modules that run. Views are not: that of a product's input would
    keep what the part before wrote. Tokens from other ranks are kept whatever part they are of."""
    if operator.name() == DISPATCHED:
        return True
    if not running or running[-1] not in kept or operator.name() in WRITTEN_OVER:
        return False
    if any(written.alias_info is not None for written in operator._schema.returns):
        return False
    return running[-1] != "attention" or "attention" in operator.name() or operator.name() in UNFUSED


def _told(forward: Callable[..., Any], name: str, running: list[str]) -> Callable[..., Any]:
    """`forward` that tells in `running` that it runs; also when the recomputation is stopped inside."""

    def run(*inputs: Any, **words: Any) -> Any:
        running.append(name)
        try:
            return forward(*inputs, **words)
        finally:
            running.pop()

    return run
