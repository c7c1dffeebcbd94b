"""Activation recomputation: forget what a layer computed in the forward pass, compute it again in the backward pass.

- full: keep only the layer's input (Chen et al. 2016, arXiv 1604.06174).
- selective: keep the outputs of matrix products and tokens from other ranks, recompute the rest (norms, rotary, attention, activation).
- selective:PART+PART: recompute those parts, keep the rest (`recompute_parts`).
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from shardplan.costmodel.recompute import ALL_LAYERS, split_recompute
from shardplan.executor.recompute_parts import parts_context
from shardplan.executor.transformer import Transformer

MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops._c10d_functional.all_to_all_single.default,  # tokens that came to experts: not fetched again
)
WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_surrounded.")
"""What this wrapper and that of layers with experts add to parameter names; `parameter_name` takes them out."""


def _keep_matrix_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(model: Transformer, word: str, stage: int = 0, *, before: int = 0) -> None:
    """Wrap the layers of this chunk as `word` (none, selective, selective:PART+PART, full, full:N = the first N layers of a rank,
    full:N0,N1,… = the first N of each `stage`) says; `before` layers are in the rank's chunks before this one."""
    kind, count, parts, by_stage = split_recompute(word)
    if kind == "none":
        return
    if by_stage is not None:
        count = by_stage[stage]
    options: dict[str, Any] = {"checkpoint_impl": CheckpointImpl.NO_REENTRANT, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
    chosen = (
        list(model.layers.items())
        if count == ALL_LAYERS
        else list(islice(model.layers.items(), max(count - before, 0)))
    )
    for name, layer in chosen:
        if parts:
            options["context_fn"] = parts_context(layer, parts)
        model.layers[name] = checkpoint_wrapper(layer, **options)


def parameter_name(name: str) -> str:
    """The name in the plain model."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
