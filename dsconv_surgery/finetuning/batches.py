"""The training batches: the number of steps, the random draws of an epoch, the batches of each step, and mixup and CutMix."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.support.copies import to_device
from dsconv_surgery.support.random_state import set_seed


def total_steps(batches: Iterable[Any], settings: FineTune, resumable: bool) -> int:
    """The number of optimizer steps of a run, `resumable` if it writes checkpoints; ValueError or TypeError for unusable batches."""
    if isinstance(batches, Tensor):
        raise ValueError("fine_tune: found a tensor, expected an iterable of batches. Pass images.split(128), or a DataLoader.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"fine_tune: expected an iterable of batches, found {type(batches).__name__}.")
    if isinstance(batches, Iterator) and (settings.epochs > 1 or resumable):
        reason = f"{settings.epochs} epochs iterate" if settings.epochs > 1 else "a run resumed from its checkpoint iterates"
        raise ValueError(
            f"fine_tune: found an iterator, which can be used only once; {reason} over the batches again. Pass a list or a DataLoader."
        )
    if any(isinstance(sampler, DistributedSampler) for sampler in _samplers(batches)):
        raise ValueError(
            "fine_tune: found a DistributedSampler, but each process takes its part of the same batches. Use shuffle=True instead."
        )
    if resumable and getattr(batches, "persistent_workers", False):
        raise ValueError(
            "fine_tune: found persistent_workers=True. Such draws depend on all earlier epochs, so a resumed run would end with "
            "other weights. Leave out persistent_workers, or checkpoint."
        )
    try:
        count = len(batches)  # type: ignore[arg-type]  # a DataLoader of an IterableDataset has __len__, which raises
    except TypeError:
        if settings.steps is None:
            raise ValueError("fine_tune: batches have no length, but the learning rate depends on it. Set FineTune(steps=...).") from None
        return settings.steps
    if not count:
        raise ValueError("fine_tune: no batches. Pass at least one.")
    steps = settings.epochs * -(-count // settings.accumulate)
    return min(steps, settings.steps or steps)


def seed_epoch(batches: Iterable[Any], seed: int, epoch: int) -> None:
    """Make the random draws of an epoch's batches depend on the seed and the epoch only."""
    epoch_seed = derived_seed(seed, "data", epoch)
    set_seed(epoch_seed)
    for sampler in _samplers(batches):
        generator = getattr(sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(epoch_seed)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def step_batches(batches: Iterable[Any], accumulate: int, done: int) -> Iterator[list[Any]]:
    """The batches of each optimizer step of an epoch, without the steps that are done; ValueError if the epoch has none."""
    remaining = islice(iter(batches), done * accumulate, None)
    while group := list(islice(remaining, accumulate)):
        yield group
        done += 1
    if not done:
        raise ValueError("fine_tune: an epoch has no batches. Pass at least one for each epoch, and with an iterator enough for all steps.")


def derived_seed(*parts: int | str) -> int:
    """A seed of 32 bits, the most that some generators take, that depends on every part."""
    return random.Random(repr(parts)).getrandbits(32)


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
    if _uniform() >= probability:
        return items, 1.0
    order, k, blend = torch.randperm(len(images[0]), device="cpu"), _uniform(), _uniform() < 0.5
    if blend or any(x.ndim != 4 for x in images) or any(target.ndim > 2 for target in targets):
        images = tuple(k * x + (1 - k) * x[to_device(order, x.device)] for x in images)
    else:
        position, side = torch.rand(2, dtype=torch.float32, device="cpu").tolist(), (1 - k) ** 0.5
        images = tuple(_paste_rectangle(x, x[to_device(order, x.device)], position, side) for x in images)
    return (*images, *targets, *(target[to_device(order, target.device)] for target in targets)), k


def _uniform() -> float:
    """A number drawn uniformly from [0, 1)."""
    return float(torch.rand((), dtype=torch.float32, device="cpu"))


def _samplers(batches: Iterable[Any]) -> list[Any]:
    """A DataLoader itself, its sampler, and its batch sampler with the sampler inside."""
    sampler, batch_sampler = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    return [batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]


def _paste_rectangle(x: Tensor, other: Tensor, position: Sequence[float], side: float) -> Tensor:
    """Replace a rectangle of x by the other images; `side` is its share of the height and of the width, `position` in [0, 1]."""
    masks = []
    for place, size in zip(position, x.shape[2:], strict=True):
        length = round(side * size)
        index = torch.arange(size, device=x.device) - round(place * (size - length))
        masks.append((index >= 0) & (index < length))
    return torch.where(masks[0][:, None] & masks[1], other, x)
