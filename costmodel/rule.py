"""What a rule is: a predicate over layout columns with a reason and a remedy; the list of them is `rules.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, LayoutTable
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.runtime import Runtime
from shardplan.hw_profiles.machine import Cluster

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a rule may look at besides the layout."""

    model: Model
    job: Job
    cluster: Cluster
    runtime: Runtime

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The layer kinds of the model, prediction modules included."""
        return tuple(kind for kind, _ in self.model.runs)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One reason to refuse a layout."""

    id: str
    broken: Callable[[Setting, LayoutTable], BoolArray]
    detail: Callable[[Setting, Layout], str]
    """The values that break it."""
    remedy: Callable[[Setting, Layout], str]
    structural: bool = False
    """Its predicate reads columns of `row_keys.RowKeys.work`, or of `.states`, not of both: it is asked about one layout of each key."""
    evidence: str = ""
    """Where the rule is from, when it is not arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why one layout is refused, as a value."""

    rule: str
    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}; {self.remedy}"
