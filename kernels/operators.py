"""Registers functions as PyTorch operators, with less Python between caller and kernel than torch.library.custom_op.

custom_op checks after each call that no output is an input's memory; the tests' opcheck does that here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shardplan"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Any:
    """`shardplan::NAME` for a function `_NAME` of tensors and numbers that writes into nothing it is given.

    `fake` gives empty results for tracing; `differentiate` and `save` are those of torch.library.register_autograd, and
    without them a derivative raises RuntimeError.
    """
    name = function.__name__.removeprefix("_")
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{qualified} has no derivative; differentiate once")

    torch.library.register_autograd(qualified, differentiate or refuse, setup_context=save, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
