"""How far a step time may be off: by what is guessed of the machine, and by what the model and the method add."""

from __future__ import annotations

from shardplan.costmodel.estimates import ADAPTER_BAND, EXPERT_BAND, GUESS_BAND, TIME_BAND
from shardplan.costmodel.fitted import is_fitted
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.machine import Cluster

TIMED_FIELDS = ("efficiency", "bandwidth", "peak_tflops", "network.latency", "intra.latency", "launch", "nic_")


def time_band(setting: Setting) -> float:
    """Half-width of the band of step time of what does not offload, relative."""
    gpus = [node.gpu for node, _ in setting.cluster.node_runs]
    guesses = bool(timing_guesses(setting.cluster, setting.job.precision)) or not all(map(is_fitted, gpus))
    experts = any(kind.experts for kind in setting.kinds)
    adapters = setting.job.adapters is not None
    return TIME_BAND + GUESS_BAND * guesses + EXPERT_BAND * experts + ADAPTER_BAND * adapters


def timing_guesses(cluster: Cluster, precision: str) -> tuple[str, ...]:
    """Guessed figures of the profile that enter the step time of a job in `precision`."""
    others = {word for word in cluster.gpu.peak_flop_per_s if word != precision}
    return tuple(
        path
        for path in cluster.guesses()
        if not path.startswith("node.host.")
        and any(field in path for field in TIMED_FIELDS)
        and path.rsplit(".", 1)[-1] not in others
    )
