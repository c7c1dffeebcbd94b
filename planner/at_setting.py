"""The cost model and the rules asked about tables of layouts at one setting."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.estimate import estimate, memory_alone
from shardplan.costmodel.estimates import Estimates
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.rule import BoolArray, Setting
from shardplan.costmodel.rules import broken_rules


def estimated(setting: Setting, layouts: LayoutTable) -> Estimates:
    """Memory and time of every layout, of the stages that can be the worst; InputError for an empty table."""
    return estimate(
        model=setting.model, job=setting.job, cluster=setting.cluster, layouts=layouts, runtime=setting.runtime
    )


def fitting(setting: Setting, layouts: LayoutTable, headroom: float) -> BoolArray:
    """Rows that fit, (N,), without their times."""
    return memory_alone(setting, layouts).fits(headroom)


def unbroken(setting: Setting, layouts: LayoutTable) -> BoolArray:
    """Rows that break no rule, (N,)."""
    return ~np.any([np.zeros(len(layouts), dtype=bool), *broken_rules(setting, layouts).values()], axis=0)
