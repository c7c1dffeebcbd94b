"""Checkpoint folders on disk, without torch: complete or not there, whenever the run is killed.

checkpoints/
    step-00000010.tmp/  being written; nothing reads it, the next start removes it
    step-00000010/      complete: files flushed, `manifest.json` last, then the folder renamed
    step-00000010-2/    the same step saved again: a complete checkpoint is never written over
    LATEST              name of the newest, for people and other tools; loading looks at the folders themselves

`manifest.json` holds the step, what must survive besides tensors, and size and sha256 of each file; it carries its own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import digest

CHECKPOINTS_FOLDER = "checkpoints"
LATEST = "LATEST"
MANIFEST = "manifest.json"
SCHEMA = "shardplan/checkpoint"
SCHEMA_VERSION = 1
HASHERS = min(4, os.cpu_count() or 1)
"""Threads that read files and hash them."""
PART_SUFFIX = ".tmp"
DIGEST_SUFFIX = ".sha256"
INDEX = ".metadata"
"""DCP's own index, a pickle."""
INDEX_CLASSES = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8")),
    }
)
"""All that it may name."""


class IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index and nothing else: a class that is not listed is refused before it is made."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """The class, if it is one of DCP's index."""
        if (module_name, global_name) not in INDEX_CLASSES:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not part of a checkpoint's index")
        return self.made(module_name, global_name)

    def made(self, module_name: str, global_name: str) -> Any:
        """What stands for a listed class: the class itself."""
        return super().find_class(module_name, global_name)


class CheckpointError(InputError):
    """A checkpoint that is not whole, or not of this model; names the folder and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint holds besides tensors; nothing of it depends on the layout."""

    step: int
    """Steps done."""
    seed: int
    """Of initial values and of the order of the data."""
    model: str
    """Digest of the model's description."""
    layout: str
    """The layout that saved it, in words."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """State of the data loader: JSON values, the same on every rank."""
    loss_scale: Mapping[str, Any] | None = None
    """State of the loss scale of fp16."""
    rotary_base: float | None = None
    """What the model computes with besides its weights (`hugging_face.Constants`); None in older checkpoints."""
    norm_epsilon: float | None = None


def part_folder(root: Path, step: int) -> Path:
    """Where step `step` is written before it is complete."""
    return root / f"step-{step:08d}{PART_SUFFIX}"


def clear_parts(root: Path) -> None:
    """Make `root` and remove what killed saves left in it; no save may be going on."""
    root.mkdir(parents=True, exist_ok=True)
    for part in root.glob(f"step-*{PART_SUFFIX}"):
        shutil.rmtree(part)


def write_digest(path: Path, *, size_bytes: int, sha256: str) -> None:
    """Write size and sha256 of `path` beside it: each rank does it for its own files, `commit` collects them."""
    _write(path.with_name(path.name + DIGEST_SUFFIX), json.dumps({"bytes": size_bytes, "sha256": sha256}))


def commit(part: Path, progress: Progress) -> Path:
    """Make the written folder `part` a complete checkpoint, durable when this returns; returns its folder."""
    files: dict[str, Any] = {}
    for path in sorted(part.glob(f"*{DIGEST_SUFFIX}")):
        files[path.name.removesuffix(DIGEST_SUFFIX)] = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(progress), "files": files}
    _write(part / MANIFEST, json.dumps({**body, "digest": digest(body)}, indent=1) + "\n")
    _flush_folder(part)
    target = _free_name(part)
    part.rename(target)
    _flush_folder(target.parent)
    pointer = target.parent / LATEST
    fresh = pointer.with_name(LATEST + PART_SUFFIX)
    _write(fresh, target.name + "\n")
    fresh.replace(pointer)
    _flush_folder(target.parent)
    return target


def prune(root: Path, *, keep: int, newest: Path) -> None:
    """Remove all but `keep` checkpoints, `newest` (just committed) among the kept; each leaves by one rename, then for good."""
    others = [folder for folder in checkpoints(root) if folder != newest]
    for old in others[keep - 1 :]:
        gone = old.with_name(old.name + PART_SUFFIX)
        old.rename(gone)
        shutil.rmtree(gone)


def checkpoints(root: Path) -> list[Path]:
    """Folders that were committed below `root`, the newest step first, of one step the last saved first; none is opened."""
    found = [(int(m[1]), int(m[2] or 1), path) for path in _entries(root) if (m := _NAME.fullmatch(path.name))]
    return [path for _, _, path in sorted(found, reverse=True)]


def verify(folder: Path) -> Progress:
    """Read every byte of a checkpoint and hold it against its manifest, and read its index; CheckpointError names the first thing wrong."""
    manifest = _read_manifest(folder)
    with ThreadPoolExecutor(HASHERS) as threads:
        checks = [threads.submit(_check_file, folder, name, expected) for name, expected in manifest["files"].items()]
        try:
            for check in checks:
                check.result()
        finally:
            threads.shutdown(cancel_futures=True)
    _check_index(folder)
    return _progress(manifest)


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise _refused(folder, f"{name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _refused(folder, f"{name} has {size} bytes of {expected['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise _refused(folder, f"{name} is corrupt (its sha256 differs)")


def read_progress(folder: Path) -> Progress:
    """What the manifest of a checkpoint says, its files unopened."""
    return _progress(_read_manifest(folder))


def newest(roots: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the first of `roots` that has one, and a line for each newer one refused."""
    refused: list[str] = []
    for root in roots:
        for folder in checkpoints(root) if _NAME.fullmatch(root.name) is None else [root]:
            try:
                verify(folder)
            except CheckpointError as bad:
                refused.append(str(bad))
            else:
                return folder, refused
    return None, refused


