"""How many GPUs: fewest, cheapest, in time; against the search on every size of the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.document import part_names
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.deadline import days_needed
from shardplan.planner.one_size import quickest_s
from shardplan.planner.search import SearchResult, search
from shardplan.planner.sizes import EACH_UP_TO, every_size, gpu_counts
from shardplan.planner.space import Wishes
from shardplan.planner.watch import Watch

CLUSTER = load_cluster("h100-ib", gpus=48)
CATALOG = [name for name in part_names("clusters") if not load_cluster(name).parts]
CASES = [("llama-3-8b", "megatron", 96), ("llama-3-8b", "deepspeed", 96), ("llama-2-7b", "fsdp2", 60)]


def question(model: str, runtime: str, batch: int) -> dict[str, Any]:
    job = Job(seq=4096, global_batch=batch, precision="bf16", tokens=1e11)
    return {"model": load_model(model), "job": job, "runtime": runtime}


def step_s(found: SearchResult) -> float:
    return float("inf") if found.ranked is None else float(found.ranked.step_s[0])


def test_sizes_of_a_cluster() -> None:
    assert every_size(CLUSTER) == (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40, 48)
    assert gpu_counts(CLUSTER) == (1, 2, 4, 8, 16, 32, 48)
    large = every_size(load_cluster("h100-ib", gpus=8 * 300))
    assert {8 * nodes for nodes in range(1, EACH_UP_TO + 1)} <= set(large)
    assert [size // 8 for size in large if size > 8 * EACH_UP_TO] == [
        *range(72, 129, 8),
        *range(144, 257, 16),
        288,
        300,
    ]
    assert set(gpu_counts(load_cluster("h100-ib", gpus=8 * 300))) <= set(large)


@pytest.mark.parametrize("name", CATALOG)
def test_every_size_is_a_size_of_the_cluster(name: str) -> None:
    cluster = load_cluster(name)
    sizes = every_size(cluster)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == cluster.gpus
    assert [cluster.with_gpus(gpus).gpus for gpus in sizes] == list(sizes)
    assert set(gpu_counts(cluster)) <= set(sizes)


@pytest.mark.parametrize(("model", "runtime", "batch"), CASES)
def test_no_size_is_better(model: str, runtime: str, batch: int) -> None:
    asked = question(model, runtime, batch)
    each = {gpus: search(**asked, cluster=CLUSTER.with_gpus(gpus)) for gpus in every_size(CLUSTER)}
    fitting = {gpus: step_s(found) for gpus, found in each.items() if found.ranked is not None}
    assert search(**asked, cluster=CLUSTER, objective="gpus").cluster.gpus == min(fitting)
    price = {gpus: step * each[gpus].cluster.nodes for gpus, step in fitting.items()}
    cheapest = search(**asked, cluster=CLUSTER, objective="cost")
    assert step_s(cheapest) * cheapest.cluster.nodes == pytest.approx(min(price.values()), rel=1e-9)
    runtime_file = load_runtime(runtime)
    days = {gpus: days_needed(each[gpus], asked["model"], asked["job"], runtime_file) for gpus in fitting}
    for size in (24, 40):
        late = 1.0001 * days[size]
        met = search(**asked, cluster=CLUSTER, objective="deadline", days=late)
        assert met.cluster.gpus == min(gpus for gpus in days if days[gpus] <= late)
    never = search(**asked, cluster=CLUSTER, objective="deadline", days=0.01)
    assert never.ranked is None
    assert never.refused[0].rule == "deadline"


def test_a_bound_leaves_out_what_is_slower_and_nothing_else() -> None:
    model, job, runtime = load_model("llama-3-8b"), Job(seq=4096, global_batch=96, precision="bf16"), "megatron"
    at = Setting(model=model, job=job, cluster=CLUSTER, runtime=load_runtime(runtime))
    best = step_s(search(model=model, job=job, cluster=CLUSTER, runtime=runtime))
    for share, found in ((1.0001, best), (1.3, best), (0.9999, float("inf")), (0.5, float("inf"))):
        assert quickest_s(at, Wishes(), 0.05, share * best, Watch()) == found


class Stopping(Watch):
    """Presses Ctrl-C when it is told of so many GPUs."""

    def __init__(self, at: str) -> None:
        super().__init__(keeps_best=True)
        self.at = at

    def phase(self, name: str, done: float, looked_at: int) -> None:
        if name == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("objective", ["cost", "deadline", "gpus"])
def test_an_interrupt_leaves_the_best_size_so_far(objective: Any) -> None:
    asked, days = question("llama-3-8b", "deepspeed", 96), 1000.0 if objective == "deadline" else None
    at_once = search(**asked, cluster=CLUSTER, objective=objective, days=days, watch=Stopping("1 GPUs"))
    assert at_once.partial
    assert at_once.ranked is None
    later = search(**asked, cluster=CLUSTER, objective=objective, days=days, watch=Stopping("40 GPUs"))
    assert later.ranked is not None
    assert later.partial == (objective == "cost")  # the others were done before
