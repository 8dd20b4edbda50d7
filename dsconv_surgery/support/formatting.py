"""Text for people: tables, hints for misspelt names, counts of reasons, and errors of others as sentences."""

from __future__ import annotations

import difflib
import io
from collections import Counter
from collections.abc import Iterable, Sequence


def text_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text, numbers to the right, the last row set off as the total."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    cells = list(rows)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index][:1].isdigit() or row[index] in ("", "-") for row in cells)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for index, row in enumerate(cells):
        if index == len(cells) - 1 and index:
            table.add_section()
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=400, color_system=None, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join(lines) + "\n"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean X?" for the most similar choice, an empty string if none is similar."""
    matches = difflib.get_close_matches(word, list(choices), 1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def count_reasons(reasons: Sequence[str]) -> str:
    """The five most common reasons, each with its count; a remedy, the sentences after the first, is named once, after its reasons."""
    by_remedy: dict[str, list[str]] = {}
    for reason, count in Counter(reasons).most_common(5):
        problem, stop, remedy = reason.partition(". ")
        by_remedy.setdefault(remedy, []).append(f"{count} x: {problem}{stop.strip()}")
    return " ".join(f"{' '.join(problems)} {remedy}".strip() for remedy, problems in by_remedy.items())


def as_sentence(error: object) -> str:
    """The text of an error, behind its type if it is an exception, that ends with a full stop: another sentence may follow."""
    text = (f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)).strip().rstrip(":,;")
    return text if text.endswith((".", "!", "?")) else f"{text}."
