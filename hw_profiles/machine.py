"""The machine as data: GPU, link, node, network, cluster. All values SI; what is for people (units in keys) lives in the TOML.

Conventions: bandwidth is per GPU and one direction; FLOP rates are dense; GPU memory is what the driver reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.hw_profiles.at_rate import fractions_at
from shardplan.hw_profiles.errors import InputError

FloatArray = NDArray[np.float64]
SourceKind = Literal["spec", "measured", "published", "guess"]
LinkKind = Literal["nvswitch", "mesh", "pcie", "shared_memory", "none"]
NetworkKind = Literal["infiniband", "roce", "ethernet", "efa", "omni_path", "slingshot", "none"]
AttentionKernel = Literal["cudnn", "flash3", "flash2", "flash1", "triton", "memory_efficient", "shardplan"]
"""Generations of fused attention (triton: the kernel of 2022; shardplan: `kernels/attention.py`); a runtime chooses among a GPU's."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a number is from; a `guess` widens every band it enters."""

    kind: SourceKind
    text: str


@dataclass(frozen=True, kw_only=True)
class EfficiencyCurve:
    """Fraction of a peak reached as a function of size: a power of the size between two points, flat beyond both ends.
    Small sizes take the latency whatever they are, that is a fraction in proportion to the size, which a power follows exactly.
    """

    sizes: tuple[float, ...]
    """Ascending; FLOP for matrix products, bytes for memory and links."""
    fractions: tuple[float, ...]
    """Fraction of the peak, above 0."""
    shapes: tuple[tuple[float, float, float], ...] = ()
    """(rows, depth, columns) of the products that were timed at each size, relative to the cube's side; none: cubes, smoothed."""

    def at(self, size: ArrayLike) -> FloatArray:
        """Fraction at each `size`, same shape."""
        return np.exp(np.interp(np.log(np.maximum(np.asarray(size, dtype=np.float64), 1e-30)), *self._logs))

    @cached_property
    def _logs(self) -> tuple[FloatArray, FloatArray]:
        return np.log(np.asarray(self.sizes)), np.log(np.asarray(self.fractions))


@dataclass(frozen=True, kw_only=True)
class AttentionCurve:
    """Fused attention: fraction of the dense peak = plateau(head dim) * keys / (keys + ramp), both changed by a causal mask."""

    head_dims: tuple[float, ...]
    """Ascending."""
    forward: tuple[float, ...]
    """Plateau of the forward pass at each head dim, of the FLOP that its tiles compute."""
    backward: tuple[float, ...]
    forward_ramp_tokens: float
    """Keys at which half the plateau is reached, without a mask."""
    backward_ramp_tokens: float
    causal_ramp_tokens: float
    """Added to either ramp by a causal mask: half-used diagonal tiles and uneven work."""
    causal_plateau_fraction: float = 1.0
    """What a causal mask leaves of either plateau, however long the sequence."""

    def at(
        self, way: Literal["forward", "backward"], head_dim: ArrayLike, keys: ArrayLike, *, causal: bool
    ) -> FloatArray:
        """Fraction of the peak, arguments broadcast: linear in the head dim, proportional to it below the first one
        (the softmax then sets the time), flat beyond the last one."""
        plateaus = self.backward if way == "backward" else self.forward
        ramp = self.backward_ramp_tokens if way == "backward" else self.forward_ramp_tokens
        plateau = np.interp(np.asarray(head_dim, dtype=np.float64), (0.0, *self.head_dims), (0.0, *plateaus))
        length, kept = np.asarray(keys, dtype=np.float64), self.causal_plateau_fraction if causal else 1.0
        return kept * plateau * length / (length + ramp + (self.causal_ramp_tokens if causal else 0.0))


PLAIN_RAMP_TOKENS = 100.0
"""Ramp of a profile that only gives plain plateaus: between those of the published kernels without a mask (60 to 250)."""
PLAIN_CAUSAL_RAMP_TOKENS = 250.0
"""What a causal mask adds to it: among the least of the published kernels (154 to 515)."""


