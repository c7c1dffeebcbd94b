"""The order of mesh axes: groups of ranks, what they cost, and the search for the best order."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.axis_order import AXES, DEFAULT_ORDER, ORDERS, read_order
from shardplan.costmodel.collectives import collective_s, members_per_node
from shardplan.costmodel.estimate import estimate, on_mean_stage
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, layout_table, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.order_rules import ORDER_RULES
from shardplan.costmodel.rank_groups import Ranks, dense_groups, rank_coordinates
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import broken_rules, rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.topology import tier_table
from shardplan.planner.at_setting import estimated
from shardplan.planner.machines import with_network_rate
from shardplan.planner.placement import as_innermost, least_step_s, placement_document, placement_lines
from shardplan.planner.search import search
from shardplan.planner.space import Wishes, layout_space, parse_wishes


def setting(runtime: str, *, gpus: int = 16, model: str = "llama-3-8b", batch: int = 64, gbps: float = 25.0) -> Setting:
    return Setting(
        model=load_model(model),
        job=Job(seq=4096, global_batch=batch),
        cluster=with_network_rate(load_cluster("h100-ib", gpus=gpus), gbps),
        runtime=load_runtime(runtime),
    )


def step_s(at: Setting, words: str) -> float:
    found = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=parse_layout(words), runtime=at.runtime)
    return float(found.step_s[0])


def test_an_order_is_a_word() -> None:
    assert DEFAULT_ORDER == "tp-cp-dp-pp"
    assert len(set(ORDERS)) == 24
    assert read_order("tp-cp-ep-pp-dp") == "tp-cp-pp-dp"  # as Megatron-Core writes it
    assert parse_layout("dp=2 order=TP-CP-EP-DP-PP") == Layout(dp=2)
    assert parse_layout("dp=2 order=dp-tp-cp-pp").words().endswith("order=dp-tp-cp-pp")
    for bad in ("tp-dp-pp", "tp-tp-cp-dp", "ep-tp-cp-dp-pp", "tp cp dp pp", ""):
        with pytest.raises(InputError):
            read_order(bad)
    with pytest.raises(InputError):
        Layout(order="tp-dp-pp")


def held_together(layout: Layout, axes: tuple[str, ...]) -> np.ndarray:
    """Ranks that share all coordinates but those of `axes` with rank 0, ascending."""
    at = rank_coordinates(layout)
    return np.flatnonzero(np.all([at[axis] == 0 for axis in AXES if axis not in axes], axis=0))


def ranks_of(group: Ranks) -> np.ndarray:
    inner = np.arange(int(group.ranks[0])) * int(group.stride[0])
    sets = 1 if group.sets is None else int(group.sets[0])
    outer = np.arange(sets) * int(np.ravel(group.set_stride)[0])
    return np.sort((inner[:, None] + outer).ravel())


@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 4])] * 4),
    order=st.sampled_from(ORDERS),
    shard=st.sampled_from([1, 2, 4]),
    zero=st.integers(0, 3),
)
def test_groups_are_those_of_the_rank_map(sizes: tuple[int, ...], order: str, shard: int, zero: int) -> None:
    layout = Layout(**dict(zip(AXES, sizes, strict=True)), order=order, zero=zero)
    layout = replace(layout, dp_shard=min(shard, layout.dp)) if zero else layout
    table = layout_table([layout])
    for axis in AXES:
        ranks = np.arange(getattr(layout, axis)) * int(table.stride(axis)[0])
        assert ranks.tolist() == held_together(layout, (axis,)).tolist()
    groups = dense_groups(table)
    at = rank_coordinates(layout)
    together = held_together(layout, ("cp", "dp"))
    sharing = [rank for rank in together if at["dp"][rank] < layout.shard_ranks] if zero else [0]
    assert ranks_of(groups.shards).tolist() == list(sharing)
    repeating = (
        [r for r in together if at["cp"][r] == 0 and at["dp"][r] % layout.shard_ranks == 0] if zero else together
    )
    assert ranks_of(groups.replicas).tolist() == list(repeating)
    assert groups.ranks[0] == len(together)


def test_sets_of_neighbours_share_nics_as_the_nodes_hold_them() -> None:
    """cp=2 beside each other and dp=8 at stride 4: a node of 8 holds two of each, like eight ranks at stride 2."""
    tiers = tier_table(load_cluster("h100-ib", gpus=64))
    size = np.full(1, 1e9)
    pairs = collective_s(tiers, "all_gather", size, 2.0, 1.0, np.full(1, 8.0), 4.0)
    even = collective_s(tiers, "all_gather", size, 16.0, 2.0)
    assert members_per_node(tiers, 16.0, 2.0) == 4
    assert pairs == pytest.approx(even, rel=1e-12)
    alone = collective_s(tiers, "all_gather", size, 16.0, 2.0, np.ones(1), 1.0)
    assert alone == even


def test_rows_of_several_orders_are_what_each_is_alone() -> None:
    at = setting("shardplan", gpus=32)
    base = layout_space(at.model, at.job, 32, parse_wishes("zero=1"))
    base = base.take(~np.any(list(broken_rules(at, base).values()), axis=0))
    some = base.take(np.arange(0, len(base), 7))
    rng = np.random.default_rng(0)
    mixed = replace(some, order=rng.integers(0, len(ORDERS), len(some)))
    together = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=mixed, runtime=at.runtime)
    for code in range(len(ORDERS)):
        rows = np.flatnonzero(mixed.order == code)
        alone = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=mixed.take(rows), runtime=at.runtime)
        assert together.step_s[rows] == pytest.approx(alone.step_s, rel=1e-12)
        plain = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=some.take(rows), runtime=at.runtime)
        assert together.device_peak_bytes[rows] == pytest.approx(plain.device_peak_bytes, rel=1e-12)
        least = least_step_s(at, plain, Wishes())
        assert (least <= alone.step_s * (1.0 + 1e-12)).all()


def test_what_talks_most_belongs_inside_the_node() -> None:
    """Over a slow network of nodes of 8: tensor parallelism moves activations, data parallelism parameters, a pipeline little."""
    slow = setting("shardplan", gpus=64, batch=512, gbps=10.0)
    tensor, data = "tp-cp-dp-pp", "dp-tp-cp-pp"
    gathering = "dp=8 tp=8 micro_batch=1 zero=3 sequence_parallel=true order={}"
    assert step_s(slow, gathering.format(tensor)) < step_s(slow, gathering.format(data))
    short = replace(slow, job=replace(slow.job, seq=256, global_batch=8))
    assert step_s(short, gathering.format(data)) < step_s(short, gathering.format(tensor))
    piped = "dp=8 pp=8 micro_batch=1 zero=1 order={}"
    assert step_s(slow, piped.format("dp-pp-tp-cp")) < step_s(slow, piped.format("pp-dp-tp-cp"))


@pytest.mark.parametrize(
    ("runtime", "model", "gpus", "gbps", "objective"),
    [
        ("shardplan", "llama-3-8b", 16, 10.0, "throughput"),
        ("shardplan", "llama-3-8b", 32, 100.0, "throughput"),
        ("shardplan", "gpt2", 24, 1.0, "throughput"),
        ("megatron", "llama-3-8b", 16, 10.0, "throughput"),
        ("megatron", "mixtral-8x7b", 32, 25.0, "throughput"),
        ("shardplan", "llama-3-8b", 16, 10.0, "memory"),
    ],
)
def test_the_chosen_order_is_the_best_of_all(runtime: str, model: str, gpus: int, gbps: float, objective: str) -> None:
    """Against every layout that fits in each of the 24 orders, without bounds."""
    at = setting(runtime, model=model, gpus=gpus, gbps=gbps, batch=48 if gpus == 24 else 64)
    at = replace(at, job=replace(at.job, seq=1024))
    found = search(model=at.model, job=at.job, cluster=at.cluster, runtime=at.runtime, objective=objective)
    assert found.ranked is not None
    assert found.placement is not None
    assert found.placement.complete
    layouts = found.ranked.layouts
    best = np.inf
    least_memory = found.ranked.device_peak_bytes[0]
    for code in range(len(ORDERS)):
        table = replace(layouts, order=np.full(len(layouts), code))
        broken = broken_rules(at, table)
        table = table.take(~np.any([np.zeros(len(table), dtype=bool), *broken.values()], axis=0))
        if not len(table):
            continue
        one = estimate(model=at.model, job=at.job, cluster=at.cluster, layouts=table, runtime=at.runtime)
        rows = one.device_peak_bytes <= least_memory if objective == "memory" else np.ones(len(table), dtype=bool)
        best = min(best, float(one.step_s[rows].min(initial=np.inf)))
    assert found.ranked.step_s[0] == pytest.approx(best, rel=1e-9)


def test_rules_of_orders() -> None:
    megatron, deepspeed = setting("megatron"), setting("deepspeed")

    def told(at: Setting, words: str) -> dict[str, str]:
        return {one.rule: str(one) for one in rejections(at, parse_layout(words))[0]}

    assert "runtime-order" not in told(megatron, "dp=4 pp=4 zero=1 order=tp-cp-pp-dp")
    assert "tp-cp-dp-pp or tp-cp-pp-dp" in told(megatron, "dp=4 tp=4 zero=1 order=dp-tp-cp-pp")["runtime-order"]
    assert "runtime-order" in told(deepspeed, "dp=4 pp=4 zero=1 order=tp-cp-pp-dp")
    assert told(deepspeed, "dp=16 zero=1 order=pp-dp-tp-cp") == {}  # one axis: every order is the same
    assert "order-zeropp" in told(deepspeed, "dp=16 zero=3 hpz=8 order=tp-cp-pp-dp")
    experts = setting("megatron", model="mixtral-8x7b")
    piped = "dp=4 tp=1 pp=4 zero=1 order=tp-cp-pp-dp"
    assert "order-experts" in told(experts, f"{piped} ep=4")
    inside = "dp=2 tp=2 pp=4 zero=1 sequence_parallel=true order=tp-cp-pp-dp"
    assert "order-experts" not in told(experts, f"{inside} ep=2")
    assert "order-experts" in told(experts, f"{inside} ep=4")


def test_the_user_may_fix_or_forbid_an_order() -> None:
    at = setting("shardplan", gpus=16, gbps=10.0)
    asked = {"model": at.model, "job": at.job, "cluster": at.cluster, "runtime": at.runtime}
    fixed = search(**asked, wishes=parse_wishes("order=dp-tp-cp-pp pp=2"))
    assert fixed.ranked is not None
    assert {fixed.ranked.layouts.row(i).order for i in range(len(fixed.ranked))} == {"dp-tp-cp-pp"}
    plain = search(**asked, wishes=parse_wishes("pp=2", ["order"]))
    assert plain.ranked is not None
    assert not plain.ranked.layouts.order.any()
    free = search(**asked, wishes=parse_wishes("pp=2"))
    assert free.ranked is not None
    assert free.ranked.step_s[0] <= min(plain.ranked.step_s[0], fixed.ranked.step_s[0])


def test_the_choice_is_told() -> None:
    at = setting("megatron", gpus=64, gbps=100.0)
    told = placement_document(at, parse_layout("dp=8 tp=2 pp=4 zero=1 sequence_parallel=true"))
    assert [(row["axis"], row["ranks_in_node"], row["nodes"]) for row in told["axes"]] == [
        ("tp", 2, 1),
        ("dp", 4, 2),
        ("pp", 1, 4),
    ]
    assert len(told["orders"]) == 6  # of three axes
    assert sum(row["runtime_knows"] for row in told["orders"]) == 2
    lines = placement_lines(told)
    assert lines[0].endswith("tp=2 inside a node, dp=8 across 2 nodes, 4 in each, pp=4 across 4 nodes")
    assert lines[1].startswith("order=tp-cp-pp-dp would take")


def test_equal_groups_are_estimated_once() -> None:
    at = setting("shardplan")
    for words, orders in (("dp=16 zero=1", 1), ("dp=4 tp=4 zero=1", 2), ("dp=2 tp=2 pp=4 zero=1", 6)):
        assert len(placement_document(at, parse_layout(words))["orders"]) == orders
    shown = [tuple(p) for p in itertools.permutations(AXES)]
    assert ["-".join(p) for p in shown] == list(ORDERS)


@pytest.mark.parametrize("cluster", ["h100-ib", "aws-p4d", "gcp-a3-high", "meta-24k-roce", "b200-ib"])
@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b"])
def test_no_order_is_faster_than_every_axis_as_the_innermost(model: str, cluster: str) -> None:
    """As a bound of equal stages, of stages as they are, and of stages of equal fractions; for random layouts of 64 GPUs."""
    at = replace(setting("shardplan", model=model), cluster=load_cluster(cluster, gpus=64))
    every = layout_space(at.model, at.job, 64, Wishes(), ("ring", "ulysses"))
    random = np.random.default_rng(0)
    every = every.take(~np.any(list(broken_rules(at, every).values()), axis=0))
    table = every.take(np.sort(random.permutation(len(every))[:1000]))
    layouts, bounded = as_innermost(at, table)
    assert len(table) > 500 and bounded.all()
    for seconds in (lambda rows: estimated(at, rows).step_s, lambda rows: on_mean_stage(at, rows).step_s):
        least_s = seconds(layouts)
        for order in range(len(ORDERS)):
            moved = replace(table, order=np.full(len(table), order))
            rows = np.flatnonzero(~np.any([rule.broken(at, moved) for rule in ORDER_RULES], axis=0))
            assert (seconds(moved.take(rows)) >= least_s[rows] * (1.0 - 1e-12)).all(), ORDERS[order]


def test_meshes_and_axes_that_nodes_do_not_divide_have_no_such_bound() -> None:
    at = setting("shardplan", gpus=48)
    mesh = replace(at, cluster=load_cluster("dgx1v-edr", gpus=16))
    assert not as_innermost(mesh, layout_table([Layout(dp=16)]))[1].any()
    _, bounded = as_innermost(at, layout_table([Layout(dp=48), Layout(dp=3, tp=16), Layout(dp=16, pp=2)]))
    assert bounded.tolist() == [False, False, True]
