"""Saves and loads the training state with torch's distributed checkpoint (DCP), in the background, across layouts.

Every tensor goes by the name its parameter has in the plain model, whatever stage, shard or wrapper holds it:
`model.<parameter>`, `optimizer.<parameter>.<state>`. DCP stores which part of the whole each rank wrote, and a rank of another
layout reads the parts it needs. The rest (`Progress`) is JSON in the manifest: no pickled objects but DCP's own index, which
is read with a list of the classes it may name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.serialization import get_crc32_options, set_crc32_options

from shardplan.executor import checkpoint_files
from shardplan.executor.checkpoint_files import INDEX, CheckpointError, IndexUnpickler, Progress
from shardplan.executor.hashed_file import HashedFile
from shardplan.executor.recompute import parameter_name
from shardplan.executor.transformer import HEAD, TABLE

SAVE_TIMEOUT = timedelta(hours=1)
"""Longest that ranks wait for each other while they write; a rank that dies is seen at once."""
BYTES_PER_WRITER = 5e8
MOST_WRITERS = 4
COMPILE_PREFIX = "_orig_mod."

State = dict[str, Any]
"""Name -> tensor."""


def named_parameters(chunks: Sequence[nn.Module], *, tied: bool) -> dict[str, nn.Parameter]:
    """The parameters of this rank's model chunks by their names in the plain model; a tied head goes by the embedding's, and where a
    rank holds both as two copies, the embedding speaks for them."""
    found: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            plain = parameter_name(name).replace(COMPILE_PREFIX, "")
            found.setdefault(TABLE if tied and plain == HEAD else plain, parameter)
    return found


def training_state(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """Parameters and optimizer states, the live tensors; states that do not exist yet are made by a step that changes nothing."""
    if not optimizer.state:
        _make_states(optimizer)
    state: State = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {kind} of {name} is a {type(value).__name__}, no tensor")
            state[f"optimizer.{name}.{kind}"] = value
    return state


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # neither the gradient nor the weight decay moves a parameter
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for states in optimizer.state.values():
        for value in states.values():
            value.zero_()  # the count of steps is 1 by now
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class _HashingFiles(FileSystem):
    """What DCP writes files with: hashed on the way, on the disk when closed."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}
        """Size and sha256 by name."""
        self.failed: list[Exception] = []
        """What was raised, in whatever thread: DCP passes on only what its caller's own thread raises."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A new file; entered in the thread that writes it."""
        assert mode == "wb"
        try:
            with HashedFile(Path(path)) as file, _without_crc():
                yield file
        except Exception as bad:
            self.failed.append(bad)
            raise
        self.written[Path(path).name] = (file.size_bytes, file.sha256)


class CheckpointWriter(FileSystemWriter):
    """DCP's writer into a temporary folder, hashing; the coordinator commits at the end. Large shards are written by several threads, each
    a file."""

    def __init__(self, root: Path, progress: Progress, *, keep: int) -> None:
        self.part = checkpoint_files.part_folder(root, progress.step)
        self.progress, self.keep = progress, keep
        super().__init__(self.part, overwrite=False, sync_files=False)  # closing does
        self.fs = self.files = _HashingFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Write this rank's tensors, flushed, and their digests."""
        self.thread_count = writers(sum(map(_item_bytes, plan.items)))
        done = super().write_data(plan, planner)
        done.wait()
        if self.files.failed:
            raise self.files.failed[0]
        for name, (size_bytes, sha256) in self.files.written.items():
            checkpoint_files.write_digest(self.part / name, size_bytes=size_bytes, sha256=sha256)
        return done

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On the coordinator, after every rank has written: the index, the manifest, the rename, the pointer; then old ones go."""
        super().finish(metadata, results)
        size_bytes, sha256 = self.files.written[f"{INDEX}.tmp"]
        checkpoint_files.write_digest(self.part / INDEX, size_bytes=size_bytes, sha256=sha256)
        target = checkpoint_files.commit(self.part, self.progress)
        checkpoint_files.prune(target.parent, keep=self.keep, newest=target)


def writers(size_bytes: float) -> int:
    """Threads that write a rank's `size_bytes`: one for each BYTES_PER_WRITER, as far as this machine has cores for its ranks."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(int(size_bytes // BYTES_PER_WRITER), cores, MOST_WRITERS))


