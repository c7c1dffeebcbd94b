"""Why: what binds a plan, and how its runners-up differ term by term."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardplan.costmodel.estimates import DEFAULT_HEADROOM
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import layout_from_document, layout_table, parse_layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.remedies import GIB, first_knob, memory_remedy
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import Runtime, load_runtime
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_from_document
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.explain_stages import stage_lines
from shardplan.planner.own_changes import own_changes
from shardplan.planner.placement import placement_document
from shardplan.planner.plan import Plan, digest
from shardplan.planner.ranking import OBJECTIVES, Objective
from shardplan.planner.search import judge, search_document
from shardplan.planner.sensitivity import Question, figure_of, network_needed, one_change
from shardplan.planner.shortlist import RUNNERS_UP
from shardplan.planner.space import ALLOWABLE, Wishes, parse_wishes
from shardplan.planner.watch import Watch


def explain_plan(plan: Plan, watch: Watch | None = None) -> dict[str, Any]:
    """A plan looked at again with today's cost model on the machine it carries; `watch` is told how far it is."""
    runtime = load_runtime(plan.runtime)
    cluster = cluster_from_document(dict(plan.cluster)).with_gpus(plan.gpus)
    headroom = float(plan.search.get("headroom", DEFAULT_HEADROOM))
    prediction = judge(plan.layout, model=plan.model, job=plan.job, cluster=cluster, runtime=runtime, headroom=headroom)
    if not isinstance(prediction, dict):
        raise InputError(
            f"its layout has no meaning here: {prediction[0].rule}: {prediction[0].detail}",
            place="layout",
            remedy="make the plan again with `shardplan plan`",
        )
    runners = [row for row in plan.search.get("ranked", []) if row["layout"] != plan.layout.words()][:RUNNERS_UP]
    notes = plan.notes()
    changed = plan.digests.get("runtime") not in (None, digest(dataclasses.asdict(runtime)))
    if changed and "asked" not in plan.edited:
        notes.append(f"the runtime file {plan.runtime!r} has changed since the plan was made")
    planned = float(plan.prediction["time"]["step_s"])
    if abs(prediction["time"]["step_s"] / planned - 1.0) > 1e-3:
        now = "what is described here takes" if plan.edited else "the cost model now says"
        notes.append(f"{now} {prediction['time']['step_s']:.3g} s a step, the plan said {planned:.3g} s")
    compared = [
        _compared(row["layout"], prediction, plan.model, plan.job, cluster, runtime, headroom) for row in runners
    ]
    setting = Setting(model=plan.model, job=plan.job, cluster=cluster, runtime=runtime)
    question = Question(
        model=plan.model,
        job=plan.job,
        cluster=cluster,
        runtime=runtime,
        wishes=parse_wishes(
            str(plan.search.get("fix", "")), plan.search.get("forbid", ()), plan.search.get("allow", ())
        ),
        headroom=headroom,
        objective=_objective(plan),
        watch=watch or Watch(),
    )
    return {
        **prediction,
        "subject": {"model": plan.model.name, "cluster": cluster.name, "job": dataclasses.asdict(plan.job)},
        "binds": what_binds(prediction, setting, headroom),
        "placement": placement_document(setting, plan.layout),
        "one_change": one_change(question),
        "one_change_keeps": "nothing",
        "one_change_of": figure_of(question).words,
        "network_needed": network_needed(question, plan.layout),
        "runners_up": [row for row in compared if row],
        "search": dict(plan.search),
        "notes": notes,
    }


def _objective(plan: Plan) -> Objective:
    """What the plan was made for; files from before it was written say nothing."""
    known: list[Objective] = [one for one in OBJECTIVES if one == plan.search.get("objective")]
    return known[0] if known else "throughput"


