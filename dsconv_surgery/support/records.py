"""Frozen records that pydantic checks, their JSON, and error messages that name the field, the value and the next move."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, TypeAdapter, ValidationError

from dsconv_surgery.support.formatting import did_you_mean

T = TypeVar("T")
_adapter: Any = functools.cache(TypeAdapter)  # built when first needed, once for each record
QUOTED = 200  # characters of a user's input in a message, at most


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A class decorator: a frozen dataclass that refuses unknown keys, NaN and infinity when it is read from JSON."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


@dataclass_transform(frozen_default=True)
def checked_record(example: str) -> Callable[[type[T]], type[T]]:
    """A class decorator: a frozen dataclass whose fields pydantic checks on construction.

    A wrong field is a ValueError of one line: the field, the value, what was expected (the field's description), and an example call.

    Args:
        example: a correct call, shown where a keyword is unknown.
    """

    def decorate(cls: type[T]) -> type[T]:
        config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
        checked: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(cls)
        construct = checked.__init__

        @functools.wraps(construct)
        def init(self: Any, *args: Any, **keywords: Any) -> None:
            try:
                construct(self, *args, **keywords)
            except ValidationError as error:
                raise ValueError(_explain(error, checked, example)) from None

        checked.__init__ = init
        return checked

    return decorate


def _explain(error: ValidationError, cls: Any, example: str) -> str:
    """The first problem of a failed construction, in one line."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "unexpected_keyword_argument":
        fields = cls.__dataclass_fields__
        hint = f"{did_you_mean(name, fields)} Known: {', '.join(fields)}, as in {example}."
        return f"{name}={quoted(problem['input'])}: there is no such setting.{hint}"
    if problem["type"] == "unexpected_positional_argument":
        return f"found {quoted(problem['input'])} without a name. Write settings by name, as in {example}."
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    description = getattr(cls.__pydantic_fields__.get(name), "description", None)
    expected = f"expected {description}" if description else str(problem["msg"])
    return f"{name}={quoted(problem['input'])}: {expected}. Write it as in {example}."


class JsonRecord:
    """Gives a dataclass JSON both ways."""

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return _adapter(type(self)).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote; ValueError names the place and the problem."""
        return parse_json(cls, text, cls.__name__.lower())


def parse_json(cls: type[T], text: str | bytes, what: str) -> T:
    """A record from JSON; ValueError names the place, what was found and, for an unknown key, the most similar known one."""
    try:
        return _adapter(cls).validate_json(text, strict=True)
    except ValidationError as error:
        # Another format version explains all other problems.
        problem = min(error.errors(include_url=False), key=lambda problem: problem["loc"][-1:] != ("format_version",))
    place = shortened(".".join(str(part) for part in problem["loc"])) or "the whole file"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        key = str(problem["loc"][-1])
        schema = json_schema(cls)
        hint = did_you_mean(key[:QUOTED], sorted(_json_keys(schema)))
        known = ", ".join(_keys_at(schema, problem["loc"][:-1]))
        raise ValueError(f"{what}: unknown key {quoted(key)} at {place}.{hint} Known{' there' * (len(problem['loc']) > 1)}: {known}.")
    message = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    explained = problem["type"] in ("value_error", "json_invalid")
    value = "" if explained else f", found {shortened(json.dumps(problem['input'], default=str))}"
    raise ValueError(f"{what}: at {place}: {message}{value}.")


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """The JSON schema of a record."""
    return _adapter(cls).json_schema()


def quoted(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """A text as a message shows it, cut where it is long."""
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def _keys_at(schema: Any, place: Sequence[int | str]) -> list[str]:
    """The property names of an object at a place in the data that a JSON schema describes."""
    nodes = _alternatives(schema, schema)
    for part in place:
        children = [node.get("properties", {}).get(part, node.get("items", node.get("additionalProperties"))) for node in nodes]
        nodes = [node for child in children if isinstance(child, dict) for node in _alternatives(child, schema)]
    return list(dict.fromkeys(name for node in nodes for name in node.get("properties", ())))


def _alternatives(node: Any, schema: Any) -> list[Any]:
    """The schemas that a schema's node refers to, or is a choice of."""
    if "$ref" in node:
        return _alternatives(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    choices = node.get("anyOf", node.get("oneOf"))
    return [node] if choices is None else [inner for choice in choices for inner in _alternatives(choice, schema)]


def _json_keys(schema: Any) -> set[str]:
    """Every property name in a JSON schema."""
    if isinstance(schema, dict):
        return set(schema.get("properties", ())).union(*map(_json_keys, schema.values()))
    return set[str]().union(*map(_json_keys, schema)) if isinstance(schema, list) else set()