def _item_bytes(item: WriteItem) -> int:
    held = item.tensor_data
    return 0 if held is None else math.prod(held.chunk.sizes) * held.properties.dtype.itemsize


@contextmanager
def _without_crc() -> Iterator[None]:
    """Leave out the CRC-32 that torch.save computes of every tensor (in torch 2.13 of this thread alone): the manifest has a sha256 of each
    file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class Checkpoints:
    """Saves every `every` steps and at the last, one save at a time, in a thread beside training."""

    def __init__(self, root: Path, *, every: int, keep: int) -> None:
        self.root, self.every, self.keep = root, every, keep
        self.group = _patient_group()  # its own: training goes on meanwhile
        self.saving: Future[Any] | None = None

    def due(self, step: int, last: int) -> bool:
        """Is step `step` to be saved, of a run that ends at `last`?"""
        return step % self.every == 0 or step == last

    def save(self, state: State, progress: Progress) -> None:
        """Copy `state` to host memory and write it in the background; waits for the save before and raises what it raised."""
        self.wait()
        writer = CheckpointWriter(self.root, progress, keep=self.keep)
        saving = async_save(state, storage_writer=writer, process_group=self.group)
        self.saving = cast("Future[Any]", saving)

    def busy_after(self, seconds: float) -> bool:
        """Is a save still going on, given so long to end?"""
        return self.saving is not None and bool(wait_for([self.saving], seconds).not_done)

    def wait(self) -> None:
        """Return when the last save is complete on disk."""
        if self.saving is not None:
            with _told("saving failed"):
                self.saving.result()
            self.saving = None


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn DCP's report over all ranks into the line of the first that failed."""
    try:
        yield
    except CheckpointException as bad:
        rank, (error, _) = min(bad.failures.items())
        raise CheckpointError(f"{what} on rank {rank}: {type(error).__name__}: {error}") from bad


def _patient_group() -> dist.ProcessGroup:
    """All ranks, on the host, where they may wait for disks."""
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))


class CheckpointReader(FileSystemReader):
    """DCP's reader, whose index cannot run code; tensors are read with `weights_only` by DCP itself."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index."""
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                metadata = IndexUnpickler(cast("IO[bytes]", file)).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as bad:
            raise CheckpointError(f"{INDEX} is refused ({bad})", place=f"checkpoint {path.parent}") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{INDEX} holds no index", place=f"checkpoint {path.parent}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._check_names(metadata)
        return metadata

    def _check_names(self, metadata: Metadata) -> None:
        names = {info.relative_path for info in metadata.storage_data.values()}
        if strange := [name for name in names if not (Path(self.path) / name).is_file() or "/" in name]:
            raise CheckpointError(f"index names {strange[0]!r}", place=f"checkpoint {self.path}")


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is a pickled object; only tensors are loaded")


def load(folder: Path, state: State) -> Progress:
    """Fill the tensors of `state` from a checkpoint, in place, whatever layout saved it; all ranks call it together."""
    with _told(f"checkpoint {folder}: loading failed"):
        load_distributed(state, storage_reader=CheckpointReader(folder), planner=_TensorsOnly())
    return checkpoint_files.read_progress(folder)


def choose(roots: list[Path]) -> tuple[Path | None, list[str]]:
    """What `checkpoint_files.newest` finds, looked up by rank 0 for all ranks."""
    found: list[Any] = [checkpoint_files.newest(roots) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, group=_patient_group())  # rank 0 reads whole checkpoints
    return found[0]
