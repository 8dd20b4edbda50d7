"""The convolutions and linear layers of a model, and reasons why a layer cannot be replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

# Classes of torch that hide or copy a model's modules, and what to do instead.
_WRAPPERS = {
    "OptimizedModule": "Pass the model from before torch.compile (`model._orig_mod`), then compile the result.",
    "DistributedDataParallel": "Pass `model.module`, then wrap the result.",
    "DataParallel": "Pass `model.module`, then wrap the result.",
    "FullyShardedDataParallel": "Cut the model before you shard it.",
    "ScriptModule": "Pass the eager model, then script the result.",
}


def check_unwrapped(model: nn.Module) -> None:
    """Raise TypeError for a compiled, scripted or distributed model, ValueError for a lazy one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}. Pass the model itself.")
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch"):
                raise TypeError(f"{name or 'model'}: expected a plain module, found {kind.__name__}. {_WRAPPERS[kind.__name__]}")
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
    tied = _tied_layers(model)
    in_encoder = {layer for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer) for layer in module.modules()}
    reasons = {layer: _reason(layer, tied.get(layer), layer in in_encoder) for layer in named_layers(model)}
    return {layer: reason for layer, reason in reasons.items() if reason}


def _reason(layer: Any, tied: str | None, in_encoder: bool) -> str | None:
    """Why a layer cannot be replaced, or None."""
    if parametrize.is_parametrized(layer):
        return "its weight is parametrised. Call torch.nn.utils.parametrize.remove_parametrizations first."
    if "weight" not in layer._parameters:
        return "its weight is computed by a hook (old-style weight norm, spectral norm or pruning). Remove the hook first."
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"{type(layer).__name__} is not a plain nn.Conv2d or nn.Linear."
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its weights are {getattr(weight, 'dtype', type(weight).__name__)}, and only floating-point weights can be factorised."
    if weight.numel() == 0:
        return f"it has no weights (shape {tuple(weight.shape)})."
    if tied:
        return f"its weight or bias is tied to {tied}, and cutting the layer would untie them."
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks, which would be lost. Remove them first."
    if in_encoder:
        return "it is inside an nn.TransformerEncoderLayer, whose fast path reads its weights directly."
    return None


def _tied_layers(model: nn.Module) -> dict[nn.Module, str]:
    """For each layer that shares memory with another parameter, the name of that parameter."""
    groups: dict[Any, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                address = 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()
                memory = (address, parameter.storage_offset()) if address else id(parameter)
                groups.setdefault(memory, []).append((module, f"{name}.{kind}".removeprefix(".")))
    shared = [group for group in groups.values() if len(group) > 1]
    return {module: group[index - 1][1] for group in shared for index, (module, _) in enumerate(group) if is_layer(module)}


def check_finite_state(model: nn.Module) -> None:
    """Raise ValueError if a bias, or a parameter or statistic of a normalisation layer, is NaN or infinite."""
    for name, module in model.named_modules():
        norm = isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if (norm or (key == "bias" and is_layer(module))) and not tensor.is_meta and not bool(tensor.isfinite().all()):
                path, bad = f"{name}.{key}".removeprefix("."), int((~tensor.isfinite()).sum())
                raise ValueError(f"{path}: {bad} of {tensor.numel()} entries are NaN or infinite, expected finite ones. Repair them first.")


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError if an entry of a layer's weight is NaN or infinite."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. Repair them, or exclude the layer.")
