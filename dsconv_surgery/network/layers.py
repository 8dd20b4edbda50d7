"""The convolutions and linear layers of a model, and reasons why a layer cannot be replaced."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.network.layer_call import GEOMETRY, STANDARD_ATTRIBUTES, computes_the_same, is_of_torch
from dsconv_surgery.network.source_reads import source_reads

# Classes that hide or copy a model's modules, with their package, and what to do instead.
_WRAPPERS = {
    "torch.OptimizedModule": "Pass the model from before torch.compile (`model._orig_mod`), then compile the result.",
    "torch.DistributedDataParallel": "Pass `model.module`, then wrap the result.",
    "torch.DataParallel": "Pass `model.module`, then wrap the result.",
    "torch.FullyShardedDataParallel": "Cut the model before you shard it.",
    "torch.ScriptModule": "Pass the eager model, then script the result.",
    "lightning._FabricModule": "Pass `model.module`, then set up the result.",
    "lightning_fabric._FabricModule": "Pass `model.module`, then set up the result.",
    "ultralytics.Model": "Pass the network in it, `yolo.model`, then assign the result to `yolo.model`.",
}

_MAKE_PLAIN = "Call dsconv_surgery.plain(model) first."
_MERGE_FIRST = "Cut the result of merge_and_unload(), or add adapters after the cut."
_MAYBE_PLAIN = "If it only pads its input or computes its weight, dsconv_surgery.plain(model) makes it one."
# Methods that decide what a layer computes.
_METHODS = {nn.Module: ("__call__", "_call_impl"), nn.Conv2d: ("forward", "_conv_forward"), nn.Linear: ("forward",)}
_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device)
# Names of links in the registered schemes: an attribute of such a name cannot be carried over to a chain.
LINK_NAMES = frozenset(("depthwise", "pointwise", "reduce", "core", "expand", "vertical", "horizontal", "dense"))


def check_network(model: object, argument: str = "model") -> None:
    """Raise TypeError unless an argument is an nn.Module."""
    if not isinstance(model, nn.Module):
        hint = "Pass its .model." if isinstance(getattr(model, "model", None), nn.Module) else "Pass the network itself, before its inputs."
        raise TypeError(f"{argument}: expected an nn.Module, found {type(model).__name__}. {hint}")


def check_unwrapped(model: nn.Module) -> None:
    """Raise TypeError for a compiled, scripted, distributed or otherwise wrapped model, ValueError for a lazy one."""
    check_network(model)
    for name, module in model.named_modules():
        for wrapper in _class_names(module) & _WRAPPERS.keys():
            raise TypeError(f"{name or 'model'}: expected a plain module, found {wrapper.split('.')[1]}. {_WRAPPERS[wrapper]}")
        if "forward" in vars(module) and "torch.GraphModule" in _class_names(module):
            reason = "its forward was replaced on the instance, and a copy of a GraphModule would lose it. Edit its graph."
            raise TypeError(f"{name or 'model'}: {reason}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name}: expected an initialised tensor, found one of a lazy module. Run one forward pass first.")


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution of any kind or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


def named_layers(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every layer with all its names, in module order."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_layer(module):
            names[module] = (*names.get(module, ()), name)
    return names


def irreplaceable_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that cannot be replaced, each with the reason."""
    layers = named_layers(model)
    tied, reads = _tied_layers(model), source_reads(model, layers)
    in_encoder, in_adapter = layers_in_encoders(model), _layers_in_adapters(model)
    same: dict[Any, bool] = {}
    reasons: dict[nn.Module, str] = {}
    for layer in layers:
        reason = _computation_reason(layer, same) or _state_reason(layer)
        if not reason and layer in tied:
            reason = f"its weight or bias is tied to {tied[layer]}, and cutting the layer would untie them."
        if not reason and layer in in_encoder:
            reason = "it is inside an nn.TransformerEncoderLayer, whose fast path reads its weights directly."
        if not reason and layer in in_adapter:
            reason = f"it is inside a peft adapter, which reads its weight to merge. {_MERGE_FIRST}"
        for read in reads.get(layer, ()):
            if not reason and not read.only_properties:
                reason = f"its {read.attribute} is read by {read.method}, so the layer must stay."
        if reason:
            reasons[layer] = reason
    return reasons


