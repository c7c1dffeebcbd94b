"""ZeRO-0 to 3 (arXiv 1910.02054) and HSDP from one primitive, `fully_shard`; it also keeps fp32 masters.

| stage | parameters after the forward pass | gradients between micro-batches |
|---|---|---|
| 0 | whole (shard groups of one rank)  | whole, reduced once a step |
| 1 | whole until the step ends         | whole, reduced once a step |
| 2 | whole until the step ends         | sharded, reduced every micro-batch |
| 3 | gathered per layer, then dropped  | sharded, reduced every micro-batch |

Optimizer states and fp32 masters are sharded in 1 to 3. Inside a pipeline the schedule itself reduces once a step, so
there gradients stay whole until the end for every stage.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardplan.costmodel.job import Job
from shardplan.executor.transformer import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision_policy(job: Job) -> MixedPrecisionPolicy:
    """Compute dtype and gradient-reduction dtype; reduction is fp32 unless the job asks for less."""
    if job.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=DTYPES[job.precision], reduce_dtype=DTYPES[job.grad_dtype or "fp32"])


def apply_zero(model: Transformer, job: Job, mesh: DeviceMesh, *, zero: int) -> None:
    """Shard each layer, then the rest (embedding, norm, head) as the root group, in place."""
    if mesh["dp_replicate"].size() * mesh["dp_shard"].size() == 1 and job.precision == "fp32":
        return
    replicas = mesh["dp_replicate"].size()
    data_mesh = mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]
    policy = precision_policy(job)
    for layer in model.layers.values():
        fully_shard(layer, mesh=data_mesh, mp_policy=policy, reshard_after_forward=zero == 3)
    # the root is used first and last in every pass: dropping it in between would only gather it twice
    fully_shard(model, mesh=data_mesh, mp_policy=policy, reshard_after_forward=False)


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
