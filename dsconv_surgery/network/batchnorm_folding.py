"""Fold BatchNorms into the convolutions and linear layers before them."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dsconv_surgery.network.layers import carry_attributes, check_unwrapped, irreplaceable_layers, named_layers
from dsconv_surgery.network.self_check import is_close, outputs_equal
from dsconv_surgery.support.copies import copy_model, evaluation_copy, run_model
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import Inputs, as_inputs
from dsconv_surgery.support.modes import standard_modes
from dsconv_surgery.support.user_warning import warn_user

_MARK = "batchnorm_folded"  # an attribute of a layer that has taken over a BatchNorm; a chain in the layer's place inherits it


@standard_modes()
def fold_batchnorm(model: nn.Module, *example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Make a copy in which BatchNorms in evaluation mode are folded into the convolution, linear layer or chain before them.

    With weight W and bias b of the layer or of the last link, and mean m, variance v, scale g and shift h of the BatchNorm, output
    channel o gets `s_o = g_o / sqrt(v_o + eps)`, `W'_o = s_o W_o` and `b'_o = h_o + s_o (b_o - m_o)`, computed in float64. An nn.Identity
    takes the place of the BatchNorm. For a subclass of a BatchNorm with modules in it, as timm's, it is an nn.Sequential of these.

    The network runs once on the example inputs. A BatchNorm is folded if its input is the output of a plain nn.Conv2d or nn.Linear, both
    are called once, nothing else uses that output, neither has hooks, and the two together compute the same as the folded layer. Other
    BatchNorms stay. A network whose control flow depends on its inputs must call these layers in the same way for all inputs.

    A cut network that was folded is for deployment: `save`, `fold_back` and `compare(plan=...)` refuse it. Save before you fold. A
    network may also be folded and then cut. Then pass `fold_batchnorm(fresh_model, ...)` to `load`.

    Args:
        model: any network with its BatchNorms in evaluation mode, dense or cut, traceable or not. It is not changed.
        example_inputs, example_kwargs: the arguments of the network.

    Returns:
        The copy. Its outputs on the example inputs were compared with those of the model. A warning tells if they are equal in float64
        only, because the network amplifies rounding errors.

    Raises:
        ValueError: there are no example inputs, BatchNorms are in training mode, the network does not run, has no values, or computes
            something else when its BatchNorms are folded.
        TypeError: the model is compiled, scripted or wrapped, or its class does not let submodules be replaced.

    Source: Jacob et al. 2018, section 3.2.

    Example:
        >>> deployed = fold_batchnorm(small.model, torch.rand(1, 3, 224, 224))
    """
    check_unwrapped(model)
    inputs = as_inputs(example_inputs, example_kwargs)
    _check(model, inputs)
    pairs, expected = _observe(model, inputs)
    replacements: dict[str, nn.Module] = {}
    for layer, (batchnorm, shape) in pairs.items():
        if folded := _folded_pair(model.get_submodule(layer), model.get_submodule(batchnorm), shape):
            replacements[layer], replacements[batchnorm] = folded
    result = copy_model(model, {id(model.get_submodule(name)): module for name, module in replacements.items()})
    for name, module in replacements.items():
        if result.get_submodule(name) is not module:
            raise TypeError(f"{name}: cannot be replaced, as {type(model).__name__} or a module in it copies itself (__deepcopy__).")
    _check_result(model, result, expected, inputs)
    return result


def _check_result(model: nn.Module, folded: nn.Module, expected: Any, inputs: Inputs) -> None:
    """Raise ValueError unless the folded network has the outputs that are expected; if only rounding sets them apart, warn."""
    try:
        with torch.no_grad():
            equal = outputs_equal(expected, run_model(evaluation_copy(folded), inputs))
    except Exception as error:
        raise ValueError(
            f"fold_batchnorm: the network does not run without its BatchNorms: {as_sentence(error)} It uses more of a BatchNorm than a "
            "call. Deploy it with its BatchNorms."
        ) from error
    if equal:
        return
    try:
        if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
            raise ValueError("the outputs differ in float64.")
        exact = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        fold_batchnorm(evaluation_copy(model).double(), *exact.args, example_kwargs=exact.kwargs)
    except Exception as error:  # the network may not run in float64
        raise ValueError(
            "fold_batchnorm: the network computes something else with its BatchNorms folded, as it treats layers by their type or keeps "
            "them somewhere else. Deploy it with its BatchNorms."
        ) from error
    message = "the outputs differ by more than is usual for rounding, but in float64 they are equal. Measure the accuracy of the result."
    warn_user(f"fold_batchnorm: {message}")


def folded_for_timing(models: Sequence[nn.Module], inputs: Inputs) -> list[nn.Module]:
    """Copies of networks with BatchNorms folded, as they are deployed; the networks themselves if one of them cannot be folded."""
    if not any(_is_foldable(module) for model in models for module in model.modules()):
        return list(models)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rounding, as outputs do not matter here
            return [fold_batchnorm(evaluation_copy(model), *inputs.args, example_kwargs=inputs.kwargs) for model in models]
    except (ValueError, TypeError):
        return list(models)


def has_folded_batchnorm(layer: nn.Module) -> bool:
    """Whether `fold_batchnorm` folded a BatchNorm into a layer, or into the layer whose place a chain has taken."""
    return bool(vars(layer).get(_MARK))


