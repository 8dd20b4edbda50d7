"""Find the convolutions and linear layers of a model, with their input sizes and counted MACs, and the reasons why some stay dense."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dsconv_surgery.network.geometry import ConvSpec, Cost, Size
from dsconv_surgery.network.graph_rewrite import trace
from dsconv_surgery.network.layers import check_unwrapped, irreplaceable_layers, is_layer, named_layers
from dsconv_surgery.support.copies import copy_model, fake_copy
from dsconv_surgery.support.random_state import preserve_random_state

# Attributes that the nn.Sequential in a layer's place would not have, as in `x.view(-1, self.fc.in_features)`.
_LAYER_ATTRIBUTES = frozenset(("weight", "bias", *nn.Conv2d.__constants__, *nn.Linear.__constants__))
# Properties that all weights share, as in `next(self.parameters()).dtype`: reading them does not need the layer.
_SHARED_PROPERTIES: frozenset[Any] = frozenset(
    (Tensor.dtype.__get__, Tensor.device.__get__, Tensor.requires_grad.__get__, Tensor.is_cuda.__get__, Tensor.is_floating_point)  # type: ignore[attr-defined]
)


@dataclass(frozen=True)
class ConvSite:
    """A layer that can be cut: its name, other names of the same module, its geometry, and the input size of each call."""

    name: str
    aliases: tuple[str, ...]
    spec: ConvSpec
    sizes: tuple[Size, ...]

    @property
    def cost(self) -> Cost:
        return Cost(self.spec.params, sum(self.spec.macs(size) for size in self.sizes))


@dataclass(frozen=True)
class Skip:
    """A layer that stays as it is, and the reason, a sentence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """The layers of a model in module order, their costs by name, and the cost of the whole model."""

    layers: tuple[ConvSite | Skip, ...]
    costs: dict[str, Cost]
    total: Cost  # all parameters; MACs of convolutions and linear layers
    remainder_macs: int  # matrix products outside of layers, as in attention


def find_convs(model: nn.Module, *example_inputs: Any) -> list[ConvSite | Skip]:
    """Find every convolution and linear layer of a model: a site that can be cut, or a skip with its reason.

    A copy of the model runs on fake tensors, so nothing is computed, and models larger than memory or on the meta device work, too.
    Only a model whose shapes depend on data runs once on real tensors, without gradients.

    Args:
        model: any nn.Module, in its current training mode. It is not changed.
        example_inputs: the arguments of `model(*example_inputs)`. Only shapes, dtypes and devices matter.

    Returns:
        `ConvSite(name, aliases, spec, sizes)` or `Skip(name, reason)` for each layer, in module order.

    Raises:
        TypeError: the model is compiled, scripted or wrapped for data parallelism.
        ValueError: the model does not run on the inputs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 2))
        >>> for layer in find_convs(model, torch.rand(1, 3, 16, 16)):
        ...     print(layer)
        ConvSite(name='0', aliases=(), spec=ConvSpec(in_channels=3, ...), sizes=((1, 16, 16),))
        Skip(name='1', reason='ConvTranspose2d is not a plain nn.Conv2d or nn.Linear.')
    """
    return list(survey_model(model, *example_inputs).layers)


def survey_model(model: nn.Module, *example_inputs: Any) -> Survey:
    check_unwrapped(model)
    recorder, all_macs = _record_calls(model, example_inputs)
    reasons = irreplaceable_layers(model)
    layers: list[ConvSite | Skip] = []
    costs: dict[str, Cost] = {}
    for module, (name, *aliases) in named_layers(model).items():
        calls = recorder.calls.get(name, [])
        costs[name] = Cost(sum(p.numel() for p in module.parameters()), sum(macs for _, macs in calls))
        reason = reasons.get(module)
        if not reason and name in recorder.reads:
            reason = f"its {recorder.reads[name]} is read outside its own call, so the layer must stay."
        elif not reason and not calls:
            reason = f"it is never called on the example inputs in {'training' if model.training else 'evaluation'} mode."
        layers.append(Skip(name, reason) if reason else ConvSite(name, tuple(aliases), ConvSpec.of(module), tuple(s for s, _ in calls)))
    total = Cost(sum(p.numel() for p in model.parameters()), sum(cost.macs for cost in costs.values()))
    return Survey(tuple(layers), costs, total, all_macs - total.macs)


