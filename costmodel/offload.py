"""CPU offload of the optimizer: PCIe traffic, CPU update, what of it the step waits for (ZeRO-Offload, arXiv 2101.06840)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.machine import Node

FloatArray = NDArray[np.float64]


def optimizer_offload_s(
    node: Node,
    parameters: ArrayLike,
    *,
    gradient_bytes: float,
    parameter_bytes: float,
    window_s: ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) seconds of one step for ranks that update `parameters` parameters each.

    T = max(0, D2H - window) + CPU update + H2D. Gradients go down while the last backward runs and waits, the updated parameters
    come up after; all GPUs of the node share its memory bandwidth, which bounds the update.
    """
    updated = np.asarray(parameters, dtype=np.float64)
    window = np.asarray(window_s, dtype=np.float64)
    host = node.host
    down = gradient_bytes * updated / host.pcie_bytes_per_s
    up = parameter_bytes * updated / host.pcie_bytes_per_s
    share = host.memory_bandwidth_bytes_per_s * host.memory_efficiency / node.gpus
    update = host.adam_bytes_per_parameter * updated / share
    return np.maximum(down - window, 0.0) + update + up, np.minimum(down, window)
