"""The one product of input and weight that a layer computes, and whether a subclass computes the same as its base class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

# Attributes of every nn.Conv2d and nn.Linear.
GEOMETRY = frozenset((*nn.Conv2d.__constants__, *nn.Linear.__constants__, "transposed", "_reversed_padding_repeated_twice"))
STANDARD_ATTRIBUTES = frozenset(vars(nn.Module())) | GEOMETRY
# Names of nn.Conv2d and nn.Linear that a subclass may define.
_MAY_OVERRIDE = frozenset(("__init__", "forward", "_conv_forward", "reset_parameters", "extra_repr", "__repr__"))
_CLASS_MACHINERY = frozenset(("__dict__", "__weakref__", "__annotate__", "__annotate_func__", "__init_subclass__", "__class_getitem__"))
# Names that the code of an overridden forward may use: nothing else can then decide the result.
_FORWARD_NAMES = GEOMETRY | {
    "weight", "bias", "training", "torch", "nn", "F", "functional", "jit", "is_scripting", "super", "forward", "_conv_forward",
    "conv2d", "linear", "pad", "Tensor", "to", "dtype", "device", "_pair",
}  # fmt: skip
_FORWARD_GLOBALS: tuple[Any, ...] = (torch, nn, F, torch.jit, Tensor, F.conv2d, F.linear, F.pad, _pair)

_PRODUCTS = {F.conv2d: "conv2d", F.linear: "linear"}
# Properties of a tensor that do not depend on its values.
_PROPERTIES: frozenset[Any] = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "layout")),
        *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.is_floating_point),
    )
)


def is_of_torch(kind: type) -> bool:
    """Whether torch defines a class (and not torchvision or timm)."""
    return kind.__module__.split(".")[0] in ("torch", "builtins")


@dataclass(frozen=True)
class LayerCall:
    """The product of a layer's forward, `output = product(pad(input), weight, bias)`."""

    weight: Tensor
    bias: Tensor | None
    output: Tensor
    others: int  # calls of other functions, which computed the weight or the bias
    product: str  # conv2d or linear
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    pads: tuple[int, ...]  # left, right, top, bottom, of F.pad before the product
    pad_mode: str

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything but the tensors and the amount of padding."""
        has_bias = self.bias is not None
        return self.product, self.stride, self.padding, self.dilation, self.groups, bool(self.pads), self.pad_mode, has_bias


class _Recorder(TorchFunctionMode):
    """Records the products and paddings of one run, and whether anything else uses the input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.values: list[Tensor] = [x]  # the input, and the padded input
        self.products: list[tuple[Any, dict[str, Any], Tensor]] = []
        self.pads: tuple[int, ...] = ()
        self.pad_mode = "constant"
        self.others = 0
        self.exact = True

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _PRODUCTS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.products.append((func, dict(zip(names, args, strict=False)) | kwargs, result))
        elif func is F.pad and not self.products and len(self.values) == 1:
            call = {"mode": "constant", "value": None, **dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
            self.exact &= call["input"] is self.values[0] and not call["value"] and len(call["pad"]) == 4
            self.pads, self.pad_mode = tuple(int(n) for n in call["pad"]), call["mode"]
            self.values.append(result)
        elif func not in _PROPERTIES:
            self.others += 1
            tensors = (*self.values, *(product[2] for product in self.products))
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            self.exact &= not any(leaf is tensor for leaf in leaves for tensor in tensors)
        return result


def record_call(layer: nn.Module, x: Tensor) -> LayerCall | None:
    """The call that a layer's forward makes for an input; None if it does not return exactly one product of that input."""
    recorder = _Recorder(x)
    with torch.no_grad(), recorder:
        output = layer(x)
    if not recorder.exact or len(recorder.products) != 1:
        return None
    func, call, product = recorder.products[0]
    if product is not output or call["input"] is not recorder.values[-1]:
        return None
    padding = call.get("padding", 0)
    geometry: Any = {name: tuple(_pair(call.get(name, 1))) for name in ("stride", "dilation")}
    geometry |= {"product": _PRODUCTS[func], "padding": padding if isinstance(padding, str) else tuple(_pair(padding))}
    geometry |= {"groups": call.get("groups", 1), "pads": recorder.pads, "pad_mode": recorder.pad_mode}
    return LayerCall(call["weight"], call.get("bias"), output, recorder.others, **geometry)


def input_shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs to try a layer on: heights and widths with every remainder by the stride."""
    if isinstance(layer, nn.Linear):
        yield from ((3, layer.in_features), (2, 5, layer.in_features))
        return
    height, width = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    steps = max(2, *layer.stride)
    yield from ((2, layer.in_channels, height + 2 + step, width + 2 + steps - step) for step in range(steps + 1))


def computes_the_same(layer: Any) -> bool:
    """Whether a subclass of nn.Conv2d or nn.Linear computes what its base class does. In case of doubt, it does not.

    The code of an overridden forward may name nothing but torch's functions and the layer's standard attributes. On the meta device, it
    has to make the very call of its base class.
    """
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return False
    base: type[nn.Module] = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    parents = [kind for kind in type(layer).__mro__ if kind not in base.__mro__]
    own = [item for kind in parents for item in vars(kind).items()]
    guarded = {*dir(base), *STANDARD_ATTRIBUTES, "weight", "bias", "__deepcopy__", "__copy__"} - _MAY_OVERRIDE - _CLASS_MACHINERY
    if any(map(is_of_torch, parents)) or any(name in guarded and (callable(value) or hasattr(value, "__get__")) for name, value in own):
        return False
    forwards = [value for name, value in own if name in ("forward", "_conv_forward")]
    if not all(map(_is_transparent, forwards)):
        return False
    return not forwards or all(_same_call(layer, base, shape, mode) for shape in input_shapes(layer) for mode in (True, False))


def _is_transparent(function: Any) -> bool:
    """Whether a function's code names nothing but what `_FORWARD_NAMES` lists."""
    if not isinstance(function, FunctionType):
        return False
    code, names = function.__code__, function.__globals__
    nested = any(hasattr(constant, "co_names") for constant in code.co_consts)
    values = [names[name] for name in code.co_names if name in names and name not in GEOMETRY]
    unknown = any(all(value is not item for item in _FORWARD_GLOBALS) for value in values)
    return not (nested or unknown) and {*code.co_names} <= _FORWARD_NAMES and {*code.co_freevars} <= {"__class__"}


def _same_call(layer: nn.Module, base: type[nn.Module], shape: tuple[int, ...], training: bool) -> bool:
    """Whether a layer and its base class make the same call for an input of this shape."""
    parameters = {name: p if p is None else nn.Parameter(p.detach().to("meta")) for name, p in layer._parameters.items()}
    calls = []
    for kind in (type(layer), base):
        shell = kind.__new__(kind)  # shares nothing that a run could change
        vars(shell).update(vars(layer), _parameters=dict(parameters), training=training)
        try:
            calls.append(record_call(shell, torch.empty(shape, dtype=layer.get_parameter("weight").dtype, device="meta")))
        except Exception:  # the layer's code may raise anything: it does not compute the same
            return False
    call, expected = calls
    if call is None or expected is None or call.others:
        return False
    tensors = call.weight is expected.weight and call.bias is expected.bias
    return tensors and (call.geometry, call.pads) == (expected.geometry, expected.pads)
