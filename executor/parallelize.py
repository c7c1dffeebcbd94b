"""The recipe: how a plain model becomes what the layout says. Each step says why it stands where it does."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.executor.recompute import apply_recompute
from shardplan.executor.tensor_parallel import apply_tensor_parallel
from shardplan.executor.transformer import Transformer
from shardplan.executor.zero import apply_zero


def parallelize(
    model: Transformer, layout: Layout, job: Job, mesh: DeviceMesh, *, layers_before: int = 0
) -> Transformer:
    """Spread `model` (whole, or one pipeline chunk) over the ranks of `mesh`, in place; `layers_before` are in the rank's chunks before."""
    # 1. Tensor parallelism looks modules up by their plain names, so it comes before anything that wraps them.
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], sequence_parallel=layout.sequence_parallel)

    # 2. Recomputation wraps layers, collectives of tensor parallelism included.
    apply_recompute(model, layout.recompute, mesh.get_local_rank("pp"), before=layers_before)

    # 3. ZeRO last: it shards what is left on the rank, and its gathers must surround the recomputation.
    apply_zero(model, job, mesh, zero=layout.zero, hpz=layout.hpz)
    return model
