"""A description of example inputs as plain data, which a plan keeps: the shape and dtype of tensors, and other values as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.records import record


class InputsNotKeptError(ValueError):
    """An object among the example inputs cannot be rebuilt."""


@record
class TensorTree:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: str


@record
class SequenceTree:
    """A list or tuple."""

    sequence: Literal["list", "tuple"]
    items: tuple[InputTree, ...]


@record
class DictTree:
    """A dict."""

    entries: dict[str, InputTree]


@record
class ValueTree:
    """A number, a text, a flag or None."""

    value: bool | int | float | str | None


@record
class ObjectTree:
    """Another object, of which only the type is kept."""

    type_name: str


InputTree = TensorTree | SequenceTree | DictTree | ValueTree | ObjectTree


@record
class InputDescription:
    """The arguments and keyword arguments of a network."""

    args: tuple[InputTree, ...]
    kwargs: dict[str, InputTree]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all tensors."""
        return tuple(_shapes((*self.args, *self.kwargs.values())))

    def rebuild(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
        """Inputs like these: random floating-point values in [0, 1), of `dtype` if that is not None; zeros for other tensors.

        InputsNotKeptError if there was another object among them.
        """
        args = [_rebuild(tree, device, dtype) for tree in self.args]
        return Inputs(*args, **{key: _rebuild(tree, device, dtype) for key, tree in self.kwargs.items()})


def describe_inputs(inputs: Inputs) -> InputDescription:
    """The description of a network's inputs."""
    return InputDescription(tuple(map(_describe, inputs.args)), {key: _describe(value) for key, value in inputs.kwargs.items()})


def _describe(value: Any) -> InputTree:
    if isinstance(value, Tensor):
        return TensorTree(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return SequenceTree("list" if isinstance(value, list) else "tuple", tuple(map(_describe, value)))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return DictTree({key: _describe(item) for key, item in value.items()})
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return ValueTree(value)
    return ObjectTree(f"{type(value).__module__}.{type(value).__qualname__}")


def _shapes(trees: Iterable[InputTree]) -> Iterable[tuple[int, ...]]:
    for tree in trees:
        if isinstance(tree, TensorTree):
            yield tree.shape
        elif isinstance(tree, SequenceTree | DictTree):
            yield from _shapes(tree.items if isinstance(tree, SequenceTree) else tree.entries.values())


def _rebuild(tree: InputTree, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    if isinstance(tree, TensorTree):
        kind = getattr(torch, tree.dtype)
        if not kind.is_floating_point:
            return torch.zeros(tree.shape, dtype=kind, device=device)
        return torch.rand(tree.shape, dtype=torch.float32, device=device).to(dtype or kind)
    if isinstance(tree, SequenceTree):
        items = [_rebuild(item, device, dtype) for item in tree.items]
        return items if tree.sequence == "list" else tuple(items)
    if isinstance(tree, DictTree):
        return {key: _rebuild(item, device, dtype) for key, item in tree.entries.items()}
    if isinstance(tree, ObjectTree):
        raise InputsNotKeptError(
            f"the example inputs hold an object of type {tree.type_name}, which a plan does not keep. Pass them again, as in "
            "apply_plan(model, plan, *example_inputs)."
        )
    return tree.value
