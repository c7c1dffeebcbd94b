"""How many GPUs: the size of a cluster on which something fits, tokens cost least, or a deadline is met, over every size of it.

Sizes are not in order: 72 GPUs may be cheaper than 64 and than 80, 192 in time where 200 are late, by what divides the batch, the layers
and the heads. So each of `every_size` is searched, with what it has to undercut as a bound: most sizes are settled by bounds alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from shardplan.costmodel.job import Job
from shardplan.costmodel.result import DAY_S, usd_per_s
from shardplan.costmodel.rule import Setting
from shardplan.hw_profiles.machine import Cluster
from shardplan.planner.deadline import days_needed, late, narrowed
from shardplan.planner.one_size import quickest_s, search_one_size
from shardplan.planner.ranking import Objective, SearchResult, nothing_yet
from shardplan.planner.space import Wishes
from shardplan.planner.watch import Watch

EACH_UP_TO = 64
"""Nodes up to which every number of them is tried."""
STEPS = 8
"""Numbers of nodes tried from there to each power of two."""


def gpu_counts(cluster: Cluster) -> tuple[int, ...]:
    """A few sizes, ascending: parts of a node that divide it, then doubling nodes, then the whole cluster."""
    node = cluster.node.gpus
    sizes = [g for g in range(1, node + 1) if node % g == 0 and g <= cluster.gpus]
    while sizes[-1] * 2 < cluster.gpus:
        sizes.append(sizes[-1] * 2)
    return tuple(dict.fromkeys((*sizes, cluster.gpus)))


def every_size(cluster: Cluster) -> tuple[int, ...]:
    """All sizes, ascending: every part of a node (of a rack whole servers), every number of nodes up to EACH_UP_TO, then STEPS of them to
    each power of two, and the whole cluster."""
    node = cluster.node
    part = [
        g for g in range(1, min(node.gpus, cluster.gpus) + 1) if g % (node.tray_gpus or 1) == 0 or node.gpus % g == 0
    ]
    nodes = list(range(2, min(EACH_UP_TO, cluster.nodes) + 1))
    start = EACH_UP_TO
    while start < cluster.nodes:
        nodes += [start + step * start // STEPS for step in range(1, STEPS + 1)]
        start *= 2
    whole = [count * node.gpus for count in nodes if count <= cluster.nodes]
    return tuple(dict.fromkeys((*part, *whole, cluster.gpus)))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A number of GPUs, and whether an interrupt ended the search for it."""

    gpus: int | None
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Searches on parts of the cluster of a setting."""

    setting: Setting
    wishes: Wishes
    headroom: float
    watch: Watch

    def at(self, gpus: int) -> Setting:
        """The setting on so many GPUs."""
        return replace(self.setting, cluster=self.setting.cluster.with_gpus(gpus))

    def search(self, gpus: int, objective: Objective) -> SearchResult:
        """The whole search on so many GPUs."""
        return search_one_size(self.at(gpus), self.wishes, objective, self.headroom, self.watch)

    def cheapest(self) -> SearchResult:
        """On the size that pays least per token: whole nodes are paid."""
        every, few = every_size(self.setting.cluster), gpu_counts(self.setting.cluster)
        least, best, stopped = float("inf"), None, False
        try:
            for gpus in self._told([*few, *(size for size in every if size not in few)]):
                price = usd_per_s(self.at(gpus).cluster)
                assert price is not None, "the objective needs a price"
                step_s = self._quickest_s(gpus, least / price)
                if step_s * price < least:
                    least, best = step_s * price, gpus
        except KeyboardInterrupt:
            if not self.watch.keeps_best:
                raise
            stopped = True
        return self._answer(_Found(gpus=best, stopped=stopped), "cost")

    def fewest(self) -> SearchResult:
        """On as few GPUs as something fits."""
        found = self._first(lambda gpus: self._quickest_s(gpus, float("inf")) < float("inf"))
        return self._answer(found, "gpus")

    def within(self, days: float) -> SearchResult:
        """On the fewest GPUs whose best layout trains the job's tokens in `days`, failures counted; nothing ranked where none is."""
        longest_s, met, missed = _longest_s(self.setting.job, days), dict[int, SearchResult](), list[SearchResult]()

        def in_time(gpus: int) -> bool:
            if self._quickest_s(gpus, longest_s) >= longest_s:
                return False
            one = self.search(gpus, "deadline")
            if self._days(one) <= days:
                met[gpus] = one
            else:
                missed.append(one)
            return gpus in met

        found = self._first(in_time)
        if found.gpus is not None:
            best = met[found.gpus]
            return replace(best, partial=True, complete=False) if found.stopped else best
        fastest = min([*missed, self._answer(found, "deadline")], key=self._days)
        if found.stopped:
            return replace(fastest, partial=True, complete=False)
        return fastest if fastest.ranked is None else late(fastest, self._days(fastest), days)

    def _first(self, good: Callable[[int], bool]) -> _Found:
        """The first of all sizes that is good; between numbers of nodes that are not next to each other, sizes are `narrowed`."""
        last, best = 0, None
        try:
            for gpus in self._told(every_size(self.setting.cluster)):
                if good(gpus):
                    best = gpus
                    best = narrowed(last, gpus, self.setting.cluster.node.gpus, good)
                    break
                last = gpus
        except KeyboardInterrupt:
            if not self.watch.keeps_best:
                raise
            return _Found(gpus=best, stopped=True)
        return _Found(gpus=best)

    def _days(self, found: SearchResult) -> float:
        return days_needed(found, self.setting.model, self.setting.job, self.setting.runtime)

    def _quickest_s(self, gpus: int, below_s: float) -> float:
        return quickest_s(self.at(gpus), self.wishes, self.headroom, below_s, Watch())

    def _told(self, sizes: Sequence[int]) -> Iterator[int]:
        for at, gpus in enumerate(sizes):
            self.watch.phase(f"{gpus} GPUs", at / len(sizes), 0)
            yield gpus

    def _answer(self, found: _Found, objective: Objective) -> SearchResult:
        """The search on the size that was found; where there is none, the search on the whole cluster says why nothing fits."""
        if found.gpus is None and found.stopped:
            return nothing_yet(self.setting.cluster)
        result = self.search(self.setting.cluster.gpus if found.gpus is None else found.gpus, objective)
        return replace(result, partial=True, complete=False) if found.stopped else result


def _longest_s(job: Job, days: float) -> float:
    """Seconds of a step with which the job's tokens take `days`, without failures."""
    assert job.tokens is not None, "a deadline is for a number of tokens"
    return days * DAY_S * job.tokens_per_step / job.tokens * (1.0 + 1e-9)
