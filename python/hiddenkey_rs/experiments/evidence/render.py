"""Tables as what they say, and as HTML and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

NONE = "–"
"""A cell of what has not been run."""
_COMMAND = "hiddenkey sweep "


@dataclass(frozen=True)
class Table:
    """A table with its heading and caption. Rows are text, one cell a column; the first column names the row.

    ``folded``: long lists that a page shows on demand.
    """

    key: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture's file below the report, and what it shows in words."""

    path: str
    title: str
    words: str


def html(table: Table) -> str:
    """The table, scrolling sideways by itself where the page is narrow."""
    head = "".join(f'<th scope="col"{_head(table, n)}>{escape(name)}</th>' for n, name in enumerate(table.columns))
    rows = "\n".join(_row(row) for row in table.rows)
    body = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
    if table.folded:
        body = f"<details><summary>{len(table.rows)} rows</summary>\n{body}\n</details>"
    caption = f'<p class="caption">{escape(table.caption)}</p>\n' if table.caption else ""
    return f"<h3>{escape(table.title)}</h3>\n{caption}{body}\n"


def _head(table: Table, column: int) -> str:
    """A column of words has its heading on the left, too."""
    words = any("words" in _class(row[column]) for row in table.rows)
    return ' class="words"' if words else ""


def _row(row: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td{_class(cell)}>{_breakable(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'


def _class(cell: str) -> str:
    """Words and commands stand left, numbers right; a verdict has its colour besides its word."""
    if cell in ("better", "worse", "unfinished"):
        return f' class="words {cell}"'
    if cell.startswith(_COMMAND):
        return ' class="words"'
    return "" if not cell or cell[0] in "0123456789+−–<∞" else ' class="words"'


def _breakable(cell: str) -> str:
    """Commands as code; an interval may break before its bracket, so that a column need not be as wide as both."""
    text = escape(cell)
    if cell.startswith(_COMMAND):
        return f"<code>{text}</code>"
    return re.sub(r"\[[^\]]*\]", r"<span>\g<0></span>", text)


def markdown(table: Table) -> str:
    """The table in Markdown: heading, caption, rows."""
    lines = [
        "| " + " | ".join(_cell(name) for name in table.columns) + " |",
        "|" + " --- |" * len(table.columns),
        *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows),
    ]
    caption = f"{table.caption}\n\n" if table.caption else ""
    return f"### {table.title}\n\n{caption}" + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")  # in code, too: a row of cells is divided before anything in it is read
    return f"`{text}`" if text.startswith(_COMMAND) else text
