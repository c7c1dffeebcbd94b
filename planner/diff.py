"""Two plans side by side: what differs in their inputs and layouts, and what that does to time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.planner.plan import WISHES, Plan

MEMORY_PARTS = (
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "buffers_bytes",
    "allocator_slack_bytes",
    "context_bytes",
)
LEFT_OUT = ("prediction", "search", "digests", "schema", "schema_version", "rank_map")
"""Of a plan's document: told apart, not an input, or what follows from the layout."""
OF_FILES = ("model", "cluster", "runtime")
"""Digests that may differ where no field of the plan does."""


def diff_plans(before: Plan, after: Plan) -> dict[str, Any]:
    """Plain values: `inputs` and `layout` as {field: [before, after]}, `time_s` and `memory_bytes` as {part: [before, after]} of the
    step and of the fullest stage of each, `throughput` of tokens/s per GPU, MFU and fit; `same` when nothing differs; `notes` on each of
    them that was edited since it was made."""
    one, other = before.document(), after.document()
    changed = dict(_differences(_told(one), _told(other)))
    layout = {name.removeprefix("layout."): pair for name, pair in changed.items() if name.startswith("layout.")}
    inputs = {name: pair for name, pair in changed.items() if not name.startswith("layout.")}
    for name in sorted((set(before.digests) | set(after.digests)) & set(OF_FILES)):
        pair = [before.digests.get(name), after.digests.get(name)]
        shown = any(field == name or field.startswith(f"{name}.") for field in inputs)
        if pair[0] != pair[1] and not shown:
            inputs[f"{name} (its file)"] = [str(digest)[:12] for digest in pair]
    time = {part: [one["prediction"]["time"].get(part), other["prediction"]["time"].get(part)] for part in TIME_PARTS}
    return {
        "same": not inputs and not layout and one["prediction"]["time"] == other["prediction"]["time"],
        "inputs": inputs,
        "layout": layout,
        "step_s": [one["prediction"]["time"]["step_s"], other["prediction"]["time"]["step_s"]],
        "time_s": {part: pair for part, pair in time.items() if any(pair)},
        "memory_bytes": _memory(one["prediction"], other["prediction"]),
        "throughput": {
            name: [one["prediction"]["throughput"].get(name), other["prediction"]["throughput"].get(name)]
            for name in ("tokens_per_s", "tokens_per_s_per_gpu", "mfu")
        },
        "fits": [one["prediction"].get("fits"), other["prediction"].get("fits")],
        "notes": [before.notes(), after.notes()],
    }


def _told(document: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan's document is compared field by field; what its search was asked for by the names of those options."""
    fields = {name: value for name, value in document.items() if name not in LEFT_OUT}
    return fields | {name: document["search"][name] for name in WISHES if name in document["search"]}


def _memory(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[float]]:
    """Parts of the fullest stage of each, and its peak."""
    fullest = [max(side["memory"]["stages"], key=lambda stage: stage["device_bytes"]) for side in (one, other)]
    return {part: [float(stage[part]) for stage in fullest] for part in (*MEMORY_PARTS, "device_bytes")}


def _differences(one: object, other: object, place: str = "") -> Iterator[tuple[str, list[Any]]]:
    """(dotted name, [one, other]) of every leaf that differs; a leaf that only one side has is None on the other."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        left, right = cast("Mapping[str, object]", one), cast("Mapping[str, object]", other)
        for name in dict.fromkeys((*left, *right)):
            yield from _differences(left.get(name), right.get(name), f"{place}.{name}" if place else name)
    elif one != other:
        yield place, [one, other]
