"""BatchNorm statistics: how far images are from them, and their re-estimation for a cut network from calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv_surgery.calibration.batchnorm_moments import BatchNormMoments
from dsconv_surgery.calibration.images import MIN_TO_HOLD_OUT, Calibration, Images, check_model_runs, held_out, images_for
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import evaluation_copy, run_model
from dsconv_surgery.support.fidelity import OutputComparison
from dsconv_surgery.support.inputs import Inputs, as_inputs
from dsconv_surgery.support.modes import standard_modes


def reestimate_batchnorm(dense: nn.Module, cut: nn.Module, images: Images, progress: Callable[[int], object] = lambda _: None) -> bool:
    """Replace the running statistics of a cut network's BatchNorms by those of calibration images, if that lowers its output error.

    Three of four images give the statistics; every fourth image is held out to compare the squared errors. Returns whether the
    statistics were replaced. Factors that were fitted to data seldom need this. `progress` is called with the number of images after
    each batch.
    """
    trial = evaluation_copy(cut)
    norms = {name: norm for name, norm in trial.named_modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None}
    if not norms or images.count < MIN_TO_HOLD_OUT:
        return False
    _estimate_statistics(trial, norms.values(), images, progress)
    if not _lowers_error(dense, evaluation_copy(cut), trial, images, progress):
        return False
    for name, norm in norms.items():
        target: Any = cut.get_submodule(name)
        target.running_mean.copy_(norm.running_mean)
        target.running_var.copy_(norm.running_var)
    return True


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


def _estimate_statistics(model: nn.Module, norms: Iterable[Any], images: Images, progress: Callable[[int], object]) -> None:
    """Set the statistics to their mean over batches, and over processes weighted by the number of batches."""
    for norm in norms:
        norm.reset_running_stats()
        norm.register_forward_pre_hook(_Averaging())
        norm.train()
    with torch.no_grad():
        for first_image, count, inputs in _select(images, held=False):
            if count > 1:
                run_model(model, inputs, first_image)
            progress(count)
    for norm in norms:
        norm.eval()
        batches = distributed.all_reduce_sum(norm.num_batches_tracked.double())
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(distributed.all_reduce_sum(statistic * norm.num_batches_tracked) / batches)


class _Averaging:
    """A hook before each call of a BatchNorm in training mode: its statistics become means over calls.

    `momentum=None` does the same, but reads the number of calls from the device each time.
    """

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, norm: nn.Module, _inputs: Any) -> None:
        self._calls += 1
        norm.momentum = 1 / self._calls  # type: ignore[assignment]


def _lowers_error(dense: nn.Module, before: nn.Module, after: nn.Module, images: Images, progress: Callable[[int], object]) -> bool:
    """Whether the squared error of the outputs on held-out images is lower after than before."""
    comparisons = {before: OutputComparison(images.select_outputs), after: OutputComparison(images.select_outputs)}
    with torch.no_grad():
        for first_image, count, inputs in _select(images, held=True):
            target = run_model(dense, inputs, first_image)
            for cut, comparison in comparisons.items():
                comparison.add(target, run_model(cut, inputs, first_image), count)
            progress(count)
    for comparison in comparisons.values():
        comparison.all_reduce()
    return comparisons[after].squared_error < comparisons[before].squared_error


def _select(images: Images, held: bool) -> Iterator[tuple[int, int, Inputs]]:
    """The held-out images of every batch, or the others."""
    for first_image, count, inputs in images:
        mask = held_out(first_image, count) == held
        if bool(mask.any()):
            yield first_image, int(mask.sum()), images.structure.select(inputs, mask)
