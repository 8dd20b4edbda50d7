"""Calibration images: checked once, and given a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support import distributed
from dsconv_surgery.support.cache import digest
from dsconv_surgery.support.copies import run_model

HELD = 4  # every fourth image is held out to choose by,
ENOUGH = 4 * HELD  # given so many
PROBE_IMAGES, PROBE_NUMBERS = 256, 2**23  # limits on images, and on the numbers in them, for measurements that repeat
NUMBERS_AT_ONCE = 2**21  # input numbers sent through the networks at a time


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images to factorise for, and how much of them to use.

    Args:
        batches: any iterable of batches that gives the same ones again (a list, a DataLoader that does not shuffle): tensors, or
            tuples of the model's inputs, what comes after them (labels) ignored. A few hundred images of the kind that the network
            will see.
        patches: of each layer's input at most so many are looked at, drawn evenly from all images.
        memory: bytes of activations to keep in memory; more are kept in temporary files.
        seed: of the draws.

    Raises:
        ValueError: patches or memory are not positive.

    Example:
        >>> Calibration([torch.rand(64, 3, 32, 32) for _ in range(4)], memory=2**30)
    """

    batches: Iterable[Any]
    patches: int = 2**17
    memory: int = 2**31
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("patches", "memory"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"calibration: {name}={getattr(self, name)!r}, expected a positive whole number.")


def input_shapes(inputs: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Of every tensor among a model's inputs."""
    return tuple(tuple(t.shape) for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor))


class Images:
    """Calibration batches as the model takes them, checked once, a few images at a time; by default the same in every pass."""

    def __init__(self, calibration: Calibration | Iterable[Any], shapes: tuple[tuple[int, ...], ...], same: bool = True) -> None:
        self.settings = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        self.shapes = shapes
        self.example = max(1, shapes[0][0] if shapes and shapes[0] else 1)  # images that a plan's sizes are for
        batches = self.settings.batches
        if isinstance(batches, Tensor):
            raise ValueError("calibration: found a tensor, expected an iterable of batches. Pass [images], or images.split(64).")
        if not isinstance(batches, Iterable):
            raise TypeError(f"calibration: expected an iterable of batches, found {type(batches).__name__}.")
        if iter(batches) is batches:
            raise ValueError(
                "calibration: found an iterator, which can be gone through only once; several passes are needed. "
                "Pass a list (list(...)), a DataLoader, or any object that can be iterated again."
            )
        self._prints: list[str] = []  # of the batches, by which later passes know them
        self._passed, self._same = False, same
        self.count = sum(inputs[0].shape[0] for inputs in self._checked())
        self._passed = True
        if not self.count:
            raise ValueError("calibration: no images. Pass at least one batch; a few hundred images are a good start.")
        _, world_size = distributed.process_and_world_size()
        if world_size > 1 and next(iter(self), None) is None:
            raise ValueError(f"calibration: every batch has fewer images than there are processes ({world_size}). Pass larger batches.")

    def __iter__(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The number of the first image, and inputs, as many at a time as fit; with several processes this one's part of each batch."""
        first, (rank, count) = 0, distributed.process_and_world_size()
        for inputs in self._checked():
            lead = inputs[0]
            size = max(1, min(128, NUMBERS_AT_ONCE // max(lead[0].numel(), 1)))
            begin, end = rank * lead.shape[0] // count, (rank + 1) * lead.shape[0] // count
            for at in range(begin, end, size):
                part = slice(at, min(at + size, end))
                yield first + at, pytree.tree_map_only(Tensor, partial(_part, part), inputs)
            first += lead.shape[0]

    def probe_batches(self) -> Iterator[tuple[Any, ...]]:
        """The first images only: few enough to run a network on them many times."""
        for first, inputs in self:
            limit = max(1, min(PROBE_IMAGES, PROBE_NUMBERS // inputs[0][0].numel())) - first
            if limit <= 0:
                return
            yield pytree.tree_map_only(Tensor, partial(_part, slice(limit)), inputs)

    def _checked(self) -> Iterator[tuple[Any, ...]]:
        number = -1
        for number, batch in enumerate(self.settings.batches):
            inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            inputs = inputs[: len(self.shapes)]
            where = f"calibration: batch {number}"
            if len(inputs) < len(self.shapes) or not all(isinstance(t, Tensor) for t in inputs):
                found = ", ".join(type(t).__name__ for t in inputs)
                raise ValueError(f"{where} holds {found or 'nothing'}, expected {len(self.shapes)} tensor(s), as the model takes them.")
            for tensor, shape in zip(inputs, self.shapes, strict=True):
                if tensor.ndim != len(shape) or (len(shape) > 1 and tensor.shape[1] != shape[1]):
                    raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected one like the example input's, {shape}.")
                if tensor.shape[:1] != inputs[0].shape[:1]:
                    raise ValueError(f"{where}: inputs of {inputs[0].shape[0]} and {tensor.shape[0]} images, expected equally many.")
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    bad = int((~torch.isfinite(tensor)).sum())
                    raise ValueError(f"{where}: {bad} of {tensor.numel()} numbers are NaN or infinite. Leave out or repair those images.")
            self._know(number, digest(*map(_few, inputs)))
            if inputs[0].shape[0]:
                yield inputs
        self._know(number + 1, "the end")

    def _know(self, number: int, print_: str) -> None:
        """Take note of a batch in the first pass; ValueError if it is another one later."""
        if not self._passed:
            self._prints.append(print_)
        elif self._same and (number >= len(self._prints) or self._prints[number] != print_):
            raise ValueError(
                f"calibration: batch {number} is not what it was in the pass before; several passes are needed over the same images in "
                "the same order. Pass a DataLoader without shuffle=True and without random transforms, or a list: list(loader)."
            )


def _few(tensor: Tensor) -> Tensor:
    """Up to eight of the numbers along every dimension but the first."""
    return tensor[(slice(None), *(slice(None, None, max(1, -(-size // 8))) for size in tensor.shape[1:]))]


def _part(part: slice, tensor: Tensor) -> Tensor:
    return tensor[part]


def held_out(first: int, count: int) -> Tensor:
    """Which of so many images, the first of this number, are held out to choose by."""
    return torch.arange(first, first + count) % HELD == HELD - 1


def check_model_runs(model: nn.Module, images: Images) -> Any:
    """What a network gives for the first few images; ValueError if it does not take them."""
    _, inputs = next(iter(images))
    try:
        with torch.no_grad():
            return run_model(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise ValueError(
            f"calibration: the model does not run on images of shape {shapes}: {type(error).__name__}: {error} "
            "Pass them as the model takes them."
        ) from error
