"""What every test shares: the repository's root, an environment for child processes, skips with a reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# The same examples every time: a failure found once is found again, and a slow machine fails nothing.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def child_environment() -> dict[str, str]:
    """Environment of a child process that imports this checkout's shardplan, wherever it runs."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    return kept | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    import shardplan.cli

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shardplan", *words])
        with pytest.raises(SystemExit) as left:
            shardplan.cli.main()
        output = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, output.out, output.err

    return run


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker run all files that start gloo processes: two such tests at a time take many times as long on a few cores. What tests
    of another file share is made by one worker too; all else goes to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shared_by(file: str) -> str:
        text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
        return "gloo" if "mark.distributed" in text else file if 'scope="module"' in text else ""

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_by(nodeid.partition("::")[0]) or nodeid

    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and (reason := _no_gpu()):
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"
