"""`torch.compile` of each layer, where the runtime of the plan has the switch `compile` (`shardplan+compile`).

Layers alone, as torchtitan does: they are alike, so one compilation serves all, and what `fully_shard` hangs around them stays outside.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardplan.executor.transformer import Transformer

SWITCH = "compile"
BACKEND = "inductor"


def is_compiled(runtime: str) -> bool:
    """Whether the plan's runtime, a name with switches after plus signs, compiles layers."""
    return SWITCH in runtime.split("+")[1:]


def compiler_here() -> str | None:
    """The C++ compiler with which inductor builds kernels of a CPU, None where there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def apply_compile(model: Transformer, *, backend: str, whole: bool = True) -> None:
    """Compile each layer of `model`, in place and without another name for any parameter; `whole`: as one graph, else around what cannot
    be in one (attention over a sequence that ranks share)."""
    import torch

    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=whole)
    if model.embedding is not None:
        # Under tensor parallelism what leaves is a tensor that a collective is still filling, a class of its own which a graph
        # takes as input but gives a plain gradient (torch 2.11 to 2.13: AttributeError in the backward); a copy is a plain one.
        model.embedding.register_forward_hook(lambda _module, _inputs, out: out.clone())
