"""Plain data to text and back: tables, checked JSON, and the nearest known word."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def text_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text, numbers to the right, the last row set off as the total."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    lines = list(rows)
    for at, column in enumerate(columns):
        numeric = bool(lines) and all(line[at][:1].isdigit() or line[at] in ("", "-") for line in lines)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for at, line in enumerate(lines):
        if at == len(lines) - 1 and at:
            table.add_section()
        table.add_row(*line)
    out = io.StringIO()
    Console(file=out, width=400, color_system=None, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean X?", or nothing where nothing is near."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
