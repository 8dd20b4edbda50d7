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
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import describe_type
from dsconv_surgery.support.records import quoted

_WITHOUT_TENSORS = (str, bytes, range, memoryview, Number, type, ModuleType, FunctionType, MethodType, nn.Module)
_SAME_SHAPES = "Let output= select tensors that have the same shapes in both networks."
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
            problem = f"a set of {len(items)} tensors among the outputs has no order to compare them in"
            raise ValueError(f"{problem}. Return them as a list, from the network or from output=.")
    elif type(value) in pytree.SUPPORTED_NODES:
        items = list(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])
    else:
        items = list(vars(value).values()) if hasattr(value, "__dict__") else []
        items += [getattr(value, name) for kind in type(value).__mro__ for name in class_slots(kind) if hasattr(value, name)]
    for item in items:
        _collect_tensors(item, tensors, visited)


class OutputSelector:
    """Selects the tensors of an output that are compared: all floating-point tensors, or those of a user's function.

    Args:
        function: the user's `output=`.
        caller: the public argument or function that the outputs belong to, for messages.
    """

    def __init__(self, function: Callable[[Any], Any] | None = None, caller: str = "") -> None:
        if function is not None and not callable(function):
            raise TypeError(f"output: found {type(function).__name__}, expected a function. {OUTPUT_REMEDY}")
        self.function, self._where = function, f"{caller}: " if caller else ""

    def __call__(self, output: Any) -> list[Tensor]:
        result = output if self.function is None else self._apply(self.function, output)
        try:
            tensors = output_tensors(result)
        except ValueError as error:
            raise ValueError(f"{self._where}{error}") from None
        if not tensors and self.function is None:
            problem = f"the network's output ({describe_type(output)}) holds no floating-point tensor to compare"
            raise ValueError(f"{self._where}{problem}. {OUTPUT_REMEDY}")
        if not tensors:
            problem = f"output= returned {describe_type(result)} for the network's output ({describe_type(output)})"
            raise ValueError(f"{self._where}{problem}, expected floating-point tensors.")
        return tensors

    def _apply(self, function: Callable[[Any], Any], output: Any) -> Any:
        try:
            return function(output)
        except Exception as error:
            problem = f"{self._where}output= failed on the network's output ({describe_type(output)})"
            raise ValueError(f"{problem}: {as_sentence(error)} Correct the function.") from error

    def pairs(self, target: Any, output: Any) -> list[tuple[Tensor, Tensor]]:
        """The tensors of two networks' outputs, in pairs; ValueError if their shapes differ."""
        targets, outputs = self(target), self(output)
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (targets, outputs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{self._where}the outputs of the two networks cannot be compared: their tensors have the shapes {quoted(shapes[0])} and "
                f"{quoted(shapes[1])}. {OUTPUT_REMEDY if self.function is None else _SAME_SHAPES}"
            )
        return list(zip(targets, outputs, strict=True))
