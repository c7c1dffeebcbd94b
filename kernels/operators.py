"""Registers functions as PyTorch operators, with less Python between caller and kernel than torch.library.custom_op.

custom_op checks after each call that no output is an input's memory; the tests' opcheck does that here, once. And where
nothing is traced, derivatives come from a plain autograd.Function: what register_autograd puts around a call reads the
operator's schema each time, with sixteen arguments four times what the Function costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "shardplan"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Any:
    """`shardplan::NAME` for a function `_NAME` of tensors and numbers that writes into nothing it is given, called by place.

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
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    return registered if differentiate is None or save is None else _quick(registered, differentiate, save)


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _quick(registered: Callable[..., Any], differentiate: Callable[..., Any], save: Callable[..., None]) -> Any:
    """`registered`, by an autograd.Function where it is called from Python and nothing traces it."""

    class Called(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = registered(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*inputs)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):  # pyright: ignore[reportPrivateUsage]
            raise RuntimeError(f"{registered} has no derivative in forward mode (torch.func.jvp): it would be 0")
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
            return registered(*inputs)
        return Called.apply(*inputs)

    return call
