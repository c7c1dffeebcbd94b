"""What a hardware file may say: pydantic models of the merged document.

In a merged document every number is a table {value, source, source_kind} and every curve carries the same two words.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from shardplan.hw_profiles.machine import AttentionKernel, LinkKind, NetworkKind
from shardplan.hw_profiles.schema_values import (
    AtLeastOne,
    Flag,
    Fraction,
    GflopCurve,
    MibCurve,
    NonNegative,
    NonNegativeFloat,
    Part,
    Positive,
    PositiveFloat,
    Price,
    Sourced,
    Whole,
    WholeOrZero,
)

PlateauFraction = Annotated[float, Field(gt=0, le=1, strict=True)]


class PeakTflops(Part):
    """Dense TFLOP/s by precision; a missing word = no hardware for it."""

    fp32: Positive
    tf32: Positive | None = None
    fp16: Positive | None = None
    bf16: Positive | None = None
    fp8: Positive | None = None
    fp4: Positive | None = None


class GemmEfficiency(Part):
    """One curve per precision, `default` for the rest."""

    default: GflopCurve
    fp32: GflopCurve | None = None
    tf32: GflopCurve | None = None
    fp16: GflopCurve | None = None
    bf16: GflopCurve | None = None
    fp8: GflopCurve | None = None
    fp4: GflopCurve | None = None


class AttentionPlateaus(Sourced):
    """One generation of fused attention: plateaus by head dim and the ramps that lead to them."""

    head_dim: list[PositiveFloat]
    forward: list[PlateauFraction]
    backward: list[PlateauFraction]
    forward_ramp_tokens: NonNegativeFloat
    backward_ramp_tokens: NonNegativeFloat
    causal_ramp_tokens: NonNegativeFloat
    causal_plateau_fraction: PlateauFraction = 1.0

    @model_validator(mode="after")
    def _as_many_of_each(self) -> AttentionPlateaus:
        sizes = (len(self.head_dim), len(self.forward), len(self.backward))
        if not sizes[0] or len(set(sizes)) > 1:
            raise ValueError(
                f"has {sizes[0]} head_dim, {sizes[1]} forward and {sizes[2]} backward; give as many of each, 1 or more"
            )
        if any(low >= high for low, high in pairwise(self.head_dim)):
            raise ValueError("has head_dim that do not ascend; sort them and remove doubles")
        return self


class AttentionEfficiency(Part):
    """Fused attention, fraction of the dense peak: by kernel, or one plain pair that goes before them."""

    forward: Fraction | None = None
    backward: Fraction | None = None
    cudnn: AttentionPlateaus | None = None
    flash3: AttentionPlateaus | None = None
    flash2: AttentionPlateaus | None = None
    flash1: AttentionPlateaus | None = None
    triton: AttentionPlateaus | None = None
    memory_efficient: AttentionPlateaus | None = None
    shardplan: AttentionPlateaus | None = None

    @model_validator(mode="after")
    def _something_is_known(self) -> AttentionEfficiency:
        if (self.forward is None) != (self.backward is None):
            raise ValueError("has one of forward and backward; give both, or neither")
        if self.forward is None and not self.kernels():
            raise ValueError("is empty; give forward and backward, or a kernel such as flash2")
        return self

    def kernels(self) -> dict[str, AttentionPlateaus]:
        """The kernels that are given, fastest first."""
        found = {name: getattr(self, name) for name in get_args(AttentionKernel)}
        return {name: part for name, part in found.items() if part is not None}


class GpuPart(Part):
    """A GPU, or the share of a CPU that one process gets."""

    name: str
    vendor: str
    architecture: str
    device: Literal["cuda", "cpu", "hpu"]
    memory_mib: Positive
    bandwidth_gb_per_s: Positive
    l2_mib: Positive
    multiprocessors: Whole
    peak_tflops: PeakTflops
    vector_tflops: Positive
    launch_us: Positive
    context_gib: NonNegative
    power_w: Positive | None = None
    power_cap_w: Positive | None = None
    attention_efficiency: AttentionEfficiency
    gemm_efficiency: GemmEfficiency
    memory_efficiency: MibCurve

    @model_validator(mode="after")
    def _a_cap_is_below_the_power(self) -> GpuPart:
        if self.power_cap_w is None:
            return self
        cap = self.power_cap_w.value
        if self.power_w is None:
            raise ValueError(
                f"has power_cap_w = {cap:g} and no power_w; give power_w, the board's power without the cap"
            )
        if cap > self.power_w.value:
            raise ValueError(
                f"has power_cap_w = {cap:g} above power_w = {self.power_w.value:g}; give a cap in watts up to the board's power"
            )
        return self


class IntraPart(Part):
    """The link inside a node."""

    kind: LinkKind
    bandwidth_gb_per_s: NonNegative
    latency_us: NonNegative
    efficiency: MibCurve
    all_reduce_efficiency: MibCurve | None = None
    point_to_point_fraction: Fraction

    @model_validator(mode="after")
    def _a_link_has_bandwidth(self) -> IntraPart:
        if self.kind != "none" and self.bandwidth_gb_per_s.value == 0:
            raise ValueError(f'has kind {self.kind!r} and bandwidth_gb_per_s = 0; give the rate, or kind = "none"')
        return self


class HostPart(Part):
    """The CPU side of a node."""

    cores: Whole
    ram_gib: Positive
    memory_bandwidth_gb_per_s: Positive
    memory_efficiency: Fraction
    pcie_gb_per_s: Positive
    pcie_node_gb_per_s: Positive | None = None
    adam_bytes_per_parameter: Positive


class NvmePart(Part):
    """Local flash of a node."""

    read_gb_per_s: Positive
    write_gb_per_s: Positive
    capacity_tb: Positive


class NodePart(Part):
    """A box of equal GPUs; the GPU itself is the document's `gpu`."""

    name: str
    gpus: Whole
    tray_gpus: Whole | None = None
    power_w: Positive | None = None
    usd_per_hour: Price | None = None
    intra: IntraPart
    host: HostPart
    nvme: NvmePart | None = None

    @model_validator(mode="after")
    def _several_gpus_are_joined(self) -> NodePart:
        if self.gpus.value > 1 and self.intra.kind == "none":
            raise ValueError(f'has {self.gpus.value} GPUs and intra.kind = "none"; name the link, for instance pcie')
        return self


