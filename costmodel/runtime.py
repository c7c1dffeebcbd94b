"""What the executing software does, as data (runtimes/*.toml): bytes per parameter, what recompute saves, what overlaps, abilities.

No code asks for a runtime's name; a new runtime is a new file. User files: give a path ending in .toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from shardplan.costmodel.axis_order import DEFAULT_ORDER, ORDERS
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import PART_NAMES, LayerPart
from shardplan.costmodel.recompute import Part
from shardplan.costmodel.runtime_document import check_values, runtime_document, runtime_file, state_row, switched
from shardplan.costmodel.runtime_experts import ExpertParallel
from shardplan.costmodel.runtime_offload import Offloading
from shardplan.costmodel.runtime_stages import StageRule
from shardplan.costmodel.runtime_states import States, WorkingSet
from shardplan.costmodel.runtime_tuning import Tuning
from shardplan.hw_profiles.errors import InputError, nearest
from shardplan.hw_profiles.machine import AttentionKernel

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class _FromFile:
    """Unknown keys in the file are errors."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Abilities(_FromFile):
    """What the runtime can run; rules refuse the rest by name."""

    zero: tuple[int, ...]
    zero_with_pipeline: tuple[int, ...]
    hsdp: bool
    """ZeRO sharding over fewer ranks than dp."""
    zeropp: tuple[Literal["hpz", "qwz", "qgz"], ...]
    """Words of ZeRO++."""
    hpz_with_tensor_parallel: bool = True
    hpz_with_pipeline: bool = True
    tensor_parallel: bool
    sequence_parallel: bool
    pipeline_parallel: bool
    experts: bool
    """Mixture-of-experts layers."""
    expert_parallel: bool = False
    """Experts spread over ranks (`ep`)."""
    expert_parallel_zero: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages that go with it."""
    expert_tensor_parallel: bool = False
    """Experts cut over another number of ranks than dense products (`etp`)."""
    expert_parallel_splits_sequence: bool = False
    """With tensor parallelism, experts need sequence parallelism."""
    experts_without: tuple[Literal["hpz"], ...] = ()
    """What does not go with them."""
    layer_parts: tuple[LayerPart, ...] = tuple(PART_NAMES)
    """What it runs of what layers of Llama, GPT-2 and Mixtral do not have."""
    tied_embeddings_across_stages: bool
    uneven_stages: bool
    ends_without_layers: bool = False
    """A first chunk of the embedding alone, and a last one of head and loss alone."""
    micro_batches_cover_stages: bool
    """The schedules need at least as many micro-batches as stages."""
    schedules: tuple[str, ...]
    recompute: tuple[str, ...]
    partial_recompute: bool
    """`full:N` with N below the layers of a stage."""
    recompute_by_stage: bool = False
    """`full:4,2,0`: another number of layers on each stage."""
    recompute_parts: tuple[Part, ...] = ()
    """Parts of `recompute.PARTS` that `selective:PART+PART` may name."""
    recompute_parts_of_dense_layers: tuple[Part, ...] = ()
    """Those that run nothing again in layers with experts."""
    recompute_parts_of_expert_layers: tuple[Part, ...] = ()
    """Those that run nothing again in layers without."""
    tensor_parallel_recompute: tuple[str, ...] = ("none", "selective", "parts", "full")
    """Words of `recompute` that go with tensor parallelism; parts: `selective:PART+PART`."""
    context_parallel_recompute: tuple[str, ...] = ("none", "selective", "parts", "full")
    """The same of context parallelism."""
    attention: tuple[str, ...]
    """First is what `auto` means."""
    precisions: tuple[str, ...]
    optimizers: tuple[str, ...]
    methods: tuple[str, ...]
    """What can be trained: full, lora, qlora."""
    smallest_vocabulary: int
    """Token ids the training data uses."""
    pads_vocabulary: bool
    """Else tp must divide the vocabulary as it is."""
    offload_optimizer: tuple[str, ...]
    offload_zero: tuple[int, ...]
    """ZeRO stages with which the optimizer can be offloaded."""
    context_parallel: tuple[str, ...] = ()
    """Kinds of context parallelism (words of `cp_kind`), the usual one first."""
    ulysses_copies_heads: bool = False
    """Ulysses with fewer key-value heads than ranks copies them; else cp must divide them."""
    context_parallel_alone: bool = False
    """Context parallelism goes with data parallelism only, not with tensor or pipeline parallelism."""
    context_attention: tuple[str, ...] | None = None
    """Words of `attention` besides auto that go with a ring and with gathered keys; None: all of `attention`."""
    split_backward_zero: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages that work with schedules that split the backward (`layout.SPLIT_BACKWARD`)."""
    split_backward_recompute: tuple[str, ...] = ("none", "selective", "full")
    """Words of `recompute` that do."""
    schedules_on_gpu_only: tuple[str, ...] = ()
    """Schedules that do not run over gloo."""
    orders: tuple[str, ...] = (DEFAULT_ORDER,)
    """Orders of mesh axes (words of `axis_order.ORDERS`), the default one first; the file may say "any"."""


