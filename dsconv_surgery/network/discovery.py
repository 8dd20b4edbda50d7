"""What a network costs, counted and timed: parameters, MACs, latency. Imports nothing of ours."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


def count_params(model: nn.Module) -> int:
    """All parameters; one that is shared counts once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of everything that `run` computes, functional matrix products included (torch's flop counter halved)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class ConvSite:
    """A layer that can be cut: its name, other names of the same module, geometry, and the input size of each call."""

    name: str
    aliases: tuple[str, ...]
    spec: ConvSpec
    sizes: tuple[Size, ...]

    @property
    def cost(self) -> Cost:
        return Cost(self.spec.params, sum(self.spec.macs(size) for size in self.sizes))


@dataclass(frozen=True)
class Skip:
    """A layer that stays as it is, and why, in a sentence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """All that one look gathers: sites and skips in module order, every layer's cost, the whole network's, and what is not in layers."""

    layers: tuple[ConvSite | Skip, ...]
    costs: dict[str, Cost] = field(repr=False)  # by first name, skipped layers included
    total: Cost  # all parameters; MACs of convolutions and linear layers
    remainder_macs: int  # functional matrix products, as in attention
    how: str  # "traced", "fake" or "real": what the inputs ran through


def find_convs(model: nn.Module, *example_inputs: Any) -> list[ConvSite | Skip]:
    """Every convolution and linear layer of a model, as a site that can be cut or a skip with its reason.

    The model is traced with torch.fx and the inputs' shapes are sent through it on fake tensors: nothing is computed, so a
    network larger than memory (or on the meta device) will do. What does not trace is run as it stands, on fake tensors too;
    where those cannot follow (shapes that depend on data) on a copy of the model for real, once, without gradients.

    Args:
        model: any nn.Module; its training flag is respected, nothing in it changes.
        example_inputs: what `model(*example_inputs)` takes; only shapes, dtypes and devices matter.

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
    """`find_convs` with the costs that go with it."""
    check_unwrapped(model)
    names = named_layers(model)
    record, remainder, how = _record_calls(model, example_inputs)
    fixed = irreplaceable_layers(model)
    layers: list[ConvSite | Skip] = []
    costs: dict[str, Cost] = {}
    for module, (name, *aliases) in names.items():
        calls = record.calls.get(name, [])
        reason = fixed.get(module) or _why_not_here(record.reads.get(name), len(calls))
        params = sum(p.numel() for p in module.parameters())
        costs[name] = Cost(params, sum(macs for _, macs in calls))
        layers.append(Skip(name, reason) if reason else ConvSite(name, tuple(aliases), ConvSpec.of(module), tuple(s for s, _ in calls)))
    total = Cost(count_params(model), sum(cost.macs for cost in costs.values()))
    return Survey(tuple(layers), costs, total, remainder - total.macs, how)


def _why_not_here(read: str | None, calls: int) -> str | None:
    """What this model does with a layer that stands against replacing it, or None."""
    if read:
        return f"its {read} is read outside its own call, which needs the dense {'tensor' if read in ('weight', 'bias') else 'layer'}."
    if not calls:
        return "it is never called on these inputs (in this mode), so its cost is unknown."
    return None


# What only a layer has, not the nn.Sequential that takes its place, as in `x.view(-1, self.fc.in_features)`.
_OWN = frozenset(("weight", "bias", *nn.Conv2d.__constants__, *nn.Linear.__constants__))
# What tensors are asked without a need for their values, as in `next(self.parameters()).dtype`.
_ASKED: frozenset[Any] = frozenset(
    (Tensor.dtype.__get__, Tensor.device.__get__, Tensor.requires_grad.__get__, Tensor.is_cuda.__get__, Tensor.is_floating_point)  # type: ignore[attr-defined]
)


class _Record(TorchFunctionMode):
    """Notes each layer's calls, by hooks, and what is read of it outside them: attributes, and weights by seeing every torch function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Size, int]]] = {}  # name -> (input size, MACs) of each call
        self.reads: dict[str, str] = {}  # name -> the first thing read
        self._inside: list[str] = []
        self._owners: dict[int, tuple[str, str]] = {}
        for module, (name, *_) in named_layers(model).items():
            for kind in ("weight", "bias"):
                tensor = module._parameters.get(kind)
                if tensor is not None:
                    self._owners[id(tensor)] = (name, kind)
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: self._inside.append(name))
            module.register_forward_hook(lambda *call, name=name: self._called(name, *call), with_kwargs=True)
            self._notice_attributes(name, module)

    def _notice_attributes(self, name: str, module: nn.Module) -> None:
        """Give a layer of the copy a class of its own, alike but for noting who asks."""
        kind: Any = type(module)

        def getattribute(layer: nn.Module, attribute: str) -> Any:
            if attribute in _OWN:
                self._read(name, attribute)
            return kind.__getattribute__(layer, attribute)

        module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": getattribute})

    def _read(self, name: str, what: str) -> None:
        if name not in self._inside:
            self.reads.setdefault(name, what)

    def _called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(module, nn.Linear):
            size, macs = (math.prod(x.shape[:-1]), 1, 1), x.numel() * module.out_features
        else:
            conv: Any = module
            size = (x.shape[0] if x.ndim == 4 else 1, x.shape[-2], x.shape[-1])
            # Every weight is used once for each pixel: of the output, or of the input where the convolution is transposed.
            pixels = x.numel() // max(conv.in_channels, 1) if conv.transposed else output.numel() // max(conv.out_channels, 1)
            macs = conv.weight.numel() * pixels
        self.calls.setdefault(name, []).append((size, macs))
        self._inside.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ASKED:
            for leaf in pytree.tree_leaves((args, kwargs)):
                owner = self._owners.get(id(leaf))
                if owner is not None:
                    self._read(*owner)
        return func(*args, **(kwargs or {}))


def _record_calls(model: nn.Module, inputs: Sequence[Any]) -> tuple[_Record, int, str]:
    """Send the inputs through a copy: traced on fake tensors, else as it stands on fake tensors, else for real."""
    last: Exception | None = None
    for how in ("fake", "real") if is_layer(model) else ("traced", "fake", "real"):  # tracing a lone layer would go into it
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the model's own: it is the user's run that they are for
                return _run(model, inputs, how)
        except Exception as error:  # any failure of one way is the reason to try the next; the last one's is reported
            last = error
    shapes = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor)]
    raise ValueError(
        f"the model does not run on the example inputs ({', '.join(shapes) or 'none given'}): {type(last).__name__}: {last} "
        "Pass inputs for which `model(*example_inputs)` works."
    ) from last


def _run(model: nn.Module, inputs: Sequence[Any], how: str) -> tuple[_Record, int, str]:
    with torch.no_grad(), torch.random.fork_rng(enabled=how == "real"):
        if how == "real":
            clone, given = copy_model(model), tuple(inputs)
            record = _Record(clone)
            with record:
                macs = count_macs(lambda: clone(*given))
            return record, macs, how
        mode, clone, given = fake_copy(model, inputs)
        record = _Record(clone)
        with mode, record:
            runner = fx.Interpreter(trace(clone)).run if how == "traced" else clone
            inspect.signature(clone.forward).bind(*given)  # the interpreter would ignore inputs too many
            macs = count_macs(lambda: runner(*given))
        return record, macs, how
