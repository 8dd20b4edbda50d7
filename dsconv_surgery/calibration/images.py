"""Calibration images: checked in the first pass, given to the networks a few at a time, some of them also to probe with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.synthetic import Synthetic, SyntheticBatches, synthetic_batches
from dsconv_surgery.network.discovery import survey_model
from dsconv_surgery.network.layers import check_network
from dsconv_surgery.support import distributed
from dsconv_surgery.support.cache import digest
from dsconv_surgery.support.copies import run_model
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import Inputs, InputStructure, checked_prepare, prepared
from dsconv_surgery.support.outputs import OutputSelector

HELD_OUT_EVERY = 4  # one image of four is held out
MIN_TO_HOLD_OUT = 4 * HELD_OUT_EVERY  # no image is held out of fewer
PROBE_IMAGES, PROBE_VALUES = 128, 2**23  # limits of images and of their values for measurements that repeat
CHUNK_IMAGES, CHUNK_VALUES = 128, 2**21  # limits of images and of their values for one forward pass


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images to fit factors to, and how many patches and how much memory the fit uses.

    Args:
        batches: an iterable of batches that yields the same batches in every pass (a list, or a DataLoader that does not shuffle).
            A batch has the structure of the example inputs, and items after them, such as labels, are ignored. A few hundred images of
            the kind that the network will see are enough.
        patches: the largest number of patches of a layer's input to use; they are drawn evenly from all images.
        memory: bytes of activations to hold in memory; further activations go to temporary files.
        seed: of all random draws.

    Raises:
        ValueError: `patches` or `memory` is not positive.

    Example:
        >>> Calibration([torch.rand(64, 3, 32, 32) for _ in range(4)], memory=2**30)
    """

    batches: Iterable[Any] | Synthetic
    patches: int = 2**15
    memory: int = 2**31
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("patches", "memory"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"calibration: {name}={getattr(self, name)!r}, expected a positive whole number.")

    @classmethod
    def synthetic(
        cls,
        count: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        seed: int = 0,
        patches: int = 2**15,
        memory: int = 2**31,
    ) -> Calibration:
        """Procedural images instead of real ones, for networks that see photographs; `calibration="synthetic"` has these defaults.

        They are overlapping shapes of many sizes ("dead leaves", Lee, Mumford & Huang 2001; Baradad et al. 2021), of the size of the
        example input. The value range is the one at which the inputs of the network's first BatchNorm have its running mean and
        variance. Of many images, those are used that are together closest to the statistics of all BatchNorms, and a few steps on
        their pixels bring them closer. A warning says if they are far. A network without BatchNorm needs `mean` and `std`, or an image
        as the example input.

        Args:
            count: the number of images; by default 512, and fewer, at least 256, above 64 x 64 pixels.
            mean, std: the normalisation of images with values in [0, 1], one number or one for each channel.
            seed, patches, memory: as for `Calibration`.

        Raises:
            ValueError: a number is out of range, or only one of `mean` and `std` is given.

        Example:
            >>> Calibration.synthetic(256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        """
        return cls(Synthetic(count, mean, std, seed), patches, memory, seed)


