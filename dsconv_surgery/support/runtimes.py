"""Runtimes: what executes networks whose latency is measured. Torch is imported when a network is prepared."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dsconv_surgery.support.formatting import as_sentence, did_you_mean, first_line
from dsconv_surgery.support.records import quoted

if TYPE_CHECKING:
    from torch import nn

    from dsconv_surgery.support.inputs import Inputs

Call = Callable[[], Any]
RuntimeChoice = str | Callable[..., Any]


@dataclass(frozen=True)
class Runtime:
    """What executes networks: its name and version, and how a network or a chain of plain layers becomes a call that can be timed.

    With `measures`, the function is a user's and measures by itself: the call returns milliseconds.
    """

    name: str
    version: str
    prepare: Callable[[nn.Module, Inputs], Call]
    prepare_chain: Callable[[nn.Module, Inputs], Call]
    measures: bool = False
    _calls: Any = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    def network_call(self, model: nn.Module, inputs: Inputs) -> Call:
        """A call of a copy of a network in evaluation mode; as exports and compilations take long, the same network has the same call."""
        from dsconv_surgery.support.copies import evaluation_copy

        if self.name == "eager":
            return self.prepare(evaluation_copy(model), inputs)
        if model not in self._calls:
            self._calls[model] = self.prepare(evaluation_copy(model), inputs)
        return self._calls[model]


def find_runtime(choice: RuntimeChoice) -> Runtime:
    """The runtime of a name or of a user's function; ValueError if it is not known or not installed."""
    check_runtime(choice)
    if callable(choice):
        call = partial(partial, _milliseconds, choice)
        return Runtime(runtime_name(choice), "", call, call, measures=True)
    return _RUNTIMES[choice]()


def check_runtime(choice: RuntimeChoice) -> None:
    """Raise ValueError unless there is a runtime of this name."""
    if isinstance(choice, str) and choice not in _RUNTIMES:
        known = f"Known: {', '.join(_RUNTIMES)}, or a function (module, inputs) -> milliseconds."
        raise ValueError(f"unknown runtime {quoted(choice)}.{did_you_mean(choice, _RUNTIMES)} {known}")


def runtime_name(choice: RuntimeChoice) -> str:
    """The name that measurements record."""
    return choice if isinstance(choice, str) else f"callable {getattr(choice, '__name__', type(choice).__name__)}"


def _milliseconds(function: Callable[..., Any], module: nn.Module, inputs: Inputs) -> float:
    """What a user's function measured, checked."""
    result = function(module, inputs)
    if not isinstance(result, Real) or isinstance(result, bool) or not 0 < float(result) < math.inf:
        expected = "expected the milliseconds that module(*inputs.args, **inputs.kwargs) takes, a positive number"
        raise ValueError(f"runtime={runtime_name(function)}: it returned {quoted(result)}, {expected}.")
    return float(result)


def _eager() -> Runtime:
    return Runtime("eager", "", _eager_call, _eager_call)


def _eager_call(module: nn.Module, inputs: Inputs) -> Call:
    return partial(module, *inputs.args, **inputs.kwargs)


def _compile() -> Runtime:
    return Runtime("compile", importlib.metadata.version("torch"), _compiled_call, _compiled_call)


def _compiled_call(module: nn.Module, inputs: Inputs) -> Call:
    """torch.compile's call of a network, compiled for these inputs."""
    import torch

    def call() -> Any:
        return module(*inputs.args, **inputs.kwargs)

    call.__code__ = call.__code__.replace()  # a new object: torch.compile keeps up to eight versions of a code object
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            compiled = torch.compile(call)
            compiled()
    except Exception as error:  # compilers raise many kinds of errors
        problem = as_sentence(first_line(error))
        remedy = "On CPUs torch.compile needs a C++ compiler, such as g++. Install one, or use another runtime."
        raise ValueError(f"runtime='compile': {type(module).__name__} cannot be compiled: {problem} {remedy}") from error
    return compiled


def _onnxruntime() -> Runtime:
    from dsconv_surgery.support.onnx_export import chain_to_onnx, import_onnx_extra, network_to_onnx

    version = [import_onnx_extra(module) for module in ("onnx", "onnxscript", "onnxruntime")][-1].__version__
    return Runtime("onnxruntime", version, partial(_session_call, network_to_onnx), partial(_session_call, chain_to_onnx))


def _session_call(to_onnx: Callable[[nn.Module, Inputs], bytes], module: nn.Module, inputs: Inputs) -> Call:
    """onnxruntime's call of a network or a chain."""
    from dsconv_surgery.support.onnx_export import session_call

    if devices := {str(tensor.device) for tensor in inputs.tensors} - {"cpu"}:
        problem = f"found inputs on {', '.join(sorted(devices))}"
        raise ValueError(
            f"runtime='onnxruntime' times on the CPU; {problem}. Move the model and the inputs to the CPU, or pass a function."
        )
    try:
        call = session_call(to_onnx(module, inputs), inputs)
        call()
    except Exception as error:  # exporters and onnxruntime raise many kinds of errors
        problem = as_sentence(first_line(error))
        raise ValueError(f"runtime='onnxruntime': {problem} Use runtime='eager', or pass a function.") from error
    return call


_RUNTIMES: dict[str, Callable[[], Runtime]] = {"eager": _eager, "compile": _compile, "onnxruntime": _onnxruntime}
RUNTIME_NAMES = tuple(_RUNTIMES)
