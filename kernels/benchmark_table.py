"""The results of `bench kernels` as a table of Markdown: `python -m shardplan.kernels.benchmark_table FILE.csv [FILE.csv ...]`.

One row a case: our rate, the ratio to every baseline (above 1: ours is faster), and the targets that are missed.
Of several files the last that measured a case counts.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

OURS = "shardplan"
LEFT_OUT = ("device",)
"""Kernels that are no kernels of ours."""


def table(*files: Iterable[Mapping[str, str]]) -> str:
    """Markdown of the long-format rows that `bench kernels -o` writes."""
    cases: dict[tuple[str, str], Mapping[tuple[str, str], Mapping[str, str]]] = {}
    for rows in files:
        for case, found in _by_case(rows).items():
            if case not in cases or (OURS, "rate") in found:
                cases[case] = found
    lines = ["| kernel | case | rate | ours over a baseline | below what it should reach |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(*key, found) for key, found in cases.items())])


def _by_case(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], dict[tuple[str, str], Mapping[str, str]]]:
    found: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, str]]] = {}
    for row in rows:
        if row["kernel"] not in LEFT_OUT:
            found.setdefault((row["kernel"], row["case"]), {})[row["provider"], row["metric"]] = row
    return found


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
    """Print the table of these files."""
    if not arguments or not all(Path(name).is_file() for name in arguments):
        print("python -m shardplan.kernels.benchmark_table FILE.csv: name files of `bench kernels -o`", file=sys.stderr)
        return 2
    with ExitStack() as opened:
        files = [opened.enter_context(Path(name).open(newline="", encoding="utf-8")) for name in arguments]
        print(table(*map(csv.DictReader, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
