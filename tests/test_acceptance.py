"""Published tuned layouts against the planner's own (docs/acceptance.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardplan.costmodel.published_software import names
from shardplan.planner.acceptance import markdown, tuned_layouts, verdict

QUICK = ("Llama-3-8B, 8 H100", "Llama-3-8B, 8 B200", "Mixtral 8x7B, 64 H100")
ACCEPTED = 11


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
    assert row["fits"]
    assert row["behind"] >= -1e-9  # nothing of the space is better than its best
    assert row["accepted"], row


@pytest.mark.slow
def test_the_table_of_the_documentation_holds(root: Path) -> None:
    rows = [verdict(one) for one in tuned_layouts()]
    assert all(row["fits"] for row in rows)
    assert all(row["behind"] is None or row["behind"] >= -1e-9 for row in rows)
    assert sum(row["accepted"] for row in rows) >= ACCEPTED
    text = (root / "docs" / "acceptance.md").read_text(encoding="utf-8")
    assert all(line in text for line in markdown(rows))
