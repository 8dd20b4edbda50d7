"""Networks whose weights look untrained."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dsconv_surgery import Budget, make_plan
from dsconv_surgery.network.untrained import untrained_reason


def with_batchnorm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))


def without_batchnorm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize(("make", "reason"), [(with_batchnorm, "2 BatchNorms"), (without_batchnorm, "as torch draws them")])
def test_new_networks(make: Callable[[], nn.Module], reason: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        assert reason in (untrained_reason(make()) or "")


def test_trained_networks() -> None:
    """One forward pass moves BatchNorm statistics; a few steps of training spread the weights otherwise, and so do other draws."""
    model = with_batchnorm()
    model(torch.rand(2, 3, 8, 8))
    assert untrained_reason(model) is None
    model = without_batchnorm()
    with torch.no_grad():
        model[2].weight += 0.05 * torch.randn_like(model[2].weight)
    assert untrained_reason(model) is None
    assert untrained_reason(nn.Conv2d(3, 4, 3)) is None  # too few weights to tell
    assert untrained_reason(with_batchnorm().to("meta")) is None


def test_the_embedded_network_is_trained() -> None:
    from cifar import demo_resnet20

    assert untrained_reason(demo_resnet20()) is None


def test_planning_warns() -> None:
    model, x = without_batchnorm(), torch.rand(1, 3, 6, 6)
    with pytest.warns(UserWarning, match=r"weights look untrained: its weights are spread as torch draws them.*Load the trained weights"):
        make_plan(model, x, budget=Budget(macs=0.8), schemes="channel")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_plan(model, x, budget=Budget(macs=0.8), schemes="channel")
    assert not any("untrained" in str(warning.message) for warning in caught)
