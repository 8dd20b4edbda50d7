"""Run a copy of a model, on fake tensors where that is possible, and record how it calls its layers."""

from __future__ import annotations

import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dsconv_surgery.network.geometry import Size
from dsconv_surgery.network.graph_rewrite import placeholder_values, trace
from dsconv_surgery.network.layers import is_layer, named_layers, take_place, weight_property_readers
from dsconv_surgery.network.source_reads import LAYER_ATTRIBUTES
from dsconv_surgery.support.copies import CopyError, copy_model, fake_copy, model_device, unregistered_tensors
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import Inputs, example_hint
from dsconv_surgery.support.random_state import seeded

_WATCHED = LAYER_ATTRIBUTES - {"weight"}  # uses of the weight are recorded where they happen, because its dtype and device may be read
# Properties that all weights share, as in `next(self.parameters()).dtype`: reading them does not need the layer.
_SHARED_PROPERTIES: frozenset[Any] = frozenset(
    (Tensor.dtype.__get__, Tensor.device.__get__, Tensor.requires_grad.__get__, Tensor.is_cuda.__get__, Tensor.is_floating_point)  # type: ignore[attr-defined]
)
_FAILED_RUN_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.fx")


@dataclass(frozen=True)
class CallRecord:
    """How a model calls its layers."""

    calls: Mapping[str, list[tuple[Size, int]]]  # layer -> input size and MACs of each call
    reads: Mapping[str, str]  # layer -> the first attribute that was read outside of its calls
    type_dependent: frozenset[str]  # layers that the model treats by their type or attributes
    macs: int  # of all operations
    unregistered_params: int  # parameters that were used and that `model.parameters()` does not have


class ForeignForwardError(ValueError):
    """A copy of a model computes with parameters of the original."""


def record_calls(model: nn.Module, inputs: Inputs, candidates: Sequence[str]) -> CallRecord:
    """Run a copy of the model in evaluation mode: its trace on fake tensors, else itself on fake tensors, else itself on real ones.

    The candidates are names of layers. A second run, with each candidate in an nn.Sequential, tests whether the model computes the same
    with other types of modules in their places.
    """
    run, recorder, macs = _first_run(model, inputs)
    called = [name for name in candidates if name in recorder.calls and name not in recorder.reads and name]
    operations = run(_OperationLog, []).log if called else []

    def is_same(names: Sequence[str]) -> bool:
        try:
            return run(_OperationLog, names).log == operations
        except Exception:  # whatever the model does with modules that it does not expect
            return False

    return CallRecord(recorder.calls, recorder.reads, frozenset(_failing(is_same, called)), macs, sum(recorder.unregistered.values()))


def _failing(test: Callable[[Sequence[str]], bool], names: Sequence[str]) -> list[str]:
    """The names that make a test fail, by bisection; none if the test passes with all."""
    if not names or test(names):
        return []
    if len(names) == 1:
        return list(names)
    middle = len(names) // 2
    return _failing(test, names[:middle]) + _failing(test, names[middle:])


def _first_run(model: nn.Module, inputs: Inputs) -> tuple[Callable[..., Any], _CallRecorder, int]:
    """A function that runs the model under an observer, with some layers in an nn.Sequential; and the recorded calls and MACs."""
    failure: Exception | None = None
    # fx would trace into a lone layer, and it reads more of a weight than its dtype.
    kinds = ("fake", "real") if is_layer(model) or weight_property_readers(model) else ("traced", "fake", "real")
    for run_kind in kinds:

        def run(make_observer: Callable[[nn.Module], Any], names: Sequence[str], run_kind: str = run_kind) -> Any:
            with warnings.catch_warnings(), _quiet(_FAILED_RUN_LOGGERS):
                warnings.simplefilter("ignore")
                return _run(model, inputs, run_kind, make_observer, names)

        try:
            recorder = run(lambda clone: _CallRecorder(clone, model), [])
            return run, recorder, recorder.macs
        except (CopyError, ForeignForwardError):
            raise
        except Exception as error:
            failure = error
    shapes = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in inputs.tensors]
    device, others = model_device(model), {str(t.device) for t in inputs.tensors} - {str(model_device(model))}
    remedy = f" The network is on {device}: move the inputs there, as in inputs.to({str(device)!r})." if others else ""
    raise ValueError(
        f"the model does not run on the example inputs ({', '.join(shapes) or 'no tensors'}): {as_sentence(failure)} "
        f"{example_hint(inputs)}Pass inputs for which `model(*example_inputs, **example_kwargs)` works in evaluation mode.{remedy}"
    ) from failure


def _run(model: nn.Module, inputs: Inputs, run_kind: str, make_observer: Callable[[nn.Module], Any], wrapped: Sequence[str]) -> Any:
    """Run a copy once, with some layers in an nn.Sequential, under an observer made for the copy; returns the observer."""
    device_copy: Any = (nullcontext(), copy_model(model), inputs) if run_kind == "real" else fake_copy(model, inputs)
    fake_mode, clone, values = device_copy
    # FlopCounterMode does not take parameters that require gradients as inputs of modules.
    clone = _wrap_layers(clone.eval().requires_grad_(False), wrapped)
    observer = make_observer(clone)
    with torch.no_grad(), seeded(0), fake_mode, observer:
        values = pytree.tree_map_only(Tensor, torch.clone, values) if run_kind == "real" else values  # the network may change them in place
        if run_kind == "traced":
            graph = trace(clone)
            fx.Interpreter(graph).run(*placeholder_values(clone, graph, values))
        else:
            clone(*values.args, **values.kwargs)
    return observer


