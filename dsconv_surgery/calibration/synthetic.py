"""Synthetic calibration images: dead leaves, fitted to a network by the running statistics of its BatchNorms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.calibration.batchnorm_moments import BatchNormMoments
from dsconv_surgery.calibration.dead_leaves import dead_leaves
from dsconv_surgery.support import distributed
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.user_warning import warn_user

BATCH = 32
PIXELS, FEWEST, MOST = 2**21, 256, 512  # images in all by default: so many pixels, within these numbers of images
POOL_PIXELS, SMALLEST_POOL, LARGEST_POOL = 2**23, 2, 4  # images drawn to choose from, in multiples of the images chosen
FIT_PIXELS, FIT_IMAGES = 2**20, (16, 128)  # images to fit the value range with
FEWEST_STEPS, MOST_STEPS, STEP_PIXELS = 3, 10, 2**25  # steps that move pixels: limits, and the pixels moved in all of them
RATE = 0.02  # of these steps, in standard deviations of the images
SWEEPS = 4  # times that every chosen image may be exchanged for another
FAR = 0.1  # nats: photographs are about 0.02 from a network for small photographs, white noise 0.5
LEAST_CORRELATION = 0.5  # of neighbouring pixels, in an example input that is an image
STEP = 1e-2  # for derivatives by finite differences: images are in float32
PULL = 0.1  # towards the same range for all channels
SMALLEST_SIDE = 8
SYNTHETIC = "calibration='synthetic'"
RESEMBLE = "synthetic images resemble those that it was trained on. Only photographs do. Measure the accuracy, or pass real images."
CALL = "Calibration.synthetic(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"


@dataclass(frozen=True)
class Synthetic:
    """The settings of `Calibration.synthetic`."""

    count: int | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and (not isinstance(self.count, int) or self.count < 1):
            raise ValueError(f"Calibration.synthetic: count={self.count!r}, expected a positive whole number.")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"Calibration.synthetic: mean={self.mean!r}, std={self.std!r}. Pass both or neither, as in {CALL}.")

    def stated_range(self, channels: int) -> tuple[Tensor, Tensor] | None:
        """The gain and the shift of the stated normalisation, (channels, 1, 1) each."""
        if self.mean is None or self.std is None:
            return None
        mean, std = (torch.as_tensor(value, dtype=torch.float32, device="cpu").flatten() for value in (self.mean, self.std))
        if not ({len(mean), len(std)} <= {1, channels} and bool((std > 0).all()) and bool(mean.isfinite().all() and std.isfinite().all())):
            problem = f"mean={self.mean!r}, std={self.std!r}, expected one number or {channels} each, and a positive std"
            raise ValueError(f"Calibration.synthetic: {problem}, as the network's input has {channels} channel(s).")
        gain = (1 / std).expand(channels)[:, None, None]
        return gain, -mean[:, None, None] * gain


class SyntheticBatches(list[Any]):
    """Batches of synthetic images, as the network takes them."""


def synthetic_batches(model: nn.Module, example: Inputs, settings: Synthetic) -> SyntheticBatches:
    """Draw images, bring them to the network's value range, and choose those that fit its BatchNorm statistics best.

    The value range is the stated normalisation of images in [0, 1]. Otherwise each channel gets the gain and the shift at which the
    inputs of the network's first BatchNorm have its running mean and variance. Without BatchNorms, it gets the mean and the standard
    deviation of the example input, if that is an image. Of a pool of images, those are chosen whose statistics, all together, are
    closest to those of all BatchNorms. A few steps then change their pixels towards the same goal (Haroush et al. 2020, "The knowledge
    within"; Yin et al. 2020, "Dreaming to distill").

    Args:
        model: the network.
        example: its inputs: one tensor of images, and perhaps values that are not tensors.
        settings: how many images, their normalisation and the seed.

    Raises:
        ValueError: the inputs are not one tensor of images with 1 or 3 channels, or the value range is unknown.
    """
    shape = channels, height, width = _image_shape(example)
    pixels, moments = height * width, BatchNormMoments(model)
    black = torch.zeros((1, *shape), dtype=example.tensors[0].dtype, device="cpu")
    trained = bool(moments.run(_as_inputs(example, black), 1))  # not if there are BatchNorms that no image reaches
    count = settings.count or min(MOST, max(FEWEST, PIXELS // pixels))
    size = min(LARGEST_POOL * count, max(SMALLEST_POOL * count, POOL_PIXELS // pixels)) if trained else count
    if channels == 1:
        warn_user(f"{SYNTHETIC}: inputs of one channel may be anything, so it is unknown whether {RESEMBLE}")
    stated = settings.stated_range(channels)
    known = stated or (None if trained else _example_range(example))  # a mistake is found before images are drawn
    pool = torch.from_numpy(dead_leaves(size, *shape, np.random.default_rng(settings.seed)))
    if stated is None:
        pool = (pool - pool.mean((0, 2, 3))[:, None, None]) / pool.std((0, 2, 3))[:, None, None]
    few = pool[: min(FIT_IMAGES[1], max(FIT_IMAGES[0], FIT_PIXELS // pixels))]
    gain, shift = known or _fitted_range(moments, few, example)
    images = (gain * pool + shift).to(example.tensors[0].dtype)
    if trained:
        images = _closest(moments, images, example, count)
        # Before the steps on pixels, which could hide that the network was trained on other images.
        _warn_if_far(moments.distance((len(batch), _as_inputs(example, batch)) for batch in images.split(BATCH)))
        images = _refined(moments, images, example, min(MOST_STEPS, max(FEWEST_STEPS, STEP_PIXELS // (count * pixels))))
    else:
        warn_user(f"{SYNTHETIC}: the network has no BatchNorm statistics, so it is unknown whether {RESEMBLE}")
    return SyntheticBatches(_as_inputs(example, batch) for batch in images.split(BATCH))


def _image_shape(example: Inputs) -> tuple[int, int, int]:
    """The channels, height and width of the only tensor in the example inputs; ValueError if it does not hold images."""
    tensors = example.tensors
    shapes = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors) or "no tensor"
    problem = ""
    if len(tensors) != 1 or tensors[0].ndim != 4 or not tensors[0].is_floating_point():
        problem = "one floating-point tensor (images, channels, height, width)"
    elif tensors[0].shape[1] not in (1, 3):
        problem = "1 or 3 channels, as grey and colour photographs have"
    elif min(tensors[0].shape[2:]) < SMALLEST_SIDE:
        problem = f"images of {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more"
    if problem:
        raise ValueError(f"{SYNTHETIC}: found {shapes} as the network's inputs, expected {problem}. Pass real inputs as calibration=.")
    _, channels, height, width = tensors[0].shape
    return channels, height, width


def _as_inputs(example: Inputs, images: Tensor) -> Inputs:
    """The example inputs with other images."""
    return pytree.tree_map_only(Tensor, lambda _: images, example)


def _example_range(example: Inputs) -> tuple[Tensor, Tensor]:
    """The standard deviation and the mean of every channel of the example input; ValueError if it does not look like an image.

    Neighbouring pixels of images are alike; those of random numbers are not, and a constant tells no range.
    """
    (x,) = example.tensors
    problem = "found no values of the example input"
    if not x.is_meta:
        x = x.detach().float().cpu()
        mean, std = x.mean((0, 2, 3))[:, None, None], x.std((0, 2, 3))[:, None, None]
        z = (x - mean) / std
        if bool((std > 0).all()) and float((z[..., 1:] * z[..., :-1]).mean()) >= LEAST_CORRELATION:
            return std, mean
        problem = "the example input does not look like an image"
    raise ValueError(
        f"{SYNTHETIC}: the value range of the inputs is unknown: the network has no BatchNorm statistics, and {problem}. Pass "
        f"an image as the example input, or the normalisation of images in [0, 1]: calibration={CALL}."
    )


def _fitted_range(moments: BatchNormMoments, pool: Tensor, example: Inputs) -> tuple[Tensor, Tensor]:
    """The gain and the shift of every channel at which the inputs of the first BatchNorm have its running mean and variance.

    Least squares over its channels, with a weak pull towards the same gain and shift for all channels of the image.
    """
    from scipy.optimize import least_squares  # here, as it takes long to import

    channels = pool.shape[1]

    def scaled(parameters: Any) -> tuple[Tensor, Tensor]:
        values = torch.tensor(parameters, dtype=torch.float32, device="cpu")[:, None, None]
        return values[:channels].exp(), values[channels:]

    def residuals(parameters: Any) -> Any:
        gain, shift = scaled(parameters)
        images = (gain * pool + shift).to(example.tensors[0].dtype)
        mean, square = next(iter(moments.run(_as_inputs(example, images), len(images), only_first=True).values()))
        mean, square = mean.double().mean(0), square.double().mean(0)
        log_std = (square - mean.square()).clamp(min=1e-6).log() / 2
        logs, shifts = parameters[:channels], parameters[channels:] / np.exp(parameters[:channels].mean())
        pull = PULL * np.concatenate([logs - logs.mean(), shifts - shifts.mean()])
        return np.concatenate([torch.cat([mean, log_std]).numpy() / len(mean) ** 0.5, pull])

    def derivatives(parameters: Any) -> Any:
        steps = STEP * np.eye(len(parameters))
        return np.stack([(residuals(parameters + step) - residuals(parameters)) / STEP for step in steps], 1)

    fit = least_squares(residuals, np.zeros(2 * channels), derivatives, ftol=1e-3, xtol=1e-3, max_nfev=20)
    return scaled([distributed.all_reduce_mean(value) for value in fit.x])


def _closest(moments: BatchNormMoments, pool: Tensor, example: Inputs, count: int) -> Tensor:
    """The images, so many of them, that are together closest to the BatchNorm statistics."""
    batches = [moments.run(_as_inputs(example, batch), len(batch)) for batch in pool.split(BATCH)]
    each = {name: tuple(torch.cat([batch[name][i] for batch in batches]) for i in (0, 1)) for name in batches[0]}
    # The squared norm of the mean row is, near zero, the distance: (s^2 - 1 - log s^2 + m^2) / 2 = ((s^2 - 1)^2 / 2 + m^2) / 2 + ...
    rows = [torch.cat([m / 2**0.5, (s - 1) / 2], 1) / m.shape[1] ** 0.5 for m, s in each.values()]
    gram = sum((row @ row.T).double() for row in rows) / len(rows)
    return pool[_smallest_sum(distributed.all_reduce_sum(gram).numpy(), count)]


def _refined(moments: BatchNormMoments, images: Tensor, example: Inputs, steps: int) -> Tensor:
    """The images, moved a little closer to the BatchNorm statistics by steps of Adam on their pixels.

    The distance is that of all images together: those of the other batches enter it with the moments that they had last. No
    pixel leaves the range that its channel had.
    """
    rate, dtype = RATE * float(images.float().std()), images.dtype
    low, high = (bound.float()[:, None, None] for bound in (images.amin((0, 2, 3)), images.amax((0, 2, 3))))
    pixels = [batch.float().clone().requires_grad_() for batch in images.split(BATCH)]
    optimizers = [torch.optim.Adam([batch], rate) for batch in pixels]
    sums: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in pixels]
    for step in range(steps + 1):  # the first round only computes the moments
        for number, batch in enumerate(pixels):
            new = moments.run(_as_inputs(example, batch.to(dtype)), len(batch), differentiable=step > 0)
            sums[number] = {name: (m.sum(0), s.sum(0)) for name, (m, s) in new.items()}
            if step == 0:
                continue
            totals = {name: torch.stack([torch.stack(part[name]) for part in sums]).sum(0) / len(images) for name in new}
            loss = moments.mean_distance({name: (m, s) for name, (m, s) in totals.items()})
            if not loss.requires_grad:  # the network lets no gradients through
                return images
            optimizers[number].zero_grad()
            loss.backward()
            optimizers[number].step()
            with torch.no_grad():
                batch.clamp_(low, high)
            sums[number] = {name: (m.detach(), s.detach()) for name, (m, s) in sums[number].items()}
    return torch.cat([batch.detach() for batch in pixels]).to(dtype)


def _warn_if_far(distance: float) -> None:
    if distance > FAR:
        warn_user(
            f"{SYNTHETIC}: the images are {distance:.2f} nats from the network's BatchNorm statistics, expected at most {FAR}; it is "
            f"doubtful whether {RESEMBLE}",
        )


def _smallest_sum(gram: Any, count: int) -> Any:
    """The numbers, in ascending order, of `count` vectors with a short sum; `gram` holds the vectors' products.

    Each vector in turn is exchanged for the one that makes the sum shortest, a few times over.
    """
    chosen = np.arange(count)
    total, free = gram[:, chosen].sum(1), np.ones(len(gram), bool)
    free[chosen] = False
    for turn in range(SWEEPS * count):
        index = turn % count
        free[chosen[index]] = True
        total -= gram[:, chosen[index]]
        chosen[index] = np.where(free, 2 * total + gram.diagonal(), np.inf).argmin()
        free[chosen[index]] = False
        total += gram[:, chosen[index]]
    return np.sort(chosen)
