"""Text for people: tables as text, Markdown and HTML, hints for misspelt names, counts of reasons, and errors of others as sentences."""

from __future__ import annotations

import difflib
import html
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TOTAL = "whole network"  # begins the last row of a table with a total


@dataclass(frozen=True)
class TableContent:
    """What a result shows: a table with a title, and lines below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...] = ()

    def text(self) -> str:
        return "\n".join([text_table(self.title, self.columns, self.rows), *self.lines])

    def markdown(self) -> str:
        title = f"{self.title}\n\n" if self.title else ""
        notes = "\n" + "\n".join(f"- {line}" for line in self.lines) + "\n" if self.lines else ""
        return title + markdown_table(self.columns, self.rows) + notes

    def html(self) -> str:
        return html_table(self.title, self.columns, self.rows, self.lines)


class Displayed(ABC):
    """Gives a result `str()`, Markdown and, for notebooks, HTML, all of one table."""

    @abstractmethod
    def table(self) -> TableContent:
        """The table that shows this result."""

    def __str__(self) -> str:
        return self.table().text()

    def to_markdown(self) -> str:
        """The table and the lines below it in Markdown, for a README or an issue."""
        return self.table().markdown()

    def _repr_html_(self) -> str:
        return self.table().html()


def text_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text, numbers to the right, the last row set off as the total."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    cells = list(rows)
    numeric = _numeric_columns(cells)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numeric else "left", no_wrap=True)
    for index, row in enumerate(cells):
        if index == len(cells) - 1 and index:
            table.add_section()
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=400, color_system=None, markup=False, emoji=False, force_jupyter=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
    return "\n".join([title, *lines] if title else lines)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Iterable[str] = ()) -> str:
    """A table in HTML, numbers to the right, a total in bold, and lines below it."""
    numeric = _numeric_columns(rows)
    styles = ("text-align: right; white-space: nowrap" if index in numeric else "text-align: left" for index in range(len(columns)))
    align = [f'style="{style}"' for style in styles]

    def row(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag} {style}>{html.escape(cell)}</{tag}>' for style, cell in zip(align, cells, strict=True))}</tr>"

    body = [row("th" if cells[0] == TOTAL else "td", cells) for cells in rows]
    caption = f"<div><b>{html.escape(title)}</b></div>" if title else ""
    notes = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
    return f"{caption}<table><thead>{row('th', columns)}</thead><tbody>{''.join(body)}</tbody></table>{notes}"


def _numeric_columns(rows: Sequence[Sequence[str]]) -> set[int]:
    """The columns whose cells are all numbers, or empty."""
    columns = list(zip(*rows, strict=True))
    return {index for index, cells in enumerate(columns) if all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)}


def counted(number: int, noun: str) -> str:
    """A number of things, as in "1 layer" and "2 layers"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text: exporters and compilers add reports of hundreds of lines."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