@dataclass(frozen=True, kw_only=True)
class Activations(_FromFile):
    """What operators keep for the backward pass."""

    selective: Mapping[str, float]
    """Operators that `selective` runs again instead of keeping their tensors, and the share of each."""
    selective_streams: float
    """Whole hidden-wide tensors (not divided by tp) a layer keeps under `selective` in exchange."""
    core_output_again: bool = False
    """The part core_attn drops the output of attention too, and runs that again; else it is kept for the projection."""
    full_stops_early: bool
    """Full recompute ends with the last tensor that the backward needs: the layer's last product is not repeated."""
    full_stops_early_apart: bool = True
    """Whether it does so where ranks share layers or sequences (tp or cp above 1)."""
    gated_mlp_copies: float
    """ffn-wide tensors kept by a gated MLP: 3 fused (gate, up, product), 4 with silu(gate) kept too."""
    norm_bytes: float
    """Bytes per element of a norm's saved input; 0 = the compute dtype."""
    logit_bytes: float
    """Bytes per logit alive at the peak of the loss (logits, softmax, gradient)."""
    frees_loss: bool = False
    """The training loop drops logits before the backward, so that they are gone when a layer is rebuilt."""


@dataclass(frozen=True, kw_only=True)
class Execution(_FromFile):
    """Time behaviour that is software, not hardware."""

    elementwise_traffic: float
    """Bytes moved by element-wise operators relative to fully fused ones."""
    launches_per_operator: float
    """Kernels launched per operator of the cost model, forward."""
    tensor_parallel_launches: float
    """Extra host time per tensor-parallel operator (dispatch of distributed tensors), in launches."""
    exchange_launches: float
    """Host time to gather or reduce the states of one layer (hooks, copies in and out), in launches."""
    reduce_launches: float = 0.0
    """Host time to lay out the copy of a gradient into the buffer that is reduced, per parameter, in launches."""
    root_is_one_unit: bool = False
    """Embedding, last norm and head of a rank are gathered and reduced together."""
    fetch_launches: float = 0.0
    """More for a gather ahead of a layer (hooks of every module that track its parameters), in launches."""
    gather_copy_bytes: float = 0.0
    """Bytes of streaming that copying a gathered parameter out of its flat buffer takes between products."""
    gather_input_bytes: float = 0.0
    """The same of copying a rank's own shard into that buffer, per parameter of the shard."""
    reduce_copy_bytes: float = 0.0
    """The same of copying a gradient into the buffer that is reduced."""
    clip_bytes: float = 0.0
    """Bytes read and written per gradient to clip it by the norm of all."""
    clip_unscales: bool = False
    """Clipping divides the scale of the loss out in the same pass; else that is one more."""
    update_slowdown: float = 1.0
    """Seconds of clipping and updating on a GPU over those of streaming the same bytes."""
    update_launches: float = 0.0
    """Host time to clip and update one layer, in launches."""
    fused_accumulation: bool
    """Products of weight gradients add to the accumulated gradient themselves; else that is a pass over both of its own."""
    step_overhead_s: float
    """Fixed host time per optimizer step."""
    attention_kernels: tuple[AttentionKernel, ...]
    """Fused attention in order of preference: the first that the GPU has runs."""
    fused_layers: bool
    """RMSNorm, rotary embedding and gated activation run as one kernel each; else as eager PyTorch runs them."""
    fused_norms: bool = False
    """Norms are one kernel each, whatever the rest is."""
    attention_rate: float
    """Attention core relative to the published rates of its kernels."""
    compute_slowdown: float
    """Fraction by which compute slows while communication hides behind it."""
    softmax_passes: tuple[float, float] = (1.0, 1.0)
    """Traffic between the products of unfused attention, forward and backward, relative to one kernel that scales, masks and normalises
    the scores and one that goes back through it."""
    ring_attention_rate: float = 1.0
    """What is left of the rate when attention runs block by block in a ring of context parallelism, merging partial outputs."""
    cast_bytes: float = 4.0
    """Traffic per element to cast an operand of an fp8 product: 4 reads 16 bits and writes 8 as it is and transposed, the scale
    known beforehand (Transformer Engine's delayed scaling)."""


