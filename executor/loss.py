"""Next-token cross-entropy, also over logits that are split over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional

LossFunction = Callable[[Tensor, Tensor], Tensor]


def mean_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy (nats per token) in fp32, a scalar."""
    return functional.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(0, 1))


def loss_function(tp_mesh: DeviceMesh) -> LossFunction:
    """`mean_loss` for whole logits, or for the rank's slice (B, S, V/tp) when `tp_mesh` has more than one rank."""
    if tp_mesh.size() == 1:
        return mean_loss

    def split_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        whole = DTensor.from_local(logits_BSV, tp_mesh, [Shard(-1)], run_check=False)
        loss = mean_loss(whole, targets_BS)
        assert isinstance(loss, DTensor)
        return loss.to_local().clone()  # no view: a schedule that splits the backward detaches the loss in place

    return split_loss


def loss_context(tp_mesh: DeviceMesh) -> AbstractContextManager[object]:
    """Must surround forward and backward of a step: keeps split logits split inside the cross-entropy."""
    return loss_parallel() if tp_mesh.size() > 1 else nullcontext()
