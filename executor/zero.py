"""ZeRO-0 to 3 (arXiv 1910.02054) and HSDP from one primitive, `fully_shard`; it also keeps fp32 masters.

| stage | parameters after the forward pass | gradients between micro-batches |
|---|---|---|
| 0 | whole (shard groups of one rank)  | whole, reduced once a step |
| 1 | whole until the step ends         | whole, reduced once a step |
| 2 | whole until the step ends         | sharded, reduced every micro-batch |
| 3 | gathered per layer, then dropped  | sharded, reduced every micro-batch |

hpZ of ZeRO++ (arXiv 2306.10209, section 3.2): after the forward pass ZeRO-3 keeps a second, larger shard of the parameters, so that the
backward pass gathers among `hpz` neighbours only.

Optimizer states and fp32 masters are sharded in 1 to 3. Inside a pipeline the schedule itself reduces once a step, so
there gradients stay whole until the end for every stage.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardplan.costmodel.job import Job
from shardplan.executor.expert_parallel import Surrounded, expert_layers, shard_dim
from shardplan.executor.transformer import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision_policy(job: Job) -> MixedPrecisionPolicy:
    """Compute dtype and gradient-reduction dtype; reduction is fp32 unless the job asks for less."""
    if job.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=DTYPES[job.precision], reduce_dtype=DTYPES[job.grad_dtype or "fp32"])


def apply_zero(
    model: Transformer,
    job: Job,
    mesh: DeviceMesh,
    *,
    zero: int,
    hpz: int = 1,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard each layer, then the rest (embedding, norm, head) as the root group, in place; experts on a mesh of their own first."""
    expert_ranks = _size(expert_mesh, "expert") if expert_mesh is not None else 1
    if _size(mesh, "dp") * expert_ranks == 1 and job.precision == "fp32":
        return
    data_mesh = _data_mesh(mesh, "dp")
    policy = precision_policy(job)
    if expert_mesh is not None:
        for name, layer in model.layers.items():
            model.layers[name] = Surrounded(layer)
            for part in expert_layers(layer):
                fully_shard(
                    part.experts,
                    mesh=_data_mesh(expert_mesh, "expert"),
                    mp_policy=policy,
                    reshard_after_forward=zero == 3,
                    shard_placement_fn=partial(shard_dim, shards=expert_mesh["expert_shard"].size()),
                )
    shards = partial(shard_dim, shards=mesh["dp_shard"].size())
    keep: bool | int = hpz if zero == 3 and 1 < hpz < mesh["dp_shard"].size() else zero == 3
    for layer in model.layers.values():
        fully_shard(layer, mesh=data_mesh, mp_policy=policy, reshard_after_forward=keep, shard_placement_fn=shards)
    # the root is used first and last in every pass: dropping it in between would only gather it twice
    fully_shard(model, mesh=data_mesh, mp_policy=policy, reshard_after_forward=False)


def _size(mesh: DeviceMesh, states: str) -> int:
    return mesh[f"{states}_replicate"].size() * mesh[f"{states}_shard"].size()


def _data_mesh(mesh: DeviceMesh, states: str) -> DeviceMesh:
    """Over what `states` (dp, or expert) are sharded and repeated."""
    replicate, shard = f"{states}_replicate", f"{states}_shard"
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]


def set_micro_step(model: Transformer, *, zero: int, last: bool) -> None:
    """Tell the sharded model before a micro-batch whether it is the last of its step (not used inside a pipeline)."""
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last or zero == 3)
    model.set_requires_gradient_sync(last or zero >= 2)
    # HSDP with ZeRO-2/3: scatter within the shard group every time, sum across replicas once
    model.set_requires_all_reduce(last)


def reshard(model: Transformer) -> None:
    """Drop parameters that a forward pass without a backward one left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
