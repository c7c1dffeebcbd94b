"""Nothing fits, or nothing is in time: how far off the nearest layout is, and which single changes would do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from shardplan.costmodel.job import METHODS, PRECISIONS, Job
from shardplan.costmodel.model import Model
from shardplan.costmodel.rule import Rejection, Setting
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.closest import closest_layout, needed_share
from shardplan.planner.deadline import DEADLINE
from shardplan.planner.no_degrees import why_forbidden, why_no_degrees
from shardplan.planner.one_size import anything_fits
from shardplan.planner.search import SearchResult, judge, search, search_document
from shardplan.planner.space import Wishes, asked, fixes_pipeline
from shardplan.planner.watch import StepWatch, Watch

ROOM = ("device-memory", "host-memory", "nvme-capacity")
"""Rules of what does not fit."""
MOST_DOUBLINGS = 6
MOST_HALVINGS, SHORTEST = 4, 256
"""Of the sequence, and its tokens."""
SMALLER_OPTIMIZERS = ("adamw16bit", "adamw8bit", "paged_adamw8bit", "adafactor")
"""That hold less than Adam in fp32, the nearest to it first."""


NONE_DOES = (
    "no single change makes one fit: none of wishes, headroom, gradients, optimizer, GPUs of this kind, sequence, batch, method, precision "
    "and runtime alone"
)


def what_would_fit(
    result: SearchResult,
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime,
    wishes: Wishes,
    headroom: float,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The account of a search that found nothing: the closest layout, its rejections, and changes that would fit; `watch` is told how far
    it is."""
    watching = watch or Watch()
    document: dict[str, Any] = {"fits": False, "rejections": [], "search": search_document(result, 0), "closest": None}
    if result.refused and result.refused[0].rule == DEADLINE:
        late = result.refused[0]
        document["rejections"] = [{"rule": DEADLINE, "detail": late.example, "remedy": late.remedy}]
        document["would_fit"] = []
        return document
    headroom_that_fits = None
    setting = Setting(model=model, job=job, cluster=cluster, runtime=runtime)
    if result.closest is not None:
        nearest = closest_layout(
            setting, wishes, headroom, result.closest, StepWatch(watching, "the nearest layout", 0.0, 0.5)
        )
        headroom_that_fits = 1.0 - float(needed_share(nearest, 0.0)[0])
        judged = judge(
            nearest.layouts.row(0), model=model, job=job, cluster=cluster, runtime=runtime, headroom=headroom
        )
        if isinstance(judged, dict):
            document["closest"], document["rejections"] = judged, judged["rejections"]
    else:
        cause = why_no_degrees(setting, wishes) if result.refused else _no_factorisation(setting, wishes)
        document["rejections"] = [
            *([asdict(cause)] if cause else []),
            *(
                {"rule": r.rule, "detail": f"{r.count} layouts: {r.example}", "remedy": r.remedy}
                for r in result.refused
            ),
        ]
    told = document["would_fit"] = list(
        _changes(setting, wishes, headroom, StepWatch(watching, "what would fit", 0.5, 1.0))
    )
    if headroom_that_fits is not None and 0.0 <= headroom_that_fits < headroom:
        told.insert(0, f"--headroom {math.floor(1000.0 * headroom_that_fits) / 1000.0:g} instead of {headroom:g}")
    for one in document["rejections"] if document["closest"] else ():
        if one["rule"] in ROOM:  # what its own words could do was tried: no layout is nearer
            first = f"first try {told[0]}" if told else NONE_DOES
            one["remedy"] = f"no layout is nearer to fitting; {first}"
    return document


def _no_factorisation(setting: Setting, wishes: Wishes) -> Rejection:
    """Why the space is empty."""
    job, cluster = setting.job, setting.cluster
    for word in ("dp", "tp", "pp", "cp"):
        degree = getattr(wishes.fixed, word)
        if word in wishes.fixed_words and cluster.gpus % degree:
            return Rejection(
                rule="gpus-product",
                detail=f"{word}={degree} does not divide the {cluster.gpus} GPUs",
                remedy=f"fix a {word} that does, or change --gpus",
            )
    product = (
        wishes.fixed.tp * wishes.fixed.pp * wishes.fixed.cp * (wishes.fixed.dp if "dp" in wishes.fixed_words else 1)
    )
    if cluster.gpus % product:
        words = " ".join(
            f"{word}={getattr(wishes.fixed, word)}" for word in ("dp", "tp", "pp", "cp") if word in wishes.fixed_words
        )
        return Rejection(
            rule="gpus-product",
            detail=f"{words} make groups of {product} GPUs, which do not divide the {cluster.gpus} GPUs",
            remedy="fix fewer of them or smaller ones, or change --gpus",
        )
    if fixes_pipeline(wishes) and (cluster.gpus == 1 or asked(wishes, "pp")):
        return Rejection(
            rule="schedule-of-pipelines",
            detail=f"schedule={wishes.fixed.schedule} is that of a pipeline, and there is none on {cluster.gpus} GPUs within the wishes",
            remedy="drop the schedule, or use more GPUs and leave pp open",
        )
    told = why_no_degrees(setting, wishes) or why_forbidden(setting, wishes)
    return told or Rejection(
        rule="batch-divisible",
        detail=f"no dp*tp*pp = {cluster.gpus} within the wishes has a dp that divides global_batch={job.global_batch}",
        remedy="change the global batch, the GPUs or what is fixed",
    )


