"""Where tables for people go."""

from __future__ import annotations

from rich.console import Console

PIPE_WIDTH = 120


def make_console() -> Console:
    """As wide as the terminal; a pipe or file gets PIPE_WIDTH columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)
