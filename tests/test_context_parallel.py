"""Context parallelism: the sequence of one sample spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.collectives import collective_s, point_to_point_s, wire_factor
from shardplan.costmodel.context_parallel import Exchange, context_seconds, exchanges
from shardplan.costmodel.estimate import Estimates, estimate
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import CP_KINDS, layout_from_document, layout_table, parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import load_cluster
from shardplan.hw_profiles.topology import TierTable, tier_table
from shardplan.planner.search import search
from shardplan.planner.space import layout_space, parse_wishes

TIERS = tier_table(load_cluster("h100-ib", gpus=64))


def test_all_to_all_inside_a_node_moves_all_shares_but_ones_own() -> None:
    size, rate = 1e9, TIERS.bandwidth_bytes_per_s[0] * TIERS.efficiency[0].at(1e9)
    assert float(collective_s(TIERS, "all_to_all", size, 8, 1)) == pytest.approx(
        TIERS.latency_s[0] + size * 7 / 8 / rate
    )
    assert float(collective_s(TIERS, "all_to_all", size, 1, 1)) == 0.0


def test_all_to_all_between_nodes_is_paced_by_what_leaves_the_node() -> None:
    """Two nodes of 8: 8 of 16 shares leave (nccl-tests: at most k/(k-1) times the NIC rate for k nodes)."""
    size = 1e9
    outer = TIERS.bandwidth_bytes_per_s[1] * TIERS.efficiency[1].at(8 * size / 2)
    expected = TIERS.latency_s[1] + size / 2 / outer
    assert float(collective_s(TIERS, "all_to_all", size, 16, 1)) == pytest.approx(expected)
    assert collective_s(TIERS, "all_to_all", size, 16, 1) < collective_s(TIERS, "all_to_all", size, 16, 8)


def test_few_members_per_node_meet_the_efficiency_of_as_many_bytes_per_nic() -> None:
    """One member a node passes S through its NIC share, four pass S / 4 each: same bytes per NIC, same efficiency where the steps of
    the longer ring do not count."""
    four = float(collective_s(TIERS, "all_gather", 4e11, 32, 2))  # 4 members a node, 1e11 bytes a NIC
    one = float(collective_s(TIERS, "all_gather", 1e11, 8, 8))
    assert four == pytest.approx(one * (31 / 32) / (7 / 8), rel=1e-9)


@pytest.mark.parametrize(
    ("mib", "shares"),
    [
        (16, (0.32, 0.24, 0.13, 0.05, 0.044, 0.021, 0.0087)),
        (256, (0.85, 0.77, 0.69, 0.57, 0.387, 0.209, 0.1027)),
        (512, (0.89, 0.85, 0.78, 0.73, 0.562, 0.384, 0.1902)),
        (1024, (0.92, 0.93, 0.9, 0.76, 0.74, 0.563, 0.314575)),
        (4096, (0.95, 0.95, 0.95, 0.95, 0.923, 0.755, 0.740175)),
    ],
)
def test_rings_of_many_nodes_slow_down_as_measured(mib: int, shares: tuple[float, ...]) -> None:
    """aliyun/SimAI@cef83f9 inputs/ratio: share of 23.5 GB/s a NIC on 2 to 128 nodes of eight, from the curve of four."""
    tiers = tier_table(load_cluster("selene", gpus=1024))
    size = mib * 2**20
    reached = [
        size * (n - 1) / n / float(collective_s(tiers, "all_gather", size, n, 1)) / (8 * 23.5e9)
        for n in (16, 32, 64, 128, 256, 512, 1024)
    ]
    assert reached == pytest.approx(list(shares), rel=0.55)
    assert np.mean(np.abs(np.log(np.array(reached) / shares))) < 0.17


def test_slower_nics_leave_the_steps_as_long() -> None:
    network = load_cluster("selene").network
    slow = network.at_rate(network.nic_bytes_per_s / 4)
    for size in (2**20, 64 * 2**20):
        seconds = [size / n.nic_bytes_per_s * (1 / n.efficiency.at(size) - 1 / 0.902) for n in (network, slow)]
        assert seconds[0] == pytest.approx(seconds[1])
    assert network.at_rate(network.nic_bytes_per_s).efficiency.fractions == pytest.approx(network.efficiency.fractions)


@pytest.mark.parametrize(
    "head", ['base = "h100-ib"\n[network]\n', 'nodes = 16\nnode = { base = "dgx-h100" }\n[network]\nbase = "ib-ndr"\n']
)
def test_a_profile_with_slower_nics_is_the_network_at_that_rate(tmp_path: Path, head: str) -> None:
    """As `explain` and `sweep` have it when they say how many Gbit/s are needed; a curve of the profile's own is left as it is."""
    profile = tmp_path / "slower.toml"
    profile.write_text('source = "here"\n' + head + "nic_gbit_per_s = 196\n")
    network, known = load_cluster(profile).network, load_cluster("h100-ib").network
    assert network.efficiency == known.at_rate(196e9 / 8).efficiency
    assert "at 196 Gbit/s steps take as long as at 400" in load_cluster(profile).provenance["network.efficiency"].text
    curve = (
        '[network.efficiency]\nsize_mib = [1, 64]\nfraction = [0.1, 0.8]\nsource = "here"\nsource_kind = "measured"\n'
    )
    profile.write_text(profile.read_text() + curve)
    assert load_cluster(profile).network.efficiency.fractions == (0.1, 0.8)


