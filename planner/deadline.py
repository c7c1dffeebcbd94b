"""A deadline for a token budget: days that a plan takes, and what is said where none is in time."""

from __future__ import annotations

from collections.abc import Callable
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
    """A number of GPUs in time where one node less is not: sizes between one that misses the deadline and one that meets it are tried
    evenly, then those before the first that meets it, until two neighbours are left."""
    while sizes := between(missed, met, node_gpus):
        for gpus in sizes:
            if in_time(gpus):
                met = gpus
                break
            missed = gpus
    return met


def late(fastest: SearchResult, needed: float, days: float) -> SearchResult:
    """A result that takes `needed` days instead of `days`, as one with nothing ranked: its layouts are refused by the deadline."""
    refused = sum(one.count for one in fastest.refused)
    refusal = Refusal(
        rule=DEADLINE,
        count=fastest.looked_at - refused - fastest.slower - fastest.does_not_fit,
        example=f"the fastest, on {fastest.cluster.gpus} GPUs, takes {needed:.3g} days, the deadline is {days:g}",
        remedy="give more days or more GPUs",
    )
    return replace(fastest, ranked=None, refused=(refusal, *fastest.refused))
