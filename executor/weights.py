"""Moves weights between a `Transformer` and a folder with Hugging Face's names (`hugging_face`), for every layout.

Reading happens before a chunk is spread, so each rank reads what its chunk holds. Writing gathers one parameter after the other; the first
rank of each pipeline stage writes its files, rank 0 the index, and the folder gets its name when everything is in it (`export_folder`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardplan.executor.export_folder import give_name, part_of, run_mark, written_by
from shardplan.executor.hugging_face import CONFIG, INDEX, Constants, Folder, config_of, is_stack, their_names
from shardplan.executor.mesh import data_rank
from shardplan.executor.recompute import parameter_name
from shardplan.executor.transformer import Transformer
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

DTYPES = {"fp32": (torch.float32, "float32"), "bf16": (torch.bfloat16, "bfloat16"), "fp16": (torch.float16, "float16")}
MOST_FILE_BYTES = 5 * 10**9


@torch.no_grad()
def load(chunk: Transformer, folder: Folder) -> None:
    """Give a chunk that is not spread yet the values of `folder`, and what its model computes with."""
    for name, parameter in chunk.named_parameters():
        for theirs, matrix in zip(*_matrices(chunk.whole_name(name), parameter), strict=True):
            with safe_open(str(folder.files[theirs]), framework="pt") as file:
                matrix.copy_(file.get_tensor(theirs))
    constants = folder.constants
    chunk.compute_with(rotary_base=constants.rotary_base, norm_epsilon=constants.norm_epsilon)


def save(
    chunks: Sequence[Transformer],
    plan: Plan,
    mesh: DeviceMesh,
    target: Path,
    *,
    run: Path,
    dtype: str,
    origin: Folder | None,
    constants: Constants,
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Write the whole model to the new folder `target`, unless an earlier attempt of the run of folder `run` has; every rank calls this.

    InputError where something else has come to lie at `target` meanwhile: the weights then stay in the temporary folder, which it names.
    """
    torch_dtype, word = DTYPES[dtype]
    stage, writes = mesh.get_local_rank("pp"), data_rank(mesh) == 0 and mesh.get_local_rank("tp") == 0
    mark = run_mark(run)
    part = part_of(target, mark)
    done = [written_by(target) == mark]
    dist.broadcast_object_list(done, src=0)
    if done[0]:  # an attempt of this run ended after its export was complete
        return
    if dist.get_rank() == 0 and part.exists():
        shutil.rmtree(part)  # of an attempt of this run that failed meanwhile
    dist.barrier()
    part.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    size_bytes = 0

    def flush() -> None:
        if held:
            file = f"model-stage-{stage:03}-{len(set(found.values())):05}.safetensors"
            save_file(held, str(part / file), metadata={"format": "pt"})
            found.update(dict.fromkeys(held, file))
            held.clear()

    for name, value in _whole(chunks):
        on_tensor()
        if writes:
            for theirs, matrix in zip(*_matrices(name, value), strict=True):
                held[theirs] = matrix.to("cpu", torch_dtype, copy=True).contiguous()
                size_bytes += held[theirs].nbytes
            if sum(one.nbytes for one in held.values()) > MOST_FILE_BYTES:
                flush()
    flush()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (found, size_bytes))
    if dist.get_rank() == 0:
        names = {name: file for files, _ in every for name, file in files.items()}
        metadata = {"total_size": sum(size for _, size in every), "run": mark}
        index = {"metadata": metadata, "weight_map": dict(sorted(names.items()))}
        (part / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        config = config_of(plan.model, seq=plan.job.seq, dtype=word, folder=origin, constants=constants)
        (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    done = [dist.get_rank() == 0 and give_name(part, target)]
    dist.broadcast_object_list(done, src=0)
    if not done[0]:
        raise InputError(
            "came to lie there while the run trained, and is left as it is",
            place=str(target),
            remedy=f"the weights are in {part}, complete: move them where you want them",
        )


def _matrices(name: str, value: Tensor) -> tuple[list[str], Sequence[Tensor]]:
    """Hugging Face's names of a parameter, and what goes by each: a stack of experts falls into its matrices."""
    return their_names(name, tuple(value.shape)), value.unbind() if is_stack(name) else [value]


@torch.no_grad()
def _whole(chunks: Sequence[Transformer]) -> Iterator[tuple[str, Tensor]]:
    """Name in the plain model and value of every parameter, gathered; a tied head comes once, as the embedding."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name != chunk.whole_name(name):
                continue
            yield (
                parameter_name(name),
                parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach(),
            )
