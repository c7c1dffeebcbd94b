"""What must hold for any model, machine, runtime and layout: parts add up, physics points one way, one row equals many.

Settings are drawn from the presets, the catalog and the runtimes, layouts from the planner's own space less what the rules refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardplan.costmodel.block_table import padded_vocab
from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.fitted import Fitted, fitted, with_fitted_cluster, with_fitted_runtime
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import LayoutTable
from shardplan.costmodel.model import Model, parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.pipeline import splits_backward
from shardplan.costmodel.recompute import RECOMPUTE
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.runtime_document import runtime_names
from shardplan.costmodel.stage_cost import stage_parameters, stage_rows
from shardplan.costmodel.step_time import TIME_PARTS
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.machine import Cluster, Gpu, Node
from shardplan.planner.space import layout_space, parse_wishes

FEW = settings(max_examples=20)
SLACK = 1e-9
"""Relative rounding of sums."""
MODELS = ("llama-3-8b", "llama-2-13b", "llama-3-70b", "gpt3-175b", "megatron-39b")
CLUSTERS = ("h100-ib", "selene", "jean-zay", "b200-ib", "dgx2-edr", "h200-ib", "mi325x-ib", "a100-40gb-ib")
RARE = ("schedule=zero_bubble", "schedule=zero_bubble_v", "schedule=dualpipe_v")
MOST_LAYOUTS = 100_000
"""Of one setting, kept in memory."""
TIERS = (
    ("deepspeed", "zero=3 offload_optimizer=cpu offload_params=cpu"),
    ("deepspeed", "zero=3 offload_optimizer=nvme offload_params=nvme"),
    ("deepspeed", "zero=3 offload_optimizer=cpu offload_ratio=0.4"),
    ("deepspeed+delayed_update", "zero=2 offload_optimizer=cpu"),
    ("megatron-deepspeed", "zero=3 offload_optimizer=cpu offload_activations=cpu recompute=full"),
    ("deepspeed", "zero=3 hpz=8 qwz=true qgz=true"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A setting and layouts that break none of its rules."""

    setting: Setting
    layouts: LayoutTable

    def estimates(
        self,
        *,
        layouts: LayoutTable | None = None,
        every_stage: bool = True,
        constants: Fitted | None = None,
        **changed: object,
    ) -> Estimates:
        """Estimates of the layouts, or of others, under the setting with parts of it changed."""
        at = replace(self.setting, **changed)  # type: ignore[arg-type]
        return estimate(
            model=at.model,
            job=at.job,
            cluster=at.cluster,
            layouts=self.layouts if layouts is None else layouts,
            runtime=at.runtime,
            every_stage=every_stage,
            constants=constants,
        )

    def changed(self, **columns: NDArray[np.int64]) -> tuple[LayoutTable, LayoutTable]:
        """(rows, the same rows with columns replaced), those that are valid both ways."""
        whole = {name: np.broadcast_to(column, len(self.layouts)) for name, column in columns.items()}
        other = replace(self.layouts, **whole)
        valid = _valid(self.setting, other)
        return self.layouts.take(valid), other.take(valid)


def _valid(setting: Setting, table: LayoutTable) -> NDArray[np.bool_]:
    found = broken_rules(setting, table)
    return ~np.any([np.zeros(len(table), dtype=bool), *found.values()], axis=0)


@cache
def _space(model: str, cluster: str, nodes: int, runtime: str, seq: int, batch: int, fix: str) -> Case:
    """Valid layouts among MOST_LAYOUTS of one setting, evenly drawn; schedules that the runtime lacks are not asked for."""
    machine = load_cluster(cluster)
    machine = machine.with_gpus(nodes * machine.node.gpus)
    chosen = load_runtime(runtime)
    precision = "bf16" if "bf16" in machine.gpu.peak_flop_per_s and "bf16" in chosen.abilities.precisions else "fp16"
    job = Job(seq=seq, global_batch=batch, precision=precision)
    setting = Setting(model=load_model(model), job=job, cluster=machine, runtime=chosen)
    kinds = chosen.abilities.context_parallel
    piped = chosen.abilities.schedules
    space = layout_space(setting.model, job, machine.gpus, parse_wishes(fix), kinds, schedules=piped)
    if len(space) > MOST_LAYOUTS:
        space = space.take(np.sort(np.random.default_rng(0).choice(len(space), size=MOST_LAYOUTS, replace=False)))
    return Case(setting=setting, layouts=space.take(_valid(setting, space)))