def test_doubling_bandwidth_is_never_slower() -> None:
    faster = replace(TIERS, bandwidth_bytes_per_s=2 * TIERS.bandwidth_bytes_per_s)
    for size in (1e3, 1e6, 1e9):
        for ranks, stride in ((4, 1), (8, 1), (16, 1), (8, 8), (16, 4)):
            assert collective_s(faster, "all_to_all", size, ranks, stride) <= collective_s(
                TIERS, "all_to_all", size, ranks, stride
            )


# --- one attention ---------------------------------------------------------------------------------------------------

CP = np.array([8.0])
QUERIES, KEYS_VALUES = np.array([32e6]), np.array([16e6])  # bytes of one rank


def wire_bytes(parts: tuple[Exchange, ...], cp: float) -> float:
    """Bytes a rank sends."""
    sent = 0.0
    for part in parts:
        factor = 1.0 if part.operation == "pass" else float(wire_factor(part.operation, cp))
        sent += float(np.sum(part.times * part.size_bytes)) * factor
    return sent


@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [
        ("ring", 7 * 16e6, 7 * 32e6),
        ("all_gather", 7 * 16e6, 2 * 7 * 16e6),
        ("ulysses", 7 / 8 * (32e6 + 8e6 + 8e6 + 32e6), 7 / 8 * (32e6 + 8e6 + 8e6 + 32e6)),
    ],
)
def test_volumes(kind: str, forward: float, backward: float) -> None:
    """Ring: K and V cp - 1 times, twice the bytes backward; Ulysses: q, k, v and output, less the share that stays."""
    parts = exchanges(kind, CP, QUERIES, KEYS_VALUES)
    assert [wire_bytes(one, 8.0) for one in parts] == pytest.approx([forward, backward], rel=1e-12)


def seconds(kind: str, *, attention_s: float, overlap: float = 1.0, tiers: TierTable = TIERS) -> dict[str, float]:
    columns = context_seconds(
        tiers,
        kinds=np.array([CP_KINDS.index(kind)]),
        cp=CP,
        stride=np.ones(1),
        query_bytes=QUERIES,
        key_value_bytes=KEYS_VALUES,
        forward_s=np.array([attention_s]),
        backward_s=np.array([2.5 * attention_s]),
        overlap=overlap,
    )
    return {name: float(column[0]) for name, column in columns.items()}


