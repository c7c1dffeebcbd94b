"""What software a row of a table of published runs was made with: its words -> a runtime with switches, and what is meant where no
column says. The words are data: `validation_names.toml`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from shardplan.costmodel.runtime import Runtime, load_runtime

Row = Mapping[str, str]


@cache
def names() -> Mapping[str, Any]:
    """The tables of `validation_names.toml`."""
    text = (resources.files("shardplan.costmodel") / "validation_names.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def said(row: Row) -> str:
    """Model and notes, lower-case."""
    return f"{row['model']} {row['notes']}".lower()


def remarks(row: Row) -> list[Mapping[str, Any]]:
    """What model and notes say that no column does: layout words, job words, switches."""
    text = said(row)
    return [each for each in names()["remarks"] if each["contains"] in text and each.get("said", "") in text]


def _entry(row: Row) -> Mapping[str, Any] | None:
    """The first entry of `frameworks` that the row meets."""
    framework, text = row["framework"].lower(), said(row)
    return next((e for e in names()["frameworks"] if e["contains"] in framework and e.get("said", "") in text), None)


def software(row: Row) -> tuple[Runtime, Mapping[str, Any]] | None:
    """(runtime with the switches that the row names, its entry of `frameworks`, which says what is meant when the row does not);
    None for software that has no runtime."""
    entry = _entry(row)
    if entry is None:
        return None
    framework, text = row["framework"].lower(), said(row)
    chosen = _named(framework)
    if row["experts"] and not chosen and "(" not in framework:  # nothing is said of how tokens are dispatched
        chosen = _named(text) or _usual_of_experts(row, framework, text)
    chosen += [name for remark in remarks(row) for name in remark.get("switches", ())]
    return load_runtime("+".join(dict.fromkeys([*entry["runtime"].split("+"), *chosen]))), entry


def usual_peak(row: Row) -> str | None:
    """The kind of peak that the row's software prints; None: not known."""
    entry = _entry(row)
    return entry.get("peak") if entry else None


def _named(text: str) -> list[str]:
    """Switches that the words name."""
    found = [switch["switch"] for switch in names()["switches"] if switch["contains"] in text]
    return list(dict.fromkeys(found))


def _usual_of_experts(row: Row, framework: str, text: str) -> list[str]:
    """Switches of the first entry of `experts` that the row meets."""
    release = re.search(r"\brelease (\d\d\.\d\d)", text)
    interleaved = row["virtual_stages"] not in ("", "1")
    for entry in names()["experts"]:
        meets = (
            entry["framework"] in framework
            and entry.get("said", "") in text
            and row["gpu"] in entry.get("gpus", [row["gpu"]])
            and ("since" not in entry or (release is not None and release[1] >= entry["since"]))
            and (interleaved or not entry.get("interleaved", False))
            and (row["pp"] == "1" or not entry.get("one_stage", False))
        )
        if meets:
            return list(entry["switches"])
    return []


def recompute_modules(row: Row) -> str | None:
    """`selective:…` or `none` where the notes name what is recomputed (`recompute modules: layernorm+moe_act`); None: they do not."""
    named = re.search(r"recompute modules: ([a-z_+]+)", said(row))
    if named is None:
        return None
    words = [names()["recompute_modules"].get(word, word) for word in named[1].split("+")]
    if row["experts"]:
        words = [word for word in words if word != "mlp"]  # of the few dense layers only
    return "none" if words in ([], ["none"]) else "selective:" + "+".join(words)
