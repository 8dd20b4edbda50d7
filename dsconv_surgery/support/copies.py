"""Copies of networks and inputs: on their device, in evaluation mode, on fake tensors, in channels_last."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


def unregistered_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes (old-style weight norm keeps its computed weight there)."""
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def deepcopy_memo(model: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy with detached copies of the tensors that autograd computed, which deepcopy refuses."""
    return {id(t): t.detach().clone() for t in unregistered_tensors(model) if not t.is_leaf}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of a network."""
    return copy.deepcopy(model, deepcopy_memo(model))


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a network in evaluation mode."""
    return copy_model(model).eval()


def fake_copy(model: nn.Module, inputs: Sequence[Any]) -> tuple[FakeTensorMode, nn.Module, tuple[Any, ...]]:
    """A network and its inputs with fake tensors for data: shapes run through it, nothing is computed and no memory is taken."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors: dict[int, Any] = {
        id(t): mode.from_tensor(t if t.is_leaf else t.detach()) for t in chain(model.parameters(), unregistered_tensors(model))
    }
    fake_inputs = pytree.tree_map_only(Tensor, mode.from_tensor, tuple(inputs))
    return mode, copy.deepcopy(model, tensors), fake_inputs


def channels_last_copy(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of a network, and its inputs, with 4-D tensors in torch.channels_last."""
    result = copy_model(model)
    for tensor in chain(result.parameters(), result.buffers()):
        tensor.data = as_channels_last(tensor.data)
    return result, pytree.tree_map_only(Tensor, as_channels_last, tuple(inputs))


def as_channels_last(tensor: Tensor) -> Tensor:
    """A 4-D tensor in torch.channels_last; any other tensor as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Nested data with every tensor moved to a device."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), value)


def run_model(model: nn.Module, inputs: Sequence[Any]) -> Any:
    """The output for copies of the inputs on the network's device (a network may change its inputs in place)."""
    return model(*copy.deepcopy(to_device(tuple(inputs), model_device(model))))
