"""Why a run failed, read off what the ranks and torchrun left: the rank that failed first, not those it took with it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardplan.executor import measure

WAITED = re.compile(r"timed?[ -]?out", re.IGNORECASE)
LEFT = re.compile(r"connection (reset|closed)|broken pipe|remote process", re.IGNORECASE)
"""What a rank raises because another is gone."""
FULL = re.compile(r"no space left|file too large|quota exceeded", re.IGNORECASE)
"""A disk that takes no more."""
ENDED = re.compile(r"Sending process (\d+) closing signal")
"""torchrun's word when it ends a rank."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One line for people, and lines of detail below it."""

    line: str
    details: list[str] = field(default_factory=list[str])


def failure(folder: Path, code: int, *, ranks: int) -> Failure:
    """A rank killed by a signal, else one that left no word but an exit code, else one that answers no more, else the first that raised or
    was told to end, else the exit code."""
    log = _log(folder)
    raised = _raised(folder, log)
    of_their_own = {rank: found for rank, found in raised.items() if not LEFT.search(found["error"])}
    own = of_their_own or raised
    first = min(own, key=lambda rank: own[rank]["time"], default=None)
    waited = first is not None and WAITED.search(own[first]["error"]) is not None
    killed = _killed(log)
    if killed is not None and not waited:  # torchrun kills a rank that hangs, after others have waited for it
        rank, number = killed
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        return Failure(line=f"rank {rank} was killed by signal {number} {signal.Signals(number).name}{hint}")
    quiet = _left_quietly(folder, log)
    if quiet is not None and (waited or not of_their_own):
        rank, exit_code = quiet
        return Failure(line=f"rank {rank} ended with exit code {exit_code} and left no word")
    if first is not None:
        line = f"rank {first}: {own[first]['error']}"
        silent = sorted(set(range(ranks)) - set(raised))
        if silent and waited:
            line = f"{silent_ranks(folder, silent)}; {line}"
        if FULL.search(line):
            line += "; make room, or name another folder with --out"
        return Failure(line=line, details=list(own[first].get("details", ())))
    lines = [line.strip() for line in log.splitlines() if re.match(r"\S*(Error|Exception)\b", line.strip())]
    return Failure(line=lines[-1] if lines else f"torchrun ended with exit code {code}")


def silent_ranks(folder: Path, ranks: list[int]) -> str:
    """`rank 1 hung after step 3`: the ranks that left no word while others waited for them."""
    return ", ".join(f"rank {rank} hung after step {step}" for rank, step in _last_steps(folder, ranks).items())


def stuck(folder: Path, seconds: float, *, ranks: int) -> Failure:
    """Of a run that was ended because no step finished for `seconds`: what a rank said, else which are furthest behind."""
    if _raised(folder, _log(folder)):
        return failure(folder, 1, ranks=ranks)
    last = _last_steps(folder, range(ranks))
    behind = [rank for rank, step in last.items() if step == min(last.values())]
    who = "all ranks" if len(behind) == ranks else "rank " + ", ".join(map(str, behind))
    return Failure(line=f"no step finished for {seconds:.0f} s; {who} hung after step {min(last.values())}")


def _last_steps(folder: Path, ranks: Iterable[int]) -> dict[int, int]:
    """The last step of each rank, 0 where it wrote none."""
    records = measure.read_records(folder)
    return {rank: max((record.step for record in records.get(rank, ())), default=0) for rank in ranks}


def _log(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def _killed(log: str) -> tuple[int, int] | None:
    """Rank and signal of torchrun's report, without those that torchrun itself ended; of the last start."""
    for rank, exit_code in _exit_codes(log):
        if exit_code < 0 and -exit_code != signal.SIGTERM:
            return rank, -exit_code
    return None


def _left_quietly(folder: Path, log: str) -> tuple[int, int] | None:
    """Rank and exit code of torchrun's report, of a rank that left no word: with 1 Python ends what it could not start, and says why in the
    log."""
    for rank, exit_code in _exit_codes(log):
        if exit_code > 1 and not measure.rank_file(folder, rank).with_suffix(".error.json").exists():
            return rank, exit_code
    return None


def _exit_codes(log: str) -> list[tuple[int, int]]:
    """Rank and exit code by torchrun's report, the root cause among them."""
    report = re.findall(r"rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", log)
    return [(int(rank), int(exit_code)) for rank, exit_code in report]


def _raised(folder: Path, log: str) -> dict[int, dict[str, Any]]:
    """What the ranks left, by rank; a SIGTERM counts when it came first and not from torchrun, which writes down whom it ends."""
    found: dict[int, dict[str, Any]] = {}
    for path in (folder / measure.RANKS_FOLDER).glob("rank-*.error.json"):
        rank = int(path.name.removeprefix("rank-").partition(".")[0])
        found[rank] = json.loads(path.read_text(encoding="utf-8"))
    ended = set(map(int, ENDED.findall(log)))
    first = min((one["time"] for one in found.values() if one.get("told_to_end") not in ended), default=None)
    return {rank: one for rank, one in found.items() if "told_to_end" not in one or one["time"] == first}