def explain_layout(
    answer: Mapping[str, Any],
    *,
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime,
    headroom: float = DEFAULT_HEADROOM,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The user's own layout against the best of the whole space, with the words of ALLOWABLE that the layout has; `watch` is told how far
    it is."""
    own = layout_from_document(answer["layout"])
    question = Question(
        model=model,
        job=job,
        cluster=cluster,
        runtime=runtime,
        wishes=Wishes(allowed=frozenset(word for word in ALLOWABLE if getattr(own, word))),
        headroom=headroom,
        watch=watch or Watch(),
    )
    result = question.search()
    setting = Setting(model=model, job=job, cluster=cluster, runtime=runtime)
    document: dict[str, Any] = {
        **answer,
        "subject": {"model": model.name, "cluster": cluster.name, "job": dataclasses.asdict(job)},
        "binds": what_binds(answer, setting, headroom) if answer["time"] else [],
        "placement": placement_document(setting, own) if answer["time"] else None,
        "one_change": own_changes(question, own) if answer["time"] else [],
        "one_change_keeps": "layout",
        "one_change_of": figure_of(question).words,
        "network_needed": network_needed(question, own) if answer["time"] else None,
        "runners_up": [],
        "search": search_document(result, 5),
        "notes": [],
    }
    if result.ranked is None:
        document["notes"].append("no layout fits this model on these GPUs with this runtime")
        return document
    best = result.ranked.layouts.row(0)
    if layout_table([own]).row(0) == best:
        document["notes"].append("this layout is the best of the space")
        others = [row["layout"] for row in document["search"]["ranked"] if row["layout"] != best.words()][:1]
        beside = [_compared(words, answer, model, job, cluster, runtime, headroom) for words in others]
        document["runners_up"] = [row for row in beside if row]
        return document
    against = _compared(best.words(), answer, model, job, cluster, runtime, headroom) if answer["time"] else None
    if against:
        document["runners_up"] = [against]
        slower = answer["time"]["step_s"] / against["step_s"]
        if answer["fits"] and slower < AS_FAST:
            document["notes"].append(
                f"{1.0 - slower:.1%} less time than the best layout that was found: {best.words()}"
            )
        else:
            document["notes"].append(f"{slower:.2f} times the step time of the best layout that fits: {best.words()}")
    else:
        document["notes"].append(
            f"best layout that fits: {best.words()} ({float(result.ranked.step_s[0]):.3g} s a step)"
        )
    return document


def _compared(
    words: str,
    own: Mapping[str, Any],
    model: Model,
    job: Job,
    cluster: Cluster,
    runtime: Runtime,
    headroom: float,
) -> dict[str, Any] | None:
    """Another layout's step time and memory, and the difference of each time part to `own` (positive = the other is slower)."""
    other = judge(parse_layout(words), model=model, job=job, cluster=cluster, runtime=runtime, headroom=headroom)
    if not isinstance(other, dict) or not own["time"]:
        return None
    parts = {part: other["time"][part] - own["time"][part] for part in TIME_PARTS}
    return {
        "layout": words,
        "step_s": other["time"]["step_s"],
        "device_peak_bytes": other["memory"]["device_peak_bytes"],
        "difference_s": {part: seconds for part, seconds in parts.items() if seconds},
    }


def what_binds(prediction: Mapping[str, Any], setting: Setting, headroom: float = DEFAULT_HEADROOM) -> list[str]:
    """Sentences: the largest time besides compute, the fullest stage and its largest part, the first knob when memory runs out."""
    layout = layout_from_document(prediction["layout"])
    short = any(one["rule"] == "device-memory" for one in prediction["rejections"])
    knob = memory_remedy if short else first_knob
    time, memory = prediction["time"], prediction["memory"]
    lost = {part: time[part] for part in TIME_PARTS if part != "compute_s"}
    part = max(lost, key=lambda name: lost[name])
    room = {one["stage"]: one["capacity_bytes"] for one in prediction.get("stages") or ()}
    stage = max(memory["stages"], key=lambda s: s["device_bytes"] / room.get(s["stage"], memory["capacity_bytes"]))
    sizes = {name: stage[f"{name}_bytes"] for name in ("parameters", "gradients", "optimizer", "activations")}
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        f"time: {time['compute_s'] / time['step_s']:.0%} of the step is compute; the largest loss is "
        f"{TIME_WORDS[part]} ({lost[part] / time['step_s']:.1%})",
        f"memory: stage {stage['stage']} is fullest with {stage['device_bytes'] / GIB:.1f} of "
        f"{memory['capacity_bytes'] / GIB:.1f} GiB, most of it {largest} ({sizes[largest] / GIB:.1f} GiB)",
        f"if it runs out of memory: {knob(setting, layout, time['step_s'], headroom)}",
        *_allocator_line(stage),
        *stage_lines(prediction),
    ]


def _allocator_line(stage: Mapping[str, Any]) -> list[str]:
    """The allocator setting to try where the estimate counts more slack than torchtitan's eight published peaks show with it."""
    slack = stage["allocator_slack_bytes"] / stage["allocated_bytes"] if stage["allocated_bytes"] else 0.0
    if slack <= EXPANDABLE_SLACK * (1 + 1e-6):  # a sum of bytes, not the fraction itself
        return []
    return [
        f"allocator: {stage['allocator_slack_bytes'] / GIB:.1f} GiB are slack ({slack:.0%}); PYTORCH_ALLOC_CONF="
        f"expandable_segments:True leaves about {EXPANDABLE_SLACK:.0%} (as torchtitan starts; its published peaks)"
    ]


AS_FAST = 1.0 - 1e-6
"""Of the best step found, from which on a layout of the user's own is not called faster."""
EXPANDABLE_SLACK = 0.045
TIME_WORDS = {
    "compute_s": "compute",
    "recompute_s": "recompute",
    "tp_exposed_s": "tensor-parallel communication",
    "cp_exposed_s": "context-parallel communication",
    "ep_exposed_s": "expert-parallel communication",
    "dp_exposed_s": "data-parallel communication",
    "pp_exposed_s": "pipeline transfers",
    "bubble_s": "the pipeline bubble",
    "offload_exposed_s": "offload",
    "optimizer_s": "the optimizer",
    "host_s": "host and launch overhead",
}
