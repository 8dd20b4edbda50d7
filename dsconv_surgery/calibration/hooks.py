"""What calibration is fed with: the dense and the cut network side by side, and here any network, by hooks, in several passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.support.copies import model_device, run_model, to_device

TOGETHER = 8  # layers handled in one pass


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer on some images: its input in both networks, the dense layer's output, and what that is added to, in both."""

    name: str
    first: int  # number of the first image
    dense: Tensor
    cut: Tensor
    wanted: Tensor
    shortcut: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Following:
    """What becomes of a layer's output, if that is used once: a BatchNorm in evaluation mode, a sum with something else, a ReLU."""

    norm: str | None = None
    other: Any = None  # the graph's node
    relu: bool = False


class NetworkPair(Protocol):
    """Two networks alike but for layers replaced so far, and what reaches a layer in them."""

    @property
    def after(self) -> Mapping[str, Following]: ...

    def groups(self) -> Iterator[list[str]]:
        """The layers to replace in running order, those together that are to be handled in one pass."""
        ...

    def calls(self, names: Sequence[str]) -> Iterator[LayerCall]:
        """Every call of these layers on all images, a few images at a time."""
        ...

    def install(self, name: str, layer: nn.Module, norm: nn.Module | None) -> None:
        """From here on the cut network runs another module in the place of a layer, and of the BatchNorm after it."""
        ...

    def outputs(self) -> Iterator[tuple[int, Any, Any]]:
        """First image's number, and what the dense and the cut network give."""
        ...

    def close(self) -> None: ...


class HookedPair:
    """Any network, with hooks: several layers in each pass over the images."""

    def __init__(self, model: nn.Module, images: Images, names: Sequence[str]) -> None:
        self.images, self.names = images, names
        self._dense, self._cut = model, copy.deepcopy(model)
        self.after = {name: Following() for name in names}

    def groups(self) -> Iterator[list[str]]:
        seen: dict[str, None] = {}
        _, inputs = next(iter(self.images))
        observe_layers(self._dense, self.names, lambda name, *_: seen.setdefault(name), inputs)
        order = list(seen)
        return (order[at : at + TOGETHER] for at in range(0, len(order), TOGETHER))

    def calls(self, names: Sequence[str]) -> Iterator[LayerCall]:
        for first, inputs in self.images:
            sides: list[list[tuple[str, Tensor, Tensor]]] = [[], []]
            for side, model in zip(sides, (self._dense, self._cut), strict=True):

                def saw(name: str, x: Tensor, y: Tensor, side: list[tuple[str, Tensor, Tensor]] = side) -> None:
                    side.append((name, x.clone(), y.clone()))

                observe_layers(model, names, saw, inputs)
            for (name, dense, wanted), (_, cut, _) in zip(*sides, strict=True):
                yield LayerCall(name, first, dense, cut, wanted, None)

    def install(self, name: str, layer: nn.Module, norm: nn.Module | None) -> None:
        self._cut.get_submodule(name).register_forward_hook(lambda _module, args, _output: layer(*args))

    def outputs(self) -> Iterator[tuple[int, Any, Any]]:
        with torch.no_grad():
            for first, inputs in self.images:
                inputs = to_device(inputs, model_device(self._dense))
                yield first, self._dense(*copy.deepcopy(inputs)), self._cut(*inputs)

    def close(self) -> None: ...


def observe_layers(model: nn.Module, names: Sequence[str], saw: Callable[[str, Tensor, Tensor], Any], inputs: tuple[Any, ...]) -> None:
    with ExitStack() as hooks, torch.no_grad():
        for name in names:

            def hook(_module: nn.Module, args: Any, kwargs: Any, y: Tensor, name: str = name) -> None:
                saw(name, args[0] if args else kwargs["input"], y)

            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        run_model(model, inputs)
