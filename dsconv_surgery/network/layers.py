"""Which layers a model has, and which of them may be replaced at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_WRAPPERS = {
    "OptimizedModule": "a compiled model: pass the model that was given to torch.compile (`model._orig_mod`) and compile the result",
    "DistributedDataParallel": "wrapped in DistributedDataParallel: pass `model.module` and wrap the result",
    "DataParallel": "wrapped in DataParallel: pass `model.module` and wrap the result",
    "FullyShardedDataParallel": "wrapped in FullyShardedDataParallel: cut the model before it is sharded",
}


def check_unwrapped(model: nn.Module) -> None:
    """Raise TypeError for a model inside a wrapper that hides or copies its modules, with the way out."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f"{name}: " if name else "the model is "
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where}a TorchScript module, which cannot be edited. Pass the eager model and script the result.")
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch"):
                raise TypeError(f"{where}{_WRAPPERS[kind.__name__]}.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name}: not initialised yet (a lazy module). Run one forward pass first.")


def is_layer(module: nn.Module) -> bool:
    """A convolution of any kind, or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


def named_layers(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every layer, with all the names under which it is reached, in module order."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_layer(module):
            names[module] = (*names.get(module, ()), name)
    return names


def irreplaceable_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that cannot be replaced whatever they are called with, and why, in a sentence."""
    tied = _tied(model)
    fast = {layer for parent in model.modules() if isinstance(parent, nn.TransformerEncoderLayer) for layer in parent.modules()}
    reasons: dict[nn.Module, str] = {}
    for layer in named_layers(model):
        reason = _why_not(layer, tied.get(layer))
        if reason is None and layer in fast:
            reason = "it is inside an nn.TransformerEncoderLayer, whose fast path reads its weights directly."
        if reason:
            reasons[layer] = reason
    return reasons


def _why_not(layer: Any, tied: str | None) -> str | None:
    if parametrize.is_parametrized(layer):
        return "its weight is parametrised: remove_parametrizations first, so that there is a plain weight to replace."
    if "weight" not in layer._parameters:
        return "its weight is computed by a hook (old-style weight norm, spectral norm or pruning): remove the hook first."
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"{type(layer).__name__} is not a plain nn.Conv2d or nn.Linear."
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its weights are {getattr(weight, 'dtype', type(weight).__name__)}; only floating point can be factorised."
    if weight.numel() == 0:
        return f"it has no weights (shape {tuple(weight.shape)})."
    if tied:
        return f"its weight or bias is tied to {tied}: cutting one would untie them."
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it carries hooks of its own, which would be lost: remove them first."
    return None


def _tied(model: nn.Module) -> dict[nn.Module, str]:
    """For each layer that shares a parameter's memory with another parameter, the other one's name."""
    owners: dict[Any, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                storage = 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()
                place = (storage, parameter.storage_offset()) if storage else id(parameter)
                owners.setdefault(place, []).append((module, f"{name}.{kind}".removeprefix(".")))
    others: dict[nn.Module, str] = {}
    for group in owners.values():
        for at, (module, _) in enumerate(group):
            if len(group) > 1 and is_layer(module):
                others[module] = group[at - 1][1]
    return others


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError unless all entries of a layer's weight are finite."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, expected finite ones. Repair them, or exclude the layer."
        )
