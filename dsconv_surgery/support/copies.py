"""Copies of networks and inputs: on their device, in evaluation mode, on fake tensors, in channels_last."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.random_state import seeded


def unregistered_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that modules hold in attributes, containers and objects, such as cached activations; no parameters."""
    parameters = {id(parameter) for parameter in model.parameters()}
    visited: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            if id(value) not in parameters:
                yield value
        else:
            waiting += [child for _, child in reversed(_children(value))]


def _children(value: Any) -> list[tuple[str, Any]]:
    """The values inside a value: the items of a container, or the attributes of an object, each with its path."""
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    if isinstance(value, partial):
        return [(".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, type | ModuleType | FunctionType | Tensor):
        return []
    attributes = dict(getattr(value, "__dict__", {}))
    children: list[tuple[str, Any]] = []
    if isinstance(value, nn.Module):  # the names that users know
        for table in ("_parameters", "_buffers", "_modules"):
            children += [(f".{name}", item) for name, item in attributes.pop(table, {}).items()]
    children += [(f".{name}", item) for name, item in attributes.items()]
    names = [name for kind in type(value).__mro__ for name in class_slots(kind)]
    return children + [(f".{name}", getattr(value, name)) for name in names if hasattr(value, name)]


def class_slots(kind: type) -> tuple[str, ...]:
    """The names in a class's own `__slots__`."""
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots) if isinstance(slots, tuple | list) else ()


class CopyError(ValueError):
    """A network cannot be copied."""


def copy_model(model: nn.Module, replaced: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a network, in which objects with an id in `replaced` are others.

    Tensors that autograd computed, which copy.deepcopy refuses, are copied without their history, and tensors made under inference mode
    become ordinary ones.

    Raises:
        CopyError: an attribute cannot be copied; its path is named.
    """
    memo: dict[int, Any] = dict(replaced or {})
    for tensor in (*model.parameters(), *unregistered_tensors(model)):
        if id(tensor) not in memo and (tensor.is_inference() or not tensor.is_leaf):
            clone = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    if id(model) in memo:
        return memo[id(model)]
    try:
        result = copy.deepcopy(model, dict(memo))
    except Exception as error:  # a class may raise anything while it is copied
        path, value = _uncopyable(model, "", memo, set())
        raise CopyError(
            f"{path.removeprefix('.') or 'model'}: this {type(value).__qualname__} cannot be copied ({type(error).__name__}: {error}), and "
            "the library works on copies of the network. Remove the attribute, or create it when it is first used."
        ) from error
    _check_separate(model, result, replaced or {})
    return result


def _check_separate(model: nn.Module, result: nn.Module, replaced: Mapping[int, Any]) -> None:
    """Raise CopyError if a copy holds a module of the original that is not part of a replacement."""
    shared = {id(module) for value in replaced.values() if isinstance(value, nn.Module) for module in value.modules()}
    originals = {id(module): name for name, module in model.named_modules() if id(module) not in shared}
    for name, module in result.named_modules():
        if id(module) in originals:
            raise CopyError(
                f"{name or 'model'}: a copy of the network holds the same module, as {type(module).__qualname__} or a module around it "
                "copies itself (__deepcopy__). The library would change the original. Let copies be separate."
            )


def _uncopyable(value: Any, path: str, memo: Mapping[int, Any], visited: set[int]) -> tuple[str, Any]:
    """The path to the innermost value that cannot be copied, and this value."""
    visited.add(id(value))
    for name, child in _children(value):
        try:
            copy.deepcopy(child, dict(memo))
        except Exception:  # this child cannot be copied either: look inside it
            if id(child) not in visited:
                return _uncopyable(child, path + name, memo, visited)
    return path, value


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a network in evaluation mode."""
    return copy_model(model).eval()


def fake_copy(model: nn.Module, inputs: Inputs) -> tuple[FakeTensorMode, nn.Module, Inputs]:
    """A network and its inputs with fake tensors for data: shapes run through it, nothing is computed and no memory is taken."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False):
        tensors: dict[int, Any] = {id(t): mode.from_tensor(_plain_leaf(t)) for t in (*model.parameters(), *unregistered_tensors(model))}
        fake_inputs = pytree.tree_map_only(Tensor, lambda t: mode.from_tensor(_plain_leaf(t)), inputs)
    return mode, copy_model(model, tensors), fake_inputs


def _plain_leaf(tensor: Tensor) -> Tensor:
    """The tensor itself; without its history if autograd computed it, and a copy if it was made under inference mode."""
    if tensor.is_inference():
        clone = tensor.detach().clone()
        return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    return tensor if tensor.is_leaf else tensor.detach()


def channels_last_copy(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """A copy of a network, and its inputs, with 4-D tensors in torch.channels_last."""
    result = copy_model(model)
    for tensor in chain(result.parameters(), result.buffers()):
        tensor.data = as_channels_last(tensor.data)
    return result, pytree.tree_map_only(Tensor, as_channels_last, inputs)


def as_channels_last(tensor: Tensor) -> Tensor:
    """A 4-D tensor in torch.channels_last; any other tensor as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Nested data with every tensor moved to a device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=_need_not_wait(device), copy=tensor.is_inference())

    return pytree.tree_map_only(Tensor, move, value)


def _need_not_wait(device: torch.device) -> bool:
    """Whether a copy to a device may return early. The next operation on a GPU waits for its values, but the CPU would read too soon."""
    return device.type == "cuda"


def run_model(model: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
    """The output for copies of the inputs on the network's device (a network may change its inputs in place).

    Random draws begin with the seed, so that two networks draw the same numbers for the same inputs and the same seed.
    """
    values = own_copy(inputs, model_device(model))
    with seeded(seed):
        return model(*values.args, **values.kwargs)


def own_copy(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs on a device, copied; tensors made under inference mode become ordinary ones."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, non_blocking=_need_not_wait(device), copy=True), inputs)
