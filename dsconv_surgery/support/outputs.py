"""The tensors of a network's output: of any type, or selected by a user's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Number
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.copies import class_slots
from dsconv_surgery.support.inputs import describe_type
from dsconv_surgery.support.records import quoted

_WITHOUT_TENSORS = (str, bytes, range, memoryview, Number, type, ModuleType, FunctionType, MethodType, nn.Module)
OUTPUT_REMEDY = (
    "Pass output=, a function from the network's output to the tensors to compare, as in output=lambda result: result.logits. "
    "Of a detector, they may be those of a part with fixed shapes."
)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a network's output, in order: in containers, dicts, dataclasses and other objects, at any depth.

    A complex tensor counts as a real one with a last dimension of two, a sparse or nested tensor as its values.
    """
    tensors: list[Tensor] = []
    for tensor in all_tensors(output):
        if tensor.is_nested:
            tensor = torch.cat([part.flatten() for part in tensor.unbind()])
        elif tensor.layout not in (torch.strided, torch._mkldnn):  # type: ignore[attr-defined]
            tensor = tensor.to_dense()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_floating_point():
            tensors.append(tensor)
    return tensors


def all_tensors(output: Any) -> list[Tensor]:
    """All tensors of a network's output, in order, as they are."""
    tensors: list[Tensor] = []
    _collect_tensors(output, tensors, {})
    return tensors


def _collect_tensors(value: Any, tensors: list[Tensor], visited: dict[int, Any]) -> None:
    """Add the tensors in a value to a list; `visited` holds the values so far, which keeps their ids from being used again."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return
    if value is None or isinstance(value, _WITHOUT_TENSORS) or id(value) in visited:
        return
    visited[id(value)] = value
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, Sequence | Set):
        items = list(value)
        if isinstance(value, Set) and sum(isinstance(item, Tensor) for item in items) > 1:
            raise ValueError(f"a set of {len(items)} tensors among the network's outputs has no order to compare them in. {OUTPUT_REMEDY}")
    elif type(value) in pytree.SUPPORTED_NODES:
        items = list(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])
    else:
        items = list(vars(value).values()) if hasattr(value, "__dict__") else []
        items += [getattr(value, name) for kind in type(value).__mro__ for name in class_slots(kind) if hasattr(value, name)]
    for item in items:
        _collect_tensors(item, tensors, visited)


class OutputSelector:
    """Selects the tensors of an output that are compared: all floating-point tensors, or those of a user's function."""

    def __init__(self, function: Callable[[Any], Any] | None = None) -> None:
        if function is not None and not callable(function):
            raise TypeError(f"output: found {type(function).__name__}, expected a function. {OUTPUT_REMEDY}")
        self.function = function

    def __call__(self, output: Any) -> list[Tensor]:
        tensors = output_tensors(output if self.function is None else self.function(output))
        if not tensors:
            source = "the network's output" if self.function is None else "the result of output="
            raise ValueError(f"{source} ({describe_type(output)}) holds no floating-point tensor that could be compared. {OUTPUT_REMEDY}")
        return tensors

    def pairs(self, target: Any, output: Any) -> list[tuple[Tensor, Tensor]]:
        """The tensors of two networks' outputs, in pairs; ValueError if their shapes differ."""
        targets, outputs = self(target), self(output)
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (targets, outputs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the outputs of the two networks cannot be compared: their tensors have the shapes {quoted(shapes[0])} and "
                f"{quoted(shapes[1])}. {OUTPUT_REMEDY}"
            )
        return list(zip(targets, outputs, strict=True))
