"""Every kernel beside the alternatives on this GPU, in one command.

    shardplan bench kernels -o kernels.csv
    python -m shardplan.kernels.benchmark --only attention -o attention.csv    (the same, with torch and triton alone)

Providers of a case take turns in three rounds on one device; between calls a buffer larger than the L2 cache is read.
Ratios compare the least of the three medians; targets are ratios, because clocks differ from board to board.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shardplan.kernels.benchmark_case import Case, NotSupportedError, Setting
from shardplan.kernels.benchmark_cases import all_cases
from shardplan.kernels.benchmark_rows import Outcome, as_csv, as_json, long_rows, machine, table
from shardplan.kernels.benchmark_timing import ONCE, Call, Plan, Stopwatch, Timing, first_line

SHORTEST_ROUND_S = 0.008
MEASURED_SHARE = 0.3
"""Of the time of a case; the rest compiles, makes inputs, warms up and flushes."""


class NoDeviceError(RuntimeError):
    """There is no GPU to measure."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and how long that may take."""

    only: str = ""
    """Cases whose kernel or name holds this."""
    quick: bool = False
    """The headline of each kernel."""
    dry_run: bool = False
    """Tiny shapes, once each, on any machine; times mean nothing."""
    budget_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """All outcomes, the machine they are of, and what was cut short."""

    outcomes: tuple[Outcome, ...]
    about: Mapping[str, str]
    cases: int
    """Cases there are; more than outcomes while it goes on."""
    notes: tuple[str, ...]

    def csv(self) -> str:
        """Long format, a row a provider and metric."""
        return as_csv(long_rows(self.outcomes, self.about))

    def json(self) -> dict[str, Any]:
        """Nested by case."""
        return as_json(self.outcomes, self.about, self.notes)

    def table(self) -> str:
        """For people."""
        about = ", ".join(f"{name} {value}" for name, value in self.about.items() if value)
        return "\n".join([about, table(self.outcomes), *(f"note: {one}" for one in self.notes)])


def measure(options: Options, after_each: Callable[[Report], None] = lambda report: None) -> Report:
    """Measure the cases one after the other, headlines first; what the budget leaves no time for is reported so.

    `after_each` is given what there is so far. Raises NoDeviceError without a GPU, unless it is a dry run, and
    ValueError where `only` leaves no case.
    """
    start_s = time.monotonic()
    cuda = torch.cuda.is_available()
    if not cuda and not options.dry_run:
        raise NoDeviceError("no CUDA device, and a benchmark needs one; --dry-run tries every case without")
    if not cuda:  # must come before the first import of triton, which asks for it there
        os.environ.setdefault("TRITON_INTERPRET", "1")
    setting = Setting(device=torch.device("cuda" if cuda else "cpu"), dry=options.dry_run)
    cases = all_cases(setting, options.only, options.quick)
    if options.dry_run:
        cases = [replace(case, targets=()) for case in cases]
    if not cases:
        raise ValueError(f"no case holds {options.only!r}; try attention, rms_norm, quantize or adamw")
    stopwatch, about = Stopwatch(setting.device), machine()
    outcomes: list[Outcome] = []
    shortest_s = Plan().round_s

    def report() -> Report:
        notes = tuple(_notes(options, outcomes, shortest_s))
        return Report(outcomes=tuple(outcomes), about=about, cases=len(cases), notes=notes)

    for index, case in enumerate(cases):
        left_s = options.budget_s - (time.monotonic() - start_s)
        plan = ONCE if options.dry_run else _plan(left_s, len(cases) - index)
        if left_s <= 0:
            outcomes.append(_without(case, f"left out: the budget of {options.budget_s:g} s was spent"))
            continue
        shortest_s = min(shortest_s, plan.round_s)
        try:
            outcomes.append(_measure_case(case, setting, stopwatch, plan))
        except Exception as error:  # e.g. out of memory for the inputs; what was measured so far must not be lost
            outcomes.append(_without(case, first_line(error)))
        after_each(report())
    return report()


