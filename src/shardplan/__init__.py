"""shardplan: which layout of this model on these GPUs fits, is fastest, why, and does it hold when run?

    >>> import shardplan
    >>> model = shardplan.load_model("llama-3-70b")
    >>> cluster = shardplan.load_cluster("h100-ib").with_gpus(64)

Every name below loads on first use; `import shardplan` itself imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardplan.costmodel.estimate import estimate
    from shardplan.costmodel.job import Job
    from shardplan.costmodel.layout import Layout, LayoutTable, layout_table, parse_layout
    from shardplan.costmodel.model import Model
    from shardplan.costmodel.model_config import load_model
    from shardplan.costmodel.runtime import load_runtime
    from shardplan.hw_profiles.errors import InputError
    from shardplan.hw_profiles.load import load_cluster
    from shardplan.hw_profiles.machine import Cluster
    from shardplan.planner.plan import Plan
    from shardplan.planner.search import search

    __version__: str

__all__ = [
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

_HOMES = {
    "Cluster": "shardplan.hw_profiles.machine",
    "InputError": "shardplan.hw_profiles.errors",
    "Job": "shardplan.costmodel.job",
    "Layout": "shardplan.costmodel.layout",
    "LayoutTable": "shardplan.costmodel.layout",
    "Model": "shardplan.costmodel.model",
    "Plan": "shardplan.planner.plan",
    "estimate": "shardplan.costmodel.estimate",
    "layout_table": "shardplan.costmodel.layout",
    "load_cluster": "shardplan.hw_profiles.load",
    "load_model": "shardplan.costmodel.model_config",
    "load_runtime": "shardplan.costmodel.runtime",
    "parse_layout": "shardplan.costmodel.layout",
    "search": "shardplan.planner.search",
}
"""Public name -> module it is defined in."""

_FOLDERS = ("costmodel", "executor", "hw_profiles", "kernels", "planner", "reports")


def _require_folders() -> None:
    """In a checkout the six packages are symbolic links; without them every later import would fail obscurely."""
    here = Path(__file__).parent
    for name in _FOLDERS:
        if not (here / name).is_dir():
            raise ImportError(
                f"{here / name} is not a folder: this checkout has no symbolic links; "
                "run `git config core.symlinks true` and check it out again (Linux or macOS)"
            )


_require_folders()


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'shardplan' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("shardplan")
    except PackageNotFoundError:
        return "0+uninstalled"
