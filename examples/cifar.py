"""Shared by the CIFAR-10 examples: the ResNet of He et al. (2016), loading of images and weights, and the accuracy.

Images are stored as sheets: lossless pictures with many images of 32 x 32 pixels, row by row.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. The shortcut has no parameters: it takes every second pixel and pads the channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.added_channels:
            before = self.added_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added_channels - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20 (`depth=20`), ResNet-56 (`depth=56`) and so on: three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def load_resnet(path: Path, depth: int = 20) -> CifarResNet:
    """A ResNet in evaluation mode, with float32 weights from a safetensors file of any precision."""
    model = CifarResNet(depth)
    state = load_file(path)
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return model.eval()


def demo_resnet20() -> CifarResNet:
    """The ResNet-20 in examples/assets, trained by examples/train_cifar.py."""
    return load_resnet(ASSETS / "resnet20_cifar10.safetensors")


def read_sheet(path: Path) -> np.ndarray:
    """The images of one sheet as uint8 of shape (n, 32, 32, 3)."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    return sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def to_input(images: np.ndarray) -> Tensor:
    """Convert uint8 of shape (n, 32, 32, 3) to normalised float32 of shape (n, 3, 32, 32)."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)
    return x.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def augment(x: Tensor) -> Tensor:
    """Pad images by 4 pixels, crop each at random and mirror half of them."""
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (n, 1), device=x.device) for _ in range(2))
    columns = left + torch.arange(width, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    rows = top + torch.arange(height, device=x.device)
    return padded[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Batches:
    """Batches of augmented images, with labels if there are some, in a new random order for each iteration."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, size: int = 128) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.images))[: len(self) * self.size]
        for indices in order.split(self.size):
            x = augment(self.images[indices])
            yield (x,) if self.labels is None else (x, self.labels[indices])


def demo_images(split: str) -> tuple[Tensor, Tensor]:
    """Normalised images in examples/assets and their labels; `split` is "train" (5,000 images) or "test" (1,000)."""
    labels = np.load(ASSETS / "labels.npz")[split]
    return to_input(read_sheet(ASSETS / f"{split}.webp")), torch.from_numpy(labels.astype(np.int64))


def cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All "train" or "test" images of CIFAR-10 and their labels, from sheets in `folder`, or else downloaded there by torchvision."""
    if (folder / "labels.npz").exists():
        images = np.concatenate([read_sheet(sheet) for sheet in sorted(folder.glob(f"{split}*.webp"))])
        return images, np.load(folder / "labels.npz")[split].astype(np.int64)
    from torchvision.datasets import CIFAR10

    dataset = CIFAR10(str(folder), train=split == "train", download=True)
    return dataset.data, np.asarray(dataset.targets, dtype=np.int64)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 accuracy in percent, computed in evaluation mode; the mode of the model is restored."""
    training = model.training
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True))
    model.train(training)
    return 100 * hits / len(labels)
