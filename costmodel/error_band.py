"""How far an estimate may be off: every half-width of the bands, what it rests on, and which of them a machine, job and layout add.

Half-widths add up. Errors are |measured / predicted - 1| of the rows of `shardplan validate`; `--cross` prints what leaving rows out does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from shardplan.costmodel.attention_time import OWN_KERNEL, takes_own_kernel
from shardplan.costmodel.fitted import is_fitted
from shardplan.costmodel.job import OUTSIDE_PRODUCTS
from shardplan.costmodel.keys import SETTINGS_AT_ONCE, Same
from shardplan.costmodel.layout import ATTENTION, OFFLOAD, Layout
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.machine import Cluster, Gpu

TIME_BAND = 0.09
"""Of step time on a machine whose figures are known. 80 % of the dense 16-bit rows are within it when constants are fitted without the
row's source and model, 84 % in sample; 65 % without the source."""
GUESS_BAND = 0.03
"""For each kind of figure that is guessed and used: rates of the GPU, attention, links, host. Rates of another NVIDIA generation in place
of their own (A100, H100, V100) move the error that 80 % of rows keep from 6 to between 8 and 11 %; attention and links of another
machine do more to a fifth of the rows and next to nothing to half of them."""
UNFITTED_BAND = 0.06
"""For a GPU of an architecture that no run was fitted on. With the mean of the others' constants in place of its own the error that 80 % of
rows keep grows by 1 % (A100), 3 % (H100), 7 % (B200) and 8 % (V100)."""
FP8_BAND = 0.03
"""For fp8: what recipes cast and keep differs. Of 30 dense runs on H100 the band then covers 28, without it 19."""
EXPERT_BAND = 0.12
"""For models with experts: what software does to tokens and launches differs from release to release."""
ADAPTER_BAND = 0.12
"""For adapters: published runs tell little of what their software keeps and casts. The band then covers 24 of 27 timed rows of LoRA and
QLoRA, without it 14."""
OFFLOAD_BAND = 0.05
"""For layouts that offload: hosts differ in memory, cores and PCIe more than GPUs do. With the guesses that every host of the catalog
has the band covers 37 of the 42 rows read off figures, nearly all of which offload, without both 28."""
MEMORY_BAND = 0.08
"""Of device memory."""
CAPACITY_BAND = 0.03
"""For a GPU whose memory nobody saw in a driver's report: labels read as GiB are above it by 0 (A100), 0.4 (H100), 0.8 (V100), 6.3 (A40,
L4) and 6.7 % (B200), 3 % on average."""

GPU_FIGURES = ("bandwidth_gb_per_s", "memory_efficiency", "launch_us", "multiprocessors")
"""Of every job, beside what depends on its precision."""
NETWORK_FIGURES = (
    "efficiency",
    "latency_us",
    "nic_gbit_per_s",
    "nics_per_node",
    "oversubscription",
    "point_to_point_fraction",
)
"""Not the latency of the spine: doubled, it moves steps of a 70B on 1,024 GPUs by 1 % at most. Where leaves end matters where the spine is
thinner than they are."""
LINK_FIGURES = ("efficiency", "all_reduce_efficiency", "bandwidth_gb_per_s", "latency_us", "point_to_point_fraction")
HOST_FIGURES = {
    "node.host.adam_bytes_per_parameter",
    "node.host.cores",
    "node.host.memory_bandwidth_gb_per_s",
    "node.host.memory_efficiency",
    "node.host.pcie_gb_per_s",
    "node.host.pcie_node_gb_per_s",
}
FLASH_FIGURES = {"node.nvme.read_gb_per_s", "node.nvme.write_gb_per_s"}


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Half-widths, relative: of a machine and job, and what some layouts add."""

    time: float
    attention: Mapping[str, float] = field(default_factory=dict[str, float])
    """Added to it by the layout's word for attention."""
    offload: Mapping[str, float] = field(default_factory=dict[str, float])
    """Added to it where something is offloaded, by the farthest tier."""
    memory: float = MEMORY_BAND

    def of(self, layout: Layout) -> float:
        """Half-width of the step time of one layout."""
        moved = (layout.offload_optimizer, layout.offload_params, layout.offload_activations)
        return (
            self.time + self.attention.get(layout.attention, 0.0) + self.offload.get(max(moved, key=OFFLOAD.index), 0.0)
        )