def _plan(left_s: float, cases: int) -> Plan:
    """Shorter rounds where time is short; about five providers take three rounds each."""
    plan = Plan()
    fair_s = MEASURED_SHARE * left_s / cases / (5 * plan.rounds)
    return replace(plan, round_s=min(plan.round_s, max(SHORTEST_ROUND_S, fair_s)))


def _measure_case(case: Case, setting: Setting, stopwatch: Stopwatch, plan: Plan) -> Outcome:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # a function compiled for too many shapes would silently run uncompiled
    found: dict[str, Timing | str] = {}
    calls: dict[str, Call] = {}
    for name, prepare in case.providers(setting).items():
        found[name] = ""  # keeps the order
        try:
            calls[name] = prepare()
        except NotSupportedError as error:
            found[name] = str(error)
        except Exception as error:  # any failure of a provider is a row, not the end
            found[name] = first_line(error)
    found |= stopwatch.interleaved(calls, plan)
    calls.clear()
    gc.collect()
    if stopwatch.cuda:
        torch.cuda.empty_cache()
    return Outcome(case=case, found=found)


def _without(case: Case, reason: str) -> Outcome:
    return Outcome(case=case, found={"all": reason})


def _notes(options: Options, outcomes: Sequence[Outcome], shortest_s: float) -> list[str]:
    notes: list[str] = []
    if options.dry_run:
        notes.append("dry run: tiny shapes, once each; times and ratios mean nothing")
        notes += interpreter_notes()
    elif shortest_s < Plan().round_s:
        notes.append(
            f"rounds of {shortest_s * 1e3:.0f} ms instead of {Plan().round_s * 1e3:.0f} ms, to keep the budget"
        )
    dropped = sum(str(one.found.get("all", "")).startswith("left out") for one in outcomes)
    if dropped:
        notes.append(f"{dropped} of {len(outcomes)} cases left out, the largest first: the budget was spent")
    return notes


def interpreter_notes() -> list[str]:
    """Why a dry run cannot run this project's kernels here, and what would; nothing where it can."""
    remedy = "pip install triton==3.6.0 'numpy<2.4', or see `make kernels` for an environment of its own"
    if find_spec("triton") is None:
        return [f"triton is not installed: none of shardplan's own kernels ran; {remedy} (Linux)"]
    if not torch.cuda.is_available() and _release("triton") < (3, 9) and _release("numpy") >= (2, 4):
        return [
            f"the interpreter of triton {version('triton')} fails under numpy {version('numpy')}: "
            f"kernels with loops did not run; {remedy}"
        ]
    return []


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def keep(report: Report, output: Path | None) -> None:
    """Tell on stderr how far it is, and write what there is so far: a run that is cut off leaves that."""
    last = report.outcomes[-1].case
    print(f"{len(report.outcomes)}/{report.cases}  {last.kernel}, {last.name}", file=sys.stderr, flush=True)
    if output:
        output.write_text(report.csv(), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command without the packages of the command line."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.kernels.benchmark", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="cases whose kernel or name holds this, e.g. attention")
    parser.add_argument("--quick", action="store_true", help="the headline of each kernel")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, once each, without a GPU")
    parser.add_argument("--budget-s", type=float, default=Options.budget_s, help="seconds it may take (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="CSV file")
    parser.add_argument("--json", type=Path, help="JSON file")
    words = parser.parse_args(arguments)
    options = Options(only=words.only, quick=words.quick, dry_run=words.dry_run, budget_s=words.budget_s)
    try:
        report = measure(options, lambda report: keep(report, words.output))
    except (ValueError, NoDeviceError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if words.output:
        words.output.write_text(report.csv(), encoding="utf-8")
    if words.json:
        words.json.write_text(json.dumps(report.json(), indent=1) + "\n", encoding="utf-8")
    print(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
