"""Catalog names and user profiles to checked machines in SI units.

cluster = load_cluster("h100-ib", gpus=512)
document = cluster_document("my-cluster.toml")   # plain data with sources, for plan files
assert cluster_from_document(document) == load_cluster("my-cluster.toml")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shardplan.hw_profiles.document import (
    LOCALHOST,
    Document,
    PartKind,
    as_table,
    merged_table,
    part_document,
    part_names,
)
from shardplan.hw_profiles.machine import (
    AttentionCurve,
    Cluster,
    EfficiencyCurve,
    Failures,
    Gpu,
    Host,
    Link,
    Network,
    Node,
    Nvme,
    Source,
    Storage,
    plain_attention,
)
from shardplan.hw_profiles.mixed import mixed_cluster, with_part_defaults
from shardplan.hw_profiles.power import cap_in_words, capped_curve, clock_fraction

if TYPE_CHECKING:
    from shardplan.hw_profiles import schema, schema_values

GIGA, MICRO = 1e9, 1e-6
MIB, GIB = 2.0**20, 2.0**30
TIMED_PRODUCTS = ((1.0, 1.0, 1.0), (4.0, 0.5, 0.5), (2.0, 0.5, 1.0))
"""Rows, depth, columns relative to an edge of what `shardplan calibrate` times for one point of a measured curve: a square, a narrow model
over many tokens, an up-projection; all of equal FLOP."""


def list_parts(kind: PartKind) -> tuple[str, ...]:
    """Names in the catalog of one kind: "gpus", "nodes", "networks" or "clusters" (the last one ends with localhost)."""
    return part_names(kind)


def load_cluster(name_or_path: str | Path, *, gpus: int | None = None) -> Cluster:
    """A catalog cluster, `localhost` or a TOML file; `gpus` overrides its size (part of one node, or whole nodes).

    Raises InputError in one line: unknown name, unreadable file, unknown key, missing or wrong value.
    """
    cluster = cluster_from_document(cluster_document(name_or_path))
    return cluster if gpus is None else cluster.with_gpus(gpus)


def load_gpu(name: str) -> Gpu:
    """A GPU of the catalog; InputError lists the nearest names when there is none."""
    from shardplan.hw_profiles.complaints import parse
    from shardplan.hw_profiles.schema import GpuPart

    return _gpu(parse(GpuPart, part_document("gpus", name), f"catalog/gpus/{name}.toml"))


def cluster_document(name_or_path: str | Path) -> Document:
    """The fully merged cluster as plain JSON-able data: every number is {value, source, source_kind}. Checked."""
    if name_or_path == LOCALHOST:
        from shardplan.hw_profiles.detect import localhost_table

        source = Source(kind="measured", text="detected on this machine")
        merged = merged_table("clusters", localhost_table(), name=LOCALHOST, place=LOCALHOST, default=source)
    else:
        merged = part_document("clusters", name_or_path)
    document = with_part_defaults(merged, _with_defaults) if "parts" in merged else _with_defaults(merged)
    if "parts" in document:
        mixed_cluster(document, str(name_or_path), cluster_from_document)
    else:
        _checked(document, str(name_or_path))
    return document


def cluster_from_document(document: Mapping[str, Any], *, place: str = "hardware document") -> Cluster:
    """The cluster that `cluster_document` described, for instance inside a plan file; InputError when it is damaged."""
    if "parts" in document:
        return mixed_cluster(document, place, cluster_from_document)
    part = _checked(document, place)
    node = _node(part.node, _gpu(part.gpu))
    return Cluster(
        name=part.name,
        node_runs=((node, part.nodes.value),),
        network=_network(part.network),
        provenance={**dict(_provenance(dict(document))), **_cap_provenance(part.gpu)},
        storage=_storage(part.storage) if part.storage else None,
        failures=_failures(part.failures) if part.failures else None,
    )


def cluster_digest(document: Mapping[str, Any]) -> str:
    """sha256 (hexadecimal) of the document's canonical JSON: equal for equal content, whatever the order of keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(document: object, place: str) -> schema.ClusterPart:
    from shardplan.hw_profiles.complaints import parse
    from shardplan.hw_profiles.schema import ClusterPart

    return parse(ClusterPart, document, place)


