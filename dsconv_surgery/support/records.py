"""Plain data to text and back: tables, checked JSON, and the nearest known word."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dsconv_surgery.support.formatting import did_you_mean

T = TypeVar("T")


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
            raise ValueError(f"{what}: unknown key {key!r} at {place}.{did_you_mean(key, known)} Remove or correct it.") from None
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
