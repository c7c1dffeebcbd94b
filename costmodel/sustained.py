"""A setting at the rates that training sustains: what `fitted` says of its GPUs, links and runtime."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from shardplan.costmodel.fitted import Fitted, fitted, with_fitted_cluster, with_fitted_runtime
from shardplan.costmodel.keys import SETTINGS_AT_ONCE, Same
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import Runtime, without_overlap
from shardplan.hw_profiles.machine import Cluster


def prepared(setting: Setting, constants: Fitted | None = None) -> Setting:
    """The setting at the rates that training sustains (`fitted`)."""
    used = fitted() if constants is None else constants
    cluster, runtime = _sustained(Same((setting.cluster, setting.runtime, used)))
    return replace(setting, cluster=cluster, runtime=runtime)


@lru_cache(maxsize=SETTINGS_AT_ONCE)
def _sustained(same: Same) -> tuple[Cluster, Runtime]:
    """A cluster and a runtime at the rates that training sustains: the same objects again as long as they are asked for in turn."""
    cluster, runtime, used = same.objects
    sustained = with_fitted_runtime(runtime, cluster, used)
    if cluster.gpu.device == "cpu":
        sustained = without_overlap(sustained)
    return with_fitted_cluster(cluster, used), sustained
