"""A deadline for a token budget: the fewest GPUs whose best layout trains the tokens in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shardplan.costmodel.job import Job
from shardplan.costmodel.model import Model
from shardplan.costmodel.result import result_document
from shardplan.costmodel.runtime import Runtime
from shardplan.planner.ranking import SearchResult
from shardplan.planner.sift import Refusal

DEADLINE = "deadline"
"""Stands where a rule's name does: the layouts fit, none is in time."""
SIZES_BETWEEN = 7
"""Sizes of whole nodes tried at once between the last that misses the deadline and the first that meets it."""


def days_needed(found: SearchResult, model: Model, job: Job, runtime: Runtime) -> float:
    """Days of the best layout to the job's tokens, with failures where goodput is known; infinite where nothing fits."""
    if found.ranked is None:
        return float("inf")
    result = result_document(
        model=model,
        job=job,
        cluster=found.cluster,
        runtime=runtime,
        layout=found.ranked.layouts.row(0),
        step_s=float(found.ranked.step_s[0]),
    )
    assert result is not None, "a job with a token budget has a result"
    days = result["days"] if result["days_with_failures"] is None else result["days_with_failures"]
    assert days is not None, "steps take days"
    return days


def between(missed: int, met: int, node_gpus: int) -> list[int]:
    """Whole nodes between two sizes, evenly, at most SIZES_BETWEEN."""
    sizes = range(missed // node_gpus * node_gpus + node_gpus, met, node_gpus)
    step = -(-len(sizes) // SIZES_BETWEEN) if sizes else 1
    return list(sizes[::step])


def narrowed(missed: int, met: int, node_gpus: int, in_time: Callable[[int], bool]) -> int:
    """The fewest GPUs in time, where one node less than that is not: sizes between one that misses the deadline and one that meets it
    are tried evenly, then those before the first that meets it, until two neighbours are left."""
    while sizes := between(missed, met, node_gpus):
        for gpus in sizes:
            if in_time(gpus):
                met = gpus
                break
            missed = gpus
    return met


def within_deadline(
    sizes: Sequence[int],
    node_gpus: int,
    on: Callable[[int], SearchResult],
    days_of: Callable[[SearchResult], float],
    days: float,
) -> SearchResult:
    """The result on the fewest GPUs in time: the first of `sizes` (ascending), `narrowed` to whole nodes; nothing ranked where none is.

    An interrupt leaves the smallest found in time by then, else the fastest, both as partial."""
    found: dict[int, SearchResult] = {}

    def in_time(gpus: int) -> bool:
        found[gpus] = on(gpus)
        if found[gpus].partial:
            raise _StoppedError
        return days_of(found[gpus]) <= days

    missed = 0
    try:
        for gpus in sizes:
            if in_time(gpus):
                return found[narrowed(missed, gpus, node_gpus, in_time)]
            missed = gpus
    except _StoppedError:
        done = [one for one in found.values() if days_of(one) <= days]
        best = min(done, key=lambda one: one.cluster.gpus) if done else min(found.values(), key=days_of)
        return replace(best, partial=True, complete=False)
    fastest = min(found.values(), key=days_of)
    if fastest.ranked is None:
        return fastest
    refused = sum(one.count for one in fastest.refused)
    late = Refusal(
        rule=DEADLINE,
        count=fastest.looked_at - refused - fastest.slower - fastest.does_not_fit,
        example=f"the fastest, on {fastest.cluster.gpus} GPUs, takes {days_of(fastest):.3g} days, the deadline is {days:g}",
    )
    return replace(fastest, ranked=None, refused=(late, *fastest.refused))


class _StoppedError(Exception):
    """A search was interrupted."""
