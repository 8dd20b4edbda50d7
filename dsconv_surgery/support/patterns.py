"""Patterns of layer names: "layer1" is a layer and everything below it, "layer*.conv1" has a shell's wildcards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.records import QUOTED, quoted

T = TypeVar("T")
PATTERNS = 'A pattern is a layer\'s name, which also means everything below it, or has wildcards as in a shell, as in "layer1.*.conv2"'


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether one of a layer's names matches a pattern, or is below a module that does."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def first_match(by_pattern: Mapping[str, T], names: Iterable[str], default: T) -> T:
    """The value of the first pattern that matches one of a layer's names."""
    names = tuple(names)
    return next((value for pattern, value in by_pattern.items() if matches(pattern, names)), default)


def check_patterns(setting: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError, with the most similar name, for a pattern that matches no layer."""
    names = sorted(names)
    for pattern in patterns:
        if not matches(pattern, names):
            raise ValueError(f"{setting}: no layer matches {quoted(pattern)}.{did_you_mean(pattern[:QUOTED], names)} {PATTERNS}.")
