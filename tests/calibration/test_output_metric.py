"""The second moment of gradients: an average over few images is shrunk towards a multiple of the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.output_metric import _Sums, output_metrics
from dsconv_surgery.support.inputs import Inputs


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


def test_many_images_are_hardly_shrunk() -> None:
    """Of gradients with strong and weak directions, 2,000 images: less than a hundredth of the shrinkage that is possible."""
    strengths = torch.logspace(0, -2, 20)
    sums = sums_of(strengths * torch.randn(2000, 20, generator=torch.Generator().manual_seed(0)))
    plain, shrunk = sums.products / 2000, sums.shrunk()
    mean = plain.diagonal().mean() * torch.eye(20)
    assert float(torch.linalg.norm(shrunk - plain)) < 0.01 * float(torch.linalg.norm(mean - plain))


def test_one_image_says_nothing_of_directions() -> None:
    gradient = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sums_of(gradient).shrunk(), gradient.double().square().mean() * torch.eye(5, dtype=torch.float64))


def test_the_images_of_a_batch_count_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that counted as one image would be shrunk far too much, or not at all. Every fourth image is held out, and used here."""
    shapes = []
    monkeypatch.setattr(_Sums, "add", lambda _sums, product: shapes.append(tuple(product.shape)))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()
    x = torch.randn(64, 3, 8, 8)
    output_metrics(model, Images(x.split(32), Inputs(x[:1])), ["0", "3"])
    assert sorted(shapes) == [(5, 5)] * 16 + [(6, 6)] * 16
