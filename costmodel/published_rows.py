"""Tables of published runs: one CSV row -> what the cost model is asked (model, job, cluster, layout, runtime), or why it is not.

Columns are those of docs/validation.md. Nothing here looks at a row's id, source or citation: only at what was run on what.
Words of the table map to runtimes and machines through `validation_names.toml`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.published_experts import UnknownShapeError, expert_model
from shardplan.costmodel.published_software import Row, names, recompute_modules, remarks, said, software
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import Cluster

COLUMNS = [
    "case_id",
    "source",
    "citation",
    "quality",
    "model",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn",
    "gated_mlp",
    "vocab",
    "tied_embeddings",
    "experts",
    "experts_per_token",
    "expert_ffn",
    "shared_experts",
    "seq",
    "gpu",
    "gpus",
    "gpus_per_node",
    "network_gbps_per_gpu",
    "dp",
    "tp",
    "pp",
    "virtual_stages",
    "cp",
    "ep",
    "zero",
    "hpz",
    "offload_optimizer",
    "offload_params",
    "micro_batch",
    "global_batch",
    "schedule",
    "recompute",
    "sequence_parallel",
    "attention",
    "precision",
    "grad_dtype",
    "optimizer",
    "overlap_dp",
    "framework",
    "step_s",
    "tokens_per_s_per_gpu",
    "peak_memory_gib",
    "memory_kind",
    "out_of_memory",
    "notes",
]
"""Columns a table must have; `profile` (a cluster of the catalog, or a file) and `memory_stages` may follow."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a row measured, ready to be estimated."""

    model: Model
    job: Job
    cluster: Cluster
    layout: Layout
    runtime: Runtime
    recompute_unknown: bool
    """The row does not say what was recomputed: the least that fits is assumed."""


class RefusedRowError(Exception):
    """The row asks for something the model does not cover; the text says what."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a table; InputError names file, line and field when it is not one."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing[:5])}{' …' * (len(missing) > 5)}",
                    place=str(path),
                    remedy="see docs/validation.md for the columns",
                )
            rows = [_full(row, path, reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as bad:
        raise InputError(f"cannot be read ({bad})", place=str(path), remedy="give a CSV file in UTF-8") from None
    if not rows:
        raise InputError("has no rows", place=str(path), remedy="give at least one measured run")
    return rows


def _full(row: Mapping[str, str | None], path: Path, line: int) -> Row:
    """The row as text; InputError when it ends early (a truncated file) or has cells beyond the header."""
    if None in row.values() or None in row:
        raise InputError(
            f"line {line} has {'fewer' if None in row.values() else 'more'} cells than the header",
            place=str(path),
            remedy="is the file complete? write every cell, empty ones too",
        )
    return {name: value or "" for name, value in row.items()}


def number(row: Row, name: str, default: float | None = None) -> float:
    """A number of the row; InputError names case, field and value when it is none."""
    text = row[name].strip()
    if not text and default is None:
        raise RefusedRowError(f"the row does not say {name}")
    if not text:
        return float(default or 0.0)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise InputError(
            f"case {row['case_id']!r}: {name}={text!r} is not a number of 0 or more", remedy="correct the table"
        )
    return value


def whole(row: Row, name: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of the row, `least` or more where the row gives one."""
    value = number(row, name, default)
    if value != int(value) or (row[name].strip() and value < least):
        raise InputError(
            f"case {row['case_id']!r}: {name}={row[name]!r} is not a whole number of {least} or more",
            remedy="correct the table",
        )
    return int(value)


def flag(row: Row, name: str) -> bool:
    """A true/false column; empty is false."""
    return row[name].strip().lower() == "true"


def is_doubtful(row: Row) -> bool:
    """Whether the notes mark the row SUSPECT: nothing is fitted on it."""
    return "SUSPECT" in row["notes"]


def row_case(row: Row) -> Case:
    """The question a row asks; raises RefusedRowError with the reason when the model does not cover it."""
    _refuse_uncovered(row)
    runtime, unsaid = _software(row)
    model, layout = _model(row), _layout(row, unsaid, runtime)
    seq, batch = whole(row, "seq"), whole(row, "global_batch")
    try:
        job = Job(
            seq=seq,
            global_batch=batch,
            precision=row["precision"],
            grad_dtype=row["grad_dtype"] or None,
            **{
                **_adapters(row, unsaid),
                **{word: value for remark in remarks(row) for word, value in remark.get("job", {}).items()},
            },
        )
    except InputError as bad:
        raise RefusedRowError(str(bad)) from None
    unknown = not row["recompute"] and layout.recompute == "none"
    return Case(model=model, job=job, cluster=_cluster(row), layout=layout, runtime=runtime, recompute_unknown=unknown)