@dataclass(frozen=True, kw_only=True)
class Communication(_FromFile):
    """When and how ranks exchange states, and which share can hide behind compute."""

    reduce_every_micro_batch: tuple[int, ...]
    """ZeRO stages that reduce gradients after each micro-batch (else once per step)."""
    gather_every_micro_batch: tuple[int, ...]
    """ZeRO stages that gather parameters in forward and in backward of each micro-batch (else once per step)."""
    tied_after_reduction: bool = False
    """Copies of a tied embedding exchange gradients behind the reduction: the shard of a rank, in fp32; else whole ones, as they
    accumulate."""
    pipeline_reduces_once: bool
    """Inside a pipeline ZeRO-2/3 reduce once a step too; until then gradients, and under ZeRO-3 parameters, stay whole."""
    replicas_reduce_once: bool = False
    """Under HSDP the shards of replicas are summed once a step, however often gradients are scattered."""
    reduce_messages: int
    """Collectives that the gradients of one layer are reduced in."""
    gather_messages: int
    """The same of gathering its parameters."""
    full_repeats_tensor: float
    """Share of the forward tensor-parallel communication that full recompute repeats."""
    full_repeats_tensor_sp: float
    """The same with sequence parallelism."""
    selective_repeats_tensor: float
    selective_repeats_tensor_sp: float
    tensor_overlap: float
    gather_overlap: float
    """Of parameters gathered once a step, after the update."""
    prefetch_overlap: float
    """Of parameters gathered for every micro-batch, ahead of their layers."""
    reduce_overlap: float
    pipeline_overlap: float
    pipeline_scatter: bool
    """Boundary tensors are split over tp even without sequence parallelism."""
    async_tensor_overlap: float = 0.0
    """Share of the rest that async tensor parallelism hides where sequence parallelism stays inside a node."""
    one_queue_architectures: tuple[str, ...] = ()
    """Of GPUs on which that needs all kernels in one queue: beside what needs several, exchanges of states for every micro-batch or
    joined passes (`ExpertParallel.joins_passes`), it hides nothing there."""
    reuse_distance: float = float("inf")
    """ZeRO-3: matrices of a layer with at least so many parameters between their use in its recomputation and in its backward are
    released and gathered once more."""
    bucket_parameters: float = 0.0
    """Parameters whose gradients are reduced in one collective, and that are gathered in one after the update; 0: those of a layer
    (or of each of its messages). Gathers of every micro-batch go by layers all the same."""
    bucket_parameters_per_rank: float = 0.0
    """A bucket holds at least this many for each data-parallel rank."""
    selective_repeats_context: bool = False
    """Selective recompute repeats the exchanges of attention whatever it recomputes, else only where it recomputes attention."""
    context_overlap: float = 1.0
    """Share of a ring pass of context parallelism that attention can hide."""

    def full_repeats(self, *, split: bool, dispatched: bool) -> float:
        """Share of the forward tensor-parallel communication that full recompute repeats, with sequence parallelism where `split`; all of
        it in layers whose tokens are dispatched, as only what reduces a dense MLP, the end of a layer, is not repeated."""
        return 1.0 if dispatched else self.full_repeats_tensor_sp if split else self.full_repeats_tensor

    def selective_repeats(self, *, split: bool, dispatched: bool) -> float:
        """The same of selective recompute, where that repeats any."""
        share = self.selective_repeats_tensor_sp if split else self.selective_repeats_tensor
        return 1.0 if share > 0 and dispatched else share


