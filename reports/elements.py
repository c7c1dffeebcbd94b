"""Pieces of HTML. Text passes through `escape` here and nowhere else; what is already HTML is the type `Html`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType

Html = NewType("Html", str)
"""Text that is safe to stand in a page as it is."""


def escape(text: object) -> Html:
    """Any value as HTML text."""
    return Html(html.escape(str(text), quote=True))


def element(tag: str, *content: Html, css: str = "") -> Html:
    """`<tag class="css">content</tag>`."""
    opening = f'<{tag} class="{css}">' if css else f"<{tag}>"
    return Html(f"{opening}{''.join(content)}</{tag}>")


def text(tag: str, value: object, *, css: str = "") -> Html:
    """An element around escaped text."""
    return element(tag, escape(value), css=css)


def join(parts: Iterable[Html]) -> Html:
    """Pieces one below the other."""
    return Html("\n".join(part for part in parts if part))


Row = Mapping[str, Any]
Cell = Callable[[Row], str]
"""One row -> the text of its cell; it is escaped."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of an HTML table."""

    heading: str
    cell: Cell
    css: str = ""
    mark: Cell | None = None
    """Further CSS class of one row's cell (`good`, `bad`)."""


def plain(heading: str, cell: Cell) -> Column:
    """A column of text."""
    return Column(heading=heading, cell=cell)


def name(heading: str, cell: Cell) -> Column:
    """A column of names that people chose: broken anywhere if need be, but not narrow."""
    return Column(heading=heading, cell=cell, css="name")


def number(heading: str, cell: Cell) -> Column:
    """A column of numbers, aligned to the right."""
    return Column(heading=heading, cell=cell, css="number")


def layout_words(heading: str, cell: Cell) -> Column:
    """A wide column in a fixed-width font."""
    return Column(heading=heading, cell=cell, css="words")


def table(columns: Sequence[Column], rows: Iterable[Row], *, row_css: Callable[[Row], str] | None = None) -> Html:
    """An HTML table that scrolls sideways on a narrow screen."""
    head = join(text("th", column.heading, css=column.css) for column in columns)
    body = [
        element("tr", *(_cell(column, row) for column in columns), css=row_css(row) if row_css else "") for row in rows
    ]
    whole = element("table", element("thead", element("tr", head)), element("tbody", join(body)))
    return element("div", whole, css="scroll")


def _cell(column: Column, row: Row) -> Html:
    mark = column.mark(row) if column.mark else ""
    return text("td", column.cell(row), css=f"{column.css} {mark}".strip())


def tiles(facts: Iterable[tuple[str, str, str]]) -> Html:
    """Large numbers: (what, value, small print)."""
    boxes = [
        element("div", text("dt", fact), element("dd", escape(value), text("small", small) if small else Html("")))
        for fact, value, small in facts
    ]
    return element("dl", join(boxes), css="tiles")


def figure(svg: str, caption: str) -> Html:
    """A drawing (SVG from shardplan.reports.plots) with its caption."""
    return element("figure", Html(svg), text("figcaption", caption))


def folded(summary: str, content: Html) -> Html:
    """Content that opens on a click."""
    return element("details", text("summary", summary), content)