def plain_attention(forward: float, backward: float) -> AttentionCurve:
    """The same plateaus for every head dim."""
    return AttentionCurve(
        head_dims=(1.0,),
        forward=(forward,),
        backward=(backward,),
        forward_ramp_tokens=PLAIN_RAMP_TOKENS,
        backward_ramp_tokens=PLAIN_RAMP_TOKENS,
        causal_ramp_tokens=PLAIN_CAUSAL_RAMP_TOKENS,
    )


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator (or, with `device` "cpu", the share of a CPU that one process gets)."""

    name: str
    vendor: str
    architecture: str
    device: Literal["cuda", "cpu", "hpu"]
    """The torch device type that runs on it (ROCm also says cuda, Gaudi hpu)."""
    peak_flop_per_s: Mapping[str, float]
    """Dense matrix rate by precision word (fp32, tf32, fp16, bf16, fp8, fp4); a missing word = no hardware for it."""
    vector_flop_per_s: float
    """Element-wise fp32 rate."""
    memory_bytes: float
    """Capacity as the driver reports it."""
    memory_bandwidth_bytes_per_s: float
    l2_bytes: float
    multiprocessors: int
    gemm_efficiency: Mapping[str, EfficiencyCurve]
    """Fraction of the dense peak by FLOP of one matrix product; keyed by precision word, "default" for the rest."""
    attention_efficiency: Mapping[str, AttentionCurve]
    """Fused attention by AttentionKernel, fastest first; or "plain" alone: what runs here, whatever its generation."""
    memory_efficiency: EfficiencyCurve
    """Fraction of the memory bandwidth by bytes moved by one element-wise kernel."""
    launch_s: float
    """Host time to launch (or, on a CPU, dispatch) one eager operation."""
    context_bytes: float
    """Driver context and library workspaces, outside the framework's allocator."""
    power_w: float | None = None
    """Board power at which the rates hold."""
    power_cap_w: float | None = None
    """Limit below it, if one is set; `gemm_efficiency` already has it."""

    def gemm_curve(self, precision: str) -> EfficiencyCurve:
        """The efficiency curve of matrix products in `precision`."""
        return self.gemm_efficiency.get(precision, self.gemm_efficiency["default"])

    def attention_kernel(self, preferred: Sequence[str]) -> str:
        """The first of the `preferred` kernels that this GPU has; with none of them, its own first."""
        return next(name for name in (*preferred, *self.attention_efficiency) if name in self.attention_efficiency)

    def attention_curve(self, preferred: Sequence[str]) -> AttentionCurve:
        """The curve of that kernel."""
        return self.attention_efficiency[self.attention_kernel(preferred)]


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins GPUs (in a node) or nodes; per GPU, one direction."""

    kind: str
    bandwidth_bytes_per_s: float
    """Wire rate per GPU; 0 = no such link."""
    latency_s: float
    """Per step of a ring, software included."""
    efficiency: EfficiencyCurve
    """Fraction of the wire rate that a ring collective's bus bandwidth reaches among all GPUs of a node, by bytes of the
    collective; as measured, so the latency of the ring is inside: time = max(steps * latency, bytes / rate)."""
    all_reduce_efficiency: EfficiencyCurve | None = None
    """The same for all-reduce among all GPUs where the switch reduces (NVLS; may pass 1); None = as the ring."""
    point_to_point_fraction: float = 0.9
    """Fraction of the wire rate that one large transfer between two GPUs reaches."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """CPU side of one node."""

    cores: int
    ram_bytes: float
    memory_bandwidth_bytes_per_s: float
    """Theoretical; apply `memory_efficiency`."""
    memory_efficiency: float
    pcie_bytes_per_s: float
    """Pinned host-device copy, per GPU, one direction."""
    adam_bytes_per_parameter: float
    """DRAM traffic of one CPU Adam update of one parameter."""
    pcie_node_bytes_per_s: float | None = None
    """What all GPUs of the node copy at once, one direction; None: each at `pcie_bytes_per_s`."""


@dataclass(frozen=True, kw_only=True)
class Nvme:
    """Local flash of one node."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    capacity_bytes: float


