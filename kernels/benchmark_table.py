"""The results of `bench kernels` as a table of Markdown: `python -m shardplan.kernels.benchmark_table FILE.csv`.

One row a case: our rate, the ratio to every baseline (above 1: ours is faster), and the targets that are missed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

OURS = "shardplan"
LEFT_OUT = ("device",)
"""Kernels that are no kernels of ours."""


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Markdown of the long-format rows that `bench kernels -o` writes."""
    cases: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, str]]] = {}
    for row in rows:
        if row["kernel"] not in LEFT_OUT:
            cases.setdefault((row["kernel"], row["case"]), {})[row["provider"], row["metric"]] = row
    lines = ["| kernel | case | rate | ours over a baseline | below what it should reach |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(*key, found) for key, found in cases.items())])


def _line(kernel: str, case: str, found: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    own = found.get((OURS, "rate"))
    rate = f"{float(own['p50']):,.0f} {own['unit']}" if own else "not measured"
    ratios = [(provider, row) for (provider, metric), row in found.items() if metric == "ratio"]
    beside = ", ".join(f"{provider} {float(row['p50']):.2f}" for provider, row in ratios)
    missed = [
        f"{provider} {words}" for provider, row in ratios for words in row["note"].split(", ") if "missed" in words
    ]
    return f"| {kernel} | {case} | {rate} | {beside} | {'; '.join(m.removesuffix(' missed') for m in missed)} |"


def main(arguments: Sequence[str]) -> int:
    """Print the table of one file."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print(
            "python -m shardplan.kernels.benchmark_table FILE.csv: name a file of `bench kernels -o`", file=sys.stderr
        )
        return 2
    with Path(arguments[0]).open(newline="", encoding="utf-8") as file:
        print(table(csv.DictReader(file)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