@cache
def _runtimes_and_wishes() -> tuple[tuple[str, str], ...]:
    """Every runtime with all schedules that it has, with those that split the backward alone, and with other tiers of memory."""
    usual = [(name, "") for name in runtime_names()]
    rare = [(name, f) for name in runtime_names() for f in RARE if f[9:] in load_runtime(name).abilities.schedules]
    return (*usual, *rare, *TIERS)


@st.composite
def cases(draw: st.DrawFn, *, rows: int = 150) -> Case:
    """A setting and some of its valid layouts."""
    runtime, asked = draw(st.sampled_from(_runtimes_and_wishes()))
    whole = _space(
        draw(st.sampled_from(MODELS)),
        draw(st.sampled_from(CLUSTERS)),
        draw(st.sampled_from((1, 2, 4))),
        runtime,
        draw(st.sampled_from((2048, 8192))),
        draw(st.sampled_from((64, 192))),
        asked,
    )
    seed = draw(st.integers(0, 2**16))
    size = len(whole.layouts)
    assume(size > 0)
    chosen = np.random.default_rng(seed).choice(size, size=min(rows, size), replace=False)
    return replace(whole, layouts=whole.layouts.take(chosen))


def ordered(least: NDArray[np.float64], most: NDArray[np.float64], rows: LayoutTable, within: object = SLACK) -> None:
    """Fail, naming the layout, where `most` is below `least` by more than the share `within`."""
    wrong = np.flatnonzero(most < least * (1.0 - np.asarray(within)))
    assert not len(wrong), [(rows.row(int(i)).words(), float(least[i]), float(most[i])) for i in wrong[:3]]


@FEW
@given(cases())
def test_parts_add_up(case: Case) -> None:
    got, context = case.estimates(), case.estimates().context_bytes
    assert all((got.time[part] >= 0).all() for part in TIME_PARTS)
    assert sum(got.time[part] for part in TIME_PARTS) == pytest.approx(got.step_s, rel=SLACK)
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    assert sum(got.stages[part] for part in parts) == pytest.approx(got.stages["allocated"], rel=SLACK)
    assert got.stages["allocated"] + got.stages["slack"] + context == pytest.approx(got.stages["device"], rel=SLACK)


@FEW
@given(cases())
def test_hidden_and_exposed_communication_are_all_of_it(case: Case) -> None:
    """Data parallel: what hides and what does not is what a runtime that hides none exposes; the slowdown of the compute it hides
    behind comes on top. Tensor parallel: the runtime's share hides."""
    runtime = case.setting.runtime
    share = runtime.communication.tensor_overlap
    exposing = replace(
        runtime,
        communication=replace(runtime.communication, gather_overlap=0.0, prefetch_overlap=0.0, reduce_overlap=0.0),
    )
    hides, shows = (case.estimates(runtime=one, constants=NOT_FITTED) for one in (runtime, exposing))
    assert (shows.hidden["dp_s"] == 0).all()
    exposed = hides.time["dp_exposed_s"] - runtime.execution.compute_slowdown * hides.hidden["dp_s"]
    assert exposed + hides.hidden["dp_s"] == pytest.approx(shows.time["dp_exposed_s"], rel=SLACK)
    assert hides.hidden["tp_s"] * (1 - share) == pytest.approx(hides.time["tp_exposed_s"] * share, rel=SLACK)


