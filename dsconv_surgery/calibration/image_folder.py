"""Batches of calibration images from a folder of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCH = 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Scale = float | Sequence[float]


def image_folder(
    path: str | Path,
    *,
    size: int | tuple[int, int],
    mean: Scale = IMAGENET_MEAN,
    std: Scale = IMAGENET_STD,
    channels: int = 3,
    count: int = 512,
    batch: int = BATCH,
) -> list[Tensor]:
    """Read pictures as calibration images, as the command line does.

    Each picture is resized to cover the size, cropped to its middle, and normalised: `(value - mean) / std` for values in [0, 1].

    Args:
        path: a folder; pictures in folders below it are used, too.
        size: of the images in pixels, (height, width) or one number for both.
        mean, std: one number, or one for each channel; by default ImageNet's.
        channels: 3 for RGB, 1 for grey.
        count: use at most this many pictures, spread over all of them in the order of their names.
        batch: images in a batch.

    Returns:
        Batches, (images, channels, height, width) each, in float32.

    Raises:
        ValueError: no folder, no pictures in it, a size, mean or std that cannot be, or pillow is missing.

    Example:
        >>> small = compress(model, x, calibration=image_folder("photos", size=224))
    """
    folder = Path(path)
    pair = size if isinstance(size, tuple | list) else (size, size)
    if not folder.is_dir():
        raise ValueError(f"image_folder: {folder} is not a folder. Pass a folder of pictures ({', '.join(PICTURES)}).")
    if channels not in (1, 3) or len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in (*pair, count, batch)):
        problem = f"size={size!r}, channels={channels!r}, count={count!r}, batch={batch!r}"
        raise ValueError(f"image_folder: {problem}, expected 1 or 3 channels and positive whole numbers.")
    shift, scale = (_per_channel(name, value, channels) for name, value in (("mean", mean), ("std", std)))
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder}: no pictures in this folder ({', '.join(PICTURES)}).")
    chosen = [files[index * len(files) // count] for index in range(count)] if count < len(files) else files
    pictures = torch.stack([(_picture(file, channels, *pair) - shift) / scale for file in chosen])
    return list(pictures.split(batch))


def _per_channel(name: str, value: Scale, channels: int) -> Tensor:
    """The numbers of a normalisation, (channels or 1, 1, 1)."""
    numbers = [float(number) for number in value] if isinstance(value, Sequence) else [float(value)]
    if channels == 1 and value in (IMAGENET_MEAN, IMAGENET_STD):
        numbers = [sum(numbers) / len(numbers)]
    wrong = len(numbers) not in (1, channels) or not all(map(math.isfinite, numbers))
    if wrong or (name == "std" and min(numbers) <= 0):
        kind = "positive number" if name == "std" else "number"
        several = f", or {channels} of them, as the images have {channels} channels" if channels > 1 else ", as the images have 1 channel"
        raise ValueError(f"{name}={value!r}: expected one {kind}{several}.")
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").view(-1, 1, 1)


def _picture(file: Path, channels: int, height: int, width: int) -> Tensor:
    """A picture resized to cover a size, cropped to its middle, with values in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("pictures need pillow: pip install 'dsconv_surgery[examples]'.") from error
    try:
        with Image.open(file) as opened:
            picture: Any = opened.convert("L" if channels == 1 else "RGB")
    except OSError as error:
        raise ValueError(f"{file}: not a picture that pillow can read: {error}. Remove the file, or repair it.") from error
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(scale * picture.width)), max(height, round(scale * picture.height))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.array(picture.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)
