"""What `fine_tune` asks of batches: how many steps they make, the same draws in the same epoch, and their items."""

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


def steps_per_epoch(batches: Iterable[Any], settings: FineTune, resumed: bool) -> int | None:
    """How many optimizer steps an epoch takes, if batches say; ValueError if they cannot be used as asked.

    Args:
        batches: tensors, or tuples of inputs and labels.
        settings: how many epochs, and batches to a step.
        resumed: whether the run may have to go on after an interruption.
    """
    if isinstance(batches, Tensor):
        raise ValueError("fine_tune: found a tensor, expected an iterable of batches. Pass images.split(128), or a DataLoader.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"fine_tune: expected an iterable of batches, found {type(batches).__name__}.")
    reasons = {
        f"{settings.epochs} epochs need it": settings.epochs > 1,
        "going on after an interruption needs it": resumed,
        'norms="late" needs it, for the statistics,': settings.norms == "late",
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if isinstance(batches, Iterator) and why:
        raise ValueError(
            f"fine_tune: found an iterator, which can be gone through only once; {why} again. Pass a list, a DataLoader, or any object "
            "that can be iterated again."
        )
    if any(isinstance(owner, DistributedSampler) for owner in _owners(batches)):
        raise ValueError(
            "fine_tune: found a DistributedSampler, which gives each process other batches, of which each would then take its share only. "
            "Give every process the same batches: shuffle=True instead."
        )
    if resumed and getattr(batches, "persistent_workers", False):
        raise ValueError(
            "fine_tune: found a DataLoader with persistent_workers=True, whose draws depend on all epochs before, so that a run that goes "
            "on would not end as an undisturbed one. Leave persistent_workers out, or checkpoint."
        )
    try:
        count = len(batches)  # type: ignore[arg-type]  # a DataLoader of an IterableDataset has __len__, which raises
    except TypeError:
        if settings.steps is None:
            raise ValueError(
                "fine_tune: batches have no length, which the schedule needs. Say how many steps: FineTune(steps=...)."
            ) from None
        return None
    if not count:
        raise ValueError("fine_tune: no batches. Pass at least one.")
    return -(-count // settings.accumulate)


def seed_epoch(batches: Iterable[Any], seed: int, epoch: int) -> None:
    """From here on, what batches draw depends on the seed and the epoch alone."""
    drawn = derived_seed(seed, "data", epoch)
    torch.manual_seed(drawn)
    random.seed(drawn)
    np.random.seed(drawn)
    for owner in _owners(batches):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(drawn)
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)


def step_batches(batches: Iterable[Any], size: int, done: int) -> Iterator[list[Any]]:
    """The batches of each optimizer step that an epoch still has to do after so many; ValueError if an epoch has none."""
    left = islice(iter(batches), done * size, None)
    while group := list(islice(left, size)):
        yield group
        done += 1
    if not done:
        raise ValueError(
            "fine_tune: no batches, or no more. Pass at least one in every epoch, and ask for no more steps than an iterator has."
        )


def batch_items(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def derived_seed(*parts: int | str) -> int:
    """32 bits, all that some generators take, that depend on every part."""
    return random.Random(repr(parts)).getrandbits(32)


def _owners(batches: Iterable[Any]) -> list[Any]:
    """A DataLoader, and what draws for it."""
    sampler, batch_sampler = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    return [batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