def _changes(setting: Setting, wishes: Wishes, headroom: float, watch: Watch) -> Iterator[str]:
    """One change each that makes something fit, or else two, tried by searching."""
    job, cluster, runtime = setting.job, setting.cluster, setting.runtime

    def fits(changed: Mapping[str, Any], wishes: Wishes = wishes) -> bool:
        at = replace(setting, **changed)
        if not at.cluster.parts:
            return anything_fits(at, wishes, headroom, Watch())
        found = search(
            model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, wishes=wishes, headroom=headroom
        )
        return found.ranked is not None

    if (wishes.fixed_words or wishes.forbidden) and fits({}, Wishes()):
        words = [word for word, given in (("--fix", wishes.fixed_words), ("--forbid", wishes.forbidden)) if given]
        yield f"dropping {' and '.join(words)}"
    more_gpus = [
        (f"{one.gpus} GPUs of the same kind (tried by doubling)", {"cluster": one}) for one in _doubled(cluster)
    ]
    others = [
        [(f"--runtime {name}", {"runtime": load_runtime(name)})] for name in OTHER_RUNTIMES if name != runtime.name
    ]
    kinds: list[_Kind] = [*_smaller_states(job, runtime), more_gpus, *_other_jobs(job, cluster, runtime), *others]
    found = False
    for at, kind in enumerate(kinds):
        for words, changed in kind:
            watch.phase(words, at / len(kinds), 0)
            if fits(changed):
                found = True
                yield words
                break
    for words, changed in () if found else _two_changes(job, runtime):
        if fits(changed):
            yield words
            return


def _two_changes(job: Job, runtime: Runtime) -> Iterator[tuple[str, dict[str, Any]]]:
    """Adapters alone in another runtime."""
    for name in OTHER_RUNTIMES if job.method == "full" else ():
        other = load_runtime(name)
        for words, changed in _changed(job, {f"--method {word}": {"method": word} for word in METHODS[1:]}):
            if name != runtime.name and changed["job"].method in other.abilities.methods:
                yield f"--runtime {name} {words}, which trains adapters alone", {**changed, "runtime": other}


OTHER_RUNTIMES = ("megatron", "fsdp2", "deepspeed")
_Kind = list[tuple[str, dict[str, Any]]]
"""Changes of one kind, the smallest first: only the first that fits is told."""


def _smaller_states(job: Job, runtime: Runtime) -> Iterator[_Kind]:
    """What leaves the training as it is but for rounding."""
    known = runtime.states[job.precision].gradient_dtypes if job.precision in runtime.states else ()
    dtypes = [word for word in ("bf16",) if word in known and word != job.grad_dtype]
    optimizers = [word for word in SMALLER_OPTIMIZERS if job.optimizer == "adamw"]
    yield _changed(job, {f"--grad-dtype {word}": {"grad_dtype": word} for word in dtypes})
    known = runtime.abilities.optimizers
    yield _changed(job, {f"--optimizer {word}": {"optimizer": word} for word in optimizers if word in known})


def _other_jobs(job: Job, cluster: Cluster, runtime: Runtime) -> Iterator[_Kind]:
    lengths = [job.seq // 2**halvings for halvings in range(1, MOST_HALVINGS + 1)]
    methods = [word for word in METHODS[1:] if job.method == "full" and word in runtime.abilities.methods]
    yield _changed(
        job, {f"sequences of {seq} tokens (tried by halving)": {"seq": seq} for seq in lengths if seq >= SHORTEST}
    )
    if job.global_batch < cluster.gpus:
        yield _changed(job, {f"a global batch of {cluster.gpus}": {"global_batch": cluster.gpus}})
    yield _changed(job, {f"--method {word}, which trains adapters alone": {"method": word} for word in methods})
    for word in PRECISIONS:
        if word != job.precision:
            yield _changed(job, {f"--precision {word}": {"precision": word}})


def _changed(job: Job, changes: Mapping[str, Mapping[str, Any]]) -> _Kind:
    """Jobs that there are: documents may be longer than half a sequence."""
    found: _Kind = []
    for words, values in changes.items():
        with suppress(InputError):
            found.append((words, {"job": replace(job, **values)}))
    return found


def _doubled(cluster: Cluster) -> Iterator[Cluster]:
    """The same cluster with 2, 4, 8 … times the GPUs, as far as its network goes."""
    for times in range(1, MOST_DOUBLINGS + 1):
        try:
            yield cluster.with_gpus(cluster.gpus * 2**times)
        except InputError:
            return
