"""Observe layers by hooks, and so run any dense and cut network in step, in several passes over the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.support.copies import copy_model, run_model, to_device
from dsconv_surgery.support.inputs import Inputs

LAYERS_PER_PASS = 8


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer on a few images."""

    name: str
    first_image: int
    dense_input: Tensor  # in the dense network
    cut_input: Tensor  # in the network cut so far
    target: Tensor  # the output in the dense network
    shortcut: tuple[Tensor, Tensor] | None  # the other addend of a sum with the output, in the dense and in the cut network

    def select(self, mask: Tensor) -> LayerCall:
        """The call on some of its images, by a mask on the CPU."""
        indices = to_device(mask.nonzero().squeeze(1), self.target.device)
        tensors = (self.dense_input, self.cut_input, self.target, *(self.shortcut or ()))  # a shortcut may be one value for all images
        dense, cut, target, *shortcut = (t[indices] if t.shape[:1] == mask.shape else t for t in tensors)
        return LayerCall(self.name, self.first_image, dense, cut, target, (shortcut[0], shortcut[1]) if shortcut else None)


@dataclass(frozen=True)
class Following:
    """The operations after a layer, in this order, as long as each value has a single user."""

    batchnorm: str | None = None  # the name of a BatchNorm in evaluation mode
    addend: Any = None  # the graph node that is added
    relu: bool = False


class HookedPair:
    """A dense network and a copy that is cut layer by layer, observed by hooks: one pass over the images for a few layers.

    It serves models that cannot be traced; what follows a layer is not known. It has the methods of `SideBySide`.
    """

    def __init__(self, model: nn.Module, images: Images, names: Sequence[str]) -> None:
        self._images, self._names = images, names
        self._dense, self._cut = model, copy_model(model)
        self.following = {name: Following() for name in names}

    def groups(self) -> Iterator[list[str]]:
        called: dict[str, None] = {}
        first_image, _, inputs = next(iter(self._images))
        observe_layers(self._dense, self._names, lambda name, *_: called.setdefault(name), inputs, first_image)
        order = list(called)
        return (order[start : start + LAYERS_PER_PASS] for start in range(0, len(order), LAYERS_PER_PASS))

    def calls(self, names: Sequence[str]) -> Iterator[LayerCall]:
        for first_image, _, inputs in self._images:
            dense_calls, cut_calls = (_observed(model, names, inputs, first_image) for model in (self._dense, self._cut))
            if [name for name, *_ in dense_calls] != [name for name, *_ in cut_calls]:
                raise ValueError(
                    f"{names[0]}: the network compressed so far calls its layers in another order, or other layers, than the dense network "
                    "on the same images, as its control flow depends on values. Calibrate without this layer: plan.without(...)."
                )
            for (name, dense_input, target), (_, cut_input, _) in zip(dense_calls, cut_calls, strict=True):
                yield LayerCall(name, first_image, dense_input, cut_input, target, None)

    def install(self, name: str, layer: nn.Module, batchnorm: nn.Module | None) -> None:
        self._cut.get_submodule(name).register_forward_hook(lambda _module, args, kwargs, _output: layer(*args, **kwargs), with_kwargs=True)

    def close(self) -> None: ...


def _observed(model: nn.Module, names: Sequence[str], inputs: Inputs, first_image: int) -> list[tuple[str, Tensor, Tensor]]:
    """Name, input and output of every call of these layers, in running order."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    observe_layers(model, names, lambda name, x, y: calls.append((name, x.clone(), y.clone())), inputs, first_image)
    return calls


def observe_layers(
    model: nn.Module, names: Sequence[str], observe: Callable[[str, Tensor, Tensor], Any], inputs: Inputs, seed: int
) -> None:
    """Run a model, and call `observe` with name, input and output at every call of these layers; random draws begin with a seed."""

    def hook(name: str, _module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        observe(name, args[0] if args else kwargs["input"], output)

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(hook, name), with_kwargs=True))
        run_model(model, inputs, seed)
