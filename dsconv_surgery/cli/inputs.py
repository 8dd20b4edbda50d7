"""Inputs of the command line: models by name, weights and images from files."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dsconv_surgery.calibration.image_folder import BATCH, image_folder
from dsconv_surgery.support.formatting import as_sentence, did_you_mean


def example_input(shape: str) -> torch.Tensor:
    """Zeros of the shape that a text such as 1,3,224,224 names."""
    try:
        sizes = [int(part) for part in shape.split(",")]
        return torch.zeros(sizes)
    except (ValueError, RuntimeError):
        raise ValueError(f"--input {shape!r}: expected sizes separated by commas, batch first, such as 1,3,224,224.") from None


def image_batches(path: Path, example: torch.Tensor, count: int, mean: str, std: str) -> list[torch.Tensor]:
    """Batches of images from a folder of pictures (resized, cropped and normalised) or from a file with one tensor (used as it is)."""
    if path.is_dir():
        if example.ndim != 4 or example.shape[1] not in (1, 3):
            shape = ",".join(map(str, example.shape))
            raise ValueError(f"--input {shape}: pictures of a folder need a batch of images with 1 or 3 channels, such as 1,3,224,224.")
        channels, height, width = example.shape[1:]
        shift, scale = numbers("--mean", mean, channels), numbers("--std", std, channels)
        return image_folder(path, size=(height, width), mean=shift, std=scale, channels=channels, count=count)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there. Expected a folder of pictures or a .pt, .safetensors or .npy file with one tensor.")
    try:
        tensor = torch.from_numpy(np.load(path, allow_pickle=False)) if path.suffix == ".npy" else _read(path)
        if path.suffix == ".safetensors":
            (tensor,) = tensor.values()
    except Exception as error:  # readers raise many kinds of errors on damaged files
        raise ValueError(f"{path}: expected a .pt, .safetensors or .npy file with one tensor: {_why_unread(error)}") from error
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{path}: found {getattr(tensor, 'dtype', type(tensor).__name__)}, expected a tensor of normalised images.")
    rows = torch.linspace(0, len(tensor) - 1, count).long() if count < len(tensor) else torch.arange(len(tensor))
    return list(tensor[rows].float().split(BATCH))


def shuffled(batches: list[torch.Tensor]) -> DataLoader[Any]:
    """The same images in a new order each epoch, as files are often sorted by class."""
    return DataLoader(TensorDataset(torch.cat(batches)), BATCH, shuffle=True)


def numbers(option: str, text: str, channels: int) -> list[float]:
    """The numbers in the text of an option: one, or one for each channel."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, channels) or not all(map(math.isfinite, numbers)) or (option == "--std" and min(numbers) <= 0):
        kind = "positive number" if option == "--std" else "number"
        raise ValueError(f"{option} {text!r}: expected one {kind}, or {channels} with commas, as the input has {channels} channels.")
    return numbers


def named_model(name: str, weights: str) -> nn.Module:
    """The model that a name stands for, with its weights, in evaluation mode."""
    source, _, rest = name.partition(":")
    if not rest:
        raise ValueError(f"model {name!r}: expected torchvision:NAME, timm:NAME or package.module:callable.")
    pretrained = weights == "DEFAULT"
    if source == "torchvision":
        model = _import("torchvision.models", "torchvision").get_model(rest, weights="DEFAULT" if pretrained else None)
    elif source == "timm":
        try:
            model = _import("timm", "timm").create_model(rest, pretrained=pretrained)
        except RuntimeError as error:  # timm raises this for an unknown name
            raise ValueError(f"model {name!r}: {as_sentence(str(error))} See timm.list_models().") from error
    else:
        if pretrained:
            raise ValueError("--weights DEFAULT is for torchvision and timm; let your callable load its weights, or name a file.")
        sys.path.insert(0, "")
        module = _import(source, source)
        if not callable(getattr(module, rest, None)):
            raise ValueError(f"model {name!r}: {source} has no callable {rest!r}.{did_you_mean(rest, vars(module))}")
        model = getattr(module, rest)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r}: expected an nn.Module, found {type(model).__name__}.")
    if weights not in ("none", "DEFAULT"):
        path = Path(weights)
        if not path.exists():
            raise FileNotFoundError(f"--weights {weights}: expected none, DEFAULT or a file, and there is no file of this name.")
        try:
            model.load_state_dict(_state_dict(_read(path)))
        except Exception as error:  # torch.load raises many kinds of errors on damaged files
            raise ValueError(f"--weights {weights}: not a state_dict of {name}: {_why_unread(error)}") from error
    return model.eval()


def _read(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def _why_unread(error: Exception) -> str:
    """Why a file of weights or images was not read, without torch's advice to unpickle it."""
    if "GLOBAL" in str(error):
        return "the file holds pickled objects, such as a whole model, which are not loaded. Save model.state_dict() instead."
    if isinstance(error, ValueError | TypeError | RuntimeError | OSError | SafetensorError):
        return as_sentence(str(error))
    return "the file is damaged, or torch.save did not write it."


def _state_dict(content: Any) -> Any:
    """The state_dict in a checkpoint that holds more, or the content itself; ValueError if there are several."""
    if not isinstance(content, dict) or all(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    states = {
        key: value
        for key, value in content.items()
        if isinstance(value, dict) and value and all(isinstance(item, torch.Tensor) for item in value.values())
    }
    if len(states) > 1:
        raise ValueError(f"the file holds several, under {', '.join(map(repr, states))}. Save the right one alone.")
    return next(iter(states.values()), content)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside a torch it was not built for
        raise ValueError(f"{module} cannot be imported ({error}). Install {package}, or check the name.") from error