def _check(model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError without inputs or values, and for BatchNorms in training mode."""
    if not inputs.args and not inputs.kwargs:
        raise ValueError("fold_batchnorm: expected example inputs, found none. Call fold_batchnorm(model, *example_inputs).")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name}: expected values to fold, found a tensor on the meta device. Load weights first.")
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if training:
        problem = f"{len(training)} BatchNorms in training mode, which use the statistics of each batch"
        raise ValueError(f"{training[0] or 'model'}: expected evaluation mode, found {problem}. Call model.eval() first.")


class _Uses(TorchDispatchMode):
    """Records which BatchNorm is called on the output of each layer, and which outputs are used elsewhere."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: Any = WeakTensorKeyDictionary()  # output -> layer, as long as the output lives
        self.calls: Counter[str] = Counter()  # of layers and BatchNorms
        self.shapes: dict[str, torch.Size] = {}  # of the inputs of layers
        self.batchnorms: dict[str, list[str]] = {}  # layer -> the BatchNorms called on its output
        self.used: set[str] = set()  # layers whose output an operation outside of a BatchNorm uses
        self._input: Tensor | None = None  # of the BatchNorm that runs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value is not self._input and value in self.outputs:
                self.used.add(self.outputs[value])
        return func(*args, **(kwargs or {}))

    def after_layer(self, name: str, _module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.calls[name] += 1
        self.shapes[name] = (args[0] if args else kwargs["input"]).shape
        self.outputs[output] = name

    def before_batchnorm(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[name] += 1
        self._input = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if self._input is not None and self._input in self.outputs:
            self.batchnorms.setdefault(self.outputs[self._input], []).append(name)

    def after_batchnorm(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._input = None


def _observe(model: nn.Module, inputs: Inputs) -> tuple[dict[str, tuple[str, torch.Size]], Any]:
    """For each layer whose output only a BatchNorm uses, that BatchNorm and the shape of the layer's input; and the network's output."""
    irreplaceable = irreplaceable_layers(model)
    layers = [name for layer, (name, *_) in named_layers(model).items() if layer not in irreplaceable]
    batchnorms = [name for name, module in model.named_modules() if _is_foldable(module)]
    clone, uses = evaluation_copy(model), _Uses()
    for name in layers:
        clone.get_submodule(name).register_forward_hook(partial(uses.after_layer, name), with_kwargs=True)
    for name in batchnorms:
        clone.get_submodule(name).register_forward_pre_hook(partial(uses.before_batchnorm, name), with_kwargs=True)
        clone.get_submodule(name).register_forward_hook(uses.after_batchnorm)
    try:
        with torch.no_grad(), uses:
            output = run_model(clone, inputs)
    except Exception as error:
        raise ValueError(
            f"fold_batchnorm: the network does not run on the example inputs: {as_sentence(error)} Pass inputs for which "
            "`model(*example_inputs, **example_kwargs)` works in evaluation mode."
        ) from error
    elsewhere = {*uses.used, *uses.outputs.values()}  # an output that still lives is returned or stored by the network
    pairs = {
        layer: (names[0], uses.shapes[layer])
        for layer, names in uses.batchnorms.items()
        if len(names) == 1 and uses.calls[layer] == uses.calls[names[0]] == 1 and layer not in elsewhere
    }
    return pairs, output


def _is_foldable(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with statistics, without hooks or a forward of its own."""
    hooks = any(group for name, group in vars(module).items() if name.endswith("_hooks"))
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not hooks and "forward" not in vars(module)


@torch.no_grad()
def _folded_pair(layer: Any, batchnorm: Any, shape: torch.Size) -> tuple[nn.Module, nn.Module] | None:
    """A copy of a layer with a BatchNorm folded into it, and a module for the BatchNorm's place; None if they compute something else."""
    mean, variance = _exact(batchnorm.running_mean), _exact(batchnorm.running_var)
    scale = (variance + batchnorm.eps).rsqrt() * (1.0 if batchnorm.weight is None else _exact(batchnorm.weight))
    shift = 0.0 if batchnorm.bias is None else _exact(batchnorm.bias)
    bias = 0.0 if layer.bias is None else _exact(layer.bias)
    if len(scale) != len(layer.weight):  # a linear layer on sequences, of which the channels are another dimension
        return None
    folded: Any = copy_model(layer)
    if layer.bias is None:
        folded.bias = nn.Parameter(layer.weight.new_empty(len(scale)), layer.weight.requires_grad)
    folded.weight.copy_(_exact(layer.weight) * scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    folded.bias.copy_(shift + scale * (bias - mean))
    setattr(folded, _MARK, True)
    try:
        children = OrderedDict((name, copy_model(child)) for name, child in batchnorm.named_children())
        rest = nn.Sequential(children) if children else nn.Identity()
        carry_attributes(batchnorm, rest.train(batchnorm.training))
        x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(layer.weight)
        expected, result = (nn.Sequential(copy_model(a), copy_model(b)).eval()(x) for a, b in ((layer, batchnorm), (folded, rest)))
    except Exception:  # a subclass may do anything
        return None
    return (folded, rest) if is_close(expected, result) else None


def _exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU if its device has no float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