class _CallRecorder(TorchFunctionMode):
    """Records the calls of each layer of a copy, and what is read of the layer outside of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Size, int]]] = {}  # layer -> input size and MACs of each call
        self.reads: dict[str, str] = {}  # layer -> the first attribute that was read
        self._running: list[str] = []
        self._owners: dict[int, tuple[str, str]] = {}  # id of a parameter -> layer, attribute
        for module, (name, *_) in named_layers(model).items():
            self._owners |= {id(parameter): (name, attribute) for attribute, parameter in module.named_parameters(recurse=False)}
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: self._running.append(name))
            module.register_forward_hook(lambda *call, name=name: self._record_call(name, *call), with_kwargs=True)
            self._watch_attributes(name, module, type(module))

    def _watch_attributes(self, name: str, module: nn.Module, kind: Any) -> None:
        """Give a layer a subclass of its class that records reads of attributes."""

        def getattribute(layer: nn.Module, attribute: str) -> Any:
            if attribute in _LAYER_ATTRIBUTES:
                self._record_read(name, attribute)
            return kind.__getattribute__(layer, attribute)

        module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": getattribute})

    def _record_read(self, name: str, attribute: str) -> None:
        if name not in self._running:
            self.reads.setdefault(name, attribute)

    def _record_call(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(module, nn.Linear):
            size, macs = (math.prod(x.shape[:-1]), 1, 1), x.numel() * module.out_features
        else:
            size = (x.shape[0] if x.ndim == 4 else 1, x.shape[-2], x.shape[-1])
            # Every weight is used once per output pixel; in a transposed convolution, once per input pixel.
            pixels = x.numel() // max(module.in_channels, 1) if module.transposed else output.numel() // max(module.out_channels, 1)
            macs = module.weight.numel() * pixels
        self.calls.setdefault(name, []).append((size, macs))
        self._running.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SHARED_PROPERTIES:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if id(leaf) in self._owners:
                    self._record_read(*self._owners[id(leaf)])
        return func(*args, **(kwargs or {}))


def _record_calls(model: nn.Module, inputs: Sequence[Any]) -> tuple[_CallRecorder, int]:
    """Run a copy of the model: its trace on fake tensors, else itself on fake tensors, else itself on real ones."""
    failure: Exception | None = None
    for how in ("fake", "real") if is_layer(model) else ("traced", "fake", "real"):  # fx would trace into a lone layer
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _run(model, inputs, how)
        except Exception as error:
            failure = error
    shapes = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor)]
    raise ValueError(
        f"the model does not run on the example inputs ({', '.join(shapes) or 'no tensors'}): {type(failure).__name__}: {failure} "
        "Pass inputs for which `model(*example_inputs)` works."
    ) from failure


def _run(model: nn.Module, inputs: Sequence[Any], how: str) -> tuple[_CallRecorder, int]:
    """Run a copy once; returns the recorded calls, and the MACs of everything that was computed."""
    copies: Any = (nullcontext(), copy_model(model), tuple(inputs)) if how == "real" else fake_copy(model, inputs)
    fake_mode, clone, values = copies
    recorder = _CallRecorder(clone)
    with torch.no_grad(), preserve_random_state(), fake_mode, recorder:
        run = clone
        if how == "traced":
            inspect.signature(clone.forward).bind(*values)  # the interpreter ignores surplus inputs
            run = fx.Interpreter(trace(clone)).run
        with FlopCounterMode(display=False) as counter:
            run(*values)
    return recorder, counter.get_total_flops() // 2
