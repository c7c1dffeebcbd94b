"""The names that users import. A change here is a change of the public interface: say so in CHANGELOG.md."""

from __future__ import annotations

import re

import pytest

import shardplan

NAMES = [
    "Cluster",
    "InputError",
    "Job",
    "Layout",
    "LayoutTable",
    "Model",
    "Plan",
    "__version__",
    "estimate",
    "layout_table",
    "load_cluster",
    "load_model",
    "load_runtime",
    "parse_layout",
    "search",
]


def test_public_names_are_pinned() -> None:
    assert shardplan.__all__ == NAMES
    assert dir(shardplan) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_every_name_loads_and_is_documented(name: str) -> None:
    value = getattr(shardplan, name)
    assert value.__module__.startswith("shardplan.")
    assert value.__doc__


def test_version_is_a_version() -> None:
    assert re.match(r"\d+\.\d+\.\d+|0\+uninstalled", shardplan.__version__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = shardplan.serch