@dataclass(frozen=True, kw_only=True)
class Node:
    """A box of equal GPUs."""

    name: str
    gpu: Gpu
    gpus: int
    intra: Link
    host: Host
    tray_gpus: int | None = None
    """GPUs of one server where several servers share the link (a rack): jobs take equal parts of nodes in whole servers."""
    nvme: Nvme | None = None
    power_w: float | None = None
    """Whole node, GPUs included."""
    usd_per_hour: float | None = None
    """Whole node, on `price_date`."""
    price_date: str | None = None
    """A day, month or year in ISO form."""

    @property
    def usd_per_gpu_hour(self) -> float | None:
        """The node's price over its GPUs."""
        return None if self.usd_per_hour is None else self.usd_per_hour / self.gpus


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What all nodes share for checkpoints and data: the whole of it, not per node; None where nobody says."""

    kind: str | None = None
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    capacity_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Failures:
    """How often and for how long jobs stop; None where nobody says."""

    gpu_hours_per_failure: float | None = None
    """GPU-hours of running jobs per failure that stops one."""
    restart_s: float | None = None
    """From the failure to the loading of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What joins nodes: a fat tree of leaf groups below a spine."""

    name: str
    kind: str
    """A NetworkKind."""
    nics_per_node: int
    nic_bytes_per_s: float
    """Line rate of one NIC, one direction."""
    latency_s: float
    """Per ring step between nodes below one leaf, software included."""
    spine_latency_s: float
    """The same across the spine."""
    efficiency: EfficiencyCurve
    """Fraction of the NIC rate that a collective's bus bandwidth reaches, by bytes; as measured, latency inside."""
    leaf_nodes: int
    """Nodes below one leaf group; with `rail_optimised`, those whose NICs of one number meet in one leaf switch."""
    oversubscription: float = 1.0
    """Leaf-down to leaf-up bandwidth; 1 = full bisection."""
    rail_optimised: bool | None = None
    """Whether each NIC of a node has a leaf switch of its own (a rail), so that `leaf_nodes` is large; None = nobody says."""
    point_to_point_fraction: float = 0.9
    """Fraction of the NIC rate that one large transfer between two GPUs reaches."""

    def at_rate(self, nic_bytes_per_s: float) -> Network:
        """The same network with other NICs: a collective's steps take as long, so that small buffers reach more of a slower rate."""
        fractions = fractions_at(self.efficiency.fractions, nic_bytes_per_s / self.nic_bytes_per_s)
        return replace(self, nic_bytes_per_s=nic_bytes_per_s, efficiency=replace(self.efficiency, fractions=fractions))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ordered runs of (node, count), a network, and where every number is from."""

    name: str
    node_runs: tuple[tuple[Node, int], ...]
    network: Network
    provenance: Mapping[str, Source] = field(default_factory=dict[str, Source])
    """Dotted path of the file key (for instance "gpu.memory_mib") to its source."""
    storage: Storage | None = None
    failures: Failures | None = None
    parts: tuple[Cluster, ...] = ()
    """Of a mixed cluster: the homogeneous clusters it is made of, in the order of its ranks; `network` is what joins them."""

    @property
    def node(self) -> Node:
        """The node type of a homogeneous cluster."""
        if len(self.node_runs) != 1:
            raise InputError(
                f"cluster {self.name!r} mixes {len(self.node_runs)} node types",
                remedy="give a cluster of one node type here; `shardplan plan` takes mixed ones",
            )
        return self.node_runs[0][0]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return sum(count for _, count in self.node_runs)

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return sum(node.gpus * count for node, count in self.node_runs)

    @property
    def gpu(self) -> Gpu:
        """The GPU type of a homogeneous cluster."""
        return self.node.gpu

    def with_gpus(self, gpus: int) -> Cluster:
        """The same cluster with `gpus` GPUs: part of one node, whole nodes, or the largest equal parts of nodes that are racks of
        servers; on a lone CPU machine more processes than it has slots share its cores and memory. Raises InputError otherwise."""
        if self.parts:
            return self._all_of_it(gpus)
        node = self.node
        if gpus < 1:
            raise InputError(f"gpus={gpus} is not a positive number of GPUs", place="--gpus", remedy="give 1 or more")
        if gpus <= node.gpus:
            return replace(self, node_runs=((_part(node, gpus), 1),))
        if self.network.kind == "none" and node.gpu.device == "cpu":
            return replace(self, node_runs=((_crowded(node, gpus), 1),))
        if self.network.kind == "none":
            raise InputError(
                f"gpus={gpus} needs a network, but {self.name!r} is one node of {node.gpus} GPUs",
                place="--gpus",
                remedy=f"use at most {node.gpus}, or a cluster with a network",
            )
        if gpus % node.gpus and node.tray_gpus and gpus % node.tray_gpus == 0:
            part = max(n for n in range(node.tray_gpus, node.gpus, node.tray_gpus) if gpus % n == 0)
            network = replace(self.network, nics_per_node=max(self.network.nics_per_node * part // node.gpus, 1))
            return replace(self, node_runs=((_part(node, part), gpus // part),), network=network)
        if gpus % node.gpus:
            low = gpus // node.gpus * node.gpus
            raise InputError(
                f"gpus={gpus} is not a whole number of {self.name!r} nodes of {node.gpus} GPUs",
                place="--gpus",
                remedy=f"use {low} or {low + node.gpus}",
            )
        return replace(self, node_runs=((node, gpus // node.gpus),))

    def _all_of_it(self, gpus: int) -> Cluster:
        """A mixed cluster is used whole."""
        if gpus != self.gpus:
            have = " + ".join(f"{part.gpus} {part.gpu.name}" for part in self.parts)
            raise InputError(
                f"gpus={gpus} is not all of the mixed cluster {self.name!r} ({have})",
                place="--gpus",
                remedy=f"leave --gpus out ({self.gpus}), or change `nodes` of its parts",
            )
        return self

    def guesses(self) -> tuple[str, ...]:
        """Paths of the numbers that are guesses."""
        return tuple(sorted(path for path, source in self.provenance.items() if source.kind == "guess"))


def _part(node: Node, gpus: int) -> Node:
    """The node with `gpus` of its GPUs at work; of a rack the servers that have them, with their share of hosts, flash, power and price."""
    if node.tray_gpus is None:
        return replace(node, gpus=gpus)
    share = -(-gpus // node.tray_gpus) * node.tray_gpus / node.gpus
    host, whole = node.host, node.host.pcie_node_bytes_per_s
    return replace(
        node,
        gpus=gpus,
        host=replace(
            host,
            cores=max(round(host.cores * share), 1),
            ram_bytes=host.ram_bytes * share,
            memory_bandwidth_bytes_per_s=host.memory_bandwidth_bytes_per_s * share,
            pcie_node_bytes_per_s=None if whole is None else whole * share,
        ),
        nvme=node.nvme and Nvme(**{name: figure * share for name, figure in vars(node.nvme).items()}),
        power_w=None if node.power_w is None else node.power_w * share,
        usd_per_hour=None if node.usd_per_hour is None else node.usd_per_hour * share,
    )


PROCESSES_PER_CORE = 4
"""More than that on one core of a CPU machine is refused."""


def _crowded(node: Node, processes: int) -> Node:
    """A CPU node on which `processes` processes, more than its slots, share cores, memory and bandwidth evenly."""
    most = PROCESSES_PER_CORE * node.host.cores
    if processes > most:
        raise InputError(
            f"gpus={processes} is more than {PROCESSES_PER_CORE} processes on each of the {node.host.cores} cores of {node.name!r}",
            place="--gpus",
            remedy=f"use at most {most}",
        )
    share, gpu = node.gpus / processes, node.gpu
    slot = replace(
        gpu,
        peak_flop_per_s={word: rate * share for word, rate in gpu.peak_flop_per_s.items()},
        vector_flop_per_s=gpu.vector_flop_per_s * share,
        memory_bytes=gpu.memory_bytes * share,
        memory_bandwidth_bytes_per_s=gpu.memory_bandwidth_bytes_per_s * share,
        launch_s=gpu.launch_s / share,
    )
    return replace(node, gpu=slot, gpus=processes)