@dataclass(frozen=True, kw_only=True)
class Runtime(_FromFile):
    """One runtime at one version."""

    name: str
    version: str
    source: str
    abilities: Abilities
    states: Mapping[str, States]
    working_set: WorkingSet
    activations: Activations
    execution: Execution
    communication: Communication
    stages: StageRule
    vocabulary_multiple: int
    """Vocabulary is padded to this times tp."""
    allocator_slack_fraction: float
    """Reserved beyond allocated, relative to allocated."""
    offload: Offloading = field(default_factory=Offloading)
    expert_parallel: ExpertParallel = field(default_factory=ExpertParallel)
    tuning: Tuning = field(default_factory=Tuning)
    warnings: Mapping[str, str] = field(default_factory=dict[str, str])
    """What users reported of a layout's word that the runtime has: told with every layout that uses it, refused by nothing."""
    switched: Mapping[str, float] = field(default_factory=dict[str, float])
    """Numbers that switches changed, relative to before; fitted constants are changed alike."""
    fitted_as: str = ""
    """The runtime whose fitted constants hold for this one; "" = its own."""

    def warnings_of(self, layout: Layout) -> list[str]:
        """Sentences on the words that a layout uses."""
        plain = Layout()
        used = {word: getattr(layout, word) for word in self.warnings if getattr(layout, word) != getattr(plain, word)}
        return [f"warning: {word}={value} in {self.name}: {self.warnings[word]}" for word, value in used.items()]

    @property
    def fitted_entry(self) -> str:
        """Its entry among the fitted constants."""
        return self.fitted_as or self.name.partition("+")[0]


def without_overlap(runtime: Runtime) -> Runtime:
    """The runtime where communication and compute share the same cores: on a CPU nothing hides."""
    exposed = replace(
        runtime.communication,
        tensor_overlap=0.0,
        async_tensor_overlap=0.0,
        gather_overlap=0.0,
        prefetch_overlap=0.0,
        reduce_overlap=0.0,
        pipeline_overlap=0.0,
        context_overlap=0.0,
    )
    return replace(runtime, communication=exposed, expert_parallel=replace(runtime.expert_parallel, overlap=0.0))


def load_runtime(name: str) -> Runtime:
    """A shipped runtime by name, or a TOML file, with switches after "+" (fsdp2+compile).

    Raises InputError naming file, field and remedy."""
    name, *switches = name.split("+")
    return _read(*runtime_file(name, Path()), switches)


@cache
def _reader() -> TypeAdapter[Runtime]:
    """Made once: compiling the schema takes longer than reading a file."""
    from pydantic import TypeAdapter

    return TypeAdapter(Runtime)


def _read(text: str, place: str, switches: list[str]) -> Runtime:
    from pydantic import ValidationError

    document = switched(runtime_document(text, place), switches, place)
    check_values(document, place)
    abilities: dict[str, Any] = document.get("abilities", {})
    if abilities.get("orders") == "any":
        abilities["orders"] = ORDERS
    precisions: dict[str, dict[str, Any]] = document.get("states", {})
    if "fp8" in abilities.get("precisions", ()):  # only products are in fp8
        precisions.setdefault("fp8", dict(precisions.get("bf16", {})))
    for states in precisions.values():
        if isinstance(states, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            states["zero"] = [state_row(states, stage) for stage in range(4)]
            for stage in range(4):
                states.pop(f"zero_{stage}", None)
    try:
        return _reader().validate_python(document)
    except ValidationError as bad:
        errors = bad.errors()
        first = next((e for e in errors if e["type"] in ("extra_forbidden", "unexpected_keyword_argument")), errors[0])
        field = ".".join(map(str, first["loc"]))
        value = "" if first["type"].startswith("missing") else f" (value {first.get('input')!r:.60})"
        remedy = "see the shipped runtimes"
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument") and len(first["loc"]) == 2:
            table, word = map(str, first["loc"])
            part = get_type_hints(Runtime).get(table)
            remedy = nearest(word, [one.name for one in fields(part)]) if is_dataclass(part) else remedy
        raise InputError(f"{field}: {first['msg']}{value}", place=place, remedy=remedy) from None