def weight_property_readers(model: nn.Module) -> set[nn.Module]:
    """The layers of which the code of a model reads `weight.dtype`, `weight.device` or `weight.is_cuda`, and nothing else."""
    reads = source_reads(model, named_layers(model))
    return {layer for layer, group in reads.items() if all(read.only_properties for read in group)}


def layers_in_encoders(model: nn.Module) -> set[nn.Module]:
    """The modules inside an nn.TransformerEncoderLayer."""
    return {layer for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer) for layer in module.modules()}


def _layers_in_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules inside an adapter of peft: the base layer, and the layers that the adapter adds."""
    return {layer for module in model.modules() if "peft.BaseTunerLayer" in _class_names(module) for layer in module.modules()}


def _class_names(module: nn.Module) -> set[str]:
    """The names of a module's classes, each with its package."""
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(module).__mro__}


def is_plain(layer: Any, same: dict[Any, bool] | None = None) -> bool:
    """Whether a layer computes what nn.Conv2d or nn.Linear compute, with a weight of its own; `same`: results so far."""
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return False
    if type(layer) in (nn.Conv2d, nn.Linear):
        return True
    if layer._parameters["weight"] is None or not isinstance(layer, nn.Conv2d | nn.Linear):
        return False
    geometry = [repr(vars(layer).get(name)) for name in sorted(GEOMETRY)]
    results, key = {} if same is None else same, (type(layer), *geometry, layer._parameters.get("bias") is None)
    if key not in results:
        results[key] = computes_the_same(layer)
    return results[key]


def _computation_reason(layer: Any, same: dict[Any, bool]) -> str | None:
    """Why a layer may compute something else than nn.Conv2d or nn.Linear, or None."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"{class_path(type(layer))} is not a plain nn.Conv2d or nn.Linear."
    if parametrize.is_parametrized(layer):
        return f"its weight is parametrised. {_MAKE_PLAIN}"
    if "weight" not in layer._parameters:
        return f"its weight is computed by a hook (old-style weight norm, spectral norm or pruning). {_MAKE_PLAIN}"
    for kind, names in _METHODS.items():
        for name in names:
            function = getattr(kind, name)
            if isinstance(layer, kind) and getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] != "torch":
                by = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"
                return f"nn.{kind.__name__}.{name} was replaced by {by}, so it may compute something else. Restore the method first."
    if patched := [name for name, value in vars(layer).items() if _is_patch(name, value)]:
        return f"its {patched[0]} was replaced on the instance, so it may compute something else. Restore it, or cut before you replace it."
    if not is_plain(layer, same):
        hint = "" if is_of_torch(type(layer)) else f" {_MAYBE_PLAIN}"
        return f"{class_path(type(layer))} is not a plain nn.Conv2d or nn.Linear.{hint}"
    return None


def _state_reason(layer: Any) -> str | None:
    """Why a layer holds more than a chain can take over, or None."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    for tensor in (weight, bias):
        if isinstance(tensor, Tensor) and not is_plain_tensor(tensor):
            kind = class_path(type(tensor.data if type(tensor) is nn.Parameter else tensor))
            return f"its weights are tensors of the subclass {kind}. Cut the network before you quantise or shard it."
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its weights are {getattr(weight, 'dtype', type(weight).__name__)}, and only floating-point weights can be factorised."
    if weight.layout is not torch.strided:
        return f"its weights are sparse ({weight.layout}). Convert them with to_dense() first."
    if weight.numel() == 0:
        return f"it has no weights (shape {tuple(weight.shape)})."
    if edited := _edited_geometry(layer):
        return f"{edited}. Set its attributes as a new layer would."
    if any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks")):
        return "it has hooks, which would be lost. Remove them first."
    extra = [*({*layer._parameters} - {"weight", "bias"}), *layer._buffers, *layer._modules]
    if extra:
        return f"it holds {', '.join(sorted(extra))} beside its weight and bias, which would be lost. Move them to the module around it."
    if lost := uncarried_attributes(layer):
        kind = class_path(type(vars(layer)[lost[0]]))
        return f"its attribute {lost[0]} ({kind}) would be lost. Keep it in the module around the layer, or delete it."
    for name in _extra_attributes(layer):
        if name in LINK_NAMES or (hasattr(nn.Sequential, name) and not hasattr(nn.Module, name)):
            return f"its attribute {name} has the name of a link or a method of nn.Sequential. Rename it."
    return None