def _refuse_uncovered(row: Row) -> None:
    """RefusedRowError for what the cost model does not know yet."""
    if row["precision"] == "fp4":
        raise RefusedRowError(f"precision {row['precision']} is not modelled yet")


def names_adapters(row: Row) -> bool:
    """Whether model or notes name LoRA or QLoRA."""
    return re.search(r"\bq?lora\b", said(row)) is not None


def _adapters(row: Row, unsaid: Mapping[str, Any]) -> Mapping[str, Any]:
    """Method, rank and targets of a row whose model or notes name LoRA or QLoRA, or a 4-bit base (nf4); the software's own rank and
    targets where the notes say none."""
    text = said(row)
    if not names_adapters(row):
        return {}
    quantised = re.search(r"\bqlora\b|nf4", text)
    usual = {"lora_rank": 16, "lora_targets": "all", **unsaid.get("adapters", {})}
    rank = re.search(r"\blora r=(\d+)", text)
    targets = "attention" if "on q,k,v,o" in text else usual["lora_targets"]
    return {
        "method": "qlora" if quantised else "lora",
        "lora_rank": int(rank.group(1)) if rank else usual["lora_rank"],
        "lora_targets": targets,
    }


def _software(row: Row) -> tuple[Runtime, Mapping[str, Any]]:
    found = software(row)
    if found is None:
        raise RefusedRowError(f"framework {row['framework']!r} has no runtime yet")
    return found


UNSAID_VOCABULARY = {True: 32_000, False: 50_257}
"""Tokens where the row does not say, by whether the MLP is gated: Llama 2's and GPT-2's."""


