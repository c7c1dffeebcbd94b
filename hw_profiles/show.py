"""What `shardplan hardware` tells, as plain data: the catalog in rows, one part or profile field by field with its sources."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardplan.hw_profiles.document import (
    LOCALHOST,
    PART_KINDS,
    Document,
    PartKind,
    as_table,
    file_kind,
    is_path,
    part_document,
    part_names,
    unknown_name,
)
from shardplan.hw_profiles.load import cluster_digest, cluster_document, cluster_from_document
from shardplan.hw_profiles.machine import Cluster
from shardplan.hw_profiles.names import known_as
from shardplan.hw_profiles.topology import tier_table

Row = dict[str, Any]
_UNITS = {
    "_mib": "MiB",
    "_gib": "GiB",
    "_tb": "TB",
    "_gb_per_s": "GB/s",
    "_gbit_per_s": "Gbit/s",
    "_tflops": "TFLOP/s",
    "_us": "us",
    "_w": "W",
    "gpu_hours_per_failure": "GPU h",
    "_minutes": "min",
    "usd_per_hour": "USD/h",
    "_bytes_per_parameter": "B/parameter",
    "_tokens": "tokens",
}
_SECTION_ORDER = ("gpu", "node", "network", "storage", "failures")
_GENERATIONS = (
    *("volta", "turing", "ampere", "ampere_ga102", "ada", "hopper", "blackwell", "blackwell_ultra", "blackwell_gb202"),
    *("cdna2", "cdna3", "cdna4", "gaudi2", "gaudi3", "x86_64"),
)
"""GPU architectures in the order of the lists: by vendor, oldest first."""


def hardware_list() -> dict[PartKind, list[Row]]:
    """Rows of the whole catalog by kind, key figures only; `localhost` is named and not detected.

    GPUs, nodes and clusters come by GPU architecture (vendor, then age), networks by kind; then by name.
    """
    return {
        "clusters": sorted((_cluster_row(name) for name in part_names("clusters")), key=_by_generation),
        "nodes": sorted((_node_row(name) for name in part_names("nodes")), key=_by_generation),
        "networks": sorted((_network_row(name) for name in part_names("networks")), key=_by_kind),
        "gpus": sorted((_gpu_row(name) for name in part_names("gpus")), key=_by_generation),
    }


def _by_generation(row: Row) -> tuple[int, str, str]:
    """Known architectures in their order, then others by name; `localhost`, which has none, last."""
    word = row["architecture"] or "~"
    return (_GENERATIONS.index(word) if word in _GENERATIONS else len(_GENERATIONS), word, row["name"])


def _by_kind(row: Row) -> tuple[str, float, str]:
    return (row["kind"], row["nic_gbit_per_s"], row["name"])


def hardware_show(name: str | Path) -> Row:
    """One cluster (catalog, `localhost`, TOML file), node, network or GPU.

    Keys: name, kind, sections [{title, rows [{field, value, unit, source_kind, source}]}]; a price also has its date or
    null. A cluster also has gpus, nodes, usd_per_gpu_hour and price_date (null: nobody says), digest, guesses (paths) and tiers
    (a row per tier). Raises InputError for an unknown name or a file with a mistake.
    """
    kind, name = _kind_of(name)
    if kind != "clusters":
        document = part_document(kind, name)
        sections = document if kind == "nodes" else {kind.removesuffix("s"): document}
        return {"name": str(name), "kind": kind.removesuffix("s"), "sections": _sections(sections)}
    document = cluster_document(name)
    cluster = cluster_from_document(document)
    if cluster.parts:
        return _mixed_shown(document, cluster)
    return {
        "name": cluster.name,
        "kind": "cluster",
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "usd_per_gpu_hour": cluster.node.usd_per_gpu_hour,
        "price_date": cluster.node.price_date,
        "digest": cluster_digest(document),
        "sections": _sections(document),
        "guesses": list(cluster.guesses()),
        "tiers": tier_rows(document),
    }


def _mixed_shown(document: Document, cluster: Cluster) -> Row:
    """A mixed cluster: the sections and tiers of every part, titled with its name; one price per GPU and hour over all parts."""
    sections = [{"title": "network", "rows": list(_rows(document["network"]))}] if "network" in document else []
    tiers: list[Row] = []
    for part in document["parts"]:
        sections += [{**one, "title": f"{part['name']}: {one['title']}"} for one in _sections(part)]
        tiers += [{**row, "tier": f"{part['name']}: {row['tier']}"} for row in tier_rows(part)]
    prices = [part.node.usd_per_hour for part in cluster.parts]
    known = [price * part.nodes for price, part in zip(prices, cluster.parts, strict=True) if price is not None]
    return {
        "name": cluster.name,
        "kind": "cluster",
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "usd_per_gpu_hour": sum(known) / cluster.gpus if len(known) == len(prices) else None,
        "price_date": None,
        "digest": cluster_digest(document),
        "sections": sections,
        "guesses": list(cluster.guesses()),
        "tiers": tiers,
    }


def tier_rows(document: Document) -> list[Row]:
    """The tier table of a cluster document for people: GB/s, us; bandwidth is null where nothing limits it."""
    tiers = tier_table(cluster_from_document(document))
    return [
        {
            "tier": name,
            "gpus": int(tiers.gpus[index]),
            "bandwidth_gb_per_s": _finite(float(tiers.bandwidth_bytes_per_s[index]) / 1e9),
            "latency_us": round(float(tiers.latency_s[index]) * 1e6, 3),
            "ring_efficiency_at_64_mib": round(float(tiers.efficiency[index].at(2.0**26)), 3),
            "all_reduce_efficiency_at_64_mib": round(float(tiers.all_reduce_efficiency[index].at(2.0**26)), 3),
            "switched": bool(tiers.is_switched[index]),
        }
        for index, name in enumerate(tiers.names)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _kind_of(name: str | Path) -> tuple[PartKind, str | Path]:
    """Kind and catalog name; a cluster where several kinds share a name: it shows the node as well."""
    if is_path(name):
        return file_kind(name), name
    kinds: tuple[PartKind, ...] = ("clusters", "nodes", "networks", "gpus")
    for kind in kinds:
        known = known_as(str(name), part_names(kind))
        if known:
            return kind, known
    raise unknown_name("hardware", str(name), {word for kind in PART_KINDS for word in part_names(kind)})


def _sections(document: Document) -> list[Row]:
    """Fields outside every section first, then one section per part."""
    own = {key: value for key, value in document.items() if key not in _SECTION_ORDER}
    found = [("cluster", own)] if own else []
    found += [(title, document[title]) for title in _SECTION_ORDER if title in document]
    return [{"title": title, "rows": list(_rows(table))} for title, table in found]


def _rows(table: Document, path: str = "") -> Iterator[Row]:
    for key, value in table.items():
        here, inner = (f"{path}.{key}" if path else key), as_table(value)
        if inner is None:
            yield {"field": here, "value": value, "unit": "", "source_kind": "", "source": ""}
        elif "source" in inner:
            origin = {"source_kind": inner["source_kind"], "source": inner["source"]}
            if "fraction" in inner:
                size = next(word for word in inner if word.startswith("size_"))
                points = [list(point) for point in zip(inner[size], inner["fraction"], strict=True)]
                yield {"field": here, "value": points, "unit": f"fraction by {_size_unit(size)}", **origin}
            elif "head_dim" in inner:
                yield from ({**row, **origin} for row in _attention_rows(inner, here))
            else:
                dated = {"date": inner.get("date")} if key == "usd_per_hour" else {}
                yield {"field": here, "value": inner["value"], "unit": _unit(here), **dated, **origin}
        else:
            yield from _rows(inner, here)


def _attention_rows(kernel: Document, path: str) -> Iterator[Row]:
    """Plateaus of one kernel as two curves, its ramps as numbers."""
    for way in ("forward", "backward"):
        points = [list(point) for point in zip(kernel["head_dim"], kernel[way], strict=True)]
        yield {"field": f"{path}.{way}", "value": points, "unit": "fraction by head dim"}
    for key in kernel:
        if key.endswith("_tokens") or key == "causal_plateau_fraction":
            yield {"field": f"{path}.{key}", "value": kernel[key], "unit": _unit(key)}


def _size_unit(key: str) -> str:
    return {"size_gflop": "GFLOP", "size_mib": "MiB"}[key]


def _unit(path: str) -> str:
    """Unit by the ending of the key, or of the table around it (peak_tflops.bf16)."""
    for key in reversed(path.split(".")):
        for ending in sorted(_UNITS, key=len, reverse=True):
            if key.endswith(ending):
                return _UNITS[ending]
    return ""


def _number(table: Document, *keys: str) -> Any:
    """The bare number at a path of a merged document; None where there is none."""
    here: Any = table
    for key in keys:
        here = (as_table(here) or {}).get(key)
    return (as_table(here) or {}).get("value")


def _cluster_row(name: str) -> Row:
    if name == LOCALHOST:
        prices = ("usd_per_node_hour", "usd_per_gpu_hour", "price_date")
        unknown = dict.fromkeys(("architecture", "gpus", "nodes", "gpu", "node", "network", *prices))
        return {"name": name, **unknown, "note": "this machine, detected when asked for"}
    document = cluster_document(name)
    node = document["node"]
    nodes, gpus, price = _number(document, "nodes"), _number(node, "gpus"), _number(node, "usd_per_hour")
    return {
        "name": name,
        "architecture": document["gpu"]["architecture"],
        "gpus": nodes * gpus,
        "nodes": nodes,
        "gpu": document["gpu"]["name"],
        "node": node["name"],
        "network": document["network"]["name"],
        "usd_per_node_hour": price,
        "usd_per_gpu_hour": None if price is None else price / gpus,
        "price_date": node.get("usd_per_hour", {}).get("date"),
        "note": "",
    }


def _node_row(name: str) -> Row:
    document = part_document("nodes", name)
    node = document["node"]
    return {
        "name": name,
        "architecture": document["gpu"]["architecture"],
        "gpus": _number(node, "gpus"),
        "gpu": document["gpu"]["name"],
        "link": node["intra"]["kind"],
        "bandwidth_gb_per_s": _number(node, "intra", "bandwidth_gb_per_s"),
        "ram_gib": _number(node, "host", "ram_gib"),
        "cores": _number(node, "host", "cores"),
        "nvme_tb": _number(node, "nvme", "capacity_tb"),
        "power_w": _number(node, "power_w"),
        "usd_per_hour": _number(node, "usd_per_hour"),
    }


def _network_row(name: str) -> Row:
    network = part_document("networks", name)
    return {
        "name": name,
        "kind": network["kind"],
        "nics_per_node": _number(network, "nics_per_node"),
        "nic_gbit_per_s": _number(network, "nic_gbit_per_s"),
        "leaf_nodes": _number(network, "leaf_nodes"),
        "oversubscription": _number(network, "oversubscription"),
        "rail_optimised": _number(network, "rail_optimised"),
    }


def _gpu_row(name: str) -> Row:
    gpu = part_document("gpus", name)
    return {
        "name": name,
        "architecture": gpu["architecture"],
        "memory_mib": _number(gpu, "memory_mib"),
        "bandwidth_gb_per_s": _number(gpu, "bandwidth_gb_per_s"),
        "fp16_tflops": _number(gpu, "peak_tflops", "fp16"),
        "bf16_tflops": _number(gpu, "peak_tflops", "bf16"),
        "fp8_tflops": _number(gpu, "peak_tflops", "fp8"),
        "power_w": _number(gpu, "power_w"),
    }