def _with_defaults(merged: Document) -> Document:
    """One node, no network and the cluster's own name for its parts, unless said; sections in reading order."""
    one = {"value": 1, "source": "a cluster is one node unless its file says more", "source_kind": "spec"}
    network = merged["network"] if "network" in merged else part_document("networks", "none")
    document = {"name": merged["name"], "nodes": merged.get("nodes", one)}
    for section in ("gpu", "node"):
        if section in merged:
            document[section] = merged[section]
    document = {**document, "network": network, **{k: v for k, v in merged.items() if k not in (*document, "network")}}
    for section in ("gpu", "node", "network"):
        part = as_table(document.get(section))
        if part is not None and "source" not in part:
            document[section] = {"name": merged["name"], **part}
    return document


def _provenance(table: Document, path: str = "") -> Iterator[tuple[str, Source]]:
    """(dotted path, source) of every number and curve."""
    for key, value in table.items():
        inner = as_table(value)
        if inner is None:
            continue
        here = f"{path}.{key}" if path else key
        if "source" in inner:
            yield here, Source(kind=inner["source_kind"], text=inner["source"])
        else:
            yield from _provenance(inner, here)


def _curve(part: schema_values.GflopCurve | schema_values.MibCurve, unit: float) -> EfficiencyCurve:
    return EfficiencyCurve(sizes=tuple(size * unit for size in part.sizes()), fractions=tuple(part.fraction))


def _gpu(part: schema.GpuPart) -> Gpu:
    peaks = cast(dict[str, "schema_values.Positive | None"], dict(part.peak_tflops))
    curves = cast(dict[str, "schema_values.GflopCurve | None"], dict(part.gemm_efficiency))
    return Gpu(
        name=part.name,
        vendor=part.vendor,
        architecture=part.architecture,
        device=part.device,
        peak_flop_per_s={word: peak.value * 1e12 for word, peak in peaks.items() if peak},
        vector_flop_per_s=part.vector_tflops.value * 1e12,
        memory_bytes=part.memory_mib.value * MIB,
        memory_bandwidth_bytes_per_s=part.bandwidth_gb_per_s.value * GIGA,
        l2_bytes=part.l2_mib.value * MIB,
        multiprocessors=part.multiprocessors.value,
        gemm_efficiency={word: _product_curve(curve, part) for word, curve in curves.items() if curve},
        attention_efficiency=_attention(part.attention_efficiency),
        memory_efficiency=_curve(part.memory_efficiency, MIB),
        launch_s=part.launch_us.value * MICRO,
        context_bytes=part.context_gib.value * GIB,
        power_w=part.power_w.value if part.power_w else None,
        power_cap_w=part.power_cap_w.value if part.power_cap_w else None,
    )


def _product_curve(curve: schema_values.GflopCurve, gpu: schema.GpuPart) -> EfficiencyCurve:
    """The curve under the GPU's power cap; one that was measured on the machine itself was measured under it."""
    plain = _curve(curve, GIGA)
    if curve.source_kind == "measured":
        plain = replace(plain, shapes=TIMED_PRODUCTS)
    if gpu.power_cap_w is None or gpu.power_w is None or curve.source_kind == "measured":
        return plain
    return capped_curve(plain, clock_fraction(gpu.power_cap_w.value, gpu.power_w.value))


def _cap_provenance(gpu: schema.GpuPart) -> dict[str, Source]:
    """The multiplier of a power cap is a guess, which widens the band of step times."""
    curves = cast("dict[str, schema_values.GflopCurve | None]", dict(gpu.gemm_efficiency))
    scaled = any(curve.source_kind != "measured" for curve in curves.values() if curve)
    if gpu.power_cap_w is None or gpu.power_w is None or gpu.power_cap_w.value == gpu.power_w.value or not scaled:
        return {}
    text = cap_in_words(gpu.power_cap_w.value, gpu.power_w.value)
    return {"gpu.gemm_efficiency.power_cap": Source(kind="guess", text=text)}