def find(place: Path) -> tuple[Path, list[str]]:
    """The checkpoint meant by a run folder, its `checkpoints` or one checkpoint; CheckpointError where none is whole."""
    inside = place / CHECKPOINTS_FOLDER
    root = inside if inside.is_dir() else place
    folder, refused = newest([root])
    if folder is not None:
        return folder, refused
    if refused:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(refused)}", place=str(place))
    raise CheckpointError(
        "holds no complete checkpoint", place=str(place), remedy="name a run made with --checkpoint-every"
    )


def find_last(out: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of the newest run folder below `out` that has one, and a line for each that was refused before it;
    CheckpointError where none has."""
    runs = sorted(_entries(out), key=lambda path: path.name, reverse=True)
    folder, refused = newest([run / CHECKPOINTS_FOLDER for run in runs])
    if folder is not None:
        return folder, refused
    if refused:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(refused)}", place=str(out))
    raise CheckpointError(
        "holds no run with a checkpoint",
        place=str(out),
        remedy="name a run folder with --resume, or the runs with --out",
    )


_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def _free_name(part: Path) -> Path:
    target = part.with_name(part.name.removesuffix(PART_SUFFIX))
    taken = [path.name for path in checkpoints(part.parent) if path.name.startswith(target.name)]
    if not taken:
        return target
    last = _NAME.fullmatch(taken[0])
    return target.with_name(f"{target.name}-{int((last and last[2]) or 1) + 1}")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        said = manifest.pop("digest")
    except FileNotFoundError:
        raise _refused(folder, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise _refused(folder, f"{MANIFEST} is truncated or not readable") from None
    if said != digest(manifest) or manifest.get("schema") != SCHEMA:
        raise _refused(folder, f"{MANIFEST} is corrupt (its digest differs)")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise _refused(folder, f"schema_version={manifest['schema_version']} is newer than {SCHEMA_VERSION}")
    if any("/" in name or name in ("", ".", "..") for name in manifest["files"]):
        raise _refused(folder, f"{MANIFEST} names files outside the folder")
    return manifest


class _Stub:
    """Stands for any object of the index, so that reading it needs no torch and runs nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _StubUnpickler(IndexUnpickler):
    def made(self, module_name: str, global_name: str) -> type[_Stub]:
        """A class that does nothing."""
        return type(global_name, (_Stub,), {})


def _check_index(folder: Path) -> None:
    try:
        with (folder / INDEX).open("rb") as file:
            index: object = _StubUnpickler(file).load()
    except FileNotFoundError:
        raise _refused(folder, f"{INDEX} is missing") from None
    except Exception as bad:  # a forged pickle raises what it likes
        raise _refused(folder, f"{INDEX} is refused ({bad})") from None
    if type(index).__name__ != "Metadata":
        raise _refused(folder, f"{INDEX} holds no index")


def _progress(manifest: Mapping[str, Any]) -> Progress:
    later = {"loss_scale": None, "rotary_base": None, "norm_epsilon": None}  # fields that older checkpoints lack
    return Progress(**{name: {**later, **manifest}[name] for name in Progress.__dataclass_fields__})


def _refused(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(problem, place=f"checkpoint {folder}")
