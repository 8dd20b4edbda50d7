"""The training batches: how many steps they make, the same random draws in the same epoch, and groups of them for each step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from dsconv_surgery.finetuning.settings import FineTune


def total_steps(batches: Iterable[Any], settings: FineTune, resumable: bool) -> int:
    """The number of optimizer steps of a run, `resumable` if it writes checkpoints; ValueError or TypeError for unusable batches."""
    if isinstance(batches, Tensor):
        raise ValueError("fine_tune: found a tensor, expected an iterable of batches. Pass images.split(128), or a DataLoader.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"fine_tune: expected an iterable of batches, found {type(batches).__name__}.")
    if isinstance(batches, Iterator) and (settings.epochs > 1 or resumable):
        reason = f"{settings.epochs} epochs iterate" if settings.epochs > 1 else "a run resumed from its checkpoint iterates"
        raise ValueError(
            f"fine_tune: found an iterator, which can be used only once; {reason} over the batches again. Pass a list, a DataLoader, or "
            "any object that can be iterated again."
        )
    if any(isinstance(sampler, DistributedSampler) for sampler in _samplers(batches)):
        raise ValueError(
            "fine_tune: found a DistributedSampler, which gives each process other batches, but each process takes its part of the same "
            "batches. Use shuffle=True instead."
        )
    if resumable and getattr(batches, "persistent_workers", False):
        raise ValueError(
            "fine_tune: found a DataLoader with persistent_workers=True, whose random draws depend on all earlier epochs, so a resumed run "
            "would end with other weights. Leave out persistent_workers, or checkpoint."
        )
    try:
        count = len(batches)  # type: ignore[arg-type]  # a DataLoader of an IterableDataset has __len__, which raises
    except TypeError:
        if settings.steps is None:
            raise ValueError(
                "fine_tune: the batches have no length, which the learning rate schedule needs. Set FineTune(steps=...)."
            ) from None
        return settings.steps
    if not count:
        raise ValueError("fine_tune: no batches. Pass at least one.")
    steps = settings.epochs * -(-count // settings.accumulate)
    return min(steps, settings.steps or steps)


def seed_epoch(batches: Iterable[Any], seed: int, epoch: int) -> None:
    """Make the random draws of an epoch's batches depend on the seed and the epoch only."""
    epoch_seed = derived_seed(seed, "data", epoch)
    torch.manual_seed(epoch_seed)
    random.seed(epoch_seed)
    np.random.seed(epoch_seed)
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


def _samplers(batches: Iterable[Any]) -> list[Any]:
    """A DataLoader itself, its sampler, and its batch sampler with the sampler inside."""
    sampler, batch_sampler = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    return [batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
