"""Processes of a run end with the one that started them, and leave a word when they are told to end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""


def die_with_parent(parent: int | None = None) -> None:
    """On Linux: be killed when the process that started this one is gone; leaves at once where it was `parent` and is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def tell_before_ending(tell: Callable[[], None]) -> None:
    """On SIGTERM: `tell`, then leave with exit code 143.

    A thread does it, woken by the byte that Python writes for a signal: the main thread may be in a collective that does not return.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the default action would end the process before the byte
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_told, args=(reads, tell), daemon=True).start()


def _end_when_told(reads: int, tell: Callable[[], None]) -> None:
    while os.read(reads, 1)[0] != signal.SIGTERM:
        pass
    try:
        tell()
    finally:
        os._exit(128 + signal.SIGTERM)
