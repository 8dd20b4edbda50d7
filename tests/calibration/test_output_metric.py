"""The second moment of gradients: an average over few images is shrunk towards a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconv_surgery.calibration.output_metric import _Sums


def sums_of(gradients: Tensor) -> _Sums:
    """The sums of images with a gradient (images, out) each."""
    sums = _Sums.zeros(gradients.mT)
    for gradient in gradients.double():
        sums.add(gradient.outer(gradient))
    return sums


def test_few_images_say_little_of_directions() -> None:
    """Of gradients that are equally strong in all directions, 10 images: the shrunk moment is much closer to the truth."""
    errors = torch.zeros(2)
    for seed in range(20):
        sums = sums_of(torch.randn(10, 40, generator=torch.Generator().manual_seed(seed)))
        for index, moment in enumerate((sums.products / 10, sums.shrunk())):
            errors[index] += (moment - torch.eye(40)).square().sum()
    assert errors[1] < 0.1 * errors[0]


def test_many_images_are_believed() -> None:
    """Of gradients with strong and weak directions, 2,000 images: hardly anything changes."""
    strengths = torch.logspace(0, -2, 20)
    sums = sums_of(strengths * torch.randn(2000, 20, generator=torch.Generator().manual_seed(0)))
    plain, shrunk = sums.products / 2000, sums.shrunk()
    torch.testing.assert_close(shrunk, plain, rtol=0, atol=0.01)
    assert float(shrunk[-1, -1]) < 0.01  # the weakest direction stays weak: its share of the mean is 0.08


def test_one_image_says_nothing_of_directions() -> None:
    gradient = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sums_of(gradient).shrunk(), gradient.double().square().mean() * torch.eye(5, dtype=torch.float64))