def _edited_geometry(layer: Any) -> str | None:
    """How the attributes of a layer contradict its weight or each other, or None."""
    spec = ConvSpec.of(layer)
    shape = spec.weight_shape[:2] if spec.kind == "linear" else spec.weight_shape
    if (actual := tuple(layer._parameters["weight"].shape)) != shape:
        return f"its weight has the shape {actual}, but its attributes say {shape}"
    if spec.padding_mode != "zeros":
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals] if spec.padding == "same" else [(p, p) for p in spec.padding]
        pads = [pad for side in reversed(sides) for pad in side]
        if list(layer._reversed_padding_repeated_twice) != pads:
            return f"it pads by {list(layer._reversed_padding_repeated_twice)}, but its attributes say {pads}"
    return None


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor or parameter is of no subclass, as quantised and sharded ones are."""
    return type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor


def _is_patch(name: str, value: Any) -> bool:
    """Whether an attribute of an instance hides a method of its class, or a parameter."""
    hides = (hasattr(nn.Conv2d, name) or hasattr(nn.Linear, name)) and not _is_simple(value)
    return name in ("weight", "bias") or (hides and name not in STANDARD_ATTRIBUTES)


def _extra_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in STANDARD_ATTRIBUTES}


def uncarried_attributes(module: nn.Module) -> list[str]:
    """The names of attributes that `carry_attributes` does not copy."""
    return [name for name, value in _extra_attributes(module).items() if not _is_simple(value)]


def _is_simple(value: Any) -> bool:
    """Whether a value is plain data that can be copied."""
    if type(value) is dict:
        return all(map(_is_simple, (*value, *value.values())))
    return all(map(_is_simple, value)) if type(value) in (tuple, list, torch.Size) else type(value) in _SIMPLE


def carry_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy the plain data that a program keeps on a layer, such as YOLO's `f` and `i`, to the module in its place."""
    for name, value in _extra_attributes(source).items():
        if _is_simple(value):
            if name in target._modules:
                raise ValueError(f"the attribute {name} of a layer has the name of a link. Rename one of them.")
            setattr(target, name, copy.deepcopy(value))


def take_place(source: nn.Module, target: nn.Module, weight_properties: bool) -> None:
    """Give a module in the place of a layer the layer's plain attributes and, for `weight.dtype` and `weight.device`, an empty buffer."""
    carry_attributes(source, target)
    if weight_properties:
        target.register_buffer("weight", source.get_parameter("weight").detach().new_empty(0), persistent=False)


def class_path(kind: type) -> str:
    """A class with its module, as in `timm.layers.linear.Linear`; `nn.Conv1d` for torch's own layers."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.modules.") else f"{kind.__module__}.{kind.__qualname__}"


def _tied_layers(model: nn.Module) -> dict[nn.Module, str]:
    """For each layer that shares memory with another parameter, the name of that parameter."""
    groups: dict[Any, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                stored = is_plain_tensor(parameter) and parameter.layout is torch.strided and not parameter.is_meta
                address = parameter.untyped_storage().data_ptr() if stored else 0
                memory = (address, parameter.storage_offset()) if address else id(parameter)
                groups.setdefault(memory, []).append((module, f"{name}.{kind}".removeprefix(".")))
    shared = [group for group in groups.values() if len(group) > 1]
    return {module: group[index - 1][1] for group in shared for index, (module, _) in enumerate(group) if is_layer(module)}


def check_finite_state(model: nn.Module) -> None:
    """Raise ValueError if a bias, or a parameter or statistic of a normalisation layer, is NaN or infinite."""
    for name, module in model.named_modules():
        norm = isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm)
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            tensor = value.detach()
            if (norm or (key == "bias" and is_layer(module))) and not tensor.is_meta and not bool(tensor.isfinite().all()):
                path, bad = f"{name}.{key}".removeprefix("."), int((~tensor.isfinite()).sum())
                raise ValueError(f"{path}: {bad} of {tensor.numel()} entries are NaN or infinite, expected finite ones. Repair them first.")


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError if an entry of a layer's weight is NaN or infinite."""
    bad = int((~torch.isfinite(weight.detach())).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. Repair them, or exclude the layer.")


def check_not_quantized(model: nn.Module) -> None:
    """Raise ValueError if a layer of a model is one of torch.ao's quantised ones, whose weights are not parameters."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch.ao.nn.") and "quantized" in kind.__module__:
            message = f"expected floating-point weights, found {class_path(kind)}. Pass the network as it was before it was quantised."
            raise ValueError(f"{name}: {message}")