class Images:
    """Calibration batches as the model takes them, checked in the first pass; iteration yields a few images at a time.

    With `same`, a later pass that yields other images is a ValueError.

    Args:
        calibration: the batches, with their settings.
        example: the plan's example inputs; those of a batch may differ in the number and the size of images only.
        prepare: makes the inputs, perhaps with labels after them, of a batch.
        output: selects the tensors of the network's output to compare.
        same: whether later passes must yield the same images.
        argument: the public argument that holds the batches, for messages.
    """

    def __init__(
        self,
        calibration: Calibration | Iterable[Any],
        example: Inputs,
        prepare: Callable[[Any], Any] | None = None,
        output: Callable[[Any], Any] | None = None,
        same: bool = True,
        argument: str = "calibration",
    ) -> None:
        self.settings = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        self.structure, self.select_outputs = InputStructure(example), OutputSelector(output, argument)
        self._prepare, self._same, self.argument = checked_prepare(prepare), same, argument
        self.example = self.structure.images  # images in the plan's example input
        batches: Any = self.settings.batches
        if isinstance(batches, SyntheticBatches):
            self._prepare = None  # they are inputs already
        if isinstance(batches, Tensor):
            raise ValueError(f"{argument}: found a tensor, expected an iterable of batches. Pass [images], or images.split(64).")
        if not isinstance(batches, Iterable):
            raise TypeError(f"{argument}: found {type(batches).__name__}, expected an iterable of batches.")
        if iter(batches) is batches:
            raise ValueError(f"{argument}: found an iterator, which yields its batches only once. Pass a list, list(...), or a DataLoader.")
        self.synthetic = isinstance(batches, SyntheticBatches)
        self._fingerprints: list[str] = []  # of the first pass
        self._probes: list[tuple[int, int, Inputs]] | None = None  # at most PROBE_VALUES values
        self.count = 0  # until the first pass ends
        self.count = sum(count for count, _ in self._checked_batches())
        if not self.count:
            raise ValueError(f"{argument}: no images. Pass at least one batch; a few hundred images are a good start.")
        _, world_size = distributed.process_and_world_size()
        if world_size > 1 and next(iter(self), None) is None:
            raise ValueError(f"{argument}: every batch has fewer images than there are processes ({world_size}). Pass larger batches.")

    def __iter__(self) -> Iterator[tuple[int, int, Inputs]]:
        """The number of the first image, the number of images, and the inputs; of this process's part of each batch."""
        process, world_size = distributed.process_and_world_size()
        first_of_batch = 0
        for count, inputs in self._checked_batches():
            size = max(1, min(CHUNK_IMAGES, CHUNK_VALUES // self.structure.values_per_image(inputs)))
            begin, end = process * count // world_size, (process + 1) * count // world_size
            for start in range(begin, end, size):
                stop = min(start + size, end)
                yield first_of_batch + start, stop - start, self.structure.select(inputs, slice(start, stop))
            first_of_batch += count

    def probe_batches(self) -> Iterator[tuple[int, int, Inputs]]:
        """Few images, to run a network on them many times: the first held-out ones, or just the first if none are held out."""
        if self._probes is None:
            self._probes = list(self._selected_probes())
        return iter(self._probes)

    def _selected_probes(self) -> Iterator[tuple[int, int, Inputs]]:
        spacing = HELD_OUT_EVERY if self.count >= MIN_TO_HOLD_OUT else 1
        for first_image, count, inputs in self:
            limit = spacing * max(1, min(PROBE_IMAGES, PROBE_VALUES // self.structure.values_per_image(inputs)))
            if first_image >= limit:
                return
            mask = held_out(first_image, count) if spacing > 1 else torch.ones(count, dtype=torch.bool, device="cpu")
            mask[max(limit - first_image, 0) :] = False
            if bool(mask.any()):
                yield first_image, int(mask.sum()), self.structure.select(inputs, mask)

    def _checked_batches(self) -> Iterator[tuple[int, Inputs]]:
        number = -1
        batches: Any = self.settings.batches
        for number, batch in enumerate(batches):
            where = f"{self.argument}: batch {number}"
            inputs = self.structure.match(prepared(self._prepare, batch, where), where)
            self._check_same(number, digest(*(_sample(t) if t.ndim else t for t in inputs.tensors)))
            if count := self.structure.count(inputs):
                yield count, inputs
        self._check_same(number + 1, "no more batches")

    def _check_same(self, number: int, fingerprint: str) -> None:
        """Record a batch of the first pass; raise ValueError if a batch of a later pass differs."""
        if not self.count:
            self._fingerprints.append(fingerprint)
        elif self._same and self._fingerprints[number] != fingerprint:
            raise ValueError(
                f"{self.argument}: batch {number} differs from batch {number} of the first pass; several passes need the same images in "
                "the same order. Pass a DataLoader without shuffle=True and without random transforms, or a list: list(loader)."
            )


def images_for(model: nn.Module, data: Calibration | Iterable[Any] | str, example: Inputs, *settings: Any, **more: Any) -> Images:
    """`Images(data, example, ...)`; where they do not fit, and the network does not run on the example inputs, an error about these."""
    check_network(model)
    try:
        return Images(drawn(model, data, example), example, *settings, **more)
    except (ValueError, TypeError):
        survey_model(model, example, replaceable=False)
        raise


def named_calibration(data: Calibration | Iterable[Any] | str) -> Calibration | Iterable[Any]:
    """`Calibration.synthetic()` for "synthetic", other data as they are; ValueError for other texts."""
    if isinstance(data, str):
        if data != "synthetic":
            raise ValueError(f"calibration={data!r}: expected an iterable of batches of images, or 'synthetic'.")
        return Calibration.synthetic()
    return data


def drawn(model: nn.Module, data: Calibration | Iterable[Any] | str, example: Inputs) -> Calibration | Iterable[Any]:
    """Calibration data with synthetic images drawn, if it asks for them; other data as they are."""
    data = named_calibration(data)
    if not isinstance(data, Calibration) or not isinstance(data.batches, Synthetic):
        return data
    check_network(model)
    return replace(data, batches=synthetic_batches(model, example, data.batches))


def _sample(tensor: Tensor) -> Tensor:
    """Of every image, up to eight values along each dimension."""
    return tensor[(slice(None), *(slice(None, None, max(1, -(-size // 8))) for size in tensor.shape[1:]))]


def held_out(first_image: int, count: int) -> Tensor:
    """For `count` images from number `first_image` on, whether each is held out: (count,)."""
    return torch.arange(first_image, first_image + count, device="cpu") % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def check_model_runs(model: nn.Module, images: Images) -> Any:
    """The model's output for the first few images; ValueError if the model does not run on them, or the output cannot be compared."""
    first_image, _, inputs = next(iter(images))
    try:
        with torch.no_grad():
            output = run_model(model, inputs, first_image)
    except Exception as error:
        problem = f"the model does not run on {inputs}"
        raise ValueError(f"{images.argument}: {problem}: {as_sentence(error)} Pass them as the model takes them.") from error
    images.select_outputs(output)
    return output
