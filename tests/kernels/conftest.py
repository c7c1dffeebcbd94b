"""Kernel tests run on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a test live."""
    return "cuda" if torch.cuda.is_available() else "cpu"
