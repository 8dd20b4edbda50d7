"""BatchNorm statistics: how far images are from them, and their re-estimation for a cut network from calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from dsconv_surgery.calibration.batchnorm_moments import BatchNormMoments
from dsconv_surgery.calibration.images import Calibration, check_model_runs, images_for
from dsconv_surgery.support.copies import evaluation_copy
from dsconv_surgery.support.inputs import as_inputs
from dsconv_surgery.support.modes import standard_modes


@standard_modes()
def batchnorm_distance(
    model: nn.Module,
    *example_inputs: Any,
    data: Calibration | Iterable[Any] | str,
    example_kwargs: Mapping[str, Any] | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> float | None:
    """How far images are from those that a network was trained on, by the running statistics of its BatchNorms, in nats.

    With the mean m and the variance s^2 that a channel has on the images, in units of its running mean and variance: the mean over
    BatchNorms and channels of `KL(N(m, s^2) | N(0, 1)) = (s^2 - 1 - log s^2 + m^2) / 2`. On CIFAR-10, a ResNet-20 has about 0.02 on
    training images and on other photographs, and 0.5 on white noise.

    Args:
        model: the network; it does not change.
        example_inputs, example_kwargs, prepare: as for `make_plan`.
        data: batches of images, a `Calibration`, or "synthetic".

    Returns:
        The distance, or None if the network has no BatchNorm statistics.

    Raises:
        ValueError: the images do not fit the model.

    Example:
        >>> print(batchnorm_distance(model, torch.rand(1, 3, 32, 32), data=batches))
    """
    images = images_for(model, data, as_inputs(example_inputs, example_kwargs), prepare, argument="data")
    check_model_runs(evaluation_copy(model), images)
    moments = BatchNormMoments(model)
    return moments.distance((count, inputs) for _, count, inputs in images) if moments else None
