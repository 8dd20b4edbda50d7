"""Attributes of layers that the code of a model reads, also in branches that do not run on the example inputs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from dsconv_surgery.network.layer_call import GEOMETRY, is_of_torch

# Attributes that the nn.Sequential in a layer's place would not have, as in `x.view(-1, self.fc.in_features)`.
LAYER_ATTRIBUTES = (GEOMETRY - {"_reversed_padding_repeated_twice"}) | {"weight", "bias"}
# Properties of `weight` that an empty tensor has as well.
WEIGHT_PROPERTIES = frozenset(("dtype", "device", "is_cuda"))


@dataclass(frozen=True, order=True)
class SourceRead:
    """A read in a method: path of the layer below self (`.blocks.*.fc`), attribute, and whether only dtype or device are read."""

    path: str
    attribute: str
    only_properties: bool
    method: str


def source_reads(model: nn.Module, layers: Mapping[nn.Module, Iterable[str]]) -> dict[nn.Module, list[SourceRead]]:
    """The reads of each layer in methods that `forward` reaches, of all modules; `layers`: every layer with its names.

    A method is reached if a reached method names it. Methods whose source is not available count as empty.
    """
    modules = [(name, module) for name, module in model.named_modules() if module not in layers]
    reads: dict[type, set[SourceRead]] = {type(module): set() for _, module in modules}
    reached: set[str] = set()
    names = {"forward"}
    while names:
        reached |= names
        scans = [(kind, *_scan(code)) for kind in reads for name in names for code in _codes(kind, name)]
        for kind, _, of_method in scans:
            reads[kind].update(of_method)
        names = {name for _, mentioned, _ in scans for name in mentioned} - reached
    result: dict[nn.Module, list[SourceRead]] = {}
    for prefix, module in modules:
        start = f"{prefix}." if prefix else ""
        for read in sorted(reads[type(module)]):
            for layer, aliases in layers.items():
                if any(name.startswith(start) and fnmatchcase(f".{name.removeprefix(start)}", read.path) for name in aliases):
                    result.setdefault(layer, []).append(read)
    return result


def _codes(kind: type, name: str) -> Iterator[CodeType]:
    """The code of every definition of a method or property in the classes that are not torch's."""
    for parent in kind.__mro__:
        if name in vars(parent) and not is_of_torch(parent):
            value: Any = vars(parent)[name]
            value = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
            if inspect.isfunction(value):
                yield value.__code__


@cache
def _scan(code: CodeType) -> tuple[frozenset[str], tuple[SourceRead, ...]]:
    """The attributes that a method names, and its reads of layers."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return frozenset(code.co_names), ()
    nodes = list(ast.walk(tree))
    own = code.co_varnames[0] if code.co_argcount else "self"
    paths: dict[str, str] = {own: ""}
    for node in nodes:  # conv = self.conv; for conv in self.convs
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Attribute | ast.Subscript):
            paths[node.targets[0].id] = _path(node.value, paths)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Attribute):
            paths[node.target.id] = _path(node.iter, paths) + ".*"
    of_weight_property = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in WEIGHT_PROPERTIES}
    reads = set()
    for node in nodes:
        target, attribute = (node.value, node.attr) if isinstance(node, ast.Attribute) else (None, "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            target, attribute = node.args[0], getattr(node.args[1], "value", "")
        path = _path(target, paths) if attribute in LAYER_ATTRIBUTES and target is not None else ""
        if path.strip(".*"):
            reads.add(SourceRead(path, attribute, attribute == "weight" and id(node) in of_weight_property, code.co_qualname))
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute)), tuple(reads)


def _path(node: ast.expr, paths: Mapping[str, str]) -> str:
    """The path of an expression below self, as a pattern: `.conv`, `.blocks.*.fc`, `*.fc` for an unknown beginning."""
    if isinstance(node, ast.Name):
        return paths.get(node.id, "*")
    if isinstance(node, ast.Attribute):
        return f"{_path(node.value, paths)}.{node.attr}"
    return f"{_path(node.value, paths)}.*" if isinstance(node, ast.Subscript) else "*"