NOT_FITTED = Fitted(architecture={}, runtime={})


@settings(max_examples=6)
@given(cases())
def test_fitted_constants_are_applied_once(case: Case) -> None:
    """The estimate is that of a runtime and a cluster with the constants, taken as they are."""
    once = case.estimates(
        runtime=with_fitted_runtime(case.setting.runtime, case.setting.cluster, fitted()),
        cluster=with_fitted_cluster(case.setting.cluster, fitted()),
        constants=NOT_FITTED,
    )
    assert (once.step_s == case.estimates().step_s).all()


@FEW
@given(cases(), st.integers(0, 149))
def test_rows_do_not_depend_on_each_other(case: Case, at: int) -> None:
    """A row alone, and the few stages a search looks at, give what all rows and every stage give."""
    whole, few = case.estimates(), case.estimates(every_stage=False)
    row = at % len(case.layouts)
    alone = case.estimates(layouts=case.layouts.take(np.array([row])))
    for got, rows in ((few, np.arange(len(case.layouts))), (alone, np.array([row]))):
        assert got.device_peak_bytes == pytest.approx(whole.device_peak_bytes[rows], rel=1e-12)
        for part in (*TIME_PARTS, "step_s"):
            assert got.time[part] == pytest.approx(whole.time[part][rows], rel=1e-9, abs=1e-15), part


def with_node(cluster: Cluster, node: Node) -> Cluster:
    return replace(cluster, node_runs=((node, cluster.nodes),))


def with_gpu(cluster: Cluster, gpu: Gpu) -> Cluster:
    return with_node(cluster, replace(cluster.node, gpu=gpu))


FASTER: dict[str, Callable[[Cluster], Cluster]] = {
    "peak": lambda c: with_gpu(
        c, replace(c.gpu, peak_flop_per_s={word: 2 * rate for word, rate in c.gpu.peak_flop_per_s.items()})
    ),
    "memory": lambda c: with_gpu(
        c, replace(c.gpu, memory_bandwidth_bytes_per_s=2 * c.gpu.memory_bandwidth_bytes_per_s)
    ),
    "launches": lambda c: with_gpu(c, replace(c.gpu, launch_s=c.gpu.launch_s / 2)),
    "link": lambda c: with_node(
        c, replace(c.node, intra=replace(c.node.intra, bandwidth_bytes_per_s=2 * c.node.intra.bandwidth_bytes_per_s))
    ),
    "network": lambda c: replace(c, network=replace(c.network, nic_bytes_per_s=2 * c.network.nic_bytes_per_s)),
    "pcie": lambda c: with_node(
        c, replace(c.node, host=replace(c.node.host, pcie_bytes_per_s=2 * c.node.host.pcie_bytes_per_s))
    ),
    "host memory": lambda c: with_node(
        c,
        replace(
            c.node,
            host=replace(c.node.host, memory_bandwidth_bytes_per_s=2 * c.node.host.memory_bandwidth_bytes_per_s),
        ),
    ),
}


@pytest.mark.parametrize("what", FASTER)
@FEW
@given(case=cases())
def test_twice_the_rate_is_never_slower(what: str, case: Case) -> None:
    """Where the backward is split, the bubble goes by the shares that passes have in the whole model: what gets shorter on one stage alone
    may make the others' share of it longer, by less than 0.01 % of the step."""
    before, after = case.estimates(), case.estimates(cluster=FASTER[what](case.setting.cluster))
    ordered(after.step_s, before.step_s, case.layouts, np.where(splits_backward(case.layouts), 1e-4, SLACK))
    assert (before.device_peak_bytes == after.device_peak_bytes).all()


