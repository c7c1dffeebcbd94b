"""Tables of published runs: what a bad one is told, and what one row of a table changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardplan.cli import app
from shardplan.costmodel.fit import fit_rows
from shardplan.costmodel.published_rows import COLUMNS, RefusedRowError, read_rows, row_case
from shardplan.costmodel.validation import summaries, validate_rows
from shardplan.hw_profiles.errors import InputError

RUNS = Path(__file__).parent.parent / "reports" / "published" / "runs.csv"


def write_rows(path: Path, **changed: str) -> Path:
    """A table of one row: the first published run with some cells changed."""
    row = {**read_rows(RUNS)[0], **changed}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


def test_rows_marked_suspect_stand_alone(tmp_path: Path) -> None:
    rows = [read_rows(write_rows(tmp_path / "row.csv", notes=notes))[0] for notes in ("SUSPECT: twice the peak", "")]
    lines = {one["source"]: one["rows"] for one in summaries(validate_rows(rows))}
    assert lines["all marked SUSPECT"] == lines["all others"] == 1
    assert lines["all"] == 2
    assert len(fit_rows(rows)) == 1


def test_the_runs_furthest_off_are_listed(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "one.csv")
    case = read_rows(table)[0]["case_id"]
    told = CliRunner().invoke(app, ["validate", str(table), "--worst", "3"]).stdout
    assert "pairs misplaced" in told
    assert case[:40] in told  # long names are folded
    assert "pairs misplaced" not in CliRunner().invoke(app, ["validate", str(table)]).stdout


def test_names_of_rows_and_sources_change_nothing(tmp_path: Path) -> None:
    plain = validate_rows(read_rows(write_rows(tmp_path / "plain.csv")))[0]
    renamed = write_rows(tmp_path / "renamed.csv", case_id="a", source="b", citation="c", model="d")
    assert validate_rows(read_rows(renamed))[0].predicted_step_s == plain.predicted_step_s


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"gpu": "abacus"}, "'abacus' is not in the catalog"),
        ({"framework": "pen and paper"}, "'pen and paper' has no runtime"),
        ({"precision": "fp4"}, "fp4 is not modelled"),
        ({"experts": "8", "experts_per_token": "9", "expert_ffn": "512"}, "experts_per_token=9 of experts=8"),
        (
            {"experts": "8", "experts_per_token": "2", "expert_ffn": "512", "notes": "MLA"},
            "ranks of its latent attention",
        ),
        ({"experts": "8"}, "does not say experts_per_token"),
        ({"hidden": ""}, "does not say hidden"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(tmp_path: Path, changed: dict[str, str], told: str) -> None:
    row = read_rows(write_rows(tmp_path / "row.csv", **changed))[0]
    with pytest.raises(RefusedRowError, match=told):
        row_case(row)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"layers": "-4"}, "layers='-4'"),
        ({"heads": "0"}, "heads='0'"),
        ({"gpus": "0"}, "gpus='0'"),
        ({"tp": "two"}, "tp='two'"),
        ({"step_s": "0"}, "step_s=0 measures nothing"),
        ({"memory_kind": "reservd"}, "did you mean reserved"),
        ({"memory_stages": "0"}, "memory_stages='0' is no count of pipeline stages"),
        ({"memory_stages": "1.5"}, "memory_stages='1.5' is no count"),
        ({"profile": "jean-zai"}, "profile: unknown cluster 'jean-zai'; did you mean jean-zay"),
    ],
)
def test_malformed_cells_are_told(tmp_path: Path, changed: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        validate_rows(read_rows(write_rows(tmp_path / "row.csv", **changed)))


def test_memory_read_on_the_first_stages_is_compared_with_theirs(tmp_path: Path) -> None:
    pipelined = {"dp": "2", "pp": "4", "gpus": "8", "gpus_per_node": "4", "micro_batch": "8", "global_batch": "64"}
    shape = {"layers": "24", "hidden": "2048", "heads": "16", "kv_heads": "16", "head_dim": "128", "ffn": "8192"}
    small = {**pipelined, **shape, "gpu": "v100-32gb-sxm", "framework": "megatron-deepspeed", "vocab": "50257"}
    small |= {"zero": "1", "recompute": "full", "precision": "fp16", "seq": "2048", "tied_embeddings": "true"}
    small |= {"memory_kind": "nvidia-smi", "peak_memory_gib": "12.7", "gated_mlp": "false", "attention": "unfused"}

    def peak(stages: str) -> float | None:
        table = write_rows(tmp_path / f"of{stages}.csv", **small, memory_stages=stages)
        return validate_rows(read_rows(table))[0].predicted_peak_gib

    first, first_two, all_four = peak("1"), peak("2"), peak("")
    assert first is not None and first_two is not None and all_four is not None
    assert first <= first_two < all_four  # the last stage has the logits of eight sequences


def test_tables_that_are_none_are_told(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="lacks the columns case_id"):
        read_rows(other)
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "missing.csv")
    other.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no rows"):
        read_rows(other)


def test_a_truncated_table_is_told(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "cut.csv")
    table.write_text(table.read_text(encoding="utf-8")[:-400], encoding="utf-8")
    with pytest.raises(InputError, match="line 2 has fewer cells"):
        read_rows(table)


def test_refit_needs_a_folder_and_rows(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "none.csv", step_s="")
    for out, told in ((tmp_path / "no" / "x.toml", "folder does not exist"), (tmp_path / "x.toml", "no row has")):
        answer = CliRunner().invoke(app, ["validate", str(table), "--refit", str(out)])
        assert isinstance(answer.exception, InputError)
        assert told in str(answer.exception)
        assert not out.exists()


def test_json_answers_every_row(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "one.csv")
    answer = CliRunner().invoke(app, ["validate", str(table), "--json"])
    assert answer.exit_code == 0
    document = json.loads(answer.stdout)
    assert [row["case_id"] for row in document["rows"]] == [read_rows(table)[0]["case_id"]]
    assert (
        document["rows"][0]["step_s_low"] < document["rows"][0]["predicted_step_s"] < document["rows"][0]["step_s_high"]
    )
    assert document["sources"][-1]["source"] == "all"
