"""The table that `shardplan validate` prints."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.costmodel.published_rows import read_rows


def test_a_source_whose_rows_are_all_refused_is_in_the_table(tmp_path: Path) -> None:
    with resources.as_file(resources.files("shardplan.reports") / "published" / "runs.csv") as shipped:
        good = read_rows(shipped)[0]
    table = tmp_path / "two.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(good))
        writer.writeheader()
        writer.writerows([good, {**good, "case_id": "bad", "source": "of abaci", "gpu": "abacus"}])
    shown = CliRunner().invoke(app, ["validate", str(table)]).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("of abaci")]
    assert line.split()[2:4] == ["1", "0"] and line.endswith("1 refused")
