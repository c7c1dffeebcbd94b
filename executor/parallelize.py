"""The recipe: how a plain model becomes what the layout says. Each step says why it stands where it does."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.executor.compiling import apply_compile
from shardplan.executor.expert_parallel import ExpertGroups, spread_experts
from shardplan.executor.recompute import apply_recompute
from shardplan.executor.tensor_parallel import apply_tensor_parallel
from shardplan.executor.transformer import Transformer
from shardplan.executor.zero import apply_zero


def parallelize(
    model: Transformer,
    layout: Layout,
    job: Job,
    mesh: DeviceMesh,
    experts: ExpertGroups,
    *,
    layers_before: int = 0,
    compiler: str | None = None,
) -> Transformer:
    """Spread `model` (whole, or one pipeline chunk) over the ranks of `mesh`, its experts over theirs, in place.

    `layers_before` are in the rank's chunks before; `compiler` is torch.compile's backend.
    """
    # 1. Tensor parallelism looks modules up by their plain names, so it comes before anything that wraps them.
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], sequence_parallel=layout.sequence_parallel)

    # 2. Experts next, for the same reason.
    spread_experts(model, layout, mesh, experts)

    # 3. and 4. Recomputation wraps layers, collectives of tensor and expert parallelism included. What is compiled is a layer with its
    # recomputation; under tensor and context parallelism the layer alone: torch 2.13 cannot compile a checkpoint of distributed tensors,
    # nor one that breaks into several graphs. Parameters keep their names.
    layer_alone = layout.tp * layout.cp > 1
    if compiler is not None and layer_alone:
        apply_compile(model, backend=compiler, whole=layout.cp == 1)
    apply_recompute(model, layout.recompute, mesh.get_local_rank("pp"), before=layers_before)
    if compiler is not None and not layer_alone:
        apply_compile(model, backend=compiler)

    # Context parallelism exchanges what attention calls, not modules: `Trainer` adds it behind the choice of a kernel (context_parallel).

    # 5. ZeRO last: it shards what is left on the rank, and its gathers must surround the recomputation and stay out of the graph.
    apply_zero(model, job, mesh, zero=layout.zero, hpz=layout.hpz, expert_mesh=experts.mesh)
    return model
