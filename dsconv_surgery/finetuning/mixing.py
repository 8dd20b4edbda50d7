"""Mixing the images of a batch with each other: mixup and CutMix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def can_mix(items: tuple[Any, ...], inputs: int) -> bool:
    """Whether all items are tensors with one row per image, and the inputs among them are floating-point."""
    if not items or not all(isinstance(item, Tensor) and item.ndim for item in items):
        return False
    return all(x.is_floating_point() and x.ndim > 1 for x in items[:inputs]) and len({len(item) for item in items}) == 1


def mix_images(items: tuple[Any, ...], inputs: int, probability: float) -> tuple[tuple[Any, ...], float]:
    """Mix the images of a batch with the same images in another order, with some probability.

    With x the images, x' the same images in another order and k uniform in [0, 1], half of the mixed batches become
    `k x + (1 - k) x'` (mixup, Zhang et al. 2018). In the others, a rectangle of x with a share 1 - k of the area is replaced by that of
    x' (CutMix, Yun et al. 2019). The teacher labels such images well, and they are not in the training data (function matching, Beyer
    et al. 2022). Batches with targets that are maps, or inputs that are not images, use mixup only.

    The items are inputs and then targets. Returns them and, if they were mixed, the targets of x' after those of x; and k, which is 1 if
    they were not mixed. ValueError if `can_mix` is false.
    """
    if not can_mix(items, inputs):
        types = ", ".join(type(item).__name__ for item in items) or "nothing"
        raise ValueError(
            f"fine_tune: mix={probability:g}, but a batch of {types} cannot be mixed: expected floating-point inputs, and only tensors "
            "with one row per image. Leave mix out."
        )
    images, targets = items[:inputs], items[inputs:]
    if float(torch.rand(())) >= probability:
        return items, 1.0
    order, k, blend = torch.randperm(len(images[0])), float(torch.rand(())), bool(torch.rand(()) < 0.5)
    if blend or any(x.ndim != 4 for x in images) or any(target.ndim > 2 for target in targets):
        images = tuple(k * x + (1 - k) * x[order.to(x.device)] for x in images)
    else:
        position, side = torch.rand(2).tolist(), (1 - k) ** 0.5
        images = tuple(_paste_rectangle(x, x[order.to(x.device)], position, side) for x in images)
    return (*images, *targets, *(target[order.to(target.device)] for target in targets)), k


def _paste_rectangle(x: Tensor, other: Tensor, position: Sequence[float], side: float) -> Tensor:
    """Replace a rectangle of x by the other images; `side` is its share of the height and of the width, `position` in [0, 1]."""
    masks = []
    for place, size in zip(position, x.shape[2:], strict=True):
        length = round(side * size)
        first = round(place * (size - length))
        index = torch.arange(size, device=x.device)
        masks.append((index >= first) & (index < first + length))
    return torch.where(masks[0][:, None] & masks[1], other, x)
