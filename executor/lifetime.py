"""Processes of a run end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""


def die_with_parent(parent: int | None = None) -> None:
    """On Linux: be killed when the process that started this one is gone; leaves at once where it was `parent` and is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)
