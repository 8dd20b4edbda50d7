"""Chains that are known to be slow."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dsconv_surgery import Budget, make_plan
from dsconv_surgery.planning.slow_chains import ONE_KERNEL, SEVERAL_KERNELS, expected_time


def plan_of(width: int, scheme: str, rank: int, stride: int = 1) -> Any:
    model = nn.Sequential(nn.Conv2d(width, width, 3, stride, padding=1, bias=False)).eval()
    return make_plan(model, torch.rand(1, width, 8, 8), ranks={"0": (scheme, rank)}, rule="fixed", rank=1)


@pytest.mark.filterwarnings("ignore:the plan's chains")
def test_macs_of_depthwise_links_count_more() -> None:
    """By hand, per pixel: 32 -> 32 channels take 9,216 MACs."""
    dense = 9 * 32 * 32
    assert expected_time(plan_of(32, "cp", 10)) == pytest.approx((2 * 32 * 10 + ONE_KERNEL * 9 * 10) / dense)
    assert expected_time(plan_of(32, "depthwise", 2)) == pytest.approx((SEVERAL_KERNELS * 9 * 64 + 64 * 32) / dense)
    assert expected_time(plan_of(32, "depthwise", 1)) == pytest.approx((ONE_KERNEL * 9 * 32 + 32 * 32) / dense)
    assert expected_time(plan_of(32, "channel", 8)) == pytest.approx((9 * 32 * 8 + 8 * 32) / dense)
    strided = expected_time(plan_of(32, "cp", 10, stride=2))  # the first link has four times the pixels of the others
    assert strided == pytest.approx((4 * 32 * 10 + ONE_KERNEL * 9 * 10 + 32 * 10) / dense)


def test_a_plan_of_slow_chains_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"known to be slow on CPUs: .*so 1 of 1 layers may become slower \(depthwise\). Limit the time"):
        plan_of(32, "depthwise", 2)


@pytest.mark.parametrize(("scheme", "rank"), [("channel", 8), ("cp", 10)])
def test_other_plans_are_not(scheme: str, rank: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the network's weights look untrained")
        plan_of(32, scheme, rank)


def test_budgets_on_time_are_not_warned_of() -> None:
    """They are measured."""
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)).eval()
    settings: dict[str, Any] = {"ranks": {"1": ("depthwise", 2)}, "schemes": "channel", "exclude": ()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_plan(model, torch.rand(1, 16, 8, 8), budget=Budget(macs=1.0), **settings)
        first = [str(warning.message) for warning in caught if "known to be slow" in str(warning.message)]
    assert len(first) == 1
