"""Constants fitted on published runs: few, physical, bounded, all in `fitted.toml` with what they were fitted on.

Per GPU architecture: the share of the micro-benchmarked matrix, memory and node-link rates that training sustains. Per runtime: bytes that
element-wise operators move and the shares of communication that hide behind compute. `shardplan validate --refit` writes the file;
a runtime without an entry keeps the values of its own file, an architecture without one takes the mean of the others, and every curve
measured on the machine itself stays as it is: calibration belongs to a machine.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from statistics import geometric_mean
from typing import Any

from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Cluster, EfficiencyCurve, Gpu, Node

ARCHITECTURE_BOUNDS: Mapping[str, tuple[float, float, float, float]] = {
    "gemm": (0.5, 1.15, 0.95, 0.08),
    "memory": (0.5, 1.08, 0.95, 0.1),
    "attention": (0.6, 1.5, 1.0, 0.15),
    "link": (0.5, 1.6, 1.0, 0.2),
    "network": (0.5, 1.6, 1.0, 0.1),
}
"""Constant -> lowest, highest, what physics suggests, and how sure that is (standard deviation of the logarithm)."""
RUNTIME_BOUNDS: Mapping[str, tuple[float, float, float, float]] = {
    "elementwise_traffic": (0.7, 4.0, 1.4, 0.35),
    "attention_rate": (0.7, 1.6, 1.0, 0.15),
    "tensor_overlap": (0.0, 0.9, 0.1, 0.3),
    "gather_overlap": (0.0, 1.0, 0.5, 0.3),
    "prefetch_overlap": (0.0, 1.0, 0.7, 0.3),
    "reduce_overlap": (0.0, 1.0, 0.7, 0.3),
}
"""The same per runtime; shares have their deviation in absolute terms."""
SHARES = ("tensor_overlap", "gather_overlap", "prefetch_overlap", "reduce_overlap")
"""Constants that are shares of communication; the others scale."""

Table = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """All fitted constants: by architecture and by runtime (its name without switches)."""

    architecture: Table
    runtime: Table

    def table(self, name: str) -> Table:
        """`architecture` or `runtime` by that name."""
        return self.architecture if name == "architecture" else self.runtime

    @property
    def count(self) -> int:
        """Number of constants."""
        return sum(len(row) for table in (self.architecture, self.runtime) for row in table.values())


@cache
def fitted() -> Fitted:
    """The shipped constants."""
    text = (resources.files("shardplan.costmodel") / "fitted.toml").read_text(encoding="utf-8")
    document: dict[str, Any] = tomllib.loads(text)
    return Fitted(architecture=document.get("architecture", {}), runtime=document.get("runtime", {}))


def sustained_shares(gpu: Gpu, constants: Fitted) -> Mapping[str, float]:
    """Fitted constants of a GPU's architecture; the geometric mean of the others' where no run on it was fitted (`is_fitted`), as what
    training sustains is a share of what benchmarks do on every GPU that was; none on a CPU."""
    if gpu.device == "cpu":
        return {}
    table = constants.architecture
    if gpu.architecture in table or not table:
        return table.get(gpu.architecture, {})
    names = {name for row in table.values() for name in row}
    return {name: geometric_mean(row[name] for row in table.values() if name in row) for name in sorted(names)}


def is_fitted(gpu: Gpu, constants: Fitted | None = None) -> bool:
    """Whether runs on GPUs of this architecture were fitted."""
    return gpu.device == "cpu" or gpu.architecture in (constants or fitted()).architecture


def with_fitted_runtime(runtime: Runtime, cluster: Cluster, constants: Fitted) -> Runtime:
    """The runtime with its fitted constants, changed by switches as much as the values of its file were; attention also by what the
    cluster's GPU sustains, unless that was measured."""
    given = constants.runtime.get(runtime.fitted_entry, {})
    values = {name: value * runtime.switched.get(name, 1.0) for name, value in given.items()}
    execution = {name: value for name, value in values.items() if name not in SHARES}
    communication = {name: value for name, value in values.items() if name in SHARES}
    on_gpu = sustained_shares(cluster.gpu, constants).get("attention", 1.0)
    if not any("gpu.attention_efficiency" in path for path in _measured(cluster)):
        execution["attention_rate"] = on_gpu * execution.get("attention_rate", runtime.execution.attention_rate)
    return replace(
        runtime,
        execution=replace(runtime.execution, **execution),
        communication=replace(runtime.communication, **communication),
    )


def _measured(cluster: Cluster) -> set[str]:
    """Figures of the profile that were measured on the machine itself."""
    return {path for path, source in cluster.provenance.items() if source.kind == "measured"}


def with_fitted_cluster(cluster: Cluster, constants: Fitted) -> Cluster:
    """The cluster at the rates that training sustains; curves with source kind `measured` stay as they are."""
    measured = _measured(cluster)
    runs = tuple((_fitted_node(node, constants, measured), count) for node, count in cluster.node_runs)
    network = cluster.network
    if not any("network.efficiency" in path for path in measured):
        factor = sustained_shares(cluster.gpu, constants).get("network", 1.0)
        network = replace(network, efficiency=_scaled(network.efficiency, factor))
    return replace(cluster, node_runs=runs, network=network)


def _fitted_node(node: Node, constants: Fitted, measured: Collection[str]) -> Node:
    values = sustained_shares(node.gpu, constants)

    def factor(name: str, curve: str) -> float:
        return 1.0 if any(curve in path for path in measured) else values.get(name, 1.0)

    gpu, link = node.gpu, node.intra
    gemm, memory = factor("gemm", "gpu.gemm_efficiency"), factor("memory", "gpu.memory_efficiency")
    inside, reducing = factor("link", "intra.efficiency"), link.all_reduce_efficiency
    gpu = replace(
        gpu,
        gemm_efficiency={word: _scaled(curve, gemm) for word, curve in gpu.gemm_efficiency.items()},
        memory_efficiency=_scaled(gpu.memory_efficiency, memory),
    )
    link = replace(
        link,
        efficiency=_scaled(link.efficiency, inside),
        all_reduce_efficiency=None if reducing is None else _scaled(reducing, inside),
    )
    return replace(node, gpu=gpu, intra=link)


def _scaled(curve: EfficiencyCurve, factor: float) -> EfficiencyCurve:
    return replace(curve, fractions=tuple(factor * fraction for fraction in curve.fractions))
