"""What a network being fine-tuned learns from: labels, the dense network's outputs, and the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def can_mix(items: tuple[Any, ...], inputs: int) -> bool:
    """Whether all inputs of a batch are floating-point tensors, and all inputs and targets tensors with a row for each image."""
    if not items or not all(isinstance(t, Tensor) and t.ndim for t in items):
        return False
    return all(x.is_floating_point() and x.ndim > 1 for x in items[:inputs]) and len({len(t) for t in items}) == 1


def mix_images(items: tuple[Any, ...], inputs: int, share: float) -> tuple[tuple[Any, ...], float]:
    """With a chance of `share`, images of a `mixable` batch with others of the same batch mixed in.

    Half of the time `k x + (1 - k) x'` (mixup, Zhang et al. 2018), k uniform in [0, 1] and x' the images in another order; else a
    rectangle of x' with a share 1 - k of the area in the place of what is there in x (CutMix, Yun et al. 2019). The dense network says
    what such images are, far from those that it was trained on and may know by heart (function matching, Beyer et al. 2022). Images
    whose targets are maps are blended only.

    Args:
        items: inputs, each (images, ...), and targets.
        inputs: how many of them are inputs.
        share: in [0, 1].

    Returns:
        The inputs, the targets and, if mixed, the targets of x'; k, 1 if not mixed.

    Raises:
        ValueError: a batch that is not `mixable`.
    """
    if not can_mix(items, inputs):
        found = ", ".join(type(item).__name__ for item in items) or "nothing"
        raise ValueError(
            f"fine_tune: mix={share:g}, but a batch of {found} cannot be mixed: expected floating-point inputs, and tensors with a row for "
            "each image throughout. Leave mix out."
        )
    images, targets = items[:inputs], items[inputs:]
    if float(torch.rand(())) >= share:
        return items, 1.0
    order, kept, blend = torch.randperm(len(images[0])), float(torch.rand(())), bool(torch.rand(()) < 0.5)
    if blend or any(x.ndim != 4 for x in images) or any(t.ndim > 2 for t in targets):
        images = tuple(kept * x + (1 - kept) * x[order.to(x.device)] for x in images)
    else:
        at, side = torch.rand(2).tolist(), (1 - kept) ** 0.5
        images = tuple(_paste_rectangle(x, x[order.to(x.device)], at, side) for x in images)
    return (*images, *targets, *(t[order.to(t.device)] for t in targets)), kept


def _paste_rectangle(x: Tensor, other: Tensor, at: Sequence[float], side: float) -> Tensor:
    """A rectangle of the other images, `side` of the height and of the width, in the place of what is there in x."""
    spans = []
    for place, length in zip(at, x.shape[2:], strict=True):
        long = round(side * length)
        first = round(place * (length - long))
        index = torch.arange(length, device=x.device)
        spans.append((index >= first) & (index < first + long))
    return torch.where(spans[0][:, None] & spans[1], other, x)