def _wrap_layers(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The model with some of its layers in an nn.Sequential; the tensors are shared."""
    if not names:
        return model
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *unregistered_tensors(model))}
    readers = weight_property_readers(model)
    wrapped: dict[int, nn.Module] = {}
    for layer in map(model.get_submodule, names):
        wrapped[id(layer)] = nn.Sequential(OrderedDict(layer=layer)).eval()
        take_place(layer, wrapped[id(layer)], layer in readers)
    return copy_model(model, tensors | wrapped)


def _recurrent_flops(x: Any, weights: Sequence[Any]) -> int:
    """Two per MAC of the matrices of a recurrent layer, by which every step of every sequence is multiplied."""
    return 2 * math.prod(x[:2]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _attention_flops(query: Any, key: Any, _value: Any, width: int, *_: Any, **__: Any) -> int:
    """Two per MAC of multi-head attention: projections of query, key, value and output, and two products over positions."""
    batch, length, _ = query
    return 2 * batch * length * (4 * width * width + 2 * width * key[1])


# Operations with products that FlopCounterMode does not count; their functions take shapes in place of tensors.
_UNCOUNTED: dict[Any, Any] = {
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *weights, **_: _recurrent_flops(x, weights[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent_flops(x, weights),
    torch.ops.aten._native_multi_head_attention: _attention_flops,
}


@contextmanager
def _quiet(names: Sequence[str]) -> Iterator[None]:
    """Silence loggers, to which torch reports that a run on fake tensors failed."""
    loggers = [logging.getLogger(name) for name in names]
    disabled = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, value in zip(loggers, disabled, strict=True):
            logger.disabled = value


class _OperationLog(TorchDispatchMode):
    """Logs every operation: its name, its arguments that are no tensors, and the shapes and dtypes of its results."""

    def __init__(self, _model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.log.append((str(func), _plain((args, kwargs)), _plain(result)))
        return result


def _plain(values: Any) -> list[str]:
    """The leaves of nested data as texts, tensors by their shape and dtype."""
    return [f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in pytree.tree_leaves(values)]


class _CallRecorder(TorchFunctionMode):
    """Records the calls of each layer of a copy, and what is read of the layer outside of them."""

    def __init__(self, clone: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Size, int]]] = {}
        self.reads: dict[str, str] = {}
        self.unregistered: dict[int, int] = {}  # id of a parameter that the copy has, but not by name -> number of entries
        self._counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
        self._original = original
        self._running: list[str] = []
        self._owners: dict[int, tuple[str, str]] = {}  # id of a parameter -> layer, attribute
        self._registered = {id(parameter) for parameter in clone.parameters()}
        self._foreign = {id(parameter): name for name, parameter in original.named_parameters() if id(parameter) not in self._registered}
        for module, (name, *_) in named_layers(clone).items():
            self._owners |= {id(parameter): (name, attribute) for attribute, parameter in module.named_parameters(recurse=False)}
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: self._running.append(name))
            module.register_forward_hook(lambda *call, name=name: self._record_call(name, *call), with_kwargs=True)
            self._watch_attributes(name, module, type(module))

    def __enter__(self) -> Any:
        self._counter.__enter__()
        try:
            return super().__enter__()  # type: ignore[no-untyped-call]
        except BaseException:  # Ctrl-C, too
            self._counter.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._counter.__exit__(*error)

    @property
    def macs(self) -> int:
        """The MACs of all operations."""
        return self._counter.get_total_flops() // 2

    def _watch_attributes(self, name: str, module: nn.Module, kind: Any) -> None:
        """Give a layer a subclass of its class that records reads of attributes."""

        def getattribute(layer: nn.Module, attribute: str) -> Any:
            if attribute in _WATCHED:
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
                if id(leaf) in self._foreign:
                    raise ForeignForwardError(self._explain_foreign(self._foreign[id(leaf)]))
                if id(leaf) in self._owners:
                    self._record_read(*self._owners[id(leaf)])
                elif isinstance(leaf, nn.Parameter) and id(leaf) not in self._registered:
                    self.unregistered[id(leaf)] = leaf.numel()
        return func(*args, **(kwargs or {}))

    def _explain_foreign(self, parameter: str) -> str:
        functions = [
            f"{name}.{attribute}".removeprefix(".")
            for name, module in self._original.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, FunctionType)
        ]
        place = f" ({', '.join(functions[:3])})" if functions else ""
        return (
            f"{parameter}: a copy of the network still computes with this parameter of the original. A function that was set as an "
            f"attribute, such as a forward{place}, refers to the original network, so a cut copy would not use its new layers. Define it "
            "as a method of the class, or bind it: network.forward = types.MethodType(function, network)."
        )
