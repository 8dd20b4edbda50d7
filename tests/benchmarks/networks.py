"""The networks that planning is measured on, each with images to calibrate on and other images to judge by."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "examples")]

import conftest  # noqa: E402, F401  # makes torchvision importable beside a CPU build of torch
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cifar import cifar10, load_resnet, to_input  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

BATCH = 32


@dataclass(frozen=True)
class Case:
    """A network in evaluation mode, its calibration images and how to get other images."""

    model: nn.Module
    images: Tensor
    other_images: Callable[[int], Tensor]  # up to so many images that calibration does not see

    @property
    def batches(self) -> list[Tensor]:
        return list(self.images.split(BATCH))

    @property
    def example(self) -> Tensor:
        return self.images[:1]


def imagenet(folder: Path, part: str, count: int) -> Tensor:
    """The first images of a part ("calibration" or "test"), each of another class: (count, 3, 224, 224)."""
    files = sorted((folder / "imagenet" / part).glob("*/*.jpg"))[:count]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").crop((16, 16, 240, 240))) for file in files])
    return to_input(pixels)


def _cifar(folder: Path, count: int, size: int) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Calibration images drawn from the first 45,000 training images, and others from the last 5,000."""
    train = cifar10(folder / "cifar10", "train")[0]
    drawn = np.random.default_rng(0).permutation(45_000)[:count]

    def enlarged(pixels: Any) -> Tensor:
        x = to_input(pixels)
        return x if size == 32 else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    return enlarged(train[drawn]), lambda number: enlarged(train[45_000 : 45_000 + number])


def _cifar_resnet(depth: int) -> Callable[[Path, int], Case]:
    def load(folder: Path, count: int) -> Case:
        return Case(load_resnet(folder / "weights" / f"resnet{depth}_cifar10.safetensors", depth), *_cifar(folder, count, 32))

    return load


def _torchvision(name: str, file: str | None = None, size: int = 224) -> Callable[[Path, int], Case]:
    """A network of torchvision with weights from a file, or else without training."""

    def load(folder: Path, count: int) -> Case:
        import torchvision

        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, num_classes=10 if size == 64 else 1000)
        if file is not None:
            state = load_file(folder / "weights" / file)
            model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
        model.eval()
        if size == 64:
            return Case(model, *_cifar(folder, count, size))
        return Case(model, imagenet(folder, "calibration", count), lambda number: imagenet(folder, "test", number))

    return load


NETWORKS: dict[str, tuple[int, Callable[[Path, int], Case]]] = {  # the number of calibration images, and how to load
    "resnet20": (1024, _cifar_resnet(20)),
    "resnet56": (1024, _cifar_resnet(56)),
    "resnet18-64px": (512, _torchvision("resnet18", "torchvision_resnet18_cifar10_64px.safetensors", 64)),
    "squeezenet": (250, _torchvision("squeezenet1_1", "torchvision_squeezenet1_1_imagenet.safetensors")),
    "resnet18": (128, _torchvision("resnet18")),
    "resnet50": (128, _torchvision("resnet50")),
    "vgg16_bn": (32, _torchvision("vgg16_bn")),
}


def load_case(name: str, folder: Path) -> Case:
    count, load = NETWORKS[name]
    return load(folder, count)