def error_bands(setting: Setting) -> Bands:
    """The bands of all layouts of a model and a job on a homogeneous cluster."""
    return _bands(Same((setting.model, setting.job, setting.cluster, setting.runtime)))


@lru_cache(maxsize=SETTINGS_AT_ONCE)
def _bands(same: Same) -> Bands:
    model, job, cluster, runtime = same.objects
    setting, gpu = Setting(model=model, job=job, cluster=cluster, runtime=runtime), cluster.gpu
    guesses = set(cluster.guesses())
    kinds = [bool(guesses & figures) for figures in (_rates(gpu, job.precision), _links(cluster))]
    host, flash = bool(guesses & HOST_FIGURES), bool(guesses & (HOST_FIGURES | FLASH_FIGURES))
    return Bands(
        time=TIME_BAND
        + GUESS_BAND * sum(kinds)
        + UNFITTED_BAND * (not is_fitted(gpu))
        + FP8_BAND * (job.precision == "fp8")
        + EXPERT_BAND * any(kind.experts for kind in setting.kinds)
        + ADAPTER_BAND * (job.adapters is not None),
        attention={word: GUESS_BAND * bool(guesses & _attention(setting, word)) for word in ATTENTION},
        offload={"cpu": OFFLOAD_BAND + GUESS_BAND * host, "nvme": OFFLOAD_BAND + GUESS_BAND * flash},
        memory=memory_band(cluster),
    )


def widest(bands: Sequence[Bands]) -> Bands:
    """Of parts that make one machine: whichever may be off most."""
    return Bands(
        time=max(one.time for one in bands),
        attention={word: max(one.attention.get(word, 0.0) for one in bands) for word in ATTENTION},
        offload={word: max(one.offload.get(word, 0.0) for one in bands) for word in OFFLOAD},
        memory=max(one.memory for one in bands),
    )


def memory_band(cluster: Cluster) -> float:
    """Half-width of the band of device memory, relative; of a mixed cluster the widest of its parts."""
    return max(MEMORY_BAND + CAPACITY_BAND * ("gpu.memory_mib" in one.guesses()) for one in cluster.parts or (cluster,))


def _rates(gpu: Gpu, precision: str) -> set[str]:
    """Figures of the GPU that a job in `precision` is timed with."""
    words = {precision, OUTSIDE_PRODUCTS.get(precision, precision)}
    curves = {word if word in gpu.gemm_efficiency else "default" for word in words} | {"power_cap"}
    return (
        {f"gpu.{name}" for name in GPU_FIGURES}
        | {f"gpu.peak_tflops.{word}" for word in words}
        | {f"gpu.gemm_efficiency.{curve}" for curve in curves}
    )


def _links(cluster: Cluster) -> set[str]:
    """Figures of the links that its GPUs have between them."""
    inside = {f"node.intra.{name}" for name in LINK_FIGURES} if cluster.node.gpus > 1 else set[str]()
    if cluster.nodes == 1:
        return inside
    ends = {"network.leaf_nodes"} if cluster.network.oversubscription > 1.0 else set[str]()
    return inside | ends | {f"network.{name}" for name in NETWORK_FIGURES}


def _attention(setting: Setting, word: str) -> set[str]:
    """Curves of the fused kernels that layouts with this word run."""
    runtime, gpu = setting.runtime, setting.cluster.gpu
    if (runtime.abilities.attention[0] if word == "auto" else word) == "unfused":
        return set()
    kernels = runtime.execution.attention_kernels
    libraries = [kernel for kernel in kernels if kernel != OWN_KERNEL]
    named = [
        gpu.attention_kernel(
            kernels if word != "flash" and takes_own_kernel(setting.job.precision, kind.head_dim) else libraries
        )
        for kind in setting.kinds
    ]
    found = {f"gpu.attention_efficiency.{kernel}" for kernel in named}
    return found | {f"gpu.attention_efficiency.{way}" for way in ("forward", "backward") if "plain" in named}