@FEW
@given(cases())
def test_longer_sequences_and_larger_micro_batches_take_longer(case: Case) -> None:
    """Twice the tokens a micro-batch, by length or by number of sequences: as many micro-batches, none of them faster."""
    job, before = case.setting.job, case.estimates()
    doubled = replace(case.layouts, micro_batch=2 * case.layouts.micro_batch)
    more = [case.estimates(layouts=doubled, job=replace(job, global_batch=2 * job.global_batch))]
    if not case.setting.model.learned_positions:
        more.append(case.estimates(job=replace(job, seq=2 * job.seq)))
    for after in more:
        ordered(before.step_s, after.step_s, case.layouts)
        ordered(before.device_peak_bytes, after.device_peak_bytes, case.layouts)


@FEW
@given(cases())
def test_more_micro_batches_have_a_smaller_bubble(case: Case) -> None:
    job, few = case.setting.job, case.estimates()
    many = case.estimates(job=replace(job, global_batch=2 * job.global_batch))
    ordered(many.time["bubble_s"] / many.step_s, few.time["bubble_s"] / few.step_s, case.layouts)


@FEW
@given(cases(), st.integers(0, 2))
def test_zero_stages_need_less_and_less_memory(case: Case, zero: int) -> None:
    """Stage by stage on the fullest GPU, as long as there is more than one rank to shard over."""
    start = replace(case, layouts=case.layouts.take(case.layouts.dp * case.layouts.cp > 1))
    more = start.changed(zero=np.array(zero))[1]
    more = more.take(more.dp_shard == more.dp)
    more = more.take(_valid(case.setting, replace(more, zero=np.full(len(more), zero + 1))))
    less = replace(more, zero=np.full(len(more), zero + 1))
    assume(len(more) > 0)
    ordered(case.estimates(layouts=less).device_peak_bytes, case.estimates(layouts=more).device_peak_bytes, more)


@FEW
@given(cases())
def test_recompute_takes_memory_for_time(case: Case) -> None:
    """None >= selective >= full in activations, the reverse in time. Where a runtime keeps whole streams in exchange for what
    selective drops, and sequence parallelism had split the latter, selective may keep more than none."""
    exchanges = (case.setting.runtime.activations.selective_streams > 0) & (case.layouts.sequence_parallel == 1)
    for less, more in (("none", "selective"), ("selective", "full"), ("none", "full")):
        kept = replace(case, layouts=case.layouts.take(~exchanges | (less == "selective")))
        if not len(kept.layouts):
            continue
        plain, again = (kept.changed(recompute=np.array(RECOMPUTE.index(word)))[1] for word in (less, more))
        plain = plain.take(_valid(case.setting, replace(plain, recompute=np.full(len(plain), RECOMPUTE.index(more)))))
        if not len(plain):
            continue
        again = replace(plain, recompute=np.full(len(plain), RECOMPUTE.index(more)))
        before, after = (case.estimates(layouts=rows) for rows in (plain, again))
        assert (after.stages["activations"] <= before.stages["activations"] * (1 + SLACK)).all()
        ordered(before.step_s, after.step_s, plain)


@FEW
@given(cases())
def test_twice_the_data_parallel_ranks_do_half_the_work_each(case: Case) -> None:
    """Twice the replicas at the same batch: half the micro-batches, half the compute, never more memory.

    Every micro-batch but the first also adds up gradients, a tenth of its compute at most: less than half of those is left. Of a pipeline
    another stage may be the slowest, where the launches of exchanges decide.
    """
    layouts, job = case.layouts, case.setting.job
    even = layouts.take(job.global_batch / (layouts.dp * layouts.micro_batch) % 2 == 0)
    wide = replace(even, dp=2 * even.dp, dp_shard=2 * even.dp_shard)
    cluster = case.setting.cluster.with_gpus(2 * case.setting.cluster.gpus)
    valid = _valid(replace(case.setting, cluster=cluster), wide)
    assume(valid.any())
    narrow, wide = case.estimates(layouts=even.take(valid)), case.estimates(layouts=wide.take(valid), cluster=cluster)
    of_others = np.where(even.take(valid).pp > 1, 0.01, SLACK)
    ordered(wide.time["compute_s"], narrow.time["compute_s"] / 2, even.take(valid), of_others)
    ordered(narrow.time["compute_s"] / 2, wide.time["compute_s"], even.take(valid), 0.1)
    assert wide.time["recompute_s"] == pytest.approx(narrow.time["recompute_s"] / 2, rel=SLACK)
    ordered(wide.device_peak_bytes, narrow.device_peak_bytes, even.take(valid))


