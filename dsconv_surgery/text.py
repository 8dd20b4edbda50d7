"""Plain data to text and back: tables, checked JSON, and the nearest known word."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

T = TypeVar("T")


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


def parse_json(adapter: TypeAdapter[T], text: str | bytes, what: str) -> T:
    """Validate JSON into plain data, or raise a ValueError that names the place, what was found, and the nearest known key."""
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the whole file"
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = sorted(json_keys(adapter.json_schema()))
            key = str(problem["loc"][-1])
            raise ValueError(f"{what}: unknown key {key!r} at {place}.{nearest(key, known)} Remove or correct it.") from None
        message = str(problem["msg"]).removeprefix("Value error, ")
        said = problem["type"] in ("value_error", "json_invalid")
        found = "" if said else f", found {json.dumps(problem['input'], default=str)[:80]}"
        raise ValueError(f"{what}: at {place}: {message}{found}.") from None


def json_keys(schema: Any) -> set[str]:
    """Every property name in a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(json_keys, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", {})).union(*(json_keys(value) for value in schema.values()))


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean X?", or nothing where nothing is near."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
