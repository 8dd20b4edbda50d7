"""What a network costs, counted and timed: parameters, MACs, latency. Imports nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes, as old-style weight norm does with the weights that it computes."""
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def detached_copies(model: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy, which refuses tensors that autograd computed: copies of those that the model holds."""
    return {id(t): t.detach().clone() for t in loose_tensors(model) if not t.is_leaf}


def fake_copy(model: nn.Module, inputs: Sequence[Any]) -> tuple[FakeTensorMode, nn.Module, tuple[Any, ...]]:
    """The model and its inputs with fake tensors for data: shapes run through it, no memory is taken and nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors: dict[int, Any] = {
        id(t): mode.from_tensor(t if t.is_leaf else t.detach()) for t in chain(model.parameters(), loose_tensors(model))
    }
    fake_inputs = pytree.tree_map_only(Tensor, mode.from_tensor, tuple(inputs))
    return mode, copy.deepcopy(model, tensors), fake_inputs


def to_channels_last(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of the model, and the inputs, with 4-D tensors in torch.channels_last."""

    def turned(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    copied, last = copy.deepcopy(model, detached_copies(model)), pytree.tree_map_only(Tensor, turned, tuple(inputs))
    for tensor in chain(copied.parameters(), copied.buffers()):
        tensor.data = turned(tensor.data)
    return copied, last


def on_model_device(inputs: tuple[Any, ...], model: nn.Module) -> tuple[Any, ...]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)