@FEW
@given(cases())
def test_bytes_follow_the_dtype(case: Case) -> None:
    """Gradients in fp32 take twice the bytes of bf16 where they follow the job's word; fp32 activations twice those of bf16, but
    for the fp32 sums of fused attention and dropout masks, which never change. No step is slower in bf16, its update aside, which
    writes a 16-bit copy more."""
    runtime, job = case.setting.runtime, case.setting.job
    states = runtime.states.get("bf16")
    if job.precision == "bf16" and states is not None and {"bf16", "fp32"} <= set(states.gradient_dtypes):
        follow = all(
            value == "gradient"
            for row in states.zero
            for table in (row.whole, row.sharded, row.accumulating)
            if (value := table.get("gradients")) is not None
        )
        wide, narrow = (
            case.estimates(job=replace(job, grad_dtype=word)).stages["gradients"] for word in ("fp32", "bf16")
        )
        assert (narrow <= wide).all()
        waiting = runtime.working_set.gradient_layers > 0
        assert not follow or waiting or wide == pytest.approx(2 * narrow, rel=SLACK)
    if "fp32" in runtime.abilities.precisions and "fp32" in case.setting.cluster.gpu.peak_flop_per_s:
        full, half = (
            case.estimates(job=replace(job, precision=word, grad_dtype=None)) for word in ("fp32", job.precision)
        )
        assert (full.stages["activations"] <= 2 * half.stages["activations"] * (1 + SLACK)).all()
        assert (full.stages["activations"] >= half.stages["activations"] * (1 - SLACK)).all()
        least, most = (found.step_s - found.time["optimizer_s"] for found in (half, full))
        ordered(least, most, case.layouts)


@FEW
@given(cases())
def test_layers_and_parameters_add_up_to_the_model(case: Case) -> None:
    """Over stages and tensor-parallel ranks: the model's count, its norms, positions and biases of what ranks sum once more on every
    further rank, the padding of the vocabulary, and a tied embedding twice where first and last stage are two ranks
    (or two chunks of one, for runtimes that keep both)."""
    model, table, runtime = case.setting.model, case.layouts, case.setting.runtime
    stages = stage_rows(model, table, runtime, every_stage=True)
    there = np.arange(stages.stage.shape[1])[None, :] < table.pp[:, None]
    assert (np.where(there, stages.layers.sum(axis=2), 0).sum(axis=1) == model.layer_count).all()
    held = (
        np.where(there, stage_parameters(model, case.setting.job, table, runtime, stages).stage, 0.0).sum(axis=1)
        * table.tp
    )
    assert held == pytest.approx(_expected_parameters(model, case), rel=1e-12)


def _expected_parameters(model: Model, case: Case) -> NDArray[np.float64]:
    counts, table = parameter_counts(model), case.layouts
    whole = counts["norms"] + counts["final_norm"] + counts["positions"]
    for kind, count in model.layers:
        outputs = (kind.attention_output_bias, kind.mlp_bias and not kind.experts)
        whole += sum(outputs) * count * kind.hidden
    padding = (padded_vocab(model, case.setting.runtime, table.tp.astype(np.float64)) - model.vocab) * model.hidden
    apart = (table.pp > 1) & (~table.v_placed | case.setting.runtime.working_set.tied_twice_in_v)
    twice = model.tied_embeddings & apart
    tables = np.where(twice | (not model.tied_embeddings), 2, 1)
    return counts["total"] + (table.tp - 1) * whole + tables * padding + np.where(twice, counts["embedding"], 0)
