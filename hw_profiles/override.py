"""Figures that a user gives beside a profile: they go into the document, so that a plan file carries them with their source."""

from __future__ import annotations

from shardplan.hw_profiles.document import Document
from shardplan.hw_profiles.errors import InputError


def with_price(document: Document, usd_per_gpu_hour: float, gpus_per_node: int) -> Document:
    """The cluster document at a price per GPU and hour; `gpus_per_node` are the GPUs in use on each node.

    Raises InputError unless the price is above 0 and finite.
    """
    _check("price", usd_per_gpu_hour, "--price", "give USD per GPU and hour, or leave it out when unknown")
    if "parts" in document:
        each = [(part, part["node"]["gpus"]["value"]) for part in document["parts"]]
        return {**document, "parts": [with_price(part, usd_per_gpu_hour, gpus) for part, gpus in each]}
    given = f"--price {usd_per_gpu_hour:g} per GPU and hour, {gpus_per_node} GPUs of each node in use"
    price = {"value": usd_per_gpu_hour * gpus_per_node, "source": given, "source_kind": "spec"}
    return {**document, "node": {**document["node"], "usd_per_hour": price}}


def with_failure_rate(document: Document, gpu_hours_per_failure: float) -> Document:
    """The cluster document with its own failure rate. Raises InputError unless it is above 0 and finite."""
    remedy = "give GPU-hours per failure, for instance 50000, or leave it out for the default"
    _check("gpu_hours_per_failure", gpu_hours_per_failure, "--gpu-hours-per-failure", remedy)
    if "parts" in document:
        return {**document, "parts": [with_failure_rate(part, gpu_hours_per_failure) for part in document["parts"]]}
    rate = {"value": gpu_hours_per_failure, "source": "--gpu-hours-per-failure", "source_kind": "spec"}
    return {**document, "failures": {**document.get("failures", {}), "gpu_hours_per_failure": rate}}


def _check(name: str, value: float, place: str, remedy: str) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{name}={value:g} is not a positive number", place=place, remedy=remedy)
