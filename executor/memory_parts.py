"""Predicted and actual device memory by part: of a run that ended, or that ran out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

from shardplan.executor.measure import host_peak_bytes

GIB = 2.0**30
ROWS = (
    ("parameters", ("parameters_bytes",)),
    ("gradients", ("gradients_bytes",)),
    ("optimizer", ("optimizer_bytes",)),
    ("activations and buffers", ("activations_bytes", "buffers_bytes")),
    ("allocated peak", ("allocated_bytes",)),
    ("reserved", ("allocated_bytes", "allocator_slack_bytes")),
    ("of the device", ("device_bytes",)),
)
"""Row of the table -> what adds up to it in a stage of the prediction."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Is it the device's memory, also where a pipeline stage has wrapped the error in its own?"""
    import torch

    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def device_parts(
    parameters: Iterable[Tensor], states: Iterable[Any], device: torch.device, *, gathered_bytes: float
) -> dict[str, float]:
    """What this rank holds and the peak since the step began, bytes by row of `ROWS`; `free` is what the device had left.

    `parameters` are the shards, `gathered_bytes` what whole copies of them take.
    """
    import torch

    held = list(parameters)
    found: dict[str, float] = {
        "parameters": sum(map(local_bytes, held)) + gathered_bytes,
        "gradients": sum(local_bytes(p.grad) for p in held if p.grad is not None),
        "optimizer": sum(local_bytes(value) for value in states if isinstance(value, torch.Tensor)),
    }
    if device.type != "cuda":
        return found
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    peak = float(stats["allocated_bytes.all.peak"])
    return {
        **found,
        "activations and buffers": max(0.0, peak - sum(found.values())),
        "allocated peak": peak,
        "reserved": float(stats["reserved_bytes.all.peak"]),
        "of the device": float(total - free),
        "free": float(free),
        "capacity": float(total),
    }


def gradient_bytes(parameters: Iterable[Tensor]) -> float:
    """Bytes of the gradients that this rank holds now."""
    return float(sum(local_bytes(p.grad) for p in parameters if p.grad is not None))


def run_parts(
    parameters: Iterable[Tensor],
    states: Iterable[Any],
    device: torch.device,
    *,
    gradients_bytes: float,
    gathered_bytes: float,
    before_bytes: float,
) -> dict[str, float]:
    """As `device_parts` at the end of a run, whose gradients and whole copies of parameters are gone: they took so much.

    On a CPU `of the device` is the most the process ever had, `context` what it had before there was a model; the rest are activations.
    """
    found = {
        **device_parts(parameters, states, device, gathered_bytes=gathered_bytes),
        "gradients": gradients_bytes,
    }
    states_bytes = sum(found[part] for part in ("parameters", "gradients", "optimizer"))
    if device.type == "cuda":
        found["activations and buffers"] = max(0.0, found["allocated peak"] - states_bytes)
        return found
    peak = float(host_peak_bytes())
    return {
        **found,
        "activations and buffers": max(0.0, peak - before_bytes - states_bytes),
        "context": before_bytes,
        "of the device": peak,
    }


def local_bytes(tensor: Tensor) -> int:
    """Bytes of what this rank holds of it."""
    from shardplan.executor.mesh import local_part

    local = local_part(tensor)
    return local.numel() * local.element_size()


def told_parts(prediction: Mapping[str, Any], *, stage: int, actual: Mapping[str, float]) -> list[str]:
    """The table, a line a part; the part furthest above its prediction is named."""
    stages = (prediction.get("memory") or {}).get("stages") or ()
    expected = next((one for one in stages if one.get("stage") == stage), None) or {}
    lines = [f"out of memory on stage {stage}:", f"{'':<24}{'predicted':>12}{'actual':>12}"]
    over: dict[str, float] = {}
    for row, names in ROWS:
        said = sum(expected[name] for name in names) if all(name in expected for name in names) else None
        lines.append(f"{row:<24}{_gib(said):>12}{_gib(actual.get(row)):>12}")
        if said is not None and row in actual and row in [first for first, _ in ROWS[:4]]:
            over[row] = actual[row] - said
    if "capacity" in actual:
        lines.append(f"the device has {_gib(actual['capacity'])}, {_gib(actual['free'])} of it free")
    worst = max(over, key=lambda row: over[row], default=None)
    if worst is not None and over[worst] > 0:
        lines.append(f"furthest above its prediction: {worst}, by {_gib(over[worst])}")
    return lines


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f} GiB"
