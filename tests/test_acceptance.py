"""Published tuned layouts against the planner's own (docs/acceptance.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardplan.costmodel.published_software import names
from shardplan.planner.acceptance import markdown, tuned_layouts, verdict

QUICK = ("Llama-3-8B, 8 H100", "Llama-3-8B, 8 B200", "Mixtral 8x7B, 64 H100")
ACCEPTED = 33


def test_every_layout_has_a_source() -> None:
    cases = tuned_layouts()
    assert len({one["name"] for one in cases}) == len(cases)
    assert all(one["source"] for one in cases)


def test_recipes_are_judged_with_the_software_that_validation_reads_them_with() -> None:
    bridge = [entry["runtime"] for entry in names()["frameworks"] if entry["contains"] == "megatron-bridge"]
    recipes = [one for one in tuned_layouts() if one["source"] == "Megatron-Bridge perf_recipes"]
    assert recipes
    assert all(one["runtime"].startswith(min(bridge, key=len)) for one in recipes)


@pytest.mark.parametrize("name", QUICK)
def test_small_cases_are_accepted(name: str) -> None:
    row = verdict(next(one for one in tuned_layouts() if one["name"] == name))
    assert row["fits"] == "yes"
    assert row["behind"] >= -1e-9  # nothing of the space is better than its best
    assert row["accepted"], row


def test_what_only_the_point_estimate_fits_is_told() -> None:
    """81.85 GiB of a GPU of 96 GB were measured; offload, which is not published, would fit by the upper edge of the band."""
    row = verdict(next(one for one in tuned_layouts() if one["name"] == "Qwen3-32B, 8 H100 96 GB, compiled"))
    assert row["fits"] == "likely"
    assert "offload" not in row["theirs"]
    assert "(fits likely)" in "".join(markdown([row]))


def test_every_case_that_is_not_accepted_is_investigated(root: Path) -> None:
    table, _, found = (
        (root / "docs" / "acceptance.md").read_text(encoding="utf-8").partition("## The ones that are not accepted")
    )
    names = {one["name"] for one in tuned_layouts()}
    refused = [line for line in table.splitlines() if "| **no** |" in line]
    assert refused
    for line in refused:
        name = next(one for one in sorted(names, key=len, reverse=True) if line.startswith(f"| {one}"))
        assert f"| {name} |" in found or f"{name};" in found, name


@pytest.mark.slow
def test_the_table_of_the_documentation_holds(root: Path) -> None:
    rows = [verdict(one) for one in tuned_layouts()]
    assert all(row["fits"] != "no" for row in rows)
    assert all(row["behind"] >= -1e-9 for row in rows if row["fits"] == "yes")
    assert sum(row["accepted"] for row in rows) >= ACCEPTED
    text = (root / "docs" / "acceptance.md").read_text(encoding="utf-8")
    assert all(line in text for line in markdown(rows))
