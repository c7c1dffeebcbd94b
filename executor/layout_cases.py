"""What `validate_device` runs on processes of a CPU: layouts of one, two and four ranks of two small models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, parse_layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import load_model
from shardplan.planner.plan import Plan

SIZES = ("tiny", "wide")
"""tiny: the preset, 8 sequences of 256. wide: six layers of twice its widths, 8 sequences of 128."""
LAYOUTS: Mapping[int, tuple[str, ...]] = {
    1: ("micro_batch=8", "micro_batch=1", "micro_batch=4 recompute=full"),
    2: (
        "dp=2 zero=0 micro_batch=4",
        "dp=2 zero=2 micro_batch=2",
        "dp=2 zero=3 micro_batch=4",
        "tp=2 micro_batch=8",
        "tp=2 micro_batch=4 sequence_parallel=true",
        "pp=2 micro_batch=1 schedule=1f1b",
        "pp=2 micro_batch=2 schedule=gpipe recompute=full",
    ),
    4: (
        "dp=4 zero=1 micro_batch=2",
        "dp=4 zero=3 micro_batch=1 recompute=full",
        "dp=2 tp=2 zero=0 micro_batch=4",
        "dp=2 tp=2 zero=3 micro_batch=1",
        "dp=2 pp=2 zero=1 micro_batch=1 schedule=1f1b",
        "tp=2 pp=2 micro_batch=1",
        "pp=4 micro_batch=1 schedule=1f1b",
    ),
}
"""By number of ranks."""


@dataclass(frozen=True, kw_only=True)
class LayoutCase:
    """One layout of one size."""

    size: str
    words: str

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.size} {self.words}"

    def model(self) -> Model:
        """The preset, or a wider one."""
        tiny = load_model("tiny")
        if self.size == "tiny":
            return tiny
        kind = replace(tiny.layers[0][0], hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=768)
        return replace(tiny, name="wide", layers=((kind, 6),))

    def job(self) -> Job:
        """One step."""
        return Job(seq=256 if self.size == "tiny" else 128, global_batch=8, precision="fp32")

    def layout(self) -> Layout:
        """Of its ranks."""
        return parse_layout(self.words)

    def plan(self, cluster: Mapping[str, Any], prediction: Mapping[str, Any]) -> Plan:
        """What the executor takes."""
        return Plan(
            model=self.model(),
            job=self.job(),
            cluster=cluster,
            gpus=self.layout().gpus,
            runtime="shardplan",
            layout=self.layout(),
            prediction=prediction,
            search={},
            digests={},
            shardplan_version="",
        )


def layout_cases(ranks: int) -> tuple[LayoutCase, ...]:
    """All of that many ranks."""
    return tuple(LayoutCase(size=size, words=words) for size in SIZES for words in LAYOUTS[ranks])
