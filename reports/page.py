"""Plans and runs -> one self-contained HTML page: inline style and SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from shardplan.hw_profiles.errors import InputError
from shardplan.reports import formatting as say
from shardplan.reports.elements import Html, element, escape, folded, join, layout_words, plain, table, text
from shardplan.reports.inputs import Inputs, PlanInput, RunInput, read_inputs
from shardplan.reports.plan_section import plan_section
from shardplan.reports.run_section import run_section
from shardplan.reports.tables import records, version_table

PAGE_NAME = "index.html"


def write_report(paths: Iterable[str | Path], folder: str | Path) -> Path:
    """Write `folder`/index.html about plan files and run folders and return its path; raises InputError.

    The folder is made if needed; an old page stays whole until the new one is complete.
    """
    page = render_page(read_inputs(paths))
    target = Path(folder) / PAGE_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{PAGE_NAME}.tmp")
        part.write_text(page, encoding="utf-8")
        part.replace(target)
    except OSError as bad:
        raise InputError(
            f"cannot be written ({bad.strerror})", place=str(target), remedy="give another folder"
        ) from None
    return target


def render_page(inputs: Inputs) -> str:
    """The page as text; the same inputs give the same text."""
    # Runs alone: show what was predicted for them in full, too.
    plans = inputs.plans or tuple(run.plan for run in inputs.runs)
    title = _title(inputs)
    body = [
        element("header", text("h1", title), text("p", _contents(inputs), css="lead")),
        *(plan_section(plan, index=index) for index, plan in enumerate(plans, start=1)),
        run_section(inputs.runs) if inputs.runs else Html(""),
        _versions(inputs.plans, inputs.runs),
    ]
    template = resources.files("shardplan.reports").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=join(body))


def _title(inputs: Inputs) -> str:
    models = dict.fromkeys(one.plan.model.name for one in inputs.plans or tuple(run.plan for run in inputs.runs))
    return f"shardplan report: {', '.join(models)}"


def _contents(inputs: Inputs) -> str:
    counts = [(len(inputs.plans), "plan"), (len(inputs.runs), "run")]
    return " and ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts if count) + "."


def _versions(plans: Sequence[PlanInput], runs: Sequence[RunInput]) -> Html:
    columns = [
        plain("of", lambda row: row["of"]),
        plain("what", lambda row: row["name"]),
        layout_words("value", lambda row: row["value"] or say.DASH),
    ]
    listed = folded("Versions and digests", table(columns, records(version_table(plans, runs))))
    return element("footer", text("p", "Made by shardplan report."), listed)
