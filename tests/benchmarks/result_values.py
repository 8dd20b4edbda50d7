"""The numbers of the result files, for check_numbers.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests/benchmarks/results"
COMMON = 0.75  # a tag of more values than this share of a file does not tell its records apart

# Files whose rows are grouped by these keys: the READMEs show the means of the groups, and the least and the largest values.
GROUPS = {
    "budget_accuracy.json": ("network", "measure", "keep"),
    "calibrated_accuracy.json": ("network", "scheme", "setting"),
    "calibrated_layers.json": ("scheme",),
    "finetune_accuracy.json": ("case", "changed"),
}
# Files of which the READMEs show the rows and, beside them, the means of such groups.
MEANS = {"budget_rivals.json": ("network", "rule")}
BEFORE = "0efe4b3"  # the commit with which planning.json compares

Tags = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Value:
    """A number of a result file: its key, and what its record says about it."""

    name: str
    number: float
    tags: Tags


def rows(name: str, **fields: Any) -> list[dict[str, Any]]:
    """The rows of a result file with these fields."""
    node = json.loads((RESULTS / f"{name}.json").read_text())
    return [row for row in (node if isinstance(node, list) else node["rows"]) if all(row.get(key) == fields[key] for key in fields)]


def row(name: str, **fields: Any) -> dict[str, Any]:
    """The only row of a result file with these fields."""
    (result,) = rows(name, **fields)
    return result


def walk(node: Any, tags: Tags = frozenset(), path: str = "", name: str = "") -> Iterator[Value]:
    """All numbers below a node of a JSON file. Their tags are the texts in the dicts around them, and the places of these dicts."""
    if isinstance(node, dict):
        texts = {(key, str(text)) for key, text in node.items() if isinstance(text, str | bool) or key in ("keep", "images", "batch")}
        for key, item in node.items():
            yield from walk(item, tags | texts | {("at", path)}, f"{path}/{key}", key)
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from walk(item, tags, f"{path}/{index}", name)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield Value(name, float(node), tags)


def grouped(members: list[dict[str, Any]], keys: tuple[str, ...]) -> Iterator[Value]:
    """Mean, least and largest values of the rows that have the same keys: those of several seeds, or of several layers."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for member in members:
        groups.setdefault(json.dumps([member.get(key) for key in keys]), []).append(member)
    for group, of_group in groups.items():
        tags = frozenset({("at", group)} | {(key, str(of_group[0].get(key))) for key in keys})
        for name, first in of_group[0].items():
            if isinstance(first, float) and all(name in member for member in of_group):
                numbers = [member[name] for member in of_group]
                yield from (Value(name, fmean(numbers), tags), Value(f"least {name}", min(numbers), tags))
                yield Value(f"largest {name}", max(numbers), tags)


def zoo(models: list[dict[str, Any]]) -> Iterator[Value]:
    """The summary of zoo.json: models and layers of each library, and layers by the reason why they stay dense."""
    for library in ("torchvision", "timm"):
        of_library = [model for model in models if model["model"].startswith(library)]
        searched = [model for model in of_library if "sites" in model]
        summary = {
            "models": len(of_library),
            "served": sum(model["served"] for model in of_library),
            "sites": sum(model["sites"] for model in searched),
            "unexplained": sum(len(model["unexplained"]) for model in searched),
            "macs": median(model["macs_can_be_cut"] for model in searched),
            "params": median(model["params_can_be_cut"] for model in searched),
        }
        yield from (Value(name, number, frozenset({("at", library)})) for name, number in summary.items())
    reasons: Counter[str] = Counter()
    for model in models:
        reasons.update(model.get("skips", {}))
    yield from (Value("layers", layers, frozenset({("at", reason)})) for reason, layers in reasons.items())


def ratios(plans: list[dict[str, Any]]) -> Iterator[Value]:
    """Divergences in planning.json over those before the planner was rebuilt, for the same network, images and budget."""
    for before in (plan for plan in plans if plan["commit"] == BEFORE):
        case = {key: before[key] for key in ("network", "images", "budget")}
        tags = frozenset({("at", str(case))} | {(key, str(text)) for key, text in case.items()})
        for plan in plans:
            if plan["commit"] != BEFORE and all(plan[key] == case[key] for key in case):
                yield Value("ratio", plan["divergence"] / before["divergence"], tags)


def read(file: Path) -> Iterator[Value]:
    """The values of a file, with all tags."""
    node = json.loads(file.read_text())
    if file.name == "zoo.json":
        yield from zoo(node["rows"])
    elif file.parent.name == "recipes":
        yield from grouped(node["result"], ("batch", "memory_format"))
    elif file.name in GROUPS:
        yield from grouped(node["rows"], GROUPS[file.name])
    else:
        yield from walk(node)
    if file.name == "planning.json":
        yield from ratios(node)
    if file.name in MEANS:
        yield from (Value(f"mean {value.name}", value.number, value.tags) for value in grouped(node["rows"], MEANS[file.name]))


@cache
def values_of(file: Path) -> tuple[Value, ...]:
    """The values of a file, with the tags that tell its records apart."""
    values = list(read(file))
    uses = Counter(chain.from_iterable(value.tags for value in values))
    common = {tag for tag, number in uses.items() if number > COMMON * len(values)}
    result = []
    for value in values:
        record = max((tag for tag in value.tags if tag[0] == "at"), key=lambda tag: len(tag[1]))
        tags = {(key, f"{file.stem} {text}" if key == "at" else text) for key, text in value.tags - common | {record}}
        result.append(Value(value.name, value.number, frozenset(tags)))
    return tuple(result)
