"""Why stages hold what they hold: uneven ones, and those of a mixed cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2.0**30


def stage_lines(prediction: Mapping[str, Any]) -> list[str]:
    """Sentences on the stages of a pipeline of a prediction; none without a pipeline."""
    stages: Sequence[Mapping[str, Any]] = prediction.get("stages") or ()
    if len(stages) < 2:
        return []
    return [_balance(stages), *_recompute(stages), *_parts(prediction, stages)]


def _balance(stages: Sequence[Mapping[str, Any]]) -> str:
    slowest = max(stages, key=lambda one: one["micro_batch_s"])
    fastest = min(stages, key=lambda one: one["micro_batch_s"])
    layers = [one["layers"] for one in stages]
    spread = f"{min(layers)} to {max(layers)} layers" if min(layers) < max(layers) else f"{layers[0]} layers each"
    ends = "embedding on the first, head and loss on the last"
    return (
        f"stages: {spread} ({ends}); a micro-batch takes {_ms(slowest)} on stage {slowest['stage']}, the slowest, and "
        f"{_ms(fastest)} on stage {fastest['stage']}, the fastest"
    )


def _recompute(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    recomputed = [one["recomputed_layers"] for one in stages]
    if min(recomputed) == max(recomputed):
        return []
    told = ", ".join(map(str, recomputed))
    return [f"recompute: {told} layers of the stages, as many as each needs to fit what it keeps in flight"]


def _parts(prediction: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    parts: Sequence[Mapping[str, Any]] = prediction.get("parts") or ()
    lines = [_part(part, stages) for part in parts if part["stages"]]
    if parts and not lines:
        lines = ["parts: ranks of one stage lie on several kinds of node, so all go at the pace of the slowest"]
    if "runtimes" in prediction:
        lines.append(
            f"runtimes that can run this layout: {', '.join(prediction['runtimes']) or 'none that is shipped'}"
        )
    return lines


def _part(part: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    numbers: list[int] = part["stages"]
    own: list[Mapping[str, Any]] = [stages[number] for number in numbers]
    layers, total = sum(one["layers"] for one in own), sum(one["layers"] for one in stages)
    each = sum(one["micro_batch_s"] for one in own) / max(layers, 1)
    fullest = max(own, key=lambda one: one["device_bytes"] / one["capacity_bytes"])
    first, last = numbers[0], numbers[-1]
    which = f"stages {first} to {last}" if last > first else f"stage {first}"
    return (
        f"{which} on {part['name']} ({part['gpus']} GPUs): {layers} of {total} layers, since a layer with its share of the ends takes "
        f"{each * 1e3:.3g} ms of a micro-batch there; the fullest has {fullest['device_bytes'] / GIB:.1f} of "
        f"{fullest['capacity_bytes'] / GIB:.1f} GiB"
    )


def _ms(stage: Mapping[str, Any]) -> str:
    return f"{stage['micro_batch_s'] * 1e3:.3g} ms"