def _model(row: Row) -> Model:
    """Shapes of the row; position code, norms and biases follow the family that the MLP tells (gated: Llama, plain: GPT)."""
    if row["experts"]:
        return _expert_model(row)
    gated = flag(row, "gated_mlp")
    hidden = whole(row, "hidden")
    heads = whole(row, "heads", max(hidden // 128, 1))
    kind = LayerKind(
        hidden=hidden,
        heads=heads,
        kv_heads=whole(row, "kv_heads", heads),
        head_dim=whole(row, "head_dim", hidden // heads),
        ffn=whole(row, "ffn", 4 * hidden),
        gated_mlp=gated,
        norm="rmsnorm" if gated else "layernorm",
        qkv_bias=not gated,
        attention_output_bias=not gated,
        mlp_bias=not gated,
        rotary=gated,
        dropout=not gated and row["attention"] == "unfused",
    )
    return Model(
        name=row["model"],
        family="llama" if gated else "gpt2",
        layers=((kind, whole(row, "layers")),),
        vocab=whole(row, "vocab", UNSAID_VOCABULARY[gated]),
        tied_embeddings=flag(row, "tied_embeddings"),
        learned_positions=0 if gated else whole(row, "seq"),
        source=row["citation"],
    )


def _expert_model(row: Row) -> Model:
    shape = tuple(whole(row, name) for name in ("hidden", "heads", "experts", "experts_per_token", "expert_ffn"))
    hidden, heads, *_ = shape
    others = {
        "kv_heads": whole(row, "kv_heads", heads),
        "head_dim": whole(row, "head_dim", hidden // heads),
        "ffn": whole(row, "ffn", 4 * hidden),
        "shared_experts": whole(row, "shared_experts", 0, least=0),
        "gated_mlp": int(row["gated_mlp"] != "false"),
        "tied_embeddings": int(flag(row, "tied_embeddings")),
    }
    try:
        model = expert_model(
            shape, whole(row, "layers"), whole(row, "vocab", UNSAID_VOCABULARY[True]), row["notes"], others
        )
    except UnknownShapeError as unknown:
        raise RefusedRowError(str(unknown)) from None
    return replace(model, name=row["model"], source=row["citation"]) if not model.name else model


def _layout(row: Row, unsaid: Mapping[str, Any], runtime: Runtime) -> Layout:
    hpz = whole(row, "hpz", 0)
    dp, stage = whole(row, "dp"), whole(row, "zero", unsaid["zero"], least=0)
    tp, pp, micro_batch = (whole(row, name) for name in ("tp", "pp", "micro_batch"))
    finest = whole(row, "layers") // pp if pp > 1 and unsaid.get("interleaves") else 1
    cp, ep, virtual_stages = whole(row, "cp", 1), whole(row, "ep", 1), whole(row, "virtual_stages", max(finest, 1))
    schedule = row["schedule"] or ("interleaved" if virtual_stages > 1 else "1f1b")
    try:
        return Layout(
            dp=dp,
            tp=tp,
            pp=pp,
            cp=cp,
            ep=ep,
            micro_batch=micro_batch,
            virtual_stages=virtual_stages,
            zero=stage,
            **{"hpz" if "hpz" in runtime.abilities.zeropp else "dp_shard": hpz} if hpz else {},
            sequence_parallel=flag(row, "sequence_parallel") or _splits_for_experts(row, tp, runtime),
            recompute=_recompute(row, pp, unsaid.get("recompute_sharded", "") if stage == 3 else ""),
            schedule="1f1b" if schedule == "none" else schedule.replace("-", "_"),
            attention=row["attention"] or "auto",
            offload_optimizer=row["offload_optimizer"] or "none",
            offload_params=row["offload_params"] or "none",
            **{word: value for remark in remarks(row) for word, value in remark.get("layout", {}).items()},
        )
    except InputError as bad:
        raise RefusedRowError(str(bad)) from None


def _splits_for_experts(row: Row, tp: int, runtime: Runtime) -> bool:
    """A row with experts that says nothing of sequence parallelism, on a runtime that needs it for them beside tensor parallelism."""
    return bool(
        row["experts"] and not row["sequence_parallel"] and tp > 1 and runtime.abilities.expert_parallel_splits_sequence
    )


def _recompute(row: Row, pp: int, usual: str) -> str:
    """The row's word, or what is `usual`; `partial` does not say how many layers: half of a stage is taken (every second layer)."""
    if row["recompute"] == "partial":
        return f"full:{max(whole(row, 'layers') // (2 * pp), 1)}"
    word = (recompute_modules(row) if row["recompute"] == "selective" else None) or row["recompute"]
    return word or usual or ("none" if row["attention"] == "flash" else "full")


def _cluster(row: Row) -> Cluster:
    """The machine of the row's GPU (or `profile`, or one that remarks name), with its node size and network rate where the row states
    them."""
    told = [remark["cluster"] for remark in remarks(row) if "cluster" in remark]
    name = row.get("profile") or (told[0] if told else None) or _named_machine(row) or names()["gpus"].get(row["gpu"])
    if not name:
        raise RefusedRowError(f"GPU {row['gpu']!r} is not in the catalog yet")
    size, rate = whole(row, "gpus_per_node", 0), number(row, "network_gbps_per_gpu", 0.0)
    try:
        return _machine(name, whole(row, "gpus"), size, rate)
    except InputError as bad:
        place = f"{bad.place}: " if bad.place else ""
        raise InputError(f"case {row['case_id']!r}: profile: {place}{bad.problem}", remedy=bad.remedy) from None


def _named_machine(row: Row) -> str | None:
    """A cluster of the catalog that is known by its GPU and node size, network rate or software."""
    has = {
        "gpus_per_node": whole(row, "gpus_per_node", 0),
        "network_gbps_per_gpu": number(row, "network_gbps_per_gpu", 0.0),
    }
    for machine in names()["machines"]:
        stated = all(machine.get(column, value) == value for column, value in has.items())
        if stated and row["gpu"] == machine["gpu"] and machine.get("framework", "") in row["framework"].lower():
            return machine["cluster"]
    return None


@cache
def _machine(name: str, gpus: int, gpus_per_node: int, gbps_per_gpu: float) -> Cluster:
    cluster = load_cluster(name)
    if cluster.node.tray_gpus and gpus_per_node == cluster.node.tray_gpus:  # servers of a rack that is one node
        cluster = cluster.with_gpus(gpus)
        gpus_per_node = cluster.node.gpus
    node, network = cluster.node, cluster.network
    size = min(gpus_per_node or node.gpus, gpus)
    node = replace(node, gpus=size)
    if gbps_per_gpu:
        rate = gbps_per_gpu * 1e9 / 8 * size / network.nics_per_node
        network = network.at_rate(rate)
    return replace(cluster, node_runs=((node, max(gpus // size, 1)),), network=network)