def test_ring_hides_behind_attention_block_by_block() -> None:
    once = float(point_to_point_s(TIERS, 16e6, 8, 1))
    assert seconds("ring", attention_s=1.0)["context_forward_exposed_s"] == 0.0
    assert seconds("ring", attention_s=1.0)["context_forward_hidden_s"] == pytest.approx(7 * once)
    # blocks of half a pass hide half of it
    assert seconds("ring", attention_s=8 * once / 2)["context_forward_exposed_s"] == pytest.approx(7 * once / 2)
    assert seconds("ring", attention_s=1.0, overlap=0.0)["context_forward_exposed_s"] == pytest.approx(7 * once)


def test_collectives_are_exposed_and_faster_links_never_slower() -> None:
    faster = replace(TIERS, bandwidth_bytes_per_s=2 * TIERS.bandwidth_bytes_per_s)
    for kind in CP_KINDS:
        slow, fast = seconds(kind, attention_s=1e-4), seconds(kind, attention_s=1e-4, tiers=faster)
        for phase in ("forward", "backward"):
            assert fast[f"context_{phase}_exposed_s"] <= slow[f"context_{phase}_exposed_s"]
            assert kind == "ring" or slow[f"context_{phase}_hidden_s"] == 0.0 < slow[f"context_{phase}_exposed_s"]


# --- whole layouts ---------------------------------------------------------------------------------------------------


def one(
    words: str, *, model: str = "llama-3-8b", runtime: str = "megatron", seq: int = 32768, batch: int = 64
) -> Estimates:
    layout = parse_layout(words)
    return estimate(
        model=load_model(model),
        job=Job(seq=seq, global_batch=batch),
        cluster=load_cluster("h100-ib", gpus=layout.gpus),
        layouts=layout,
        runtime=runtime,
    )