def _attention(part: schema.AttentionEfficiency) -> dict[str, AttentionCurve]:
    if part.forward is not None and part.backward is not None:
        return {"plain": plain_attention(part.forward.value, part.backward.value)}
    return {
        name: AttentionCurve(
            head_dims=tuple(kernel.head_dim),
            forward=tuple(kernel.forward),
            backward=tuple(kernel.backward),
            forward_ramp_tokens=kernel.forward_ramp_tokens,
            backward_ramp_tokens=kernel.backward_ramp_tokens,
            causal_ramp_tokens=kernel.causal_ramp_tokens,
            causal_plateau_fraction=kernel.causal_plateau_fraction,
        )
        for name, kernel in part.kernels().items()
    }


def _node(part: schema.NodePart, gpu: Gpu) -> Node:
    intra, host, nvme = part.intra, part.host, part.nvme
    return Node(
        name=part.name,
        gpu=gpu,
        gpus=part.gpus.value,
        tray_gpus=part.tray_gpus.value if part.tray_gpus else None,
        intra=Link(
            kind=intra.kind,
            bandwidth_bytes_per_s=intra.bandwidth_gb_per_s.value * GIGA,
            latency_s=intra.latency_us.value * MICRO,
            efficiency=_curve(intra.efficiency, MIB),
            all_reduce_efficiency=_curve(intra.all_reduce_efficiency, MIB) if intra.all_reduce_efficiency else None,
            point_to_point_fraction=intra.point_to_point_fraction.value,
        ),
        host=Host(
            cores=host.cores.value,
            ram_bytes=host.ram_gib.value * GIB,
            memory_bandwidth_bytes_per_s=host.memory_bandwidth_gb_per_s.value * GIGA,
            memory_efficiency=host.memory_efficiency.value,
            pcie_bytes_per_s=host.pcie_gb_per_s.value * GIGA,
            adam_bytes_per_parameter=host.adam_bytes_per_parameter.value,
            pcie_node_bytes_per_s=host.pcie_node_gb_per_s.value * GIGA if host.pcie_node_gb_per_s else None,
        ),
        nvme=Nvme(
            read_bytes_per_s=nvme.read_gb_per_s.value * GIGA,
            write_bytes_per_s=nvme.write_gb_per_s.value * GIGA,
            capacity_bytes=nvme.capacity_tb.value * 1e12,
        )
        if nvme
        else None,
        power_w=part.power_w.value if part.power_w else None,
        usd_per_hour=part.usd_per_hour.value if part.usd_per_hour else None,
        price_date=part.usd_per_hour.date if part.usd_per_hour else None,
    )


def _network(part: schema.NetworkPart) -> Network:
    return Network(
        name=part.name,
        kind=part.kind,
        nics_per_node=part.nics_per_node.value,
        nic_bytes_per_s=part.nic_gbit_per_s.value * GIGA / 8,
        latency_s=part.latency_us.value * MICRO,
        spine_latency_s=part.spine_latency_us.value * MICRO,
        efficiency=_curve(part.efficiency, MIB),
        leaf_nodes=part.leaf_nodes.value,
        oversubscription=part.oversubscription.value,
        rail_optimised=part.rail_optimised.value if part.rail_optimised else None,
        point_to_point_fraction=part.point_to_point_fraction.value,
    )


def _storage(part: schema.StoragePart) -> Storage:
    read, write, capacity = part.read_gb_per_s, part.write_gb_per_s, part.capacity_tb
    return Storage(
        kind=part.kind,
        read_bytes_per_s=read.value * GIGA if read else None,
        write_bytes_per_s=write.value * GIGA if write else None,
        capacity_bytes=capacity.value * 1e12 if capacity else None,
    )


def _failures(part: schema.FailuresPart) -> Failures:
    hours, minutes = part.gpu_hours_per_failure, part.restart_minutes
    return Failures(
        gpu_hours_per_failure=hours.value if hours else None, restart_s=minutes.value * 60.0 if minutes else None
    )
