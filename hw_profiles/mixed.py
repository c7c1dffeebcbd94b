"""Mixed clusters: parts of equal nodes each, in the order of their ranks, and what joins them.

A file lists [[parts]], each a cluster of its own with `nodes`, `[parts.node]`, `[parts.network]` or a `base`. `[network]` beside them
is what the parts are joined by, and the network of every part that names none; without it the slower of the parts' networks joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shardplan.hw_profiles.document import Document, as_table
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.machine import Cluster, Network, Node

MIXED_WORDS = ("name", "network", "parts")


def with_part_defaults(merged: Document, with_defaults: Callable[[Document], Document]) -> Document:
    """The merged document with every part complete."""
    parts: list[Document] = [with_defaults(part) for part in merged["parts"]]
    network = {"network": merged["network"]} if "network" in merged else {}
    unknown = [key for key in merged if key not in MIXED_WORDS]
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is not a word of a mixed cluster",
            place=str(merged.get("name", "")),
            remedy="put it into one of its [[parts]], or leave it out",
        )
    return {"name": merged["name"], **network, "parts": parts}


def mixed_cluster(document: Mapping[str, Any], place: str, read: Callable[..., Cluster]) -> Cluster:
    """The cluster of a document with parts; `read` reads one part. InputError where nodes cannot run one job together."""
    tables: list[Document] = [table for one in document["parts"] if (table := as_table(one)) is not None]
    parts = tuple(read(table, place=f"{place}, parts[{index}]") for index, table in enumerate(tables))
    if len(parts) < 2:
        raise InputError("has fewer than two parts", place=place, remedy="write [[parts]] for each kind of node")
    _check_together(parts, place)
    joint = [part.network for part in parts if part.network.kind != "none"]
    if "network" in document:
        first = {**tables[0], "network": document["network"]}
        joint = [read(first, place=place).network]
    if not joint:
        raise InputError("has parts and no network between them", place=place, remedy='add [network] base = "ib-ndr"')
    return Cluster(
        name=str(document["name"]),
        node_runs=tuple(run for part in parts for run in part.node_runs),
        network=min(joint, key=_rate),
        provenance={
            f"parts[{index}].{path}": source
            for index, part in enumerate(parts)
            for path, source in part.provenance.items()
        },
        parts=parts,
    )


def _rate(network: Network) -> float:
    return network.nics_per_node * network.nic_bytes_per_s


def _check_together(parts: tuple[Cluster, ...], place: str) -> None:
    gpus = [part.gpu for part in parts]
    for words in ({gpu.vendor for gpu in gpus}, {gpu.device for gpu in gpus}):
        if len(words) > 1:
            raise InputError(
                f"mixes GPUs of {' and '.join(sorted(words))}, which no communication library joins in one job",
                place=place,
                remedy="mix GPUs of one vendor",
            )
    total = sum(part.gpus for part in parts)
    for part in parts:
        if total % part.node.gpus:
            raise InputError(
                f"has {total} GPUs in all, not a multiple of the {part.node.gpus} of a {part.name} node",
                place=place,
                remedy="take nodes of as many GPUs, or another number of them",
            )


def as_all(mixed: Cluster, part: Cluster) -> Cluster:
    """The mixed cluster if all its nodes were those of `part`, joined by the slower of the part's network and what joins the parts."""
    node: Node = part.node
    network = min((part.network, mixed.network), key=_rate) if part.network.kind != "none" else mixed.network
    return replace(part, node_runs=((node, mixed.gpus // node.gpus),), network=network)


def in_order(mixed: Cluster, order: tuple[int, ...]) -> Cluster:
    """The same cluster with its ranks on the parts in another order."""
    parts = tuple(mixed.parts[index] for index in order)
    return replace(mixed, parts=parts, node_runs=tuple(run for part in parts for run in part.node_runs))


def document_in_order(document: Document, cluster: Cluster) -> Document:
    """The document with the parts in the order of `cluster`."""
    if not cluster.parts:
        return document
    names = [part["name"] for part in document["parts"]]
    return {**document, "parts": [document["parts"][names.index(part.name)] for part in cluster.parts]}
