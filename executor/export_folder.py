"""Where trained weights go: a new folder, `weights.export`, which gets its name when everything is in it.

Until then it is `<export>.<mark>.tmp` beside it. The mark tells the run, and stands in the index of the export too, so that a run that
is started again knows its own, and never touches what another run, or somebody else, has put there.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from shardplan.executor.hugging_face import INDEX
from shardplan.hw_profiles.errors import InputError

MARK_DIGITS = 12


def run_mark(run: Path) -> str:
    """What tells exports of the run of folder `run` from others': the same when it is started again; no path can be read off it."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:MARK_DIGITS]


def part_of(target: Path, mark: str) -> Path:
    """Where the run of that mark gathers what becomes `target`."""
    return target.with_name(f"{target.name}.{mark}.tmp")


def written_by(target: Path) -> object:
    """The mark of the run that exported to `target`; None where there is no export of a run."""
    try:
        return json.loads((target / INDEX).read_text(encoding="utf-8"))["metadata"]["run"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def give_name(part: Path, target: Path) -> bool:
    """Call the complete folder `part` `target`; False where something has that name, which is left as it is."""
    if target.exists():  # renaming would replace an empty folder
        return False
    try:
        part.rename(target)
    except OSError:
        if target.exists():
            return False
        raise
    return True


def check_export(target: Path) -> None:
    """InputError where weights could not go to `target` after the last step, or where they would lie beside others. The folder in which
    it will be is made now."""
    other = "name a new folder in weights.export"
    if target.exists() or target.is_symlink():
        raise InputError("exists already", place=str(target), remedy=other)
    left = re.compile(rf"{re.escape(target.name)}(\.[0-9a-f]{{{MARK_DIGITS}}})?\.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}."):
            pass
        parts = sorted(one.name for one in target.parent.iterdir() if left.fullmatch(one.name))
    except OSError as bad:
        raise InputError(
            f"cannot be written ({bad.strerror})", place=str(target), remedy="name another folder in weights.export"
        ) from None
    if parts:
        raise InputError(
            f"is left over from an export to {target.name} that did not end",
            place=str(target.with_name(parts[0])),
            remedy=f"move it away, or {other}",
        )
