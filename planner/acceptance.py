"""Published tuned layouts against the planner's own: `python -m shardplan.planner.acceptance` prints the table of docs/acceptance.md.

Each published layout is fixed in the words that were published, the search fills in the rest, without offload where none is named. It is
accepted when it fits, at least by the point estimate, and its step is predicted within NEAR of the best of the whole space for that runtime
and machine, which fits by the upper edge of the band with the usual headroom, or it is among the first TOP ideas of the ranking.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from shardplan.costmodel.estimates import DEFAULT_HEADROOM, Estimates
from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import load_model, model_from_config
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import SearchResult, search
from shardplan.planner.shortlist import distinct, same_idea, worth_telling
from shardplan.planner.space import Wishes, parse_wishes

NEAR = 0.10
TOP = 5
OFFLOAD = ("offload_optimizer", "offload_params", "offload_activations")


def tuned_layouts() -> list[dict[str, Any]]:
    """The published layouts, as planner/tuned_layouts.toml holds them."""
    text = (resources.files("shardplan.planner") / "tuned_layouts.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["layouts"]


def verdict(published: Mapping[str, Any]) -> dict[str, Any]:
    """`fits` (yes, likely, no), `behind` (step over the best step, less 1), `rank` among the ideas that fit, `same` idea as ours,
    `accepted`, and both layouts in words; None where nothing fits."""
    best = _searched(published, Wishes())
    fits, theirs = _as_published(published)
    row = {**published, "fits": fits, "behind": None, "rank": None, "same": False}
    row |= {"theirs": None, "ours": None if best.ranked is None else best.ranked.layouts.row(0).words()}
    if best.ranked is None or theirs is None:
        return {**row, "accepted": False}
    layout = theirs.layouts.row(0)
    behind = float(theirs.step_s[0] / best.ranked.step_s[0]) - 1.0
    rank = _rank(best, layout)
    return {
        **row,
        "theirs": layout.words(),
        "behind": behind,
        "rank": rank,
        "same": rank == 1,
        "accepted": behind <= NEAR or (rank is not None and rank <= TOP),
    }


def _as_published(published: Mapping[str, Any]) -> tuple[str, Estimates | None]:
    """(whether it fits, the published layout with the rest filled in): the fastest that fits, else that without headroom, else the smallest
    where its point estimate fits."""
    words = published["layout"]
    wishes = parse_wishes(words, [word for word in OFFLOAD if f"{word}=" not in words])
    for fits, headroom in (("yes", DEFAULT_HEADROOM), ("likely", 0.0)):
        found = _searched(published, wishes, headroom)
        if found.ranked is not None:
            return fits, found.ranked
    closest = found.closest
    if closest is None or not closest.fits_likely()[0]:
        return "no", None
    return "likely", closest


def model_of(published: Mapping[str, Any]) -> Model:
    """The preset that a case names, or the model of its `config`."""
    if "model" in published:
        return load_model(published["model"])
    return model_from_config(published["config"], name=published["name"], place="tuned_layouts.toml")


def _searched(published: Mapping[str, Any], wishes: Wishes, headroom: float = DEFAULT_HEADROOM) -> SearchResult:
    return search(
        model=model_of(published),
        job=Job(
            seq=published["seq"],
            global_batch=published["global_batch"],
            precision=published.get("precision", "bf16"),
            method=published.get("method", "full"),
            lora_targets=published.get("lora_targets", "all"),
        ),
        cluster=load_cluster(published["cluster"], gpus=published["gpus"]),
        runtime=published.get("runtime", "megatron"),
        wishes=wishes,
        headroom=headroom,
    )


def _rank(result: SearchResult, layout: Layout) -> int | None:
    """Place of the layout's idea in the shortlist that `shardplan plan` tells, 1 = the best; one that is left out there as a copy of a
    better one counts behind those before it. None where it is not in the ranking."""
    assert result.ranked is not None
    first, _ = distinct(result.ranked.layouts)
    told = worth_telling(result.ranked, first)
    at = next((at for at, row in enumerate(first) if same_idea(result.ranked.layouts.row(int(row)), layout)), None)
    return None if at is None else 1 + int(told[:at].sum())


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table, line by line."""
    yield "| case | runtime | published (the rest filled in) | behind our best | rank | accepted | our best |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        behind = "does not fit" if row["behind"] is None else f"{row['behind']:+.1%}"
        behind += " (fits likely)" if row["fits"] == "likely" else ""
        rank = "–" if row["rank"] is None else str(row["rank"])
        assumed = f" ({row['assumed']})" if "assumed" in row else ""
        cells = (
            f"{row['name']}{assumed}; {row['source']}",
            row.get("runtime", "megatron"),
            f"`{row['theirs'] or row['layout']}`",
            behind,
            rank,
            "yes" if row["accepted"] else "**no**",
            f"`{row['ours']}`" if row["ours"] else "nothing fits",
        )
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table and the count."""
    rows = [verdict(one) for one in tuned_layouts()]
    accepted = sum(row["accepted"] for row in rows)
    for line in markdown(rows):
        print(line)
    print(
        f"\n{accepted} of {len(rows)} accepted, {sum(row['same'] for row in rows)} of them the same idea as our best."
    )


if __name__ == "__main__":
    main()