class NetworkPart(Part):
    """What joins nodes."""

    name: str
    kind: NetworkKind
    nics_per_node: WholeOrZero
    nic_gbit_per_s: NonNegative
    latency_us: NonNegative
    spine_latency_us: NonNegative
    leaf_nodes: Whole
    oversubscription: AtLeastOne
    rail_optimised: Flag | None = None
    point_to_point_fraction: Fraction
    efficiency: MibCurve

    @model_validator(mode="after")
    def _a_network_has_nics(self) -> NetworkPart:
        if self.kind != "none" and 0 in (self.nics_per_node.value, self.nic_gbit_per_s.value):
            raise ValueError('needs nics_per_node and nic_gbit_per_s above 0 unless kind = "none"')
        if self.spine_latency_us.value < self.latency_us.value:
            raise ValueError("has spine_latency_us below latency_us; the spine is the longer way")
        return self


class StoragePart(Part):
    """What all nodes share for checkpoints and data; the whole of it, not per node."""

    kind: str | None = None
    read_gb_per_s: Positive | None = None
    write_gb_per_s: Positive | None = None
    capacity_tb: Positive | None = None

    @model_validator(mode="after")
    def _something_is_known(self) -> StoragePart:
        if self.read_gb_per_s is None and self.write_gb_per_s is None and self.capacity_tb is None:
            raise ValueError("says no number; give read_gb_per_s, write_gb_per_s or capacity_tb, or leave it out")
        return self


class FailuresPart(Part):
    """How often jobs on the cluster stop, and for how long."""

    gpu_hours_per_failure: Positive | None = None
    restart_minutes: NonNegative | None = None

    @model_validator(mode="after")
    def _something_is_known(self) -> FailuresPart:
        if self.gpu_hours_per_failure is None and self.restart_minutes is None:
            raise ValueError("says no number; give gpu_hours_per_failure or restart_minutes, or leave it out")
        return self


class ClusterPart(Part):
    """A whole cluster, merged."""

    name: str
    nodes: Whole
    gpu: GpuPart
    node: NodePart
    network: NetworkPart
    storage: StoragePart | None = None
    failures: FailuresPart | None = None

    @model_validator(mode="after")
    def _several_nodes_are_joined(self) -> ClusterPart:
        if self.nodes.value > 1 and self.network.kind == "none":
            raise ValueError(f'has {self.nodes.value} nodes and no network; add [network] base = "ib-ndr" or another')
        return self


class NodeFile(Part):
    """A node part with its GPU, as the catalog merges it."""

    gpu: GpuPart
    node: NodePart