@pytest.mark.parametrize("kind", CP_KINDS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_flop_of_all_ranks_stay_and_activations_halve(kind: str, recompute: str) -> None:
    whole = one(f"dp=8 recompute={recompute}")
    half = one(f"dp=8 cp=2 cp_kind={kind} recompute={recompute}")
    assert float(half.hardware_flop_per_step[0]) == pytest.approx(float(whole.hardware_flop_per_step[0]), rel=1e-12)
    assert half.stages["activations"][0, 0] / whole.stages["activations"][0, 0] == pytest.approx(0.5, abs=0.03)
    assert half.time["compute_s"][0] / whole.time["compute_s"][0] == pytest.approx(0.5, abs=0.02)
    exposed, hidden = float(half.time["cp_exposed_s"][0]), float(half.hidden["cp_s"][0])
    assert (exposed, hidden > 0) == (0.0, True) if kind == "ring" else (exposed > 0, hidden) == (True, 0.0)


def test_unfused_attention_meets_all_keys() -> None:
    """Scores are (s / cp) x s: softmax tensors shrink with cp, not with its square."""
    whole, half = (one(f"dp=8 cp={cp} attention=unfused", seq=8192) for cp in (1, 2))
    assert half.stages["activations"][0, 0] / whole.stages["activations"][0, 0] == pytest.approx(0.5, rel=1e-9)
    assert float(half.hfu[0] * half.step_s[0] * 16) == pytest.approx(float(whole.hfu[0] * whole.step_s[0] * 8))


def test_without_context_parallelism_the_kind_changes_nothing() -> None:
    """cp = 1 alone, and beside rows with cp = 2."""
    words = ("dp=16", "dp=16 cp_kind=ulysses", "dp=8 cp=2")
    inputs = {"model": load_model("llama-3-8b"), "job": Job(seq=8192, global_batch=64), "runtime": "megatron"}
    cluster = load_cluster("h100-ib", gpus=16)
    alone = estimate(**inputs, cluster=cluster, layouts=layout_table([parse_layout("dp=16")]))
    beside = estimate(**inputs, cluster=cluster, layouts=layout_table([parse_layout(w) for w in words]))
    for row in (0, 1):
        assert beside.step_s[row] == alone.step_s[0]
        assert beside.device_peak_bytes[row] == alone.device_peak_bytes[0]
        assert beside.time["cp_exposed_s"][row] == beside.hidden["cp_s"][row] == 0.0


def test_states_are_sharded_and_reduced_over_dp_and_cp() -> None:
    """ZeRO over 4 * 2 ranks holds and exchanges as much as over 8 data-parallel ones."""
    for words, runtime in (("zero=1", "megatron"), ("zero=3", "fsdp2"), ("zero=0", "megatron")):
        wide, context = one(f"dp=8 {words}", runtime=runtime), one(f"dp=4 cp=2 {words}", runtime=runtime, batch=32)
        for part in ("parameters", "gradients", "optimizer"):
            assert context.stages[part][0, 0] == wide.stages[part][0, 0], (words, part)
        assert context.time["optimizer_s"][0] == wide.time["optimizer_s"][0]
        moved = [float(e.time["dp_exposed_s"][0] + e.hidden["dp_s"][0]) for e in (wide, context)]
        assert moved[1] > 0.9 * moved[0] > 0
    table = layout_table([parse_layout(w) for w in ("dp=4 cp=2", "dp=4 cp=2 zero=1", "dp=4 cp=2 zero=3 dp_shard=2")])
    assert table.zero_ranks.tolist() == [1, 8, 4]


def test_ulysses_keeps_its_output_and_copies_of_heads() -> None:
    """Beside what a ring keeps: b s/cp of 32 heads, and at cp = 16 eight more copies of K and V heads (16-bit, 128 wide)."""
    tokens, layers = 32768, 32

    def more(cp: int) -> float:
        kept = [
            one(f"cp={cp} cp_kind={kind} dp=1", runtime="deepspeed").stages["activations"][0, 0]
            for kind in ("ulysses", "ring")
        ]
        return float(kept[0] - kept[1])

    assert more(8) == pytest.approx(layers * tokens / 8 * 32 * 128 * 2)
    assert more(16) == pytest.approx(layers * tokens / 16 * (32 + 2 * 8) * 128 * 2)


# --- words, rules, space ---------------------------------------------------------------------------------------------


def test_words_and_old_documents() -> None:
    layout = parse_layout("dp=2 cp=4 cp_kind=all_gather")
    assert layout.words() == "dp=2 tp=1 pp=1 cp=4 micro_batch=1 zero=0 cp_kind=all_gather"
    assert layout_table([layout]).row(0) == layout
    document = layout.document()
    assert document.pop("cp_kind") == "all_gather"
    assert layout_from_document(document).cp_kind == "ring"
    with pytest.raises(InputError, match="cp_kind='rings' is unknown"):
        parse_layout("cp=2 cp_kind=rings")


@pytest.mark.parametrize(
    ("rule", "words", "runtime", "told"),
    [
        ("cp-divides-seq", "dp=32 cp=2", "megatron", "multiple of 4"),
        ("cp-kind-needs-cp", "dp=64 cp_kind=ulysses", "megatron", "raise cp"),
        ("context-attention", "dp=32 cp=2 attention=flash", "shardplan", "cp_kind=ring attends block by block"),
        ("context-parallel-alone", "dp=16 tp=2 cp=2 cp_kind=ulysses zero=1", "deepspeed", "use tp=1 pp=1, or cp=1"),
        ("ulysses-divides-heads", "dp=1 cp=64 cp_kind=ulysses", "shardplan", "kv_heads=8; use cp=1, 2, 4, 8, 16, 32"),
        ("runtime-context-parallel", "dp=32 cp=2", "megatron-2021", "lacks cp (context parallelism); use cp=1"),
        ("runtime-context-parallel", "dp=32 cp=2", "deepspeed", "lacks cp_kind=ring; use cp_kind=ulysses"),
        ("runtime-context-parallel", "dp=32 cp=2 cp_kind=ulysses", "fsdp2", "use cp_kind=ring or all_gather"),
        ("ulysses-divides-heads", "dp=4 cp=16 cp_kind=ulysses", "megatron", "kv_heads=8; use cp=1, 2, 4, 8"),
        ("ulysses-divides-heads", "dp=1 cp=64 cp_kind=ulysses", "deepspeed", "heads=32 and kv_heads=8; use cp=1, 2"),
    ],
)
def test_rules_name_values_and_remedy(rule: str, words: str, runtime: str, told: str) -> None:
    at = Setting(
        model=load_model("llama-3-8b"),
        job=Job(seq=4098 if rule == "cp-divides-seq" else 4096, global_batch=64),
        cluster=load_cluster("h100-ib", gpus=64),
        runtime=load_runtime(runtime),
    )
    found, structural = rejections(at, parse_layout(words))
    (broken,) = [r for r in found if r.rule == rule]
    assert told in str(broken), str(broken)
    assert structural == (rule == "cp-divides-seq")


def test_copied_heads_let_deepspeed_spread_wider() -> None:
    at = Setting(
        model=load_model("llama-3-8b"),
        job=Job(seq=32768, global_batch=4),
        cluster=load_cluster("h100-ib", gpus=64),
        runtime=load_runtime("deepspeed"),
    )
    assert rejections(at, parse_layout("dp=4 cp=16 zero=3 cp_kind=ulysses")) == ([], False)


def test_space_looks_at_every_cp_of_runtimes_that_have_it() -> None:
    model = load_model("llama-3-8b")

    def degrees(seq: int, kinds: tuple[str, ...], fix: str = "", forbid: str = "") -> set[tuple[int, str]]:
        space = layout_space(model, Job(seq=seq, global_batch=64), 64, parse_wishes(fix, [forbid]), kinds)
        return {(int(cp), CP_KINDS[kind]) for cp, kind in zip(space.cp, space.cp_kind, strict=True)}

    both = ("ring", "all_gather")
    every = {(1, "ring"), *((cp, kind) for cp in (2, 4, 8, 16, 32, 64) for kind in both)}
    assert degrees(131072, ()) == {(1, "ring")}
    assert degrees(131072, both) == degrees(4096, both) == every
    assert degrees(96, both) == {one for one in every if one[0] <= 32}
    assert degrees(4096, both, fix="cp=2") == {(2, "ring"), (2, "all_gather")}
    assert degrees(8192, both, fix="cp=2 cp_kind=all_gather") == {(2, "all_gather")}
    assert degrees(8192, both, forbid="context") == {(1, "ring")}
    assert degrees(8192, both, forbid="cp_kind=ring") == {one for one in every if one[0] == 1 or one[1] == "all_gather"}


def test_search_finds_context_parallelism_where_nothing_else_fits() -> None:
    """Llama 3 405B at 131,072 tokens was trained with cp = 16 (arXiv 2407.21783, table 4), optimizer states sharded only. With equal stages
    nothing else fits; uneven ones fit without it, and are slower."""
    inputs = {
        "model": load_model("llama-3-405b"),
        "job": Job(seq=131072, global_batch=128),
        "cluster": load_cluster("h100-ib", gpus=1024),
        "runtime": "megatron",
    }
    assert search(**inputs, wishes=parse_wishes("zero=1", ["context", "stage_layers"])).ranked is None
    uneven = search(**inputs, wishes=parse_wishes("zero=1", ["context"])).ranked
    best = search(**inputs, wishes=parse_wishes("zero=1", [])).ranked
    assert best is not None
    assert best.layouts.cp[0] in (8, 16)
    assert uneven is None or uneven.step_s[0] > best.step_s[0]
