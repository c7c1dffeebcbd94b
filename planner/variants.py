"""One question in several forms: precisions and runtime switches that the user allows, global batches of a range; the best of their plans.

Of a range the batches low, 2 low, 4 low ... and high are searched. A larger batch never costs more per token by itself, but each of its
tokens teaches less: of those within NEAR_BEST of the best figure of the objective the smallest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from shardplan.costmodel.job import PRECISIONS, Job
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.planner.ranking import Objective, SearchResult
from shardplan.planner.space import ALLOWABLE

NEAR_BEST = 1.01


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the question."""

    job: Job
    runtime: Runtime
    runtime_name: str
    """What loads the runtime again, switches included."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A form and what its search found."""

    form: Form
    result: SearchResult

    def row(self) -> dict[str, Any]:
        """Plain JSON values; None where nothing fits."""
        ranked, job = self.result.ranked, self.form.job
        return {
            "global_batch": job.global_batch,
            "precision": job.precision,
            "runtime": self.form.runtime_name,
            "gpus": self.result.cluster.gpus,
            "tokens_per_s": None if ranked is None else float(ranked.tokens_per_s[0]),
            "step_s": None if ranked is None else float(ranked.step_s[0]),
            "layout": None if ranked is None else ranked.layouts.row(0).words(),
        }


def batch_range(text: str) -> tuple[int, ...]:
    """`512` -> (512,), `512:2048` -> (512, 1024, 2048). Raises InputError for anything else."""
    low, colon, high = text.partition(":")
    try:
        first, last = int(low), int(high) if colon else int(low)
    except ValueError:
        raise InputError(
            f"{text!r} is not a number or a range", place="--global-batch", remedy="write 512 or 512:2048"
        ) from None
    if not 1 <= first <= last:
        raise InputError(
            f"global_batch={text} is not a rising range" if colon else f"global_batch={text} is not positive",
            place="--global-batch",
            remedy="write low:high, such as 512:2048" if colon else "give 1 or more",
        )
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return tuple(dict.fromkeys((*sizes, last)))


def forms(job: Job, runtime_name: str, batches: Sequence[int], allow: Sequence[str]) -> Iterator[Form]:
    """The question as asked, then with what `allow` adds: precisions, switches of the runtime in any company they can run in (layout
    words among them are left to the search). Raises InputError for an unknown word."""
    switches = _check_allowed(runtime_name, allow)
    precisions = dict.fromkeys((job.precision, *(word for word in allow if word in PRECISIONS)))
    names = [runtime_name]
    for size in range(1, len(switches) + 1):
        names += ["+".join((runtime_name, *some)) for some in combinations(switches, size)]
    runtimes = [(name, runtime) for name in names if (runtime := _loaded(name)) is not None]
    for (name, runtime), precision, batch in product(runtimes, precisions, batches):
        yield Form(job=replace(job, precision=precision, global_batch=batch), runtime=runtime, runtime_name=name)


def _check_allowed(runtime_name: str, allow: Sequence[str]) -> list[str]:
    """The words of `allow` that are switches of the runtime."""
    switches: list[str] = []
    for word in allow:
        if word in PRECISIONS or word in ALLOWABLE:
            continue
        try:
            load_runtime(f"{runtime_name}+{word}")
        except InputError as bad:
            if "unknown" in bad.problem:
                known = (*PRECISIONS, *ALLOWABLE)
                raise InputError(
                    f"{word!r} is no precision, quantised collective or switch of {runtime_name!r}",
                    place="--allow",
                    remedy=f"{nearest(word, known)}; {bad.remedy}",
                ) from None
        switches.append(word)
    return switches


def _loaded(name: str) -> Runtime | None:
    """The runtime, None where a switch needs another one before it."""
    try:
        return load_runtime(name)
    except InputError as bad:
        if "needs" not in bad.problem:
            raise
        return None


def ask_all(questions: Sequence[Form], search_form: Callable[[Form], SearchResult]) -> list[Answer]:
    """Every form searched, in order; after an interrupted one no other."""
    found: list[Answer] = []
    for form in questions:
        found.append(Answer(form=form, result=search_form(form)))
        if found[-1].result.partial:
            break
    return found


def best_answer(answers: Sequence[Answer], objective: Objective) -> Answer:
    """The answer whose first layout is best by the objective, by the smallest batch that is as good; the first where nothing fits."""
    fitting = [one for one in answers if one.result.ranked is not None]
    if not fitting:
        return answers[0]
    best = min(fitting, key=lambda one: _figures(one, objective))
    alike = [
        one
        for one in fitting
        if (one.form.runtime_name, one.form.job.precision) == (best.form.runtime_name, best.form.job.precision)
        and _figures(one, objective)[0] <= NEAR_BEST * _figures(best, objective)[0]
    ]
    return min(alike, key=lambda one: one.form.job.global_batch)


def _figures(answer: Answer, objective: Objective) -> tuple[float, float]:
    """What the objective makes small, then seconds per token of all GPUs."""
    result = answer.result
    assert result.ranked is not None
    seconds_per_token = 1.0 / float(result.ranked.tokens_per_s[0])
    first = {
        "throughput": seconds_per_token,
        "cost": seconds_per_token * result.cluster.nodes,
        "memory": float(result.ranked.device_peak_bytes[0]),
        "gpus": float(result.cluster.gpus),
        "deadline": float(result.cluster.gpus),
    }
    return first[objective], seconds_per_token
